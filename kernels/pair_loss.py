"""The losses of pairs in Triton: one program goes through all pairs, in float64; csrc/common/pair_loss.h says what
each is."""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_fast.kernels.arguments import Denominator, PairNumbers, PairResults, PairTensors
from rlhf_fast.kernels.launch_sizes import sizes

# Where the statistics lie, as csrc/common/pair_loss.h has them.
STAT_LOSS, STAT_ACCURACY, STAT_MARGIN, STAT_CHOSEN_REWARD, STAT_REJECTED_REWARD, STAT_INVERSE = map(
    tl.constexpr, range(6)
)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _softplus(x):
    """log(1 + e^x), without a log1p: by its series where the sum would lose e^x."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0.0, x, 0.0) + tl.where(e < 1e-5, e - 0.5 * e * e + e * e * e / 3.0, tl.log(1.0 + e))


@triton.jit
def _read(data, i, here, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(data + i, mask=here, other=0.0).to(tl.float64)
    return tl.zeros(i.shape, tl.float64)


@triton.jit
def _forward(
    chosen, rejected, ref_chosen, ref_rejected, margins, weights, kl, count, beta, agree, differ, center_coef,
    divisor_tensor, divisor_number, stats, grad_chosen, grad_rejected,
    KIND: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_MARGINS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_KL: tl.constexpr, DENOMINATOR: tl.constexpr, NEED: tl.constexpr, NEED_REJECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    loss = tl.zeros((BLOCK,), tl.float64)
    wins, margin, of_chosen, of_rejected, total = loss, loss, loss, loss, loss
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        here = i < count
        weight = tl.where(here, 1.0, 0.0).to(tl.float64)
        if HAS_WEIGHTS:
            weight = _read(weights, i, here, True)
            here = here & (weight != 0.0)
        c, r = _read(chosen, i, here, True), _read(rejected, i, here, True)
        better = beta * (c - _read(ref_chosen, i, here, HAS_REFERENCE))
        worse = beta * (r - _read(ref_rejected, i, here, HAS_REFERENCE))
        x = better - worse - _read(margins, i, here, HAS_MARGINS)
        if KIND == 0:
            term = agree * _softplus(-x) + differ * _softplus(x)
            slope = differ * _sigmoid(x) - agree * _sigmoid(-x)
            other = -slope
        elif KIND == 1:
            term = tl.where(x >= 1.0, 0.0, 1.0 - x)  # nan stays nan
            slope = tl.where(x >= 1.0, 0.0, -1.0).to(tl.float64)
            other = -slope
        elif KIND == 2:
            apart = (x - 0.5) / beta
            term, slope = apart * apart, 2.0 * apart / beta
            other = -slope
        else:
            far = beta * 0.0
            if HAS_KL:
                far = beta * tl.load(kl).to(tl.float64)
            bad, good = _sigmoid(far - better), _sigmoid(worse - far)
            term, slope, other = 0.5 * (bad + good), -0.5 * bad * (1.0 - bad), 0.5 * good * (1.0 - good)
        both = c + r
        loss += weight * (term + center_coef * both * both)
        wins += weight * tl.where(better > worse, 1.0, tl.where(better == worse, 0.5, 0.0))
        margin += weight * (better - worse)
        of_chosen += weight * better
        of_rejected += weight * worse
        total += weight
        pull = 2.0 * center_coef * both
        inside = i < count
        if NEED:
            tl.store(grad_chosen + i, (weight * (beta * slope + pull)).to(tl.float32), mask=inside)
        if NEED_REJECTED:
            tl.store(grad_rejected + i, (weight * (beta * other + pull)).to(tl.float32), mask=inside)
    divisor = tl.sum(total)
    if DENOMINATOR == 1:
        divisor = tl.load(divisor_tensor).to(tl.float64)
    if DENOMINATOR == 2:
        divisor = divisor * 0.0 + divisor_number
    divisor = tl.where(divisor == 0.0, 1.0, divisor)
    tl.store(stats + STAT_LOSS, (tl.sum(loss) / divisor).to(tl.float32))
    tl.store(stats + STAT_ACCURACY, (tl.sum(wins) / divisor).to(tl.float32))
    tl.store(stats + STAT_MARGIN, (tl.sum(margin) / divisor).to(tl.float32))
    tl.store(stats + STAT_CHOSEN_REWARD, (tl.sum(of_chosen) / divisor).to(tl.float32))
    tl.store(stats + STAT_REJECTED_REWARD, (tl.sum(of_rejected) / divisor).to(tl.float32))
    tl.store(stats + STAT_INVERSE, (1.0 / divisor).to(tl.float32))


def forward(tensors: PairTensors, numbers: PairNumbers, denominator: Denominator, results: PairResults) -> None:
    """Write the mean loss of the pairs, its statistics and gradients, as csrc/common/pair_loss.h has them."""
    size = sizes("pair_loss", results.stats.device)
    _forward[(1,)](
        **tensors._asdict(), count=tensors.chosen.numel(), **numbers.in_triton(), divisor_tensor=denominator.tensor,
        divisor_number=denominator.number, **results._asdict(), HAS_REFERENCE=tensors.ref_chosen is not None,
        HAS_MARGINS=tensors.margins is not None, HAS_WEIGHTS=tensors.weights is not None,
        HAS_KL=tensors.kl is not None, DENOMINATOR=denominator.kind, NEED=results.grad_chosen is not None,
        NEED_REJECTED=results.grad_rejected is not None, BLOCK=size["BLOCK"], num_warps=size["WARPS"],
    )  # fmt: skip
