"""The optimiser against AdamW driven by hand: rates, clipping, skipped steps, and weights narrower than float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.steps import learn

STEPS = 10
FACTORS = {  # on the rate of each of ten steps, a quarter of which (three, rounded up) warm up
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7],
    "cosine": [1 / 3, 2 / 3, 1] + [(1 + math.cos(math.pi * n / 7)) / 2 for n in range(7)],
}
SKIPPED = {4: "gradient", 6: "loss"}  # what is not finite in a step


def weights_and_gradients(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Two weights, and a gradient of each for every step: of norms about 0.4 and 2 in turn."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(shape, generator=generator).add(0.5).to(dtype) for shape in ((3, 4), (5,))]
    gradients = [
        [(torch.rand(w.shape, generator=generator) * (0.15 if step % 2 else 0.8)).to(dtype) for w in weights]
        for step in range(STEPS)
    ]
    return weights, gradients


def by_hand(
    weights: list[torch.Tensor], gradients: list[list[torch.Tensor]], rates: list[float], config: OptimConfig
) -> tuple[list[torch.Tensor], list[float]]:
    """The weights in float32 after all steps, and the norm of each step's gradient before clipping."""
    found = [nn.Parameter(w.float().clone()) for w in weights]
    adam = torch.optim.AdamW(found, lr=1.0, betas=(0.9, 0.999), eps=config.adam_eps, weight_decay=config.weight_decay)
    norms = []
    for step, (given, rate) in enumerate(zip(gradients, rates, strict=True)):
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in given)))
        if step in SKIPPED:
            continue
        for weight, gradient in zip(found, given, strict=True):
            weight.grad = gradient.float() * min(1.0, config.max_grad_norm / norms[-1])
        adam.param_groups[0]["lr"] = rate
        adam.step()
    return [weight.detach() for weight in found], norms


@pytest.mark.parametrize("schedule", list(FACTORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ten_steps_are_those_of_adamw_by_hand(dtype: torch.dtype, schedule: Any, tmp_path: Path) -> None:
    """With warm-up and decay of the rate, a clipped gradient every other step, decoupled weight decay and two steps
    that are skipped; the rates and norms that are logged, too. In bfloat16 a single step is too small to be seen."""
    config = OptimConfig(
        lr=1e-3 if dtype == torch.bfloat16 else 0.05, schedule=schedule, warmup=0.25, weight_decay=0.3, adam_eps=0.01,
        max_grad_norm=1.0,
    )  # fmt: skip
    weights, gradients = weights_and_gradients(dtype)
    modules = [nn.ParameterList([w.clone()]) for w in weights]
    modules[0].append(nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False))
    optimizer = Optimizer(modules, config, STEPS)
    run = RunFolder(tmp_path, "sft", "")
    rates = [config.lr * factor for factor in FACTORS[schedule]]
    expected, norms = by_hand(weights, gradients, rates, config)
    for step, given in enumerate(gradients):
        broken = SKIPPED.get(step)
        before = [module[0].detach().clone() for module in modules]

        def losses(given: list[torch.Tensor] = given, broken: str | None = broken) -> Any:
            """Two micro-batches, whose gradients add up to the one that is given."""
            parts = [sum((m[0] * g).sum() for m, g in zip(modules, given, strict=True)) / 2 for _ in range(2)]
            for part in parts:
                scaled = part * math.nan if broken == "gradient" else part + math.inf if broken == "loss" else part
                yield scaled, {}

        row = learn(run, step + 1, [Example((1,), (2,))], losses, optimizer, TokenBudget(64))
        assert row["lr"] == pytest.approx(rates[step], rel=1e-12)
        if broken == "gradient":
            assert math.isnan(row["grad_norm"])
        else:
            assert row["grad_norm"] == pytest.approx(norms[step], rel=1e-5)
        if broken:
            assert all(torch.equal(a, m[0]) for a, m in zip(before, modules, strict=True))
    for start, module, weight in zip(weights, modules, expected, strict=True):
        assert not torch.equal(module[0], start) and module[0].dtype == dtype
        torch.testing.assert_close(module[0].detach(), weight.to(dtype), rtol=0, atol=1e-6 if dtype.itemsize > 2 else 0)
    assert torch.equal(modules[0][1], torch.ones(2, dtype=dtype))
    assert max(norms) > 1 > min(norms), "some gradients are to be clipped, and some not"
    assert optimizer.steps == STEPS and optimizer.skipped == 0


def test_without_a_limit_no_gradient_is_clipped() -> None:
    """AdamW's first step hides a gradient's length; with a large eps it does not."""
    moved = []
    for limit in (math.inf, 1.0):
        layer = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(layer.weight)
        config = OptimConfig(lr=1.0, schedule="constant", warmup=0.0, adam_eps=1e3, max_grad_norm=limit)
        optimizer = Optimizer([layer], config, 1)
        (layer.weight * torch.tensor([[30.0, 40.0]])).sum().backward()
        assert optimizer.step() == pytest.approx(50.0)
        moved.append(-layer.weight.detach())
    torch.testing.assert_close(moved[0], torch.tensor([[30 / 1030, 40 / 1040]]))
    torch.testing.assert_close(moved[1], torch.tensor([[0.6 / 1000.6, 0.8 / 1000.8]]))


def test_steps_that_are_skipped_in_a_row_are_counted_anew_after_one_that_is_not() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer = Optimizer([layer], OptimConfig(), 10)
    counts = []
    for loss in (math.nan, math.inf, 1.0, -math.inf):
        layer.weight.sum().backward()
        optimizer.step(loss)
        counts.append(optimizer.skipped)
    assert counts == [1, 2, 0, 1] and optimizer.steps == 4
