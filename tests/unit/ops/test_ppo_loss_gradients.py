"""The gradients of ppo_loss, in float64 and beside PyTorch's own, and where there is none."""

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
from tests.unit.ops.ppo_batches import ADD_UP, ADD_UP_WITH_TOKENS, AGGREGATIONS, ALL_TERMS, OWN, batch


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_float32_is_no_worse_than_torch(dtype: torch.dtype) -> None:
    inputs, mask = batch(4, 9, dtype=dtype), cases.holes()
    names = ("logprobs", "values", "entropy")
    fixed = {k: v for k, v in inputs.items() if k not in names}

    def torch_of_today(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        x = {k: v.to(torch.promote_types(logprobs.dtype, torch.float32)) for k, v in fixed.items()}
        logprobs, values, entropy = (t.to(x["returns"].dtype) for t in (logprobs, values, entropy))
        ratio, A = (logprobs - x["old_logprobs"]).exp(), x["advantages"]
        policy = torch.max(-A * ratio, -A * ratio.clamp(0.8, 1.2))[mask].mean()
        near = x["old_values"] + (values - x["old_values"]).clamp(-0.2, 0.2)
        value = 0.5 * torch.max((values - x["returns"]) ** 2, (near - x["returns"]) ** 2)[mask].mean()
        return policy + 0.1 * value - 0.01 * entropy[mask].mean()

    def mine(logprobs: Tensor, values: Tensor, entropy: Tensor) -> Tensor:
        return ops.ppo_loss(**fixed, logprobs=logprobs, values=values, entropy=entropy, mask=mask, entropy_coef=0.01)[0]

    given_ones = [inputs[name] for name in names]
    got, gradients = run(mine, given_ones, [torch.ones(())])
    stock, stock_gradients = run(torch_of_today, given_ones, [torch.ones(())])
    truth, true_gradients = run(torch_of_today, [x.double() for x in given_ones], [torch.ones(())])
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype] * 3
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_checks_in_float64(aggregation: str) -> None:
    inputs, names = batch(4, 9), ("logprobs", "values", "entropy")
    fixed = {k: v for k, v in inputs.items() if k not in names}

    def op(*own: Tensor) -> Tensor:
        logprobs, values, entropy = own
        terms = {**fixed, **ALL_TERMS, "aggregation": aggregation}
        return ops.ppo_loss(logprobs=logprobs, values=values, entropy=entropy, mask=cases.holes(), **terms)[0]

    assert torch.autograd.gradcheck(op, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_a_common_denominator_add_up(aggregation: str) -> None:
    inputs, mask = batch(4, 9), cases.holes()
    options = {**ALL_TERMS, "aggregation": aggregation}
    count = mask.sum() if aggregation == "token_mean" else mask.any(1).sum()
    logprobs = inputs["logprobs"].requires_grad_()
    whole, stats = ops.ppo_loss(**inputs, mask=mask, **options)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    for denominator in (count, int(count), float(count)):
        parts = [
            ops.ppo_loss(**{k: v[rows] for k, v in inputs.items()}, mask=mask[rows], denominator=denominator, **options)
            for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
        ]
        total = torch.stack([loss for loss, _ in parts]).sum()
        assert_close(total, whole, 1e-12)
        assert_close(torch.autograd.grad(total, logprobs)[0], gradient, 1e-12)
        for name in ADD_UP + (ADD_UP_WITH_TOKENS if aggregation == "token_mean" else ()):
            assert_close(torch.stack([s[name] for _, s in parts]).sum(), stats[name], 1e-12, name)


def test_at_ratio_1_the_gradient_is_reinforce() -> None:
    logprobs = cases.random(4, 9, dtype=torch.float64).requires_grad_()
    advantages, mask = cases.random(4, 9, seed=1, dtype=torch.float64), cases.holes()
    loss, stats = ops.ppo_loss(logprobs, logprobs.detach(), advantages, mask=mask)
    reinforce = -(advantages * logprobs)[mask].mean()
    assert_close(torch.autograd.grad(loss, logprobs)[0], torch.autograd.grad(reinforce, logprobs)[0], 1e-15)
    for name, value in {"ratio_mean": 1, "ratio_max": 1, "clip_fraction": 0, "approx_kl": 0, "approx_kl_k3": 0}.items():
        assert_close(stats[name], torch.tensor(value), 1e-15, name)


def test_clipped_tokens_get_no_gradient_and_pulled_back_ones_do() -> None:
    d = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, stats = ops.ppo_loss(d, torch.zeros(4), advantages)
    loss.backward()
    assert (gradient_of(d) != 0).tolist() == [False, True, True, False]
    assert stats["clip_fraction"].item() == 0.5


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    d = torch.tensor([3.0, 3.0], requires_grad=True)
    loss, _ = ops.ppo_loss(d, torch.zeros(2), torch.tensor([-1.0, 0.5]), dual_clip=3.0, denominator=1)
    assert_close(loss, torch.tensor(3.0 - 0.5 * 1.2), 1e-6)
    loss.backward()
    assert gradient_of(d).tolist() == [0.0, 0.0]


def test_cispo_gives_clipped_tokens_their_gradient() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-1.0, -3.0, -1.0]), torch.tensor([2.0, 3.0, 4.0])
    loss, stats = ops.ppo_loss(logprobs, old, advantages, objective="cispo", denominator=1)
    loss.backward()
    assert gradient_of(logprobs).tolist() == pytest.approx([-2.0, -3.0 * 1.2, -4.0 * 0.8])
    assert stats["clip_fraction"].item() == 2


