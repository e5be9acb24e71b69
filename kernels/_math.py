"""Parts of the kernels over a vocabulary: where a row is, from a raw logit to z and back, and launch arguments."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels.arguments import Matrix, Transform

LOG2E = tl.constexpr(1.4426950408889634)

# How a raw logit becomes z; compiled apart, so that the common case pays for none of it.
IDENTITY, SCALED, CAPPED = 0, 1, 2


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Return where a row starts, in elements. In 64 bits: rows * columns passes 2^31 at 16,384 x 131,072."""
    row = row.to(tl.int64)
    return (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def tanh(y):
    """Compute tanh(y) to 2 units in the last place, near 0 too (Cephes: a polynomial below 0.625, exp above)."""
    size = tl.abs(y)
    square = y * y
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * y + y
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 20.0)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(y < 0.0, -far, far))


@triton.jit
def z_of(x, scale, softcap, temperature, FORM: tl.constexpr):
    """softcap * tanh(scale * x / softcap) / temperature, divided as torch divides."""
    if FORM == 0:
        return x
    z = x * scale
    if FORM == 2:
        z = softcap * tanh(tl.div_rn(z, softcap))
    return tl.div_rn(z, temperature)


@triton.jit
def load_z(start, column, columns, column_stride, scale, softcap, temperature, FORM: tl.constexpr):
    """Raw logits of a segment and their z; both -inf past the end."""
    inside = column < columns
    x = tl.load(start + column.to(tl.int64) * column_stride, mask=inside, other=float("-inf")).to(tl.float32)
    z = z_of(x, scale, softcap, temperature, FORM)
    if FORM == 2:  # which makes a number of -inf
        z = tl.where(inside, z, float("-inf"))
    return x, z


@triton.jit
def below(z, shift):
    """z - shift, but no lower than where exp is 0 already, so that 0 times it is 0; nan stays nan."""
    return tl.maximum(z - shift, -200.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def chain(gradient, x, scale, softcap, temperature, FORM: tl.constexpr):
    """The gradient in x, from that in z."""
    if FORM == 0:
        return gradient
    if FORM == 2:  # 1 - tanh(y)^2 as 4 e / (1 + e)^2, which keeps its digits where tanh is nearly 1
        e = tl.exp2(tl.abs(tl.div_rn(x * scale, softcap)) * (-2.0 * LOG2E))
        gradient = gradient * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    return gradient * tl.div_rn(scale, temperature)


@triton.jit
def row_temperature(temperatures, temperature, row, PER_ROW: tl.constexpr):
    if PER_ROW:
        return tl.load(temperatures + row)
    return temperature


@triton.jit
def is_masked(mask, row, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        return tl.load(mask + row) == 0
    return False


def matrix_arguments(x: Matrix) -> tuple[Any, ...]:
    """logits, columns, inner, outer_stride, inner_stride, column_stride."""
    return x.data, x.columns, x.inner, x.outer_stride, x.inner_stride, x.column_stride


def transform_arguments(t: Transform) -> tuple[Any, ...]:
    """scale, softcap, temperature, temperatures."""
    return t.scale, t.softcap, t.temperature, t.temperatures


def flags(t: Transform, mask: Tensor | None) -> dict[str, Any]:
    """Return the compile-time flags of a transform and a mask."""
    identity = t.scale == 1.0 and t.temperature == 1.0 and t.temperatures is None
    form = CAPPED if t.softcap > 0 else IDENTITY if identity else SCALED
    return {"FORM": form, "PER_ROW": t.temperatures is not None, "HAS_MASK": mask is not None}
