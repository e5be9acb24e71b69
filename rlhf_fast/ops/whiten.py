"""whiten: shift and scale to mean 0 and variance 1 over the unmasked elements."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, dispatch, reference

BACKENDS = ("reference",)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) * rsqrt(var + eps), mean and variance over all unmasked elements of x together.

    The variance is Bessel's, sum (x - mean)^2 / (n - 1), the default of ``torch.var`` and what TRL and verl use for
    advantages; with one element it is taken as 0. ``shift_mean=False`` adds the mean back (for rewards, whose sign
    should stay).

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        mask: same shape, bool, or None for all. Where False, the output and the gradient are exactly 0 and x may hold
            anything.
        shift_mean: whether the result has mean 0, or the mean of x.
        eps: > 0, added to the variance.

    Returns:
        Same shape, float32 (float64 for float64 x). With one unmasked element: 0, or that element if not shift_mean.
        With none: all 0.

    Raises:
        TypeError, ValueError: dtype, shape or device do not fit, or eps is not > 0.
    """
    _checks.floats(x=x)
    _checks.devices(x=x, mask=mask)
    _checks.masks(x.shape, "x", mask)
    _checks.number("eps", eps, above=0)
    dispatch.choose("whiten", BACKENDS, x)
    return reference.whiten(x, mask, shift_mean, eps)
