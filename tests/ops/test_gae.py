from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone
from tests.ops.compare import outputs_and_gradients as run


def definition(
    rewards: list[float], values: list[float], gamma: float, lam: float, last_value: float = 0.0
) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, each delta from its own two values: O(n^2), on lists without holes."""
    n = len(rewards)
    following = [*values[1:], last_value]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


def definition_of_rows(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition on each row's unmasked tokens alone, put back where they were, zeros elsewhere."""
    advantages = torch.zeros_like(rewards)
    for b, real in enumerate(mask):
        last = 0.0 if bootstrap is None else float(bootstrap[b])
        row = definition(rewards[b][real].tolist(), values[b][real].tolist(), gamma, lam, last)
        advantages[b][real] = torch.tensor(row, dtype=rewards.dtype)
    return advantages, torch.where(mask, advantages + values, 0)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    return cases.random(*shape, dtype=torch.float64), cases.random(*shape, seed=1, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_is_the_definition(gamma: float, lam: float, bootstrapped: bool) -> None:
    rewards, values = inputs(4, 9)
    bootstrap = cases.random(4, seed=2, dtype=torch.float64) if bootstrapped else None
    got = ops.gae(rewards, values, gamma, lam, mask=cases.holes(), bootstrap=bootstrap)
    want = definition_of_rows(rewards, values, cases.holes(), gamma, lam, bootstrap)
    assert_close(got[0], want[0], 1e-12, "advantages")
    assert_close(got[1], want[1], 1e-12, "returns")


def test_without_a_mask_every_token_counts() -> None:
    rewards, values = inputs(3, 5)
    got = ops.gae(rewards, values)
    want = definition_of_rows(rewards, values, torch.ones(3, 5, dtype=torch.bool), 1.0, 0.95)
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1], 1e-12)


