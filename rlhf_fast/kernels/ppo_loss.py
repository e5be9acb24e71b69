"""ppo_loss in Triton: a program a range of tokens, one sweep that reads each input once and writes the gradients.

A last kernel adds the sums of the ranges up in their order. csrc/common/ppo_loss.h says what the sums and the
statistics are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _sampled_kl
from rlhf_fast.kernels._sampled_kl import expm1_minus
from rlhf_fast.kernels._sizes import sizes
from rlhf_fast.ops._rows import Denominator, PPOInputs, PPOOptions

FINISH = 32  # ranges that the last kernel adds up at a time
SUMS = 34  # as csrc/common/ppo_loss.h counts them
EDGES = (*(-(2.0**-i) for i in range(1, 8)), 0.0, *(2.0**-i for i in range(7, 0, -1)))  # between log-ratios


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
def _bound(x):
    return tl.where(x < -20.0, -20.0, tl.where(x > 20.0, 20.0, x))


@triton.jit
def _forward(
    logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs, rollout_logprobs, mask,
    weights, log_ratios, advantage_sums, count, clip_low, clip_high, dual_clip,
    value_clip, value_coef, entropy_coef, kl_coef, rollout_cap, partials, grad_logprobs, grad_values, grad_entropy,
    HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_VALUES: tl.constexpr,
    CLIPS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL: tl.constexpr, KL: tl.constexpr,
    KL_SLOPE: tl.constexpr, KL_COUNTS: tl.constexpr, DUAL: tl.constexpr, CISPO: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, HAS_LOG_RATIOS: tl.constexpr, WHITENS: tl.constexpr, NEED: tl.constexpr,
    NEED_VALUES: tl.constexpr, NEED_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    here = inside
    if HAS_MASK:
        here = here & (tl.load(mask + i, mask=inside, other=0) != 0)
    ones = tl.where(here, 1.0, 0.0)
    weight = ones
    if HAS_WEIGHTS:
        weight = tl.where(here, tl.load(weights + i, mask=inside, other=0.0), 0.0)

    logp = _read(logprobs, i, inside, here)
    old_logp = _read(old_logprobs, i, inside, here)
    advantage = _read(advantages, i, inside, here)
    if WHITENS:
        n, total = tl.load(advantage_sums), tl.load(advantage_sums + 1)
        mean = total / tl.where(n < 1.0, 1.0, n)
        variance = (tl.load(advantage_sums + 2) - total * mean) / tl.where(n < 2.0, 1.0, n - 1.0)
        variance = tl.where(variance < 0.0, 0.0, variance) + 1e-8
        advantage = (advantage - mean.to(tl.float32)) * (1.0 / tl.sqrt(variance.to(tl.float32)))
    own = logp - old_logp
    log_ratio = own
    if HAS_LOG_RATIOS:
        log_ratio = _read(log_ratios, i, inside, here)
    bounded = _bound(log_ratio)
    ratio = tl.exp(bounded)
    low, high = 1.0 - clip_low, 1.0 + clip_high
    near = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    plain, clipped = -advantage * ratio, -advantage * near
    to = partials + tl.program_id(0).to(tl.int64) * SUMS
    if CISPO:
        pulled = ratio != near
        policy, slope = clipped * logp, clipped
    else:
        pulled = clipped > plain
        policy = tl.where(pulled, clipped, plain)
        slope = tl.where(pulled | (log_ratio < -20.0) | (log_ratio > 20.0), 0.0, plain)
    if DUAL:
        bound = (advantage < 0.0) & (policy > -advantage * dual_clip)
        policy = tl.where(bound, -advantage * dual_clip, policy)
        slope = tl.where(bound, 0.0, slope)
        tl.store(to + 7, tl.sum(tl.where(bound, ones, 0.0)).to(tl.float64))
    if HAS_ROLLOUT:
        apart = tl.exp(_bound(old_logp - _read(rollout_logprobs, i, inside, here)))
        capped = apart > rollout_cap
        held = tl.where(capped, rollout_cap, apart)
        policy *= held
        slope *= held
        tl.store(to + 11, tl.sum(held * ones).to(tl.float64))
        tl.store(to + 12, tl.sum(tl.where(capped, ones, 0.0)).to(tl.float64))
    tl.store(to, tl.sum(ones).to(tl.float64))
    tl.store(to + 1, tl.sum(policy * weight).to(tl.float64))
    tl.store(to + 5, tl.sum((ratio - 1.0) * ones).to(tl.float64))
    tl.store(to + 6, tl.sum(tl.where(pulled, ones, 0.0)).to(tl.float64))
    tl.store(to + 9, -tl.sum(own * ones).to(tl.float64))
    tl.store(to + 10, tl.sum(expm1_minus(_bound(own)) * ones).to(tl.float64))
    for e in tl.static_range(len(EDGES)):
        tl.store(to + 13 + e, tl.sum(tl.where(bounded > EDGES[e], 0.0, ones)).to(tl.float64))
    tl.store(to + 32, tl.max(tl.where(here, bounded, -20.0)).to(tl.float64))
    tl.store(to + 33, tl.max(tl.where(here, -bounded, -20.0)).to(tl.float64))

    if HAS_KL:
        d = logp - _read(ref_logprobs, i, inside, here)
        tl.store(to + 4, tl.sum(_sampled_kl.estimate(d, KL) * weight).to(tl.float64))
        if KL_COUNTS:
            slope += kl_coef * _sampled_kl.slope(d, KL_SLOPE)
    if NEED:
        tl.store(grad_logprobs + i, tl.where(here, slope * weight, 0.0), mask=inside)

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
            tl.store(to + 8, tl.sum(tl.where(worse, ones, 0.0)).to(tl.float64))
        tl.store(to + 2, tl.sum(0.5 * squared * weight).to(tl.float64))
        exact, rest = target.to(tl.float64), error.to(tl.float64)
        tl.store(to + 28, tl.sum(exact))
        tl.store(to + 29, tl.sum(exact * exact))
        tl.store(to + 30, tl.sum(rest))
        tl.store(to + 31, tl.sum(rest * rest))
        if NEED_VALUES:
            in_values = value_coef * gradient * weight
            tl.store(grad_values + i, tl.where(here, in_values, 0.0), mask=inside)
    if HAS_ENTROPY:
        tl.store(to + 3, tl.sum(_read(entropy, i, inside, here) * weight).to(tl.float64))
        if NEED_ENTROPY:
            tl.store(grad_entropy + i, -entropy_coef * weight, mask=inside)


@triton.jit
def _pick(sums, which, k):
    return tl.sum(tl.where(which == k, sums, 0.0))


@triton.jit
def _ratio_quantile(sums, which, share, EDGES: tl.constexpr):
    """exp of the log-ratio below which a share of the tokens lies; 0 without one."""
    count, most, least = _pick(sums, which, 0), _pick(sums, which, 32), -_pick(sums, which, 33)
    wanted = share * count
    lower, before, found = least, count * 0.0, most
    for e in tl.static_range(len(EDGES) + 1):
        upper, at_most = most, count
        if e < len(EDGES):
            edge = least * 0.0 + EDGES[e]
            upper = tl.where(edge < least, least, tl.where(edge > most, most, edge))
            at_most = _pick(sums, which, 13 + e)
        part = (wanted - before) / tl.where(at_most > before, at_most - before, 1.0)
        found = tl.where((at_most >= wanted) & (wanted > before), lower + (upper - lower) * part, found)
        lower, before = upper, at_most
    return tl.where(count == 0.0, 0.0, tl.exp(found))


@triton.jit
def _finish(
    partials, ranges, there, number, tokens_there, tokens_number, value_coef, entropy_coef, kl_coef, stats,
    DENOMINATOR: tl.constexpr, TOKENS: tl.constexpr, VALUES_COUNT: tl.constexpr, ENTROPY_COUNTS: tl.constexpr,
    KL_COUNTS: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    which = tl.arange(0, 64)
    largest = which >= 32  # the last two are maxima
    sums = tl.where(largest, -20.0, tl.zeros((64,), tl.float64))
    for first in range(0, ranges, FINISH):
        r = first + tl.arange(0, FINISH)
        at = r[:, None].to(tl.int64) * SUMS + which[None, :]
        none = tl.where(largest, -20.0, 0.0)[None, :]
        part = tl.load(partials + at, mask=(r < ranges)[:, None] & (which < SUMS)[None, :], other=none)
        sums = tl.where(largest, tl.maximum(sums, tl.max(part, axis=0)), sums + tl.sum(part, axis=0))
    counted = _pick(sums, which, 0)
    terms = _denominator(there, number, counted, DENOMINATOR)
    tokens = _denominator(tokens_there, tokens_number, counted, TOKENS)
    n = tl.where(counted == 0.0, 1.0, counted)
    loss = _pick(sums, which, 1) / terms
    if VALUES_COUNT:
        loss += value_coef * _pick(sums, which, 2) / terms
    if ENTROPY_COUNTS:
        loss -= entropy_coef * _pick(sums, which, 3) / terms
    if KL_COUNTS:
        loss += kl_coef * _pick(sums, which, 4) / terms
    mean, second_moment = _pick(sums, which, 28) / n, _pick(sums, which, 29) / n
    rest = _pick(sums, which, 30) / n
    left = _pick(sums, which, 31) / n - rest * rest
    variance = second_moment - mean * mean
    flat = variance <= 1e-12 * second_moment  # no more than rounding leaves of equal returns
    explained = tl.where(flat, 0.0, 1.0 - left / tl.where(flat, 1.0, variance))
    nothing = counted == 0.0

    tl.store(stats, loss.to(tl.float32))
    tl.store(stats + which, (sums / terms).to(tl.float32), mask=(which >= 1) & (which <= 4))
    tl.store(stats + 5, ((counted + _pick(sums, which, 5)) / tokens).to(tl.float32))
    tl.store(stats + 6, tl.where(nothing, 0.0, tl.exp(_pick(sums, which, 32))).to(tl.float32))
    tl.store(stats + 7, tl.where(nothing, 0.0, tl.exp(-_pick(sums, which, 33))).to(tl.float32))
    tl.store(stats + 8, _ratio_quantile(sums, which, 0.05, EDGES).to(tl.float32))
    tl.store(stats + 9, _ratio_quantile(sums, which, 0.95, EDGES).to(tl.float32))
    tl.store(stats + which + 4, (sums / tokens).to(tl.float32), mask=(which >= 6) & (which <= 12))
    tl.store(stats + 17, explained.to(tl.float32))
    tl.store(stats + 18, (1.0 / terms).to(tl.float32))


def range_size(device: torch.device) -> int:
    """Tokens."""
    return sizes("ppo_loss", device)["RANGE"]


def forward(
    x: PPOInputs,
    options: PPOOptions,
    of_terms: Denominator,
    of_tokens: Denominator,
    stats: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    partials: Tensor,
) -> None:
    o, (ranges, count), size = options, (partials.shape[0], x.logprobs.numel()), sizes("ppo_loss", stats.device)
    if ranges:
        _forward[(ranges,)](
            *x, count, *o[:8], partials, *gradients,
            HAS_MASK=x.mask is not None, HAS_WEIGHTS=x.weights is not None,
            HAS_VALUES=x.values is not None, CLIPS_VALUES=o.value_clip >= 0 and x.old_values is not None,
            HAS_ENTROPY=x.entropy is not None, HAS_KL=x.ref_logprobs is not None, KL=o.kl, KL_SLOPE=o.kl_slope,
            KL_COUNTS=o.kl_coef != 0, DUAL=o.dual_clip != 0, CISPO=o.cispo, HAS_ROLLOUT=x.rollout_logprobs is not None,
            HAS_LOG_RATIOS=x.log_ratios is not None, WHITENS=x.advantage_sums is not None,
            NEED=gradients[0] is not None, NEED_VALUES=gradients[1] is not None, NEED_ENTROPY=gradients[2] is not None,
            BLOCK=size["RANGE"], SUMS=SUMS, EDGES=EDGES, num_warps=size["WARPS"],
        )  # fmt: skip
    _finish[(1,)](
        partials, ranges, of_terms.there, of_terms.number, of_tokens.there, of_tokens.number,
        o.value_coef, o.entropy_coef, o.kl_coef, stats,
        DENOMINATOR=of_terms.kind, TOKENS=of_tokens.kind, VALUES_COUNT=o.value_coef != 0,
        ENTROPY_COUNTS=o.entropy_coef != 0, KL_COUNTS=o.kl_coef != 0, FINISH=FINISH, SUMS=SUMS, EDGES=EDGES,
        num_warps=4,
    )  # fmt: skip