def test_sapo_has_the_gradient_of_its_paper() -> None:
    """Equation 8: A r 4 s (1 - s) a token, s = sigmoid(tau (r - 1)); at r = 1 that of the plain ratio."""
    log_ratios = torch.tensor([0.0, 0.7, -0.7, 4.0, -8.0, 0.7, 12.0, 30.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0, -2.0, -1.0, 1.0], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        d = log_ratios.to(dtype, copy=True).requires_grad_()
        loss, stats = ops.ppo_loss(d, torch.zeros_like(d), advantages.to(dtype), objective="sapo", denominator=1)
        loss.backward()
        tau = 1.05 - 0.05 * (advantages > 0).double()
        s = torch.sigmoid(tau * (log_ratios.exp() - 1))
        want = -advantages * log_ratios.exp() * 4 * s * torch.sigmoid(-tau * (log_ratios.exp() - 1))
        want[-1] = 0  # beyond the clamp of log-ratios
        assert want[0] == -1 and 0 < want[5] < 4
        assert_close(gradient_of(d), want.to(dtype), tolerance)
        assert stats["clip_fraction"].item() == 0


def test_a_sequence_ratio_is_gspo() -> None:
    """Equations 5 and 7 of the paper, written per sequence, with one advantage a sequence."""
    inputs, mask = batch(4, 9), cases.holes()
    advantages = cases.random(4, 1, seed=9, dtype=torch.float64).expand(4, 9)
    logprobs = inputs["logprobs"].requires_grad_()
    sequences = []
    for b in range(4):
        real = mask[b]
        if real.any():
            s = (logprobs[b] - inputs["old_logprobs"][b])[real].mean().exp()
            sequences.append(torch.minimum(s * advantages[b, 0], s.clamp(0.95, 1.1) * advantages[b, 0]))
    want = -torch.stack(sequences).mean()
    options: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.1, "aggregation": "sequence_mean"}
    got, stats = ops.ppo_loss(logprobs, inputs["old_logprobs"], advantages, mask=mask, ratio="sequence", **options)
    assert 0 < stats["clip_fraction"].item() < 1
    assert_close(got, want, 1e-12)
    assert_close(torch.autograd.grad(got, logprobs)[0], torch.autograd.grad(want, logprobs)[0], 1e-12)


