"""Ops may be captured into a CUDA graph: nothing in them waits for the device or reads from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def token_logprobs(z: Tensor, ref: Tensor) -> list[Tensor]:
    return list(ops.token_logprobs(z, torch.full((64,), 3, device=z.device), mask=z[:, 0] > -1.0))


def full_kl(z: Tensor, ref: Tensor) -> list[Tensor]:
    return [ops.full_kl(z, ref, kind=kind) for kind in ("kl", "reverse_kl", "js")]


def kl_estimate(z: Tensor, ref: Tensor) -> list[Tensor]:
    return [ops.kl_estimate(z, ref, "k3+", z > ref)]


def gae(z: Tensor, ref: Tensor) -> list[Tensor]:
    return [z * sum(ops.gae(z, ref, mask=z > -1.0, scores=ref[:, 0]))]


def linear_token_logprobs(z: Tensor, ref: Tensor) -> list[Tensor]:
    return list(ops.linear_token_logprobs(z, ref.T.contiguous(), torch.full((64,), 3, device=z.device)))


@pytest.mark.parametrize("op", [token_logprobs, full_kl, kl_estimate, gae, linear_token_logprobs])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_gives_the_same_bits_on_new_inputs(op: Callable[..., Any], backend: str) -> None:
    z, ref = (cases.random(64, 64, seed=seed).cuda() for seed in (0, 1))
    z.requires_grad_()

    def step() -> list[Tensor]:
        with ops.use_backend(backend):
            outputs = op(z, ref)
        return [*outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), z)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles, allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(cases.random(64, 64, seed=5))
    graph.replay()
    for mine, want in zip(captured, step(), strict=True):
        assert torch.equal(mine, want)
