"""PPO's loss by its settings: which of the op's forms a run learns with, added up over micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from tests.scenarios.trainers.test_run_steps import rows
from tests.unit.trainers.seen import collect

LONGEST = 14
VARIANTS: dict[str, dict[str, Any]] = {
    "token_mean": {},
    "sequence_mean": {"aggregation": "sequence_mean"},
    "sequence_sum_mean": {"aggregation": "sequence_sum_mean", "kl_in": "loss"},
    "longest_mean": {"aggregation": "longest_mean", "dual_clip": 1.5},
    "GSPO": {"ratio": "sequence", "aggregation": "sequence_mean", "advantage": "grpo", "clip_low": 1e-3},
    "CISPO": {"objective": "cispo", "advantage": "grpo", "clip_low": 1.0},
    "Dr. GRPO": {"advantage": "dr_grpo", "aggregation": "longest_mean", "kl_coef": 0.0},
    "GSPO of tokens": {"ratio": "sequence", "lag": 1},
}


def make(folder: Path, out: Path, tokens: int = 100_000, **options: Any) -> PPOTrainer:
    """Responses of many lengths: a seventh of the tokens ends one."""
    common: dict[str, Any] = {
        "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": LONGEST, "minibatches": 1,
        "stop_token_ids": tuple(range(4, 40)), "lora": LoRAConfig(r=4),
        "optim": OptimConfig(lr=1e-3, schedule="constant", warmup=0.0, max_tokens_per_microbatch=tokens),
    }  # fmt: skip
    prompts = [{"prompt": f"question {i}" * (1 + i % 2)} for i in range(8)]

    def by_length(prompts: list[Any], responses: list[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    return PPOTrainer(folder, by_length, prompts, out, PPOConfig(**{**common, **options}))


def moved(trainer: PPOTrainer) -> None:
    """Away from the policy that sampled, so that ratios are far from 1."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.optimizer.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_micro_batch_changes_neither_gradient_nor_statistics(
    variant: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """One sequence at a time, a few, or all at once: of five responses, as a minibatch has them."""
    gradients, totals = [], []
    trainer: PPOTrainer | None = None
    for tokens in (1, 60, 100_000):
        if trainer is None or trainer.config.lag:  # which has sampled a step ahead
            trainer = make(tiny_folder, tmp_path, **VARIANTS[variant])
            start = [parameter.detach().clone() for parameter in trainer.optimizer.parameters]
        for parameter, value in zip(trainer.optimizer.parameters, start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        trainer.budget.tokens = tokens
        experience = collect(trainer, 1, 0.05)
        moved(trainer)
        minibatch = [0, 2, 3, 5, 7]
        assert len({len(experience.examples[row].response) for row in minibatch}) > 2
        parts = [(loss, stats) for loss, stats in trainer._losses(experience, minibatch)]
        assert (len(parts) == 1) == (tokens == 100_000)
        for loss, _ in parts:
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.optimizer.parameters if p.grad is not None]))
        names = [name for name in parts[0][1] if not name.endswith("_max")]
        totals.append({name: float(sum(stats[name] for _, stats in parts)) for name in names})
        totals[-1]["loss"] = float(sum(loss.detach() for loss, _ in parts))
    assert gradients[0].norm() > 1e-4 and abs(totals[0]["ratio_mean"] - 1) > 1e-3
    for gradient, total in zip(gradients[1:], totals[1:], strict=True):
        assert float((gradients[0] - gradient).double().norm() / gradients[0].norm()) < 1e-5
        assert total == pytest.approx(totals[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_ops_own_in_that_form(variant: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of a minibatch in small parts, against one call of the op over all of it, which counts by itself."""
    options = VARIANTS[variant]
    trainer = make(tiny_folder, tmp_path, 1, **options)
    experience = collect(trainer, 1, 0.05)
    moved(trainer)
    minibatch = list(range(8))
    calls: list[tuple[Any, Any]] = []

    def recorded(*inputs: Any, **words: Any) -> Any:
        calls.append((inputs, words))
        return ops.linear_ppo_loss(*inputs, **words)

    trainer.loss = recorded
    total = float(sum(loss.detach() for loss, _ in trainer._losses(experience, minibatch)))
    assert len(calls) > 1
    states, tokens, old, advantages = (torch.cat([inputs[i] for inputs, _ in calls]) for i in (0, 2, 3, 4))
    lengths = torch.cat([words["cu_seqlens"].diff() for _, words in calls])
    words = {name: value for name, value in calls[0][1].items() if name != "denominator"}
    per_token = ("values", "old_values", "returns", "ref_logprobs", "rollout_logprobs")
    words |= {name: torch.cat([each[name] for _, each in calls]) for name in per_token if name in words}
    words["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    whole, _ = ops.linear_ppo_loss(states, calls[0][0][1], tokens, old, advantages, **words)
    expected = float(whole.detach())
    if options.get("aggregation") == "longest_mean":  # arXiv 2503.20783: token sums over a constant
        expected *= int(lengths.sum()) / (8 * LONGEST)
    assert total == pytest.approx(expected, rel=1e-5)
    named = {name: options[name] for name in ("ratio", "objective", "dual_clip", "aggregation") if name in options}
    if named.get("aggregation") == "longest_mean":
        del named["aggregation"]
    told = {name: words[name] for name in ("ratio", "objective", "dual_clip", "aggregation") if name in words}
    assert told == named  # and nothing that a loss of one's own might not know


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_begins_at_ratio_one_whatever_the_form(variant: str, tiny_folder: Path, tmp_path: Path) -> None:
    """The checks of the first update hold: statistics are means over tokens in each."""
    make(tiny_folder, tmp_path, 60, **{"epochs": 1, **VARIANTS[variant]}).train()
    first, *_ = rows(tmp_path)
    assert first["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and first["clip_fraction"] == 0.0
    assert ("dual_clip_fraction" in first) == ("dual_clip" in VARIANTS[variant])
