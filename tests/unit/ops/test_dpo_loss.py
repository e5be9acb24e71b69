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
from tests.unit.ops.conftest import Backend


def pairs(n: int, dtype: torch.dtype = torch.float64, scale: float = 5.0) -> Any:
    """chosen, rejected, ref_chosen, ref_rejected."""
    return [cases.random(n, seed=i, scale=scale, dtype=dtype) for i in range(4)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.5])
def test_is_the_definition(beta: float, smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = inputs = pairs(9)
    losses, wins, margins = [], [], []
    for c, r, ref_c, ref_r in zip(*(x.tolist() for x in inputs), strict=True):
        h = beta * ((c - ref_c) - (r - ref_r))
        losses.append(-(1 - smoothing) * math.log(sigmoid(h)) - smoothing * math.log(sigmoid(-h)))
        wins.append(h > 0)
        margins.append(h)
    loss, stats = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing)
    for got, want in ((loss, losses), (stats["accuracy"], wins), (stats["margin"], margins)):
        assert_close(got, torch.tensor(sum(want) / 9, dtype=torch.float64), 1e-12)
    assert_close(stats["chosen_reward"], beta * (chosen - ref_chosen).mean(), 1e-12)
    assert_close(stats["rejected_reward"], beta * (rejected - ref_rejected).mean(), 1e-12)


def test_a_policy_equal_to_its_reference_loses_ln_2() -> None:
    chosen, rejected, _, _ = pairs(6)
    for smoothing in (0.0, 0.3):
        loss, stats = ops.dpo_loss(chosen, rejected, chosen, rejected, label_smoothing=smoothing)
        assert_close(loss, torch.tensor(math.log(2)), 1e-7)
        assert stats["accuracy"].item() == 0.5
        assert stats["margin"].item() == 0


def test_an_identical_pair_loses_ln_2_and_teaches_nothing() -> None:
    response = cases.random(6, dtype=torch.float64).requires_grad_()
    reference = cases.random(6, seed=1, dtype=torch.float64)
    loss, stats = ops.dpo_loss(response, response, reference, reference)
    loss.backward()
    assert_close(loss, torch.tensor(math.log(2)), 1e-7)
    assert torch.equal(gradient_of(response), torch.zeros(6))
    assert stats["accuracy"].item() == 0.5


def test_gradient_checks_in_float64() -> None:
    chosen, rejected, ref_chosen, ref_rejected = pairs(5)
    assert torch.autograd.gradcheck(
        lambda c, r: ops.dpo_loss(c, r, ref_chosen, ref_rejected, 0.3, 0.1)[0],
        [chosen.requires_grad_(), rejected.requires_grad_()],
    )


def test_no_gradient_flows_to_the_reference() -> None:
    inputs = [x.requires_grad_() for x in pairs(4)]
    ops.dpo_loss(*inputs)[0].backward()
    assert [x.grad is not None for x in inputs] == [True, True, False, False]


def test_far_apart_pairs_stay_finite() -> None:
    (loss,), gradients = run(
        lambda c, r: ops.dpo_loss(c, r, torch.zeros(2), torch.zeros(2), beta=1.0)[0],
        [torch.tensor([5000.0, -5000.0]), torch.tensor([-5000.0, 5000.0])],
        [torch.ones(())],
    )
    assert_close(loss, torch.tensor(5000.0), 1e-3)
    assert gradients[0].tolist() == [0.0, -0.5]


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_float32_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    inputs = pairs(40, dtype)
    references = inputs[2:]

    def torch_of_today(c: Tensor, r: Tensor) -> Tensor:
        wide = torch.promote_types(c.dtype, torch.float32)
        h = (c.to(wide) - references[0].to(wide)) - (r.to(wide) - references[1].to(wide))
        return -torch.nn.functional.logsigmoid(0.1 * h).mean()

    got, gradients = run(lambda c, r: ops.dpo_loss(c, r, *references)[0], inputs[:2], [torch.ones(())])
    stock, stock_gradients = run(torch_of_today, inputs[:2], [torch.ones(())])
    truth, true_gradients = run(torch_of_today, [x.double() for x in inputs[:2]], [torch.ones(())])
    assert got[0].dtype == torch.float32
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


def test_micro_batches_with_a_common_denominator_add_up() -> None:
    c, r, ref_c, ref_r = pairs(7)
    whole, stats = ops.dpo_loss(c, r, ref_c, ref_r)
    slices = (slice(0, 3), slice(3, 7), slice(7, 7))
    parts: Any = [ops.dpo_loss(c[i], r[i], ref_c[i], ref_r[i], denominator=7) for i in slices]
    assert_close(torch.stack([loss for loss, _ in parts]).sum(), whole, 1e-12)
    for name in stats:
        assert_close(torch.stack([s[name] for _, s in parts]).sum(), stats[name], 1e-12, name)


def test_no_pairs_give_zero() -> None:
    loss, stats = ops.dpo_loss(*(x.requires_grad_() for x in pairs(0)))
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 and not value.requires_grad for value in stats.values())


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.dpo_loss, *(x.requires_grad_() for x in pairs(4)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"chosen": torch.zeros(3, 1)}, ValueError, r"chosen: shape \(3, 1\), expected \(P,\)"),
        ({"ref_rejected": torch.zeros(2)}, ValueError, r"ref_rejected: shape \(2,\), expected \(3,\) like chosen"),
        ({"rejected": torch.zeros(3).long()}, TypeError, "rejected: int64, expected float32"),
        ({"beta": 0}, ValueError, "beta: 0, expected a number > 0"),
        ({"label_smoothing": 0.6}, ValueError, "label_smoothing: 0.6, expected a number >= 0 and <= 0.5"),
        ({"denominator": -1}, ValueError, "denominator: -1, expected a number > 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    with pytest.raises(error, match=text):
        ops.dpo_loss(**{**{name: torch.zeros(3) for name in names}, **change})


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo", "kto"])
def test_no_number_makes_the_loss_none(backend: Backend, loss: str) -> None:
    chosen, *others = (cases.random(4, seed=i) for i in range(4))
    chosen[2] = math.nan
    found, _ = backend(ops.dpo_loss, chosen, *others, loss=loss, label_smoothing=0.1 if loss == "robust" else 0.0)
    assert bool(found.isnan())