@cases.property_test
@given(cases.ragged_masks(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_packed_equals_padded_equals_definition(
    ragged: tuple[list[int], Tensor], gamma: float, lam: float, bootstrapped: bool
) -> None:
    lengths, mask = ragged
    rewards, values = inputs(*mask.shape)
    bootstrap = cases.random(len(lengths), seed=2, dtype=torch.float64) if bootstrapped else None
    want = definition_of_rows(rewards, values, mask, gamma, lam, bootstrap)
    padded = ops.gae(rewards, values, gamma, lam, mask, bootstrap=bootstrap)
    packed = ops.gae(
        cases.pack(rewards, lengths), cases.pack(values, lengths), gamma, lam,
        mask=cases.pack(mask, lengths), cu_seqlens=cases.cu_seqlens_of(lengths), bootstrap=bootstrap,
    )  # fmt: skip
    for i in (0, 1):
        assert_close(padded[i], want[i], 1e-12)
        assert torch.equal(packed[i], cases.pack(padded[i], lengths))


@cases.property_test
@given(cases.ragged_masks())
def test_with_gamma_and_lam_1_returns_are_the_reward_to_go(ragged: tuple[list[int], Tensor]) -> None:
    _, mask = ragged
    rewards, values = inputs(*mask.shape)
    _, returns = ops.gae(rewards, values, gamma=1.0, lam=1.0, mask=mask)
    real = torch.where(mask, rewards, 0)
    assert_close(returns, torch.where(mask, real.flip(1).cumsum(1).flip(1), 0), 1e-12)


def test_packed_without_a_mask_and_with_empty_sequences() -> None:
    lengths = [3, 0, 5, 1, 0]
    rewards, values = inputs(9)
    advantages, _ = ops.gae(rewards, values, 0.9, 0.8, cu_seqlens=cases.cu_seqlens_of(lengths))
    start = 0
    for n in lengths:
        want = definition(rewards[start : start + n].tolist(), values[start : start + n].tolist(), 0.9, 0.8)
        assert_close(advantages[start : start + n], torch.tensor(want, dtype=torch.float64), 1e-12)
        start += n


def test_a_hole_costs_no_discount() -> None:
    """A tool's answer between two tokens of the policy: the second is one step away, not four."""
    mask = torch.tensor([[True, False, False, False, True]])
    rewards = torch.tensor([[0.0, 9.0, 9.0, 9.0, 1.0]])
    advantages, _ = ops.gae(rewards, torch.zeros(1, 5), gamma=0.5, lam=1.0, mask=mask)
    assert advantages.tolist() == [[0.5, 0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything_and_get_no_gradient(garbage: float) -> None:
    mask = cases.holes()
    rewards, values = inputs(4, 9)
    upstream = [cases.random(4, 9, seed=3), cases.random(4, 9, seed=4)]
    got, gradients = run(
        lambda r, v: ops.gae(r, v, mask=mask),
        [cases.poison(rewards, mask, garbage), cases.poison(values, mask, garbage)],
        upstream,
    )
    want, want_gradients = run(lambda r, v: ops.gae(r, v, mask=mask), [rewards, values], upstream)
    for a, b in zip(got + gradients, want + want_gradients, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[~mask], torch.zeros_like(a[~mask]))


def test_gradient_checks_in_float64() -> None:
    rewards, values = (x.requires_grad_() for x in inputs(4, 9))
    bootstrap = cases.random(4, seed=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda r, v, b: ops.gae(r, v, 0.9, 0.8, mask=cases.holes(), bootstrap=b), [rewards, values, bootstrap]
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_empty_batches_keep_their_shape(shape: tuple[int, ...]) -> None:
    advantages, returns = ops.gae(torch.ones(shape), torch.zeros(shape))
    assert advantages.shape == returns.shape == shape
    packed = ops.gae(torch.ones(0), torch.ones(0), cu_seqlens=torch.tensor([0], dtype=torch.int32))
    assert packed[0].shape == (0,)


def test_float32_and_narrower_give_float32() -> None:
    for dtype in cases.FLOATS:
        rewards, values = cases.random(2, 6, dtype=dtype), cases.random(2, 6, seed=1, dtype=dtype)
        got = ops.gae(rewards, values)
        want = ops.gae(rewards.double(), values.double())
        assert got[0].dtype == got[1].dtype == torch.float32
        assert_close(got[0], want[0], 1e-5)


def test_padding_changes_no_bit() -> None:
    rewards, values = cases.random(2, 6), cases.random(2, 6, seed=1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    pad = torch.nn.functional.pad
    short = ops.gae(rewards, values, mask=mask)
    long = ops.gae(pad(rewards, (3, 4)), pad(values, (3, 4)), mask=pad(mask, (3, 4)))
    assert torch.equal(long[0][:, 3:9], short[0]) and torch.equal(long[1][:, 3:9], short[1])


def test_leaves_its_inputs_alone() -> None:
    rewards, values = cases.random(4, 9), cases.random(4, 9, seed=1).requires_grad_()
    assert_leaves_inputs_alone(ops.gae, rewards, values, mask=cases.holes(), bootstrap=torch.ones(4))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rewards": torch.zeros(6)}, ValueError, r"rewards: shape \(6,\), expected \(B, T\), or \(N,\) with cu_seq"),
        ({"values": torch.zeros(2, 4)}, ValueError, r"values: shape \(2, 4\), expected \(2, 3\) like rewards"),
        ({"values": torch.zeros(2, 3).int()}, TypeError, "values: int32, expected float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: float32, expected bool"),
        ({"bootstrap": torch.ones(3)}, ValueError, r"bootstrap: shape \(3,\), expected \(2,\) like the number of seq"),
        ({"gamma": 1.5}, ValueError, "gamma: 1.5, expected a number >= 0 and <= 1"),
        ({"lam": -0.1}, ValueError, "lam: -0.1, expected a number >= 0 and <= 1"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"rewards: shape \(2, 3\), expected \(N,\) because cu_seq"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.gae(**{"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), **change})


@pytest.mark.parametrize(
    ("cu_seqlens", "text"),
    [
        ([0, 2, 5], "cu_seqlens: runs from 0 to 5, expected from 0 to 6 like rewards"),
        ([1, 6], "cu_seqlens: runs from 1 to 6, expected from 0 to 6 like rewards"),
        ([0, 4, 2, 6], "cu_seqlens: falls after index 1, expected it never to"),
        ([], r"cu_seqlens: shape \(0,\), expected \(B \+ 1,\)"),
    ],
)
def test_bad_cu_seqlens_are_named(cu_seqlens: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ops.gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))
