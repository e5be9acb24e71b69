"""token_logprobs in Triton: log-probability and entropy of rows of logits, and their gradient.

One program takes one segment of a row, whole, in registers: one load, one store of four numbers, the segment's
state. A second, small kernel brings a row's states together. Rows are cut the same way whatever their
number, so a row gives the same bits in any batch; and few rows of a large vocabulary still fill the device. Logits
are read once, the gradient reads and writes once: 2 and 4 bytes a column in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._math import (
    LOG2E,
    below,
    chain,
    flags,
    is_masked,
    load_z,
    matrix_arguments,
    row_offset,
    row_temperature,
    transform_arguments,
    z_of,
)
from rlhf_fast.kernels.arguments import Matrix, Transform
from rlhf_fast.kernels.launch_sizes import sizes

STATE = (
    4  # floats: largest z, sum of exp(z - largest), sum of exp(z - largest) (z - largest), z of the token if it is here
)
FINISH_ROWS = 16

# Sizes that vary from call to call and stand in no inner loop are not specialised on: they would compile anew each
# time.


@triton.jit(do_not_specialize=("inner", "first_column", "segments", "states_per_row"))
def _update(
    logits, columns, inner, outer_stride, inner_stride, column_stride,
    scale, softcap, temperature, temperatures, tokens, mask, first_column, segments, states, states_per_row,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // segments
    part = tl.program_id(0) % segments
    if is_masked(mask, row, HAS_MASK):
        return
    t = row_temperature(temperatures, temperature, row, PER_ROW)
    start = logits + row_offset(row, inner, outer_stride, inner_stride)

    column = part * SEGMENT + tl.arange(0, SEGMENT)
    _, z = load_z(start, column, columns, column_stride, scale, softcap, t, FORM)
    largest = tl.max(z)
    d = below(z, tl.where(largest == float("-inf"), 0.0, largest))
    e = tl.exp2(d * LOG2E)
    total = tl.sum(e)
    dot = tl.sum(e * d)

    token = (tl.load(tokens + row) - first_column).to(tl.int32)
    here = (token >= part * SEGMENT) & (token < part * SEGMENT + SEGMENT)
    own = tl.load(start + token.to(tl.int64) * column_stride, mask=here, other=0.0).to(tl.float32)  # z of 0 is 0

    index = row.to(tl.int64) * states_per_row + first_column // SEGMENT + part
    state = states + index * 4
    tl.store(state, largest)
    tl.store(state + 1, total)
    tl.store(state + 2, dot)
    tl.store(state + 3, z_of(own, scale, softcap, t, FORM))


@triton.jit(do_not_specialize=("states_per_row", "rows"))
def _finish(
    states, states_per_row, rows, mask, logprobs, entropy, shifts, totals,
    HAS_MASK: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counts = row < rows
    if HAS_MASK:
        counts = counts & (tl.load(mask + row, mask=row < rows, other=0) != 0)
    part = tl.arange(0, STATES)
    present = counts[:, None] & (part < states_per_row)[None, :]
    state = states + (row.to(tl.int64)[:, None] * states_per_row + part[None, :]) * 4
    largest = tl.load(state, mask=present, other=float("-inf"))
    total = tl.load(state + 1, mask=present, other=0.0).to(tl.float64)
    dot = tl.load(state + 2, mask=present, other=0.0).to(tl.float64)
    z = tl.sum(tl.load(state + 3, mask=present, other=0.0), axis=1).to(tl.float64)

    # In double, which costs nothing here, so that only the last rounding is left.
    shift = tl.max(largest, axis=1)
    d = (largest - tl.where(shift == float("-inf"), 0.0, shift)[:, None]).to(tl.float64)
    factor = tl.where(total == 0.0, 0.0, tl.exp(d))  # a segment of nothing but -inf is left out
    sums = tl.sum(factor * total, axis=1)
    dots = tl.sum(tl.where(total == 0.0, 0.0, factor * (dot + total * d)), axis=1)
    sums = tl.where(sums == 0.0, float("nan"), sums)  # a row of nothing but -inf is no distribution
    log_sum = tl.log(sums)

    tl.store(logprobs + row, tl.where(counts, z - shift.to(tl.float64) - log_sum, 0.0), mask=row < rows)
    tl.store(entropy + row, tl.where(counts, log_sum - dots / sums, 0.0), mask=row < rows)
    if SAVE:
        tl.store(shifts + row, tl.where(counts, shift, 0.0), mask=row < rows)
        tl.store(totals + row, tl.where(counts, sums, 1.0), mask=row < rows)


@triton.jit(do_not_specialize=("inner", "first_column", "segments"))
def _gradient(
    logits, columns, inner, outer_stride, inner_stride, column_stride,
    scale, softcap, temperature, temperatures, tokens, mask, first_column, segments,
    entropy, shifts, totals, grad_logprobs, grad_entropy, grad_log_sum, grad_each, out,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_LOG_SUM: tl.constexpr, HAS_EACH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // segments
    column = (tl.program_id(0) % segments) * SEGMENT + tl.arange(0, SEGMENT)
    to = out + row.to(tl.int64) * columns + column
    if is_masked(mask, row, HAS_MASK):
        tl.store(to, tl.zeros([SEGMENT], dtype=out.dtype.element_ty), mask=column < columns)
        return
    t = row_temperature(temperatures, temperature, row, PER_ROW)
    start = logits + row_offset(row, inner, outer_stride, inner_stride)
    total = tl.load(totals + row)
    inverse, log_total = 1.0 / total, tl.log(total)
    upstream = 0.0
    if HAS_LOGPROBS:
        upstream = tl.load(grad_logprobs + row)
    intercept, slope = -upstream, 0.0
    if HAS_ENTROPY:
        slope = -tl.load(grad_entropy + row)
        intercept += slope * tl.load(entropy + row)
    if HAS_LOG_SUM:
        intercept += tl.load(grad_log_sum + row)

    # d logprob / dz_v = [v = token] - p_v, d entropy / dz_v = -p_v (log p_v + entropy), d log sum / dz_v = p_v
    x, z = load_z(start, column, columns, column_stride, scale, softcap, t, FORM)
    d = below(z, tl.load(shifts + row))
    p = tl.exp2(d * LOG2E) * inverse
    gradient = p * intercept
    if HAS_ENTROPY:
        gradient = p * (intercept + slope * (d - log_total))
    token = (tl.load(tokens + row) - first_column).to(tl.int32)
    if HAS_EACH:
        gradient += tl.load(grad_each + row)
    gradient = tl.where(column == token, gradient + upstream, gradient)
    gradient = chain(gradient, x, scale, softcap, t, FORM)
    tl.store(to, gradient.to(out.dtype.element_ty), mask=column < columns)


def segment(device: torch.device) -> int:
    """Columns."""
    return sizes("token_logprobs", device)["SEGMENT"]


def new_states(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    return torch.empty(rows, triton.cdiv(vocabulary, segment(device)), STATE, dtype=torch.float32, device=device)


def forward(x: Matrix, t: Transform, tokens: Tensor, mask: Tensor | None, results: Sequence[Tensor | None]) -> None:
    states = new_states(x.rows, x.columns, x.data.device)
    update(x, t, tokens, mask, 0, states)
    finish(states, mask, results)


def update(x: Matrix, t: Transform, tokens: Tensor, mask: Tensor | None, first_column: int, states: Tensor) -> None:
    size = sizes("token_logprobs", x.data.device)
    segments = triton.cdiv(x.columns, size["SEGMENT"])
    _update[(x.rows * segments,)](
        *matrix_arguments(x), *transform_arguments(t), tokens, mask, first_column, segments, states, states.shape[1],
        SEGMENT=size["SEGMENT"], num_warps=size["WARPS"], **flags(t, mask),
    )  # fmt: skip


def finish(states: Tensor, mask: Tensor | None, results: Sequence[Tensor | None]) -> None:
    rows, per_row, _ = states.shape
    _finish[(triton.cdiv(rows, FINISH_ROWS),)](
        states, per_row, rows, mask, *results,
        HAS_MASK=mask is not None, SAVE=results[2] is not None, ROWS=FINISH_ROWS,
        STATES=triton.next_power_of_2(per_row), num_warps=4,
    )  # fmt: skip


def gradient(
    x: Matrix,
    t: Transform,
    tokens: Tensor,
    mask: Tensor | None,
    first_column: int,
    results: Sequence[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor,
    grad_log_sum: Tensor | None = None,
    grad_each: Tensor | None = None,
) -> None:
    size = sizes("token_logprobs", x.data.device)
    segments = triton.cdiv(x.columns, size["SEGMENT"])
    _gradient[(x.rows * segments,)](
        *matrix_arguments(x), *transform_arguments(t), tokens, mask, first_column, segments, *results[1:],
        grad_logprobs, grad_entropy, grad_log_sum, grad_each, out,
        SEGMENT=size["SEGMENT"], HAS_LOGPROBS=grad_logprobs is not None, HAS_ENTROPY=grad_entropy is not None,
        HAS_LOG_SUM=grad_log_sum is not None, HAS_EACH=grad_each is not None,
        num_warps=size["WARPS"], **flags(t, mask),
    )  # fmt: skip
