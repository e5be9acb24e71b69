"""What all trainers share: schedule, optimiser, splits, and results that do not depend on micro-batches."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.data.splits import split_heldout
from rlhf_fast.models.scoring import per_example
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.loop.optimizer import Optimizer, learning_rate_factor
from rlhf_fast.trainers.loop.steps import epoch_batches
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer
from tests.unit.trainers.seen import collect

DEMONSTRATIONS = [{"prompt": f"question {i}" * (1 + i % 3), "completion": "answer " * (1 + i % 4)} for i in range(12)]
COMPARISONS = [
    {"prompt": f"question {i}", "chosen": chosen, "rejected": rejected}
    for i in range(8)
    for chosen, rejected in (
        ("good " * (1 + i % 3), "bad"),
        ("good " * (1 + i % 3), "much worse"),
        ("bad", "much worse"),
    )
]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_warms_up_and_then_never_rises(schedule: Any) -> None:
    factor = learning_rate_factor(OptimConfig(schedule=schedule, warmup=0.2), 50)
    rates = [factor(step) for step in range(50)]
    assert rates[0] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert rates[10] == 1.0 and all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert (rates[-1] == 1.0) == (schedule == "constant")
    assert factor(50) == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-12)


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights() -> None:
    layer = torch.nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = Optimizer([layer], OptimConfig(), 10)
    (layer(torch.ones(1, 2)).sum() * math.nan).backward()
    assert math.isnan(optimizer.step())
    assert torch.equal(layer.weight, before) and layer.weight.grad is None and optimizer.skipped == 1


def test_an_optimizer_over_nothing_says_so() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer([torch.nn.Linear(2, 1).requires_grad_(False)], OptimConfig(), 10)


@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_loses_nothing_and_shares_nothing(count: int, share: float, seed: int) -> None:
    training, heldout = split_heldout(list(range(count)), share, seed)
    assert sorted(training + heldout) == list(range(count))
    assert training and heldout
    assert (training, heldout) == split_heldout(list(range(count)), share, seed)


def test_a_split_of_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="2 in all, of which 2 are to be held out"):
        split_heldout([1, 2], 0.5, seed=0, least=2)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        split_heldout([1, 2], 1.0, seed=0)


def test_every_epoch_sees_everything_once_in_an_order_of_its_own() -> None:
    batches = epoch_batches(list(range(20)), 6, epochs=2, seed=3)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2] * 2
    first, second = list(itertools.chain(*batches[:4])), list(itertools.chain(*batches[4:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 40))
def test_results_come_back_in_the_order_of_the_examples(lengths: list[int], max_tokens: int) -> None:
    """Also where every response has one token, so that "a value a token" and "a value a sequence" look alike."""
    examples = [Example((7,) * (i + 1), (100 + i,) * length) for i, length in enumerate(lengths)]
    tokens, rows = per_example(
        examples, lambda batch: [batch.response_tokens, batch.input_ids.amax(-1)], max_tokens, "cpu"
    )
    assert [part.tolist() for part in tokens] == [[100 + i] * length for i, length in enumerate(lengths)]
    assert [part.tolist() for part in rows] == [[100 + i] for i in range(len(lengths))]


def gradients(losses: Any, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The accumulated gradient of all micro-batches, as one vector."""
    for parameter in parameters:
        parameter.grad = None
    for loss, _ in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("r", [0, 4])
def test_the_micro_batch_does_not_change_the_gradient(method: str, r: int, tiny_folder: Path, tmp_path: Path) -> None:
    """One sequence at a time or all at once, padded to the longest, and with each prompt read once or for every
    response: the same gradient to float32 rounding."""
    found = []
    for max_tokens, sharing in ((1, True), (200, True), (100_000, True), (100_000, False)):
        optim = OptimConfig(max_tokens_per_microbatch=max_tokens)
        lora = LoRAConfig(r=r)
        trainer: Any
        if method == "sft":
            trainer = SFTTrainer(tiny_folder, DEMONSTRATIONS, tmp_path, SFTConfig(lora=lora, optim=optim))
            losses = trainer._losses(trainer.training)
        elif method == "reward":
            trainer = RewardTrainer(tiny_folder, COMPARISONS, tmp_path, RewardConfig(lora=lora, optim=optim))
            trainer.shared *= sharing
            losses = trainer._losses(trainer.training)
        elif method == "dpo":
            trainer = DPOTrainer(tiny_folder, COMPARISONS, tmp_path, DPOConfig(lora=lora, optim=optim))
            trainer.shared *= sharing
            trainer._score_with_reference()
            losses = trainer._losses(trainer.training)
        else:
            trainer = PPOTrainer(
                tiny_folder,
                lambda prompts, responses: [float(len(response)) for response in responses],
                [{"prompt": f"question {i}"} for i in range(4)],
                tmp_path,
                PPOConfig(prompts_per_step=4, samples_per_prompt=2, max_new_tokens=12, lora=lora, optim=optim),
            )
            trainer.shared *= sharing
            experience = collect(trainer, 1, 0.05)
            losses = trainer._losses(experience, list(range(8)))
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        found.append(gradients(losses, parameters))
    for other in found[1:]:
        assert float((found[0] - other).double().norm() / found[0].norm()) < 1e-6


def test_dropout_never_acts(tiny_folder: Path) -> None:
    """Detail 24: two forward passes in training give the same numbers, whatever dropout the config asks for."""
    from rlhf_fast.pipeline import tiny_model

    config = tiny_model()
    config.attention_dropout = 0.5
    model, _ = models.load(config)
    model = models.trainable(model, LoRAConfig(r=2))
    ids = torch.arange(5, 40)[None]
    assert torch.equal(models.hidden_states(model, ids), models.hidden_states(model, ids))
    assert np.isfinite(models.hidden_states(model, ids).detach().numpy()).all()
