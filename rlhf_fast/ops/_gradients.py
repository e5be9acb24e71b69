"""The backward pass of a loss whose gradients the forward pass took: those, times the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import PairTensors, PPOTensors
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._rows import is_plain


def needs_gradient(x: Tensor | None) -> bool:
    """Return whether autograd will ask for the gradient in x."""
    return torch.is_grad_enabled() and x is not None and x.requires_grad


Tensors = TypeVar("Tensors", PPOTensors, PairTensors)


def with_constants(tensors: Tensors, own: Sequence[str]) -> Tensors:
    """Detach all tensors but ``own``, those that a gradient flows to."""
    given = zip(tensors._fields, tensors, strict=True)
    return type(tensors)._make(
        [x if x is None or name in own or not x.requires_grad else x.detach() for name, x in given]
    )


def scaled_gradient(upstream: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """upstream * gradient in x's dtype. Knows x, so that autograd refuses to go on from it."""
    return (gradient * upstream).to(x.dtype)


def _fake(upstream: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=x.dtype)


_op = Op(scaled_gradient, _fake)


def in_x(upstream: Tensor, gradient: Tensor, x: Tensor, inplace: bool = False) -> Tensor:
    """The gradient in x. ``inplace``: written over ``gradient``, float32, where nothing can ask for that again."""
    traced = torch.compiler.is_compiling() or not is_plain([upstream, gradient])
    if traced or torch.is_grad_enabled() or not inplace or _may_run_again():
        result: Tensor = _op(upstream, gradient, x)
        return result
    return gradient.mul_(upstream).to(x.dtype)


def _may_run_again() -> bool:
    """Return whether this backward pass keeps its graph."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())
