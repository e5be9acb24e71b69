"""linear and rms_norm for inference: the products of a few rows with wide weights, where libraries are far from the
limit. A row's bits do not depend on the other rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference

BACKENDS = ("cpu", "reference")
GATES = ("none", "silu", "gelu_tanh")


class Weight(NamedTuple):
    """Factors of a linear layer: x @ weight.T + bias + scaling * (x @ a.T) @ b.T."""

    weight: Tensor  # (n, K)
    bias: Tensor | None = None  # (n,)
    lora: tuple[Tensor, Tensor, float] | None = None  # (r, K), (n, r), scaling


def linear(x: Tensor, weights: Sequence[Weight], gate: str = "none") -> list[Tensor]:
    """x times up to three weights that read the same rows, in one launch. Inference only: no gradients.

    Args:
        x: (M, K), float32, bfloat16 or float16.
        weights: one to three of any strides, in x's dtype, each with its bias and low-rank adapter if it has them.
        gate: "silu" or "gelu_tanh": two weights give f(x @ w0.T) * (x @ w1.T), and that is the only result.

    Returns:
        (M, n) for each weight, or the one that is gated; sums are float32, in one fixed order for each element.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.floats(x=x)
    _checks.option("gate", gate, GATES)
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (M, K)")
    if not 1 <= len(weights) <= 3 or (gate != "none" and len(weights) != 2):
        raise ValueError(f"weights: {len(weights)}, expected {'2 with a gate' if gate != 'none' else '1 to 3'}")
    for weight in weights:
        _check_weight(x, weight)
    if gate != "none" and weights[0].weight.shape != weights[1].weight.shape:
        raise ValueError(
            f"weights: shapes {tuple(weights[0].weight.shape)} and {tuple(weights[1].weight.shape)}, "
            "expected the same with a gate"
        )
    backend = dispatch.choose("linear", BACKENDS, x)
    if backend == "reference":
        return reference.linear(x, weights, gate)
    return compiled.Linear([_readable(weight) for weight in weights], GATES.index(gate))(_rows(x))


def _check_weight(x: Tensor, factors: Weight) -> None:
    """Require everything of a weight in x's dtype, on x's device, and of a shape that fits."""
    _checks.floats(weights=factors.weight)
    shape, dtype = tuple(factors.weight.shape), factors.weight.dtype
    if factors.weight.dim() != 2 or shape[1] != x.shape[1] or dtype != x.dtype:
        raise ValueError(f"weights: shape {shape} of {dtype}, expected (n, {x.shape[1]}) of {x.dtype} like x")
    _checks.linear(x, factors.weight, factors.bias, factors.lora)
    a, b = (None, None) if factors.lora is None else factors.lora[:2]
    tensors = {"bias": factors.bias, "lora a": a, "lora b": b}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name}: {tensor.dtype}, expected {x.dtype} like x")
    _checks.devices(x=x, weights=factors.weight, **tensors)


def _rows(x: Tensor) -> Tensor:
    """x with each row contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _readable(factors: Weight) -> Weight:
    lora = None if factors.lora is None else (_rows(factors.lora[0]), factors.lora[1].contiguous(), factors.lora[2])
    return Weight(_rows(factors.weight), None if factors.bias is None else factors.bias.contiguous(), lora)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) along the last dimension. Inference only: no gradients.

    Args:
        x: (..., H), float32, bfloat16 or float16.
        weight: (H,), float; where its dtype is not x's, the reference computes it in the wider one.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    _checks.floats(x=x, weight=weight)
    _checks.devices(x=x, weight=weight)
    if x.dim() < 1:
        raise ValueError("x: shape (), expected (..., H)")
    _checks.shapes(x.shape[-1:], "the last dimension of x", weight=weight)
    backend = dispatch.choose("rms_norm", BACKENDS, x)
    if backend == "reference" or weight.dtype != x.dtype or x.numel() == 0:
        return reference.rms_norm(x, weight, eps, offset)
    return compiled.rms_norm(x, weight.contiguous(), eps, offset)


def usable(x: Tensor) -> bool:
    """Return whether the compiled kernels are to multiply tensors like x, in the dtype that they are made for."""
    here = "cpu" not in dispatch.MISSING and x.device.type == "cpu" and x.dtype == torch.float32
    return here and dispatch.asked() in ("", "cpu")
