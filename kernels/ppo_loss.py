"""ppo_loss in Triton: a program a range of tokens, one sweep that reads each input once and writes the gradients.

A second kernel adds the sums of the ranges up in their order. csrc/common/ppo_loss.h says what the sums and the
statistics are. Sums are taken eight at a time: a program waits for its threads after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _sampled_kl
from rlhf_fast.kernels._sampled_kl import expm1_minus
from rlhf_fast.kernels.arguments import Denominator, PPONumbers, PPOResults, PPOTensors
from rlhf_fast.kernels.launch_sizes import sizes

FINISH, FINISH_WARPS = 256, 16  # ranges that the second kernel adds up at a time
SCALE = 1024  # tokens of a program that scales gradients

CISPO, SAPO = tl.constexpr(1), tl.constexpr(2)  # objectives, as csrc/common/ppo_loss.h numbers them
FAR_GATE = tl.constexpr(80.0)  # its kFarGate

# Where the sums of a range lie, as csrc/common/ppo_loss.h has them in PPOSum.
SUM_COUNT, SUM_POLICY, SUM_VALUE, SUM_ENTROPY, SUM_KL, SUM_RATIO, SUM_CLIPPED, SUM_DUAL_CLIPPED = map(
    tl.constexpr, range(8)
)
SUM_VALUE_CLIPPED, SUM_OLD_MINUS_NEW, SUM_K3, SUM_ROLLOUT, SUM_ROLLOUT_CAPPED = map(tl.constexpr, range(8, 13))
SUM_AT_MOST = tl.constexpr(13)  # of fifteen edges
SUM_RETURN, SUM_RETURN_SQUARED, SUM_REST, SUM_REST_SQUARED = map(tl.constexpr, range(28, 32))
SUM_LOG_RATIO_MAX, SUM_MINUS_LOG_RATIO_MAX = map(tl.constexpr, range(32, 34))  # maxima
SUMS = 34
SUMS_READ = tl.constexpr(64)  # the power of two above them

# Where the statistics lie, as rlhf_fast/ops/ppo_loss.py names them.
STAT_POLICY = tl.constexpr(0)  # to kl, in the order of their sums
STAT_RATIO_MEAN, STAT_RATIO_MAX, STAT_RATIO_MIN, STAT_RATIO_P05, STAT_RATIO_P95 = map(tl.constexpr, range(4, 9))
STAT_CLIPPED = tl.constexpr(9)  # to rollout_clip_fraction, in the order of their sums
STAT_EXPLAINED_VARIANCE = tl.constexpr(16)


@triton.jit
def _denominator(tensor, number, counted, KIND: tl.constexpr):
    """Divisor of a sum, as arguments.Denominator says: a tensor of 0 counts as 1."""
    value = counted
    if KIND == 1:
        value = tl.load(tensor).to(tl.float64)
    if KIND == 2:
        value = counted * 0.0 + number
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def _read(data, i, inside, counts):
    """Load an input as float32; where a token does not count the result is 0, whatever the input holds."""
    return tl.where(counts, tl.load(data + i, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _bound(x):
    return tl.where(x < -20.0, -20.0, tl.where(x > 20.0, 20.0, x))


@triton.jit
def _sums(a, b, c, d, e, f, g, h):
    """Sums of eight vectors, (8,) in float64."""
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.sum(tl.join(even, odd), 0), (8,)).to(tl.float64)


@triton.jit
def _edge(e):
    """Edge number e between log-ratios: 0, +-1/128, +-1/64, ... +-1/2, from the bits of a power of two."""
    exponent = tl.where(e < 7, e + 1, 15 - e)
    size = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(e < 7, -size, tl.where(e == 7, 0.0, size))


@triton.jit
def _up_to(bounded, ones, E: tl.constexpr):
    """1 for a token whose log-ratio is at most an edge."""
    return tl.where(bounded > _edge(tl.full((), E, tl.int32)), 0.0, ones)


@triton.jit
def _forward(
    logprobs, old_logprobs, advantages, values, old_values, returns, entropy, ref_logprobs, rollout_logprobs, mask,
    weights, log_ratios, advantage_sums, count, clip_low, clip_high, dual_clip,
    value_clip, value_coef, entropy_coef, kl_coef, rollout_cap, tau_pos, tau_neg, partials, grad_logprobs, grad_values,
    grad_entropy,
    HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_VALUES: tl.constexpr,
    CLIPS_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_KL: tl.constexpr, KL: tl.constexpr,
    KL_SLOPE: tl.constexpr, KL_COUNTS: tl.constexpr, DUAL: tl.constexpr, OBJECTIVE: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr, HAS_LOG_RATIOS: tl.constexpr, WHITENS: tl.constexpr, NEED: tl.constexpr,
    NEED_VALUES: tl.constexpr, NEED_ENTROPY: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr,
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
    nothing = tl.zeros((BLOCK,), tl.float32)
    of_entropy, of_kl, of_value, worse_ones, bound_ones = nothing, nothing, nothing, nothing, nothing
    weighed, capped_ones = nothing, nothing
    exact = tl.zeros((BLOCK,), tl.float64)  # returns
    rest = exact  # what values leave of them
    far = (log_ratio < -20.0) | (log_ratio > 20.0)
    if OBJECTIVE == SAPO:
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        moved = tau * (ratio - 1.0)
        e = tl.exp(-tl.where(moved < -FAR_GATE, -FAR_GATE, tl.where(moved > FAR_GATE, FAR_GATE, moved)))
        inverse = 1.0 + e
        pulled = ratio != ratio  # none
        policy = -advantage * (4.0 / (tau * inverse))
        slope = tl.where(far, 0.0, -advantage * (4.0 * e / (inverse * inverse) * ratio))
    elif OBJECTIVE == CISPO:
        pulled = ratio != near
        policy, slope = clipped * logp, clipped
    else:
        pulled = clipped > plain
        policy = tl.where(pulled, clipped, plain)
        slope = tl.where(pulled | far, 0.0, plain)
    if DUAL:
        bound = (advantage < 0.0) & (policy > -advantage * dual_clip)
        policy = tl.where(bound, -advantage * dual_clip, policy)
        slope = tl.where(bound, 0.0, slope)
        bound_ones = tl.where(bound, ones, 0.0)
    if HAS_ROLLOUT:
        apart = tl.exp(_bound(old_logp - _read(rollout_logprobs, i, inside, here)))
        capped = apart > rollout_cap
        held = tl.where(capped, rollout_cap, apart)
        policy *= held
        slope *= held
        weighed, capped_ones = held * ones, tl.where(capped, ones, 0.0)
    if HAS_KL:
        d = logp - _read(ref_logprobs, i, inside, here)
        of_kl = _sampled_kl.estimate(d, KL) * weight
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
            worse_ones = tl.where(worse, ones, 0.0)
        of_value = 0.5 * squared * weight
        exact, rest = target.to(tl.float64), error.to(tl.float64)
        if NEED_VALUES:
            in_values = value_coef * gradient * weight
            tl.store(grad_values + i, tl.where(here, in_values, 0.0), mask=inside)
    if HAS_ENTROPY:
        of_entropy = _read(entropy, i, inside, here) * weight
        if NEED_ENTROPY:
            tl.store(grad_entropy + i, -entropy_coef * weight, mask=inside)

    to = partials + tl.program_id(0).to(tl.int64) * SUMS + tl.arange(0, 8)
    pulled_ones = tl.where(pulled, ones, 0.0)
    eight = _sums(ones, policy * weight, of_value, of_entropy, of_kl, (ratio - 1.0) * ones, pulled_ones, bound_ones)
    tl.store(to + SUM_COUNT, eight)
    k3 = expm1_minus(_bound(own)) * ones
    eight = _sums(
        worse_ones, -own * ones, k3, weighed, capped_ones, _up_to(bounded, ones, 0), _up_to(bounded, ones, 1),
        _up_to(bounded, ones, 2),
    )  # fmt: skip
    tl.store(to + SUM_VALUE_CLIPPED, eight)
    eight = _sums(
        _up_to(bounded, ones, 3), _up_to(bounded, ones, 4), _up_to(bounded, ones, 5), _up_to(bounded, ones, 6),
        _up_to(bounded, ones, 7), _up_to(bounded, ones, 8), _up_to(bounded, ones, 9), _up_to(bounded, ones, 10),
    )  # fmt: skip
    tl.store(to + (SUM_AT_MOST + 3), eight)
    eight = _sums(
        _up_to(bounded, ones, 11).to(tl.float64), _up_to(bounded, ones, 12).to(tl.float64),
        _up_to(bounded, ones, 13).to(tl.float64), _up_to(bounded, ones, 14).to(tl.float64), exact, exact * exact, rest,
        rest * rest,
    )  # fmt: skip
    tl.store(to + (SUM_AT_MOST + 11), eight)
    both = tl.join(tl.where(here, bounded, -20.0), tl.where(here, -bounded, -20.0))
    ends = partials + tl.program_id(0).to(tl.int64) * SUMS + SUM_LOG_RATIO_MAX + tl.arange(0, 2)
    tl.store(ends, tl.max(both, 0).to(tl.float64))


@triton.jit
def _ratio_quantile(totals, count, most, least, share):
    """exp of the log-ratio below which a share of the tokens lies: between two edges, as if they lay evenly there."""
    e = tl.arange(0, 16)
    below = tl.load(totals + (SUM_AT_MOST - 1) + e, mask=e > 0, other=0.0)  # tokens up to the edge below
    at_most = tl.where(e < 15, tl.load(totals + SUM_AT_MOST + e, mask=e < 15, other=0.0), count)  # and the one above
    lower = tl.where(e == 0, least, _clamp(_edge(e - 1).to(tl.float64), least, most))
    upper = tl.where(e == 15, most, _clamp(_edge(e).to(tl.float64), least, most))
    wanted = share * count
    part = (wanted - below) / tl.where(at_most > below, at_most - below, 1.0)
    log_ratio = tl.where((at_most >= wanted) & (wanted > below), lower + (upper - lower) * part, 0.0)
    return tl.exp(tl.sum(log_ratio, 0))


@triton.jit
def _clamp(x, least, most):
    return tl.where(x < least, least, tl.where(x > most, most, x))


@triton.jit
def _finish(
    partials, ranges, terms_tensor, terms_number, tokens_tensor, tokens_number, value_coef, entropy_coef, kl_coef,
    totals, loss, stats, inverse,
    DENOMINATOR: tl.constexpr, TOKENS: tl.constexpr, VALUES_COUNT: tl.constexpr, ENTROPY_COUNTS: tl.constexpr,
    KL_COUNTS: tl.constexpr, FINISH: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    which = tl.arange(0, SUMS_READ)
    largest = which >= SUM_LOG_RATIO_MAX
    sums = tl.where(largest, -20.0, tl.zeros((SUMS_READ,), tl.float64))
    for first in range(0, ranges, FINISH):
        r = first + tl.arange(0, FINISH)
        at = r[:, None].to(tl.int64) * SUMS + which[None, :]
        none = tl.where(largest, -20.0, 0.0)[None, :]
        part = tl.load(partials + at, mask=(r < ranges)[:, None] & (which < SUMS)[None, :], other=none)
        sums = tl.where(largest, tl.maximum(sums, tl.max(part, axis=0)), sums + tl.sum(part, axis=0))
    tl.store(totals + which, sums, mask=which < SUMS)
    tl.debug_barrier()  # each number below reads what it needs of these, all at once
    counted = tl.load(totals + SUM_COUNT)
    terms = _denominator(terms_tensor, terms_number, counted, DENOMINATOR)
    tokens = _denominator(tokens_tensor, tokens_number, counted, TOKENS)
    n = tl.where(counted == 0.0, 1.0, counted)
    whole = tl.load(totals + SUM_POLICY)
    if VALUES_COUNT:
        whole += value_coef * tl.load(totals + SUM_VALUE)
    if ENTROPY_COUNTS:
        whole -= entropy_coef * tl.load(totals + SUM_ENTROPY)
    if KL_COUNTS:
        whole += kl_coef * tl.load(totals + SUM_KL)
    mean, second_moment = tl.load(totals + SUM_RETURN) / n, tl.load(totals + SUM_RETURN_SQUARED) / n
    rest = tl.load(totals + SUM_REST) / n
    left = tl.load(totals + SUM_REST_SQUARED) / n - rest * rest
    variance = second_moment - mean * mean
    flat = variance <= 1e-12 * second_moment  # no more than rounding leaves of equal returns
    explained = tl.where(flat, 0.0, 1.0 - left / tl.where(flat, 1.0, variance))
    nothing = counted == 0.0
    most, least = tl.load(totals + SUM_LOG_RATIO_MAX), -tl.load(totals + SUM_MINUS_LOG_RATIO_MAX)
    low = _ratio_quantile(totals, counted, most, least, 0.05)
    high = _ratio_quantile(totals, counted, most, least, 0.95)

    tl.store(loss, (whole / terms).to(tl.float32))
    of_terms = (which >= SUM_POLICY) & (which <= SUM_KL)
    of_tokens = (which >= SUM_CLIPPED) & (which <= SUM_ROLLOUT_CAPPED)
    tl.store(stats + which + (STAT_POLICY - SUM_POLICY), (sums / terms).to(tl.float32), mask=of_terms)
    tl.store(stats + STAT_RATIO_MEAN, ((counted + tl.load(totals + SUM_RATIO)) / tokens).to(tl.float32))
    tl.store(stats + STAT_RATIO_MAX, tl.where(nothing, 0.0, tl.exp(most)).to(tl.float32))
    tl.store(stats + STAT_RATIO_MIN, tl.where(nothing, 0.0, tl.exp(least)).to(tl.float32))
    tl.store(stats + STAT_RATIO_P05, tl.where(nothing, 0.0, low).to(tl.float32))
    tl.store(stats + STAT_RATIO_P95, tl.where(nothing, 0.0, high).to(tl.float32))
    tl.store(stats + which + (STAT_CLIPPED - SUM_CLIPPED), (sums / tokens).to(tl.float32), mask=of_tokens)
    tl.store(stats + STAT_EXPLAINED_VARIANCE, explained.to(tl.float32))
    tl.store(inverse, (1.0 / terms).to(tl.float32))


@triton.jit
def _scale(
    in_logprobs, in_values, in_entropy, upstream, inverse, count, grad_logprobs, grad_values, grad_entropy,
    NEED: tl.constexpr, NEED_VALUES: tl.constexpr, NEED_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    factor = tl.load(upstream) * tl.load(inverse)
    if NEED:
        tl.store(grad_logprobs + i, tl.load(in_logprobs + i, mask=inside) * factor, mask=inside)
    if NEED_VALUES:
        tl.store(grad_values + i, tl.load(in_values + i, mask=inside) * factor, mask=inside)
    if NEED_ENTROPY:
        tl.store(grad_entropy + i, tl.load(in_entropy + i, mask=inside) * factor, mask=inside)


def range_size(device: torch.device) -> int:
    """Tokens whose sums are one row of the partial results."""
    return sizes("ppo_loss", device)["RANGE"]


def forward(
    tensors: PPOTensors, numbers: PPONumbers, of_terms: Denominator, of_tokens: Denominator, results: PPOResults
) -> None:
    """Write the results of the forward pass, gradients included, as csrc/common/ppo_loss.h has them."""
    partials, size = results.partials, sizes("ppo_loss", results.partials.device)
    ranges = partials.shape[0]
    if ranges:
        _forward[(ranges,)](
            **tensors._asdict(), count=tensors.old_logprobs.numel(), **numbers.in_triton(), partials=partials,
            grad_logprobs=results.grad_logprobs, grad_values=results.grad_values, grad_entropy=results.grad_entropy,
            **_present(tensors, numbers), NEED=results.grad_logprobs is not None,
            NEED_VALUES=results.grad_values is not None, NEED_ENTROPY=results.grad_entropy is not None,
            BLOCK=size["RANGE"], SUMS=SUMS, num_warps=size["WARPS"],
        )  # fmt: skip
    _finish[(1,)](
        partials=partials, ranges=ranges, terms_tensor=of_terms.tensor, terms_number=of_terms.number,
        tokens_tensor=of_tokens.tensor, tokens_number=of_tokens.number, value_coef=numbers.value_coef,
        entropy_coef=numbers.entropy_coef, kl_coef=numbers.kl_coef, totals=partials.new_empty(SUMS),
        loss=results.loss, stats=results.stats, inverse=results.inverse,
        DENOMINATOR=of_terms.kind, TOKENS=of_tokens.kind, VALUES_COUNT=numbers.value_coef != 0,
        ENTROPY_COUNTS=numbers.entropy_coef != 0, KL_COUNTS=numbers.kl_coef != 0, FINISH=FINISH, SUMS=SUMS,
        num_warps=FINISH_WARPS,
    )  # fmt: skip


def _present(tensors: PPOTensors, numbers: PPONumbers) -> dict[str, Any]:
    """Flags that are compiled in: which tensors are given, and whether values are clipped."""
    return {
        "HAS_MASK": tensors.mask is not None,
        "HAS_WEIGHTS": tensors.weights is not None,
        "HAS_VALUES": tensors.values is not None,
        "CLIPS_VALUES": numbers.value_clip >= 0 and tensors.old_values is not None,
        "HAS_ENTROPY": tensors.entropy is not None,
        "HAS_KL": tensors.ref_logprobs is not None,
        "HAS_ROLLOUT": tensors.rollout_logprobs is not None,
        "HAS_LOG_RATIOS": tensors.log_ratios is not None,
        "WHITENS": tensors.advantage_sums is not None,
    }


def scale(gradients: Sequence[Tensor | None], upstream: Tensor, inverse: Tensor, out: Sequence[Tensor | None]) -> None:
    """Scale the gradients of the sum of terms to those of the loss: times upstream and inverse."""
    count = max(x.numel() for x in gradients if x is not None)
    if count:
        _scale[(triton.cdiv(count, SCALE),)](
            *gradients, upstream, inverse, count, *out, NEED=out[0] is not None, NEED_VALUES=out[1] is not None,
            NEED_ENTROPY=out[2] is not None, BLOCK=SCALE,
        )  # fmt: skip
