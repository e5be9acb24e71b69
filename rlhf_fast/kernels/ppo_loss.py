"""ppo_loss in Triton: a program a range of 1,024 tokens, one sweep that reads each input once and writes the gradients.

Where the denominator is the number of tokens that count, a first kernel counts them; a last one adds the sums of the
ranges up in their order. csrc/common/ppo_loss.h says what the sums and the statistics are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _sampled_kl
from rlhf_fast.kernels._sampled_kl import expm1_minus
from rlhf_fast.ops._rows import Denominator, PPOInputs, PPOOptions

range_size = 1024  # tokens
FINISH = 128  # ranges that the last kernel adds up at a time
WARPS = 4
SUMS = 15  # as csrc/common/ppo_loss.h counts them


@triton.jit
def _count(mask, count, counts, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    flags = tl.load(mask + i, mask=i < count, other=0) != 0
    tl.store(counts + tl.program_id(0), tl.sum(flags.to(tl.int64)))


@triton.jit
def _denominator(there, number, counted, KIND: tl.constexpr):
    """A number on the device, where 0 means 1; a number; or the tokens that count."""
    value = counted
    if KIND == 1:
        value = tl.load(there).to(tl.float64)
    if KIND == 2:
        value = counted * 0.0 + number
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def _read(data, i, inside, counts):
    """An input as float32; where a token does not count it is 0 and may have been anything."""
    return tl.where(counts, tl.load(data + i, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _forward(
    logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs, mask, weights, count,
    counts, ranges, there, number, clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef,
    partials, grad_logprobs, grad_values, grad_entropy,
    DENOMINATOR: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_VALUES: tl.constexpr,
    CLIPS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL: tl.constexpr, KL: tl.constexpr,
    KL_SLOPE: tl.constexpr, KL_COUNTS: tl.constexpr, DUAL: tl.constexpr, NEED: tl.constexpr,
    NEED_VALUES: tl.constexpr, NEED_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    here = inside
    counted = tl.sum(tl.zeros((BLOCK,), tl.float64))
    if HAS_MASK:
        here = here & (tl.load(mask + i, mask=inside, other=0) != 0)
        if DENOMINATOR == 0:
            for first in range(0, ranges, BLOCK):
                r = first + tl.arange(0, BLOCK)
                counted += tl.sum(tl.load(counts + r, mask=r < ranges, other=0)).to(tl.float64)
    else:
        counted += count
    scale = (1.0 / _denominator(there, number, counted, DENOMINATOR)).to(tl.float32)
    ones = tl.where(here, 1.0, 0.0)
    weight = ones
    if HAS_WEIGHTS:
        weight = tl.where(here, tl.load(weights + i, mask=inside, other=0.0), 0.0)

    logp = _read(logprobs, i, inside, here)
    advantage = _read(advantages, i, inside, here)
    log_ratio = logp - _read(old_logprobs, i, inside, here)
    bounded = tl.where(log_ratio < -20.0, -20.0, tl.where(log_ratio > 20.0, 20.0, log_ratio))
    ratio = tl.exp(bounded)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    near = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain, clipped = -advantage * ratio, -advantage * near
    pulled = clipped > plain
    policy = tl.where(pulled, clipped, plain)
    slope = tl.where(pulled | (log_ratio < -20.0) | (log_ratio > 20.0), 0.0, plain)
    if DUAL:
        bound = (advantage < 0.0) & (policy > -advantage * dual_clip)
        policy = tl.where(bound, -advantage * dual_clip, policy)
        slope = tl.where(bound, 0.0, slope)
    to = partials + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(to, tl.sum(ones).to(tl.float64))
    tl.store(to + 1, tl.sum(policy * weight).to(tl.float64))
    tl.store(to + 5, tl.sum(ratio * ones).to(tl.float64))
    tl.store(to + 6, tl.sum(tl.where(pulled, ones, 0.0)).to(tl.float64))
    tl.store(to + 8, -tl.sum(log_ratio * ones).to(tl.float64))
    tl.store(to + 9, tl.sum(expm1_minus(bounded) * ones).to(tl.float64))
    tl.store(to + 14, tl.max(ratio * ones).to(tl.float64))

    if HAS_KL:
        d = logp - _read(ref_logprobs, i, inside, here)
        tl.store(to + 4, tl.sum(_sampled_kl.estimate(d, KL) * weight).to(tl.float64))
        if KL_COUNTS:
            slope += kl_coef * _sampled_kl.slope(d, KL_SLOPE)
    if NEED:
        tl.store(grad_logprobs + i, tl.where(here, slope * (weight * scale), 0.0), mask=inside)

    if HAS_VALUES:
        value = _read(values, i, inside, here)
        target = _read(returns, i, inside, here)
        error = value - target
        squared, gradient = error * error, error
        if CLIPS_VALUES:
            old = _read(old_values, i, inside, here)
            moved = value - old
            held = tl.where(moved < -value_clip, -value_clip, tl.where(moved > value_clip, value_clip, moved))
            near_error = old + held - target
            worse = near_error * near_error > squared
            gradient = tl.where(worse, tl.where(held == moved, near_error, 0.0), error)
            squared = tl.where(worse, near_error * near_error, squared)
            tl.store(to + 7, tl.sum(tl.where(worse, ones, 0.0)).to(tl.float64))
        tl.store(to + 2, tl.sum(0.5 * squared * weight).to(tl.float64))
        exact, rest = target.to(tl.float64), error.to(tl.float64)
        tl.store(to + 10, tl.sum(exact))
        tl.store(to + 11, tl.sum(exact * exact))
        tl.store(to + 12, tl.sum(rest))
        tl.store(to + 13, tl.sum(rest * rest))
        if NEED_VALUES:
            in_values = value_coef * gradient * (weight * scale)
            tl.store(grad_values + i, tl.where(here, in_values, 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(to + 3, tl.sum(_read(entropy, i, inside, here) * weight).to(tl.float64))
        if NEED_ENTROPY:
            tl.store(grad_entropy + i, -entropy_coef * (weight * scale), mask=inside)


@triton.jit
def _finish(
    partials, ranges, there, number, tokens_there, tokens_number, value_coef, entropy_coef, kl_coef, stats,
    DENOMINATOR: tl.constexpr, TOKENS: tl.constexpr, VALUES_COUNT: tl.constexpr, ENTROPY_COUNTS: tl.constexpr,
    KL_COUNTS: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    which = tl.arange(0, 16)
    sums = tl.zeros((16,), tl.float64)
    for first in range(0, ranges, FINISH):
        r = first + tl.arange(0, FINISH)
        at = r[:, None].to(tl.int64) * SUMS + which[None, :]
        part = tl.load(partials + at, mask=(r < ranges)[:, None] & (which < SUMS)[None, :], other=0.0)
        sums = tl.where(which == 14, tl.maximum(sums, tl.max(part, axis=0)), sums + tl.sum(part, axis=0))
    counted = tl.sum(tl.where(which == 0, sums, 0.0))
    terms = _denominator(there, number, counted, DENOMINATOR)
    tokens = _denominator(tokens_there, tokens_number, counted, TOKENS)
    n = tl.where(counted == 0.0, 1.0, counted)
    loss = tl.sum(tl.where(which == 1, sums, 0.0)) / terms
    if VALUES_COUNT:
        loss += value_coef * tl.sum(tl.where(which == 2, sums, 0.0)) / terms
    if ENTROPY_COUNTS:
        loss -= entropy_coef * tl.sum(tl.where(which == 3, sums, 0.0)) / terms
    if KL_COUNTS:
        loss += kl_coef * tl.sum(tl.where(which == 4, sums, 0.0)) / terms
    mean = tl.sum(tl.where(which == 10, sums, 0.0)) / n
    second_moment = tl.sum(tl.where(which == 11, sums, 0.0)) / n
    rest = tl.sum(tl.where(which == 12, sums, 0.0)) / n
    left = tl.sum(tl.where(which == 13, sums, 0.0)) / n - rest * rest
    variance = second_moment - mean * mean
    flat = variance <= 1e-12 * second_moment  # no more than rounding leaves of equal returns
    explained = tl.where(flat, 0.0, 1.0 - left / tl.where(flat, 1.0, variance))

    tl.store(stats, loss.to(tl.float32))
    tl.store(stats + which, (sums / terms).to(tl.float32), mask=(which >= 1) & (which <= 4))
    tl.store(stats + which, (sums / tokens).to(tl.float32), mask=which == 5)
    tl.store(stats + which - 8, sums.to(tl.float32), mask=which == 14)
    tl.store(stats + which + 1, (sums / tokens).to(tl.float32), mask=(which >= 6) & (which <= 9))
    tl.store(stats + 11, explained.to(tl.float32))


def forward(
    x: PPOInputs,
    options: PPOOptions,
    of_terms: Denominator,
    of_tokens: Denominator,
    stats: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    partials: Tensor,
    counts: Tensor,
) -> None:
    o, (ranges, count) = options, (partials.shape[0], x.logprobs.numel())
    if ranges and x.mask is not None and of_terms.kind == 0:
        _count[(ranges,)](x.mask, count, counts, BLOCK=range_size)
    if ranges:
        _forward[(ranges,)](
            *x, count, counts, ranges, of_terms.there, of_terms.number, *o[:7], partials, *gradients,
            DENOMINATOR=of_terms.kind, HAS_MASK=x.mask is not None, HAS_WEIGHTS=x.weights is not None,
            HAS_VALUES=x.values is not None, CLIPS_VALUES=o.value_clip >= 0 and x.old_values is not None,
            HAS_ENTROPY=x.entropy is not None, HAS_KL=x.ref_logprobs is not None, KL=o.kl, KL_SLOPE=o.kl_slope,
            KL_COUNTS=o.kl_coef != 0, DUAL=o.dual_clip != 0, NEED=gradients[0] is not None,
            NEED_VALUES=gradients[1] is not None, NEED_ENTROPY=gradients[2] is not None, BLOCK=range_size, SUMS=SUMS,
            num_warps=WARPS,
        )  # fmt: skip
    _finish[(1,)](
        partials, ranges, of_terms.there, of_terms.number, of_tokens.there, of_tokens.number,
        o.value_coef, o.entropy_coef, o.kl_coef, stats,
        DENOMINATOR=of_terms.kind, TOKENS=of_tokens.kind, VALUES_COUNT=o.value_coef != 0,
        ENTROPY_COUNTS=o.entropy_coef != 0, KL_COUNTS=o.kl_coef != 0, FINISH=FINISH, SUMS=SUMS, num_warps=WARPS,
    )  # fmt: skip
