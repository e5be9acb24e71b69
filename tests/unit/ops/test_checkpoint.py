"""Every differentiable op under non-reentrant checkpointing, which gives an op its saved tensors once: the gradients
are those of the plain call, bit for bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_fast import ops
from tests.unit.ops import conftest
from tests.unit.ops.cases import cu_seqlens_of, random, random_tokens

N, V, H, R = 9, 40, 8, 2
TOKENS, MASK = random_tokens(N, vocabulary=V), torch.arange(N) % 4 != 1
CU = cu_seqlens_of([4, 0, 5])


def scores(seed: int, n: int = N) -> Tensor:
    return random(n, seed=seed)


def head(lora: bool = True) -> tuple[Tensor, ...]:
    """hidden, weight, bias, a, b"""
    return random(N, H), random(V, H, seed=1), random(V, seed=2), random(R, H, seed=3), random(V, R, seed=4)


# Name -> (what gradients are in, what is called with those). The loss is the sum of all differentiable outputs.
CASES: dict[str, tuple[tuple[Tensor, ...], Callable[..., Any]]] = {
    "token_logprobs": ((random(N, V),), lambda z: ops.token_logprobs(z, TOKENS, 0.7, mask=MASK)),
    "token_logprobs, in place": (
        (random(N, V),),
        lambda z: ops.token_logprobs(z * 2, TOKENS, inplace_backward=True),
    ),
    "linear_token_logprobs": (
        head(),
        lambda h, w, bias, a, b: ops.linear_token_logprobs(h, w, TOKENS, bias, (a, b, 0.5), mask=MASK),
    ),
    "kl_estimate": ((scores(0), scores(1)), lambda p, q: ops.kl_estimate(p, q, "k3+", MASK)),
    "full_kl": ((random(N, V), random(N, V, seed=1)), lambda p, q: ops.full_kl(p, q, mask=MASK)),
    "full_kl, js": ((random(N, V), random(N, V, seed=1)), lambda p, q: ops.full_kl(p, q, kind="js")),
    "ppo_loss": (
        (scores(0), scores(1), scores(2)),
        lambda p, v, e: ops.ppo_loss(
            p, scores(3), scores(4), v, scores(5), scores(6), MASK, entropy=e, entropy_coef=0.1,
            ref_logprobs=scores(7), kl_coef=0.1,
        ),
    ),
    "ppo_loss, sequences": (
        (scores(0),),
        lambda p: ops.ppo_loss(p, scores(3), scores(4), cu_seqlens=CU, ratio="sequence", aggregation="sequence_mean"),
    ),
    "linear_ppo_loss": (
        (*head(), scores(5)),
        lambda h, w, bias, a, b, v: ops.linear_ppo_loss(
            h, w, TOKENS, scores(3), scores(4), bias=bias, lora=(a, b, 0.5), values=v, old_values=scores(6),
            returns=scores(7), entropy_coef=0.1, mask=MASK,
        ),
    ),
    "cross_entropy": ((random(N, V),), lambda z: ops.cross_entropy(z, TOKENS, MASK)),
    "cross_entropy, smoothed": (
        (random(N, V),),
        lambda z: ops.cross_entropy(z, TOKENS, MASK, label_smoothing=0.1, z_loss=1e-3),
    ),
    "linear_cross_entropy": (
        head(),
        lambda h, w, bias, a, b: ops.linear_cross_entropy(h, w, TOKENS, bias=bias, lora=(a, b, 0.5), mask=MASK),
    ),
    "linear_cross_entropy, smoothed": (
        head(),
        lambda h, w, bias, a, b: ops.linear_cross_entropy(
            h, w, TOKENS, bias=bias, lora=(a, b, 0.5), label_smoothing=0.1, z_loss=1e-3
        ),
    ),
    "dpo_loss": ((scores(0), scores(1)), lambda c, r: ops.dpo_loss(c, r, scores(2), scores(3))),
    "linear_dpo_loss": (
        (random(4, H), random(V, H, seed=1)),
        lambda h, w: ops.linear_dpo_loss(
            h, w, random_tokens(4, vocabulary=V), scores(5, 1), scores(6, 1), cu_seqlens=cu_seqlens_of([2, 2])
        ),
    ),
    "reward_loss": ((scores(0), scores(1)), lambda c, r: ops.reward_loss(c, r, 0.1, center_coef=0.01)),
    "sequence_sum": ((scores(0),), lambda x: ops.sequence_sum(x, MASK, CU)),
    "whiten": ((scores(0),), lambda x: ops.whiten(x, MASK)),
}  # fmt: skip
NO_GRADIENT = {"gae", "group_advantages", "linear", "rms_norm", "sample", "paged_attention", "write_kv"}
backend = conftest.backend


def test_no_op_is_left_out() -> None:
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {"use_backend"}
    assert {name.split(",")[0] for name in CASES} == {name for name in public if not name[0].isupper()} - NO_GRADIENT


def gradients(call: Callable[..., Any], inputs: tuple[Tensor, ...], through: Callable[..., Any]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = through(call, *leaves)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    sum((i + 1) * out.sum() for i, out in enumerate(outputs) if out.requires_grad).backward()  # type: ignore[union-attr]
    return [x.grad for x in leaves if x.grad is not None]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_call(backend: conftest.Backend, name: str) -> None:
    inputs, call = CASES[name]

    def checkpointed(call: Callable[..., Any], *leaves: Tensor) -> Any:
        return checkpoint(call, *leaves, use_reentrant=False)

    with ops.use_backend("reference" if name == "whiten" else backend.name):
        want = gradients(call, inputs, lambda call, *leaves: call(*leaves))
        got = gradients(call, inputs, checkpointed)
    assert len(got) == len(want) == len(inputs)
    for mine, true in zip(got, want, strict=True):
        assert torch.equal(mine, true)