def test_gradients_flow_only_to_logprobs_values_and_entropy() -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(4, 9).items()}
    ops.ppo_loss(**inputs, mask=cases.holes(), **ALL_TERMS)[0].backward()
    assert {k for k, v in inputs.items() if v.grad is not None} == {"logprobs", "values", "entropy"}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything_and_get_no_gradient(aggregation: str, garbage: float) -> None:
    inputs, mask = batch(4, 9), cases.holes()
    options = {**ALL_TERMS, "mask": mask, "aggregation": aggregation}
    poisoned: dict[str, Any] = {k: cases.poison(v, mask, garbage).requires_grad_() for k, v in inputs.items()}
    got, got_stats = ops.ppo_loss(**poisoned, **options)
    want, want_stats = ops.ppo_loss(**inputs, **options)
    got.backward()
    assert torch.equal(got, want)
    assert all(torch.equal(got_stats[name], want_stats[name]) for name in want_stats)
    for name in ("logprobs", "values", "entropy"):
        gradient = gradient_of(poisoned[name])
        assert gradient.isfinite().all()
        assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 5, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zero_with_a_graph(aggregation: str, denominator: Any, shape: tuple[int, ...]) -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(*shape).items()}
    mask = torch.zeros(shape, dtype=torch.bool)
    options = {**ALL_TERMS, "aggregation": aggregation, "denominator": denominator}
    loss, stats = ops.ppo_loss(**inputs, mask=mask, **options)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in stats.values())
    assert torch.equal(gradient_of(inputs["logprobs"]), torch.zeros(shape))


def test_compiles_as_one_graph() -> None:
    inputs = batch(4, 9, dtype=torch.float32)
    compiled = torch.compile(ops.ppo_loss, fullgraph=True, backend="aot_eager")
    got, _ = compiled(**inputs, mask=cases.holes(), **ALL_TERMS)
    assert_close(got, ops.ppo_loss(**inputs, mask=cases.holes(), **ALL_TERMS)[0], 1e-6)


def test_leaves_its_inputs_alone() -> None:
    inputs = {k: v.requires_grad_() for k, v in batch(4, 9).items()}
    assert_leaves_inputs_alone(ops.ppo_loss, **inputs, mask=cases.holes(), **ALL_TERMS)


def test_a_gradient_of_the_gradient_is_refused(kernel_backend: Backend) -> None:
    inputs = batch(2, 3, dtype=torch.float32)
    logprobs = inputs["logprobs"].requires_grad_()
    loss, _ = kernel_backend(ops.ppo_loss, **inputs)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(torch.autograd.grad(loss, logprobs, create_graph=True)[0].sum(), logprobs)


def test_backward_again_gives_the_same_gradients_and_scales_them_anew(kernel_backend: Backend) -> None:
    inputs = batch(2, 3, dtype=torch.float32)
    own = [inputs[name].requires_grad_() for name in OWN]
    loss, _ = kernel_backend(ops.ppo_loss, **inputs, **ALL_TERMS)
    first = torch.autograd.grad(loss, own, retain_graph=True)
    kept = [x.clone() for x in first]
    twice = torch.autograd.grad(loss, own, grad_outputs=torch.tensor(2.0), retain_graph=True)
    again = torch.autograd.grad(loss, own)
    for a, b, c, d in zip(first, kept, twice, again, strict=True):
        assert torch.equal(a, b) and torch.equal(c, 2 * b) and torch.equal(d, b)


@pytest.mark.seconds(4)
def test_compiles_with_changing_shapes_and_gradients() -> None:
    compiled = torch.compile(ops.ppo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, aggregation in ((3, "token_mean"), (5, "token_mean"), (4, "sequence_mean")):
        inputs = batch(n, 7, dtype=torch.float32)
        logprobs = inputs["logprobs"].requires_grad_()
        got, stats = compiled(**inputs, aggregation=aggregation, **ALL_TERMS)
        want, exact = ops.ppo_loss(**inputs, aggregation=aggregation, **ALL_TERMS)
        assert torch.equal(got, want) and torch.equal(stats["kl"], exact["kl"])
        assert torch.equal(torch.autograd.grad(got, logprobs)[0], torch.autograd.grad(want, logprobs)[0])
