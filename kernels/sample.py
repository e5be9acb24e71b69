"""sample in Triton: a program a row, which stays in the L2 cache for its sweeps.

What top_k and top_p keep is found by bisection over the bits of the float32 weights, which order as the weights do.
Each sweep also finds the weights next to where it looked, and the next one looks between those: exact after 7 to 20
sweeps, 31 at most, and only where something is cut. Sums are float64: 150,000 small terms lose digits in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.arguments import SampleOptions
from rlhf_fast.kernels.launch_sizes import sizes


@triton.jit
def _weights(start, first, columns, top, scale, BLOCK: tl.constexpr):
    """exp of a tile's logits less the largest, their exponents, and their columns; 0 past the end."""
    column = first + tl.arange(0, BLOCK)
    x = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
    y = (x - top) * scale
    return tl.exp(y), y, column


@triton.jit
def _reached(start, columns, top, scale, least, BLOCK: tl.constexpr):
    """Count the weights with bits of at least `least` > 0, and their total; the bits next to it above and below."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float64)
    above = tl.full((BLOCK,), 2147483647, tl.int32)
    below = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        e, _, _ = _weights(start, first, columns, top, scale, BLOCK)  # past the end those of 0
        bits = e.to(tl.int32, bitcast=True)
        reaches = bits >= least
        count += reaches.to(tl.int32)
        mass += tl.where(reaches, e, 0.0).to(tl.float64)
        above = tl.minimum(above, tl.where(reaches, bits, 2147483647))
        below = tl.maximum(below, tl.where(reaches, 0, bits))
    return tl.sum(count, 0).to(tl.int64), tl.sum(mass, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _cut(start, columns, top, scale, floor, equals, most, enough, BLOCK: tl.constexpr):
    """(bits, equals): where the likeliest reach a count of `most` or a sum of `enough`, of those above the bits `floor`
    and the first `equals` at it."""
    low = floor  # reaches, or is all there is
    high = tl.full((), 1065353216, tl.int32) + 1  # above the bits of 1
    reaching = tl.zeros((), tl.int64)  # with bits of at least low, if that is above the floor
    number = reaching  # of at least high, and what they weigh
    mass = tl.zeros((), tl.float64)
    while low + 1 < high:
        middle = low + (high - low) // 2
        this_number, this_mass, above, below = _reached(start, columns, top, scale, middle, BLOCK)
        if (this_number >= most) | (this_mass >= enough):
            low = above  # there are none between
            reaching = this_number
        else:
            high = tl.maximum(below, floor) + 1
            number = this_number
            mass = this_mass
    at_edge = tl.where(low > floor, reaching - number, equals)
    # Of the equals at the edge, as many as it takes: bisected too, for a division in float64 is a call.
    weight = low.to(tl.float32, bitcast=True).to(tl.float64)  # of each
    most_equals = tl.maximum(tl.minimum(most - number, at_edge), 1)
    too_few = most_equals * 0
    enough_equals = most_equals
    while too_few + 1 < enough_equals:
        half = too_few + (enough_equals - too_few) // 2
        if mass + half * weight >= enough:
            enough_equals = half
        else:
            too_few = half
    return low, enough_equals


@triton.jit
def _forward(
    logits, row_stride, columns, temperatures, top_ks, top_ps, min_ps, uniforms, tokens, logprobs, kepts, entropies,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, x)
        broken = broken | (x != x).to(tl.int32)
    top = tl.max(highest, 0)
    none = (tl.max(broken, 0) > 0) | (top == float("inf")) | (top == float("-inf"))  # no distribution
    top = tl.where(none, 0.0, top)
    temperature = tl.load(temperatures + row)
    greedy = temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, tl.maximum(temperature, 1.1754944e-38))  # whose inverse is a float32
    sums = tl.zeros((BLOCK,), tl.float64)
    moments = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, columns, BLOCK):
        e, y, _ = _weights(start, first, columns, top, scale, BLOCK)
        sums += e.to(tl.float64)
        moments += (e * tl.maximum(y, -1e4)).to(tl.float64)  # 0 and not nan for a banned token
    total = tl.sum(sums, 0)
    moment = tl.sum(moments, 0)

    bits = tl.full((), 0, tl.int32)
    equals = columns + tl.zeros((), tl.int64)
    top_k = tl.load(top_ks + row).to(tl.int64)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    if (top_k > 0) & (top_k < columns) & (temperature > 0.0):
        bits, equals = _cut(start, columns, top, scale, bits, equals, top_k, float("inf"), BLOCK)
    if (top_p < 1.0) & (temperature > 0.0):
        _, before_cut, _, _ = _reached(start, columns, top, scale, bits + 1, BLOCK)
        before_cut += equals * bits.to(tl.float32, bitcast=True).to(tl.float64)
        enough = top_p.to(tl.float64) * before_cut
        bits, equals = _cut(start, columns, top, scale, bits, equals, columns + tl.zeros((), tl.int64), enough, BLOCK)
    least = tl.where(min_p > 0.0, min_p.to(tl.int32, bitcast=True), 0)
    equals = tl.where(least > bits, columns, equals)
    bits = tl.maximum(bits, least)
    bits = tl.where(greedy, 1065353216, bits)  # those of 1
    equals = tl.where(greedy, 1, equals)

    weighed = tl.zeros((BLOCK,), tl.float64)
    counted = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, columns, BLOCK):
        e, _, column = _weights(start, first, columns, top, scale, BLOCK)
        of = e.to(tl.int32, bitcast=True)
        weighed += tl.where(of > bits, e, 0.0).to(tl.float64)
        counted += ((column < columns) & (of == bits)).to(tl.int32)
    equals = tl.minimum(equals, tl.sum(counted, 0).to(tl.int64))
    first_equals = equals.to(tl.int32)  # of those at the edge these stay
    mass = tl.sum(weighed, 0) + equals * bits.to(tl.float32, bitcast=True).to(tl.float64)
    target = tl.where(greedy, 0.0, tl.load(uniforms + row)) * mass

    chosen = columns + tl.zeros((), tl.int32)  # the first column whose cumulative sum is above the target
    last = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.float64)
    ranked = tl.zeros((), tl.int32)
    for first in range(0, columns, BLOCK):
        e, y, column = _weights(start, first, columns, top, scale, BLOCK)
        same = (column < columns) & (e.to(tl.int32, bitcast=True) == bits)
        rank = tl.cumsum(same.to(tl.int32), 0) + ranked
        w = tl.where(same & (rank > first_equals), 0.0, _kept(e, column, columns, bits))
        w = tl.where(greedy, ((column < columns) & (y == 0.0)).to(tl.float64), w)  # 1 may also be one rounded up
        reach = tl.cumsum(w, 0) + before
        chosen = tl.minimum(chosen, tl.min(tl.where((w > 0.0) & (reach > target), column, columns), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, column, 0), 0))
        before += tl.sum(w, 0)
        ranked += tl.sum(same.to(tl.int32), 0)
    token = tl.where(chosen < columns, chosen, last)
    x = tl.load(start + token).to(tl.float32)
    log_sum = tl.log(total.to(tl.float32))  # in float64 it would be a call
    nan = float("nan")
    tl.store(tokens + row, tl.where(none, -1, token).to(tl.int64))
    tl.store(logprobs + row, tl.where(none, nan, (x - top) * scale - log_sum))
    tl.store(kepts + row, tl.where(none, nan, mass.to(tl.float32) / total.to(tl.float32)))
    tl.store(entropies + row, tl.where(none, nan, log_sum - moment.to(tl.float32) / total.to(tl.float32)))


@triton.jit
def _kept(e, column, columns, bits):
    """The weights with at least these bits, in float64; 0 for the others."""
    stays = (column < columns) & (e.to(tl.int32, bitcast=True) >= bits)
    return tl.where(stays, e.to(tl.float64), 0.0)


def forward(logits: Tensor, options: SampleOptions, results: Sequence[Tensor]) -> None:
    """Draw a token a row and write what is known of its distribution, as csrc/common/sample.h has them."""
    rows, columns = logits.shape
    if rows:
        tokens, logprobs, kept, entropy = results
        size = sizes("sample", logits.device)
        block = min(size["BLOCK"], triton.next_power_of_2(columns))
        _forward[(rows,)](
            logits=logits, row_stride=logits.stride(0), columns=columns, temperatures=options.temperature,
            top_ks=options.top_k, top_ps=options.top_p, min_ps=options.min_p, uniforms=options.uniform, tokens=tokens,
            logprobs=logprobs, kepts=kept, entropies=entropy, BLOCK=block, num_warps=size["WARPS"],
        )  # fmt: skip
