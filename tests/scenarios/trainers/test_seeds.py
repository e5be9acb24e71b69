"""What is drawn anew in every step of a run, and what is not: seen where nothing is learned and all prompts are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import LoRAConfig, OptimConfig, PPOConfig, RunConfig
from rlhf_fast.data.templates import Prompt
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

SAME = [{"prompt": "question"}] * 8  # so that places among the prompts tell no two steps apart
STILL = OptimConfig(lr=1e-30, schedule="constant", warmup=0.0)  # below what float32 tells from the weights


def flat(prompts: list[Prompt], responses: list[str]) -> list[float]:
    return [1.0] * len(responses)


def make(folder: Path, out: Path, **options: Any) -> PPOTrainer:
    settings: dict[str, Any] = {
        "steps": 4, "prompts_per_step": 8, "samples_per_prompt": 2, "minibatches": 2, "epochs": 2, "max_new_tokens": 8,
        "lora": LoRAConfig(r=2), "optim": STILL,
    }  # fmt: skip
    return PPOTrainer(folder, flat, SAME, out, PPOConfig(**{**settings, **options}))


def drawn(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> list[set[tuple[int, ...]]]:
    """The responses of each call of the generator in a run."""
    found: list[set[tuple[int, ...]]] = []
    generate = trainer.sampler.generator.generate

    def record(*given: Any, **others: Any) -> Any:
        rollouts = generate(*given, **others)
        found.append({example.response for example in rollouts.examples()})
        return rollouts

    monkeypatch.setattr(trainer.sampler.generator, "generate", record)
    trainer.train()
    return found


@pytest.mark.parametrize("lag", [0, 1])
def test_no_two_steps_and_no_two_samples_have_the_same_responses(
    lag: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = drawn(make(tiny_folder, tmp_path, lag=lag), monkeypatch)
    assert [len(step) for step in steps] == [16] * 4
    assert len(set.union(*steps)) == 64


def test_prompts_that_stand_in_for_others_are_answered_anew(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are paid alike, so all are replaced, as often as that may be done."""
    trainer = make(
        tiny_folder, tmp_path, steps=2, prompts_per_step=2, advantage="grpo", resample=2, missing_eos_penalty=0.0
    )
    rounds = drawn(trainer, monkeypatch)
    assert [len(each) for each in rounds] == [4] * 6
    assert len(set.union(*rounds)) == 24


def test_minibatches_have_another_order_in_every_epoch_of_every_step_and_by_every_seed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[int]] = []
    update = PPOTrainer.update

    def record(self: PPOTrainer, run: Any, experience: Any, part: list[int], step: int) -> dict[str, float]:
        parts.append(part)
        return update(self, run, experience, part, step)

    monkeypatch.setattr(PPOTrainer, "update", record)
    for seed in (0, 7):
        make(tiny_folder, tmp_path / str(seed), seed=seed, steps=3).train()
    orders = [(*parts[i], *parts[i + 1]) for i in range(0, len(parts), 2)]  # of two epochs, three steps, two runs
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len(orders) == len(set(orders)) == 12


def test_held_out_prompts_are_answered_by_the_same_random_numbers_after_any_step(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def length(prompts: list[Prompt], responses: list[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    config = PPOConfig(
        steps=3, prompts_per_step=2, max_new_tokens=20, lora=LoRAConfig(r=2), optim=STILL, run=RunConfig(save_every=1)
    )
    PPOTrainer(
        tiny_folder, length, SAME, tmp_path, config, heldout_data=[{"prompt": f"q{i}"} for i in range(4)]
    ).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [(row["heldout_score"], row["heldout_tokens"]) for row in rows if "heldout_score" in row]
    assert len(measured) == 4 and len(set(measured)) == 1
    assert len({row["score"] for row in rows if "score" in row}) > 1  # while those of the steps differ
