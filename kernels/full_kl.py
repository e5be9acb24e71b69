"""full_kl in Triton: KL or Jensen-Shannon divergence between two rows of logits, and its gradients.

As in token_logprobs, one program takes one segment of both rows whole and a small kernel brings a row's segments
together: with E over p, KL(p || q) = E[z_p - z_q] - log-sum-exp(z_p) + log-sum-exp(z_q), so both are read once.
Jensen-Shannon needs the sums of both before its terms, hence a second pass. 4 bytes a column in bfloat16, 8 for the
gradients of both.
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
)
from rlhf_fast.kernels.arguments import Matrix, Transform
from rlhf_fast.kernels.launch_sizes import sizes

STATE = (
    6  # floats: reference and sum of exp(z - reference) of p, the same of q, anchor and dot; or JS's three sums a side
)
FINISH_ROWS = 16
LOG2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _above_level(apart):
    """Return what log p - log m and log q - log m are above a level, with m = (p + q) / 2, and whether that is log 2.

    apart = log p - log q. With s the smaller over the larger of p and q they are log(2 / (1 + s)), less the
    difference of the logarithms for the smaller one. Where p and q are near each other (s >= 1/2) the level is 0, and
    elsewhere log 2: so that what is small is computed as such, and keeps its digits. log1p(x) = 2 atanh(x / (2 + x)),
    with x = (1 - s) / (1 + s) where near and s elsewhere.
    """
    s = tl.exp2(-tl.abs(apart) * LOG2E)
    far = s < 0.5
    a = tl.where(far, -s, 1.0 - s) / (s + tl.where(far, 2.0, 3.0))
    square = a * a
    series = 0.151896581 * square + 0.199784756  # atanh(a) = a + a^3 series, by Remez: 3e-9
    series = series * square + 0.333334774
    log = 2.0 * a * square * series + 2.0 * a
    return log + tl.minimum(apart, 0.0), log + tl.minimum(-apart, 0.0), far


@triton.jit(do_not_specialize=("p_inner", "q_inner", "segments"))
def _states(
    p, columns, p_inner, p_outer_stride, p_inner_stride, p_column_stride,
    q, q_columns, q_inner, q_outer_stride, q_inner_stride, q_column_stride,
    scale, softcap, temperature, temperatures, mask, segments, states,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENT: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // segments
    if is_masked(mask, row, HAS_MASK):
        return
    column = (tl.program_id(0) % segments) * SEGMENT + tl.arange(0, SEGMENT)
    t = row_temperature(temperatures, temperature, row, PER_ROW)
    p_start = p + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_start = q + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    _, z_p = load_z(p_start, column, columns, p_column_stride, scale, softcap, t, FORM)
    _, z_q = load_z(q_start, column, columns, q_column_stride, scale, softcap, t, FORM)
    largest_p, largest_q = tl.max(z_p), tl.max(z_q)
    reference_p = tl.where(largest_p == float("-inf"), 0.0, largest_p)  # nothing but -inf: any number will do
    reference_q = tl.where(largest_q == float("-inf"), 0.0, largest_q)
    anchor = tl.max(tl.where(z_p == largest_p, z_q, float("-inf")))  # z_q of p's likeliest word: see _gradient
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
    d_p = below(z_p, reference_p)
    e_p = tl.exp2(d_p * LOG2E)
    state = states + tl.program_id(0).to(tl.int64) * STATE
    tl.store(state, reference_p)
    tl.store(state + 1, tl.sum(e_p))
    tl.store(state + 2, reference_q)
    tl.store(state + 3, tl.sum(tl.exp2((z_q - reference_q) * LOG2E)))
    tl.store(state + 4, anchor)
    tl.store(state + 5, tl.sum(tl.where(e_p > 0.0, e_p * (d_p - (z_q - anchor)), 0.0)))  # where p is 0, so is the term


@triton.jit
def _side(reference, total):
    """A row's reference over its segments, its sum of exp(z - reference), and what each segment's sum shrinks by."""
    nonzero = total > 0.0
    shift = tl.max(tl.where(nonzero, reference, float("-inf")), axis=1)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    factor = tl.where(nonzero, tl.exp((reference - shift[:, None]).to(tl.float64)), 0.0)
    sums = tl.sum(factor * total, axis=1)
    broken = tl.max((total != total).to(tl.int32), axis=1) > 0  # nan, and a row of nothing but -inf is no distribution
    return shift, tl.where((sums == 0.0) | broken, float("nan"), sums), factor


@triton.jit(do_not_specialize=("segments", "rows"))
def _finish(
    states, segments, rows, mask, divergence, shift_p, sum_p, shift_q, sum_q, mean_p, rest_p, mean_q, rest_q,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, STATES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    counts = row < rows
    if HAS_MASK:
        counts = counts & (tl.load(mask + row, mask=row < rows, other=0) != 0)
    part = tl.arange(0, STATES)
    present = counts[:, None] & (part < segments)[None, :]
    state = states + (row.to(tl.int64)[:, None] * segments + part[None, :]) * STATE
    reference_p = tl.load(state, mask=present, other=0.0)
    total_p = tl.load(state + 1, mask=present, other=0.0).to(tl.float64)
    reference_q = tl.load(state + 2, mask=present, other=0.0)
    total_q = tl.load(state + 3, mask=present, other=0.0).to(tl.float64)
    anchors = tl.load(state + 4, mask=present, other=0.0).to(tl.float64)
    dot = tl.load(state + 5, mask=present, other=0.0).to(tl.float64)

    own_p, sums_p, factor_p = _side(reference_p, total_p)
    own_q, sums_q, _ = _side(reference_q, total_q)
    likeliest = present & (total_p > 0.0) & (reference_p == own_p[:, None])
    anchor = tl.max(tl.where(likeliest, anchors, float("-inf")), axis=1)
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
    moved = (reference_p - own_p[:, None]).to(tl.float64) - (anchors - anchor[:, None])
    mean = tl.sum(tl.where(factor_p > 0.0, factor_p * (dot + total_p * moved), 0.0), axis=1) / sums_p
    inside = row < rows
    kl = mean + (own_q.to(tl.float64) - anchor) - tl.log(sums_p) + tl.log(sums_q)
    tl.store(divergence + row, tl.where(counts, kl, 0.0), mask=inside)
    tl.store(shift_p + row, tl.where(counts, own_p, 0.0), mask=inside)
    tl.store(sum_p + row, tl.where(counts, sums_p, 1.0), mask=inside)
    tl.store(shift_q + row, tl.where(counts, own_q, 0.0), mask=inside)
    tl.store(sum_q + row, tl.where(counts, sums_q, 1.0), mask=inside)
    rounded = mean.to(tl.float32)
    tl.store(mean_p + row, tl.where(counts, rounded, 0.0), mask=inside)
    tl.store(rest_p + row, tl.where(counts, mean - rounded.to(tl.float64), 0.0), mask=inside)
    tl.store(mean_q + row, tl.where(counts, anchor, 0.0), mask=inside)
    tl.store(rest_q + row, tl.zeros([ROWS], tl.float32), mask=inside)


@triton.jit
def _softmax(z, shift, total):
    """z - shift, finite, and p."""
    d = below(z, shift)
    return d, tl.exp2(d * LOG2E) * (1.0 / total)


@triton.jit(do_not_specialize=("p_inner", "q_inner", "segments"))
def _js_states(
    p, columns, p_inner, p_outer_stride, p_inner_stride, p_column_stride,
    q, q_columns, q_inner, q_outer_stride, q_inner_stride, q_column_stride,
    scale, softcap, temperature, temperatures, mask, segments, shift_p, sum_p, shift_q, sum_q, states,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENT: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // segments
    if is_masked(mask, row, HAS_MASK):
        return
    column = (tl.program_id(0) % segments) * SEGMENT + tl.arange(0, SEGMENT)
    t = row_temperature(temperatures, temperature, row, PER_ROW)
    p_start = p + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_start = q + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    _, z_p = load_z(p_start, column, columns, p_column_stride, scale, softcap, t, FORM)
    _, z_q = load_z(q_start, column, columns, q_column_stride, scale, softcap, t, FORM)
    total_p, total_q = tl.load(sum_p + row), tl.load(sum_q + row)
    d_p, p_v = _softmax(z_p, tl.load(shift_p + row), total_p)
    d_q, q_v = _softmax(z_q, tl.load(shift_q + row), total_q)
    above_p, above_q, far = _above_level(d_p - d_q - tl.log(total_p / total_q))
    state = states + tl.program_id(0).to(tl.int64) * STATE
    tl.store(state, tl.sum(p_v * above_p))
    tl.store(state + 1, tl.sum(tl.where(far, 0.0, p_v)))
    tl.store(state + 2, tl.sum(tl.where(far, p_v, 0.0)))
    tl.store(state + 3, tl.sum(q_v * above_q))
    tl.store(state + 4, tl.sum(tl.where(far, 0.0, q_v)))
    tl.store(state + 5, tl.sum(tl.where(far, q_v, 0.0)))


@triton.jit
def _sum_over_segments(state, present):
    return tl.sum(tl.load(state, mask=present, other=0.0).to(tl.float64), axis=1)


@triton.jit(do_not_specialize=("segments", "rows"))
def _js_finish(
    states, segments, rows, mask, divergence, mean_p, rest_p, mean_q, rest_q,
    HAS_MASK: tl.constexpr, ROWS: tl.constexpr, STATES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    counts = inside
    if HAS_MASK:
        counts = counts & (tl.load(mask + row, mask=inside, other=0) != 0)
    part = tl.arange(0, STATES)
    present = counts[:, None] & (part < segments)[None, :]
    state = states + (row.to(tl.int64)[:, None] * segments + part[None, :]) * STATE
    above_p, near_p = _sum_over_segments(state, present), _sum_over_segments(state + 1, present)
    far_p, above_q = _sum_over_segments(state + 2, present), _sum_over_segments(state + 3, present)
    near_q, far_q = _sum_over_segments(state + 4, present), _sum_over_segments(state + 5, present)
    # KL(side || m), and that less log 2: of two sums that nearly cancel, each avoids the one of large terms.
    of_p, less_p = above_p + LOG2 * far_p, above_p - LOG2 * near_p
    of_q, less_q = above_q + LOG2 * far_q, above_q - LOG2 * near_q
    total = tl.where(far_p > near_p, LOG2 + less_p, of_p) + tl.where(far_q > near_q, LOG2 + less_q, of_q)
    tl.store(divergence + row, tl.where(counts, 0.5 * total, 0.0), mask=inside)
    tl.store(mean_p + row, of_p, mask=inside)
    tl.store(rest_p + row, less_p, mask=inside)
    tl.store(mean_q + row, of_q, mask=inside)
    tl.store(rest_q + row, less_q, mask=inside)


@triton.jit(do_not_specialize=("p_inner", "q_inner", "segments"))
def _gradient(
    p, columns, p_inner, p_outer_stride, p_inner_stride, p_column_stride,
    q, q_columns, q_inner, q_outer_stride, q_inner_stride, q_column_stride,
    scale, softcap, temperature, temperatures, mask, segments, shift_p, sum_p, shift_q, sum_q,
    mean_p, rest_p, mean_q, rest_q, grad, out_p, out_q,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr, SEGMENT: tl.constexpr, JS: tl.constexpr,
    NEED_P: tl.constexpr, NEED_Q: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // segments
    column = (tl.program_id(0) % segments) * SEGMENT + tl.arange(0, SEGMENT)
    to = row.to(tl.int64) * columns + column
    if is_masked(mask, row, HAS_MASK):
        if NEED_P:
            tl.store(out_p + to, tl.zeros([SEGMENT], dtype=out_p.dtype.element_ty), mask=column < columns)
        if NEED_Q:
            tl.store(out_q + to, tl.zeros([SEGMENT], dtype=out_q.dtype.element_ty), mask=column < columns)
        return
    t = row_temperature(temperatures, temperature, row, PER_ROW)
    p_start = p + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_start = q + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    x_p, z_p = load_z(p_start, column, columns, p_column_stride, scale, softcap, t, FORM)
    x_q, z_q = load_z(q_start, column, columns, q_column_stride, scale, softcap, t, FORM)
    total_p, total_q = tl.load(sum_p + row), tl.load(sum_q + row)
    d_p, p_v = _softmax(z_p, tl.load(shift_p + row), total_p)
    d_q, q_v = _softmax(z_q, tl.load(shift_q + row), total_q)
    upstream = tl.load(grad + row)
    if JS:  # d/dz_p = p (log p - log m - KL(p || m)) / 2, and the same of q
        upstream = 0.5 * upstream
        above_p, above_q, far = _above_level(d_p - d_q - tl.log(total_p / total_q))
        g_p = p_v * (above_p - tl.where(far, tl.load(rest_p + row), tl.load(mean_p + row)))
        g_q = q_v * (above_q - tl.where(far, tl.load(rest_q + row), tl.load(mean_q + row)))
    else:  # d/dz_p = p (log p - log q - KL), in which the logarithms of the sums cancel, and d/dz_q = q - p.
        # Measured from z_q of the likeliest word of p, the terms that weigh most are the smallest, roundings and all.
        far = d_p - (z_q - tl.load(mean_q + row))
        g_p = tl.where(
            p_v > 0.0, p_v * (far - tl.load(mean_p + row) - tl.load(rest_p + row)), 0.0
        )  # where p is 0, log q may be -inf
        g_q = q_v - p_v
    if NEED_P:
        g_p = chain(upstream * g_p, x_p, scale, softcap, t, FORM)
        tl.store(out_p + to, g_p.to(out_p.dtype.element_ty), mask=column < columns)
    if NEED_Q:
        g_q = chain(upstream * g_q, x_q, scale, softcap, t, FORM)
        tl.store(out_q + to, g_q.to(out_q.dtype.element_ty), mask=column < columns)


def js_segment(segment: int) -> int:
    """Half as many columns: with its six sums there are not the registers for more."""
    return segment // 2


def forward(
    p: Matrix, q: Matrix, t: Transform, mask: Tensor | None, divergence: int, results: Sequence[Tensor]
) -> None:
    each, shift_p, sum_p, shift_q, sum_q, *means = results
    size = sizes("full_kl", p.data.device)
    segment, warps = size["SEGMENT"], size["WARPS"]
    segments = triton.cdiv(p.columns, segment)
    states = torch.empty(p.rows, segments, STATE, dtype=torch.float32, device=p.data.device)
    inputs = *matrix_arguments(p), *matrix_arguments(q), *transform_arguments(t), mask
    row_kernel = {"HAS_MASK": mask is not None, "ROWS": FINISH_ROWS, "STATES": triton.next_power_of_2(segments)}
    rows_grid = (triton.cdiv(p.rows, FINISH_ROWS),)
    _states[(p.rows * segments,)](
        *inputs, segments, states, SEGMENT=segment, STATE=STATE, num_warps=warps, **flags(t, mask)
    )
    _finish[rows_grid](states, segments, p.rows, mask, *results, STATE=STATE, **row_kernel)
    if divergence:  # JS
        segment = js_segment(segment)
        segments = triton.cdiv(p.columns, segment)
        states = torch.empty(p.rows, segments, STATE, dtype=torch.float32, device=p.data.device)
        _js_states[(p.rows * segments,)](
            *inputs, segments, shift_p, sum_p, shift_q, sum_q, states, SEGMENT=segment, STATE=STATE, num_warps=warps,
            **flags(t, mask),
        )  # fmt: skip
        row_kernel["STATES"] = triton.next_power_of_2(segments)
        _js_finish[rows_grid](states, segments, p.rows, mask, each, *means, STATE=STATE, **row_kernel)


def gradient(
    p: Matrix,
    q: Matrix,
    t: Transform,
    mask: Tensor | None,
    divergence: int,
    results: Sequence[Tensor],
    grad: Tensor,
    out_p: Tensor | None,
    out_q: Tensor | None,
) -> None:
    size = sizes("full_kl", p.data.device)
    segment, warps = size["SEGMENT"], size["WARPS"]
    segments = triton.cdiv(p.columns, segment)
    _gradient[(p.rows * segments,)](
        *matrix_arguments(p), *matrix_arguments(q), *transform_arguments(t), mask, segments, *results[1:], grad,
        out_p, out_q,
        SEGMENT=segment, JS=bool(divergence), NEED_P=out_p is not None, NEED_Q=out_q is not None, num_warps=warps,
        **flags(t, mask),
    )  # fmt: skip
