from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import reference
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.unit.ops.conftest import Backend

KINDS = ("grpo", "dr_grpo", "rloo")


def by_the_papers(rewards: list[float], kind: str) -> list[float]:
    """Of one group, in Python."""
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    if kind == "rloo":
        return [r - statistics.fmean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (deviation + 1e-6) if kind == "grpo" else r - mean for r in rewards]


@cases.property_test
@given(cases.ragged_masks(), st.sampled_from(KINDS))
def test_is_what_the_papers_say_packed_and_padded(ragged: tuple[list[int], Tensor], kind: str) -> None:
    sizes, mask = ragged
    rewards = cases.random(*mask.shape, dtype=torch.float64)
    want = torch.zeros(mask.shape, dtype=torch.float64)
    for g, real in enumerate(mask):
        want[g, real] = torch.tensor(by_the_papers(rewards[g, real].tolist(), kind), dtype=torch.float64)
    assert_close(ops.group_advantages(rewards, kind, mask), want, 1e-9)
    where = {"mask": cases.pack(mask, sizes), "cu_groups": cases.cu_seqlens_of(sizes)}
    assert_close(ops.group_advantages(cases.pack(rewards, sizes), kind, **where), cases.pack(want, sizes), 1e-9)
    single = ops.group_advantages(cases.pack(rewards, sizes).float(), kind, **where)  # on this machine's kernels
    assert_close(single, cases.pack(want, sizes), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_of_a_group_add_up_to_zero_and_shift_with_nothing(kind: str) -> None:
    rewards = cases.random(5, 8, dtype=torch.float64)
    advantages = ops.group_advantages(rewards, kind)
    assert_close(advantages.sum(1), torch.zeros(5), 1e-12)
    assert_close(ops.group_advantages(rewards + 3, kind), advantages, 1e-9)


def test_rloo_is_dr_grpo_times_n_over_n_less_1() -> None:
    rewards = cases.random(5, 8, dtype=torch.float64)
    assert_close(ops.group_advantages(rewards, "rloo"), ops.group_advantages(rewards, "dr_grpo") * 8 / 7, 1e-12)


def test_equal_rewards_say_nothing(backend: Backend) -> None:
    for kind in KINDS:
        assert_close(backend(ops.group_advantages, torch.full((3, 4), 0.7), kind), torch.zeros(3, 4), 1e-6)
        assert not backend(ops.group_advantages, cases.random(6, 1), kind).any()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_no_worse_than_torch(kernel_backend: Backend, kind: str, dtype: torch.dtype) -> None:
    sizes = [4, 0, 130, 1, 7]
    mask = cases.inside(sizes, 130) & (cases.random(5, 130, seed=1) > -0.5)
    rewards = cases.poison(cases.random(5, 130, dtype=dtype), mask, math.nan)
    mine = kernel_backend(ops.group_advantages, rewards, kind, mask)
    stock, truth = (reference.group_advantages(x, kind, mask) for x in (rewards, rewards.double()))
    assert mine.dtype == torch.float32
    assert_no_worse_than_torch(mine, stock, truth)
    flat, starts = cases.pack(rewards, sizes), cases.cu_seqlens_of(sizes)
    packed = kernel_backend(ops.group_advantages, flat, kind, cases.pack(mask, sizes), starts)
    assert torch.equal(packed, cases.pack(mine, sizes))


def test_alone_or_permuted_a_group_gets_the_same_bits(kernel_backend: Backend) -> None:
    rewards, order = cases.random(5, 70), torch.tensor([3, 0, 4, 2, 1])
    whole = kernel_backend(ops.group_advantages, rewards)
    assert torch.equal(kernel_backend(ops.group_advantages, rewards[order]), whole[order])
    assert torch.equal(kernel_backend(ops.group_advantages, rewards[2:3]), whole[2:3])


def test_no_gradient_flows_through_a_target() -> None:
    rewards = cases.random(2, 3).requires_grad_()
    assert not ops.group_advantages(rewards).requires_grad
    assert_leaves_inputs_alone(ops.group_advantages, rewards=cases.random(2, 3))


def test_compiles_and_is_registered_as_torch_wants_it() -> None:
    rewards = cases.random(3, 4)
    compiled = torch.compile(ops.group_advantages, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, "rloo"), ops.group_advantages(rewards, "rloo"))
    op = torch.ops.rlhf_fast.group_advantages_forward.default
    torch.library.opcheck(op, (rewards, "grpo", None, None, 1e-6, 3, "cpu"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"rewards": torch.zeros(4)},
            ValueError,
            r"rewards: shape \(4,\), expected \(G, n\), or \(N,\) with",
        ),
        ({"rewards": torch.zeros(2, 2).int()}, TypeError, "rewards: int32, expected float32"),
        ({"kind": "gspo"}, ValueError, "kind: 'gspo', did you mean 'grpo'"),
        ({"eps": 0}, ValueError, "eps: 0, expected a number > 0"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: float32, expected bool"),
        (
            {"cu_groups": torch.tensor([0, 6])},
            ValueError,
            r"rewards: shape \(2, 3\), expected \(N,\) because cu_groups",
        ),
        (
            {"rewards": torch.zeros(6), "cu_groups": torch.tensor([0, 5])},
            ValueError,
            "cu_groups: runs from 0 to 5, expected from 0 to 6 like rewards",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.group_advantages(**{"rewards": torch.zeros(2, 3), **change})
