"""What the ops, their kernels and autograd hand to each other is told apart by name."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops._library import Op


def doubled(backward: Any) -> Op:
    """An op of three inputs with this backward, under a name of its own."""

    def forward(ignored: float, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x + y

    forward.__name__ = f"doubled_{uuid.uuid4().hex}"
    forward.__annotations__ = {"ignored": float, "x": Tensor, "y": Tensor, "return": Tensor}
    return Op(forward, lambda ignored, x, y: torch.empty_like(x), lambda ctx, inputs, output: None, backward)


@pytest.mark.parametrize("way", ["eager", "transformed", "registered"])
def test_gradients_reach_the_inputs_of_their_names_and_no_others(way: str) -> None:
    op = doubled(lambda ctx, upstream: {"y": upstream, "x": 2 * upstream})
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    in_x, in_y = torch.autograd.grad(getattr(op, way)(0.0, x, y).sum(), (x, y))
    assert torch.equal(in_x, torch.full((2,), 2.0)) and torch.equal(in_y, torch.ones(2))
    only_y = doubled(lambda ctx, upstream: {"y": upstream})
    assert torch.autograd.grad(getattr(only_y, way)(0.0, x, y).sum(), x, allow_unused=True) == (None,)


def test_a_gradient_in_what_is_no_input_is_refused() -> None:
    op = doubled(lambda ctx, upstream: {"z": upstream})
    with pytest.raises(TypeError, match=r"doubled_\w+: a gradient in z, expected one in some of ignored, x, y"):
        op(0.0, torch.ones(2, requires_grad=True), torch.ones(2)).sum().backward()
