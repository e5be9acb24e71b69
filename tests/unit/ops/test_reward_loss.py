from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.compare import outputs_and_gradients as run


def scores(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return cases.random(n, scale=2, dtype=dtype), cases.random(n, seed=1, scale=2, dtype=dtype)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize("margin", [None, 0.5, "tensor"])
@pytest.mark.parametrize(("center", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.1, 0.2)])
def test_is_the_definition(margin: Any, center: float, smoothing: float) -> None:
    chosen, rejected = scores(9)
    margin = cases.random(9, seed=2, dtype=torch.float64).abs() if margin == "tensor" else margin
    margins = margin.tolist() if isinstance(margin, Tensor) else [margin or 0.0] * 9
    want = 0.0
    for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins, strict=True):
        x = c - r - m
        want += -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x) + center * (c + r) ** 2
    loss, stats = ops.reward_loss(chosen, rejected, margin, center, smoothing)
    assert_close(loss, torch.tensor(want / 9, dtype=torch.float64), 1e-12)
    assert_close(stats["accuracy"], (chosen > rejected).double().mean(), 1e-12)
    assert_close(stats["margin"], (chosen - rejected).mean(), 1e-12)


def test_an_identical_pair_loses_ln_2_teaches_nothing_and_counts_half() -> None:
    score = cases.random(5, dtype=torch.float64).requires_grad_()
    loss, stats = ops.reward_loss(score, score)
    loss.backward()
    assert_close(loss, torch.tensor(math.log(2)), 1e-7)
    assert torch.equal(gradient_of(score), torch.zeros(5))
    assert stats["accuracy"].item() == 0.5


def test_scores_may_be_shifted_together() -> None:
    chosen, rejected = scores(9)
    assert_close(ops.reward_loss(chosen + 7, rejected + 7)[0], ops.reward_loss(chosen, rejected)[0], 1e-12)


def test_gradient_checks_in_float64() -> None:
    chosen, rejected = (x.requires_grad_() for x in scores(5))
    margin = torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r: ops.reward_loss(c, r, margin, 0.1, 0.1)[0], [chosen, rejected])


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_float32_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    def torch_of_today(c: Tensor, r: Tensor) -> Tensor:
        wide = torch.promote_types(c.dtype, torch.float32)
        return -torch.nn.functional.logsigmoid(c.to(wide) - r.to(wide)).mean()

    inputs = scores(40, dtype)
    got, gradients = run(lambda c, r: ops.reward_loss(c, r)[0], inputs, [torch.ones(())])
    stock, stock_gradients = run(torch_of_today, inputs, [torch.ones(())])
    truth, true_gradients = run(torch_of_today, [x.double() for x in inputs], [torch.ones(())])
    assert got[0].dtype == torch.float32
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


def test_micro_batches_with_a_common_denominator_add_up() -> None:
    chosen, rejected = scores(7)
    whole, stats = ops.reward_loss(chosen, rejected, 0.2, 0.01)
    parts = [ops.reward_loss(chosen[i], rejected[i], 0.2, 0.01, denominator=7) for i in (slice(0, 2), slice(2, 7))]
    assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole, 1e-12)
    for name in stats:
        assert_close(torch.stack([s[name] for _, s in parts]).sum(), stats[name], 1e-12, name)


def test_no_pairs_give_zero() -> None:
    loss, stats = ops.reward_loss(torch.zeros(0, requires_grad=True), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 and not value.requires_grad for value in stats.values())


def test_leaves_its_inputs_alone() -> None:
    chosen, rejected = (x.requires_grad_() for x in scores(4))
    assert_leaves_inputs_alone(ops.reward_loss, chosen, rejected, torch.ones(4), 0.1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chosen": torch.zeros(3, 1)}, ValueError, r"chosen: shape \(3, 1\), expected \(P,\)"),
        ({"margin": torch.zeros(2)}, ValueError, r"margin: shape \(2,\), expected \(3,\) like chosen"),
        ({"margin": "wide"}, TypeError, "margin: str, expected a number"),
        ({"center_coef": -1}, ValueError, "center_coef: -1, expected a number >= 0"),
        ({"label_smoothing": 0.7}, ValueError, "label_smoothing: 0.7, expected a number >= 0 and <= 0.5"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.reward_loss(**{"chosen": torch.zeros(3), "rejected": torch.zeros(3), **change})
