"""What trainers hold out: by the rows' own split, nothing at all, or comparisons of a single prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, RewardConfig, SFTConfig
from rlhf_fast.models.checkpoint import read_extra
from rlhf_fast.pages.reward_report import write_reward_report
from rlhf_fast.rewards.model import resolve_reward
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer, poisson_weight
from rlhf_fast.trainers.sft import SFTTrainer

ROWS = [{"prompt": f"say {i}", "completion": "abc"[: 1 + i % 3]} for i in range(12)]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes!", "rejected": "no" + "o" * (i % 3)} for i in range(12)]
ONE = [{"prompt": "q", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
LORA, OPTIM = LoRAConfig(r=4), OptimConfig(lr=1e-3)
MAKERS: dict[str, Any] = {
    "sft": lambda folder, rows, out, **o: SFTTrainer(folder, rows, out, SFTConfig(lora=LORA, optim=OPTIM, **o)),
    "reward": lambda folder, rows, out, **o: RewardTrainer(
        folder, rows, out, RewardConfig(lora=LORA, optim=OPTIM, **o)
    ),
    "dpo": lambda folder, rows, out, **o: DPOTrainer(folder, rows, out, DPOConfig(lora=LORA, optim=OPTIM, **o)),
}


def rows_of(phase: str) -> list[dict[str, Any]]:
    return ROWS if phase == "sft" else PAIRS


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("phase", MAKERS)
def test_every_split_but_train_is_held_out(phase: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "split": ["train", "", None, "test"][i % 4]} for i, row in enumerate(rows_of(phase))]
    trainer = MAKERS[phase](tiny_folder, rows, tmp_path, heldout=0.0)
    tokens = [of[0].input_ids if phase == "sft" else of.examples[0].prompt for of in trainer.heldout]
    asked = [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    assert len(trainer.training) == 9 and len(asked) == 3
    for number, text in zip((3, 7, 11), asked, strict=True):
        assert rows[number]["prompt"] in text


@pytest.mark.parametrize("phase", MAKERS)
def test_with_nothing_held_out_all_is_trained_on_and_nothing_measured(
    phase: str, tiny_folder: Path, tmp_path: Path
) -> None:
    trainer = MAKERS[phase](tiny_folder, rows_of(phase), tmp_path, heldout=0.0, epochs=1, batch_size=4)
    assert (len(trainer.training), trainer.heldout) == (12, [])
    result = trainer.train()
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3] and all("loss" in row for row in rows)
    assert result["checkpoint"] == "step-3" and not any("accuracy" in key for key in result["summary"])
    assert not (tmp_path / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="patience: 2, but nothing is held out to measure"):
        MAKERS[phase](tiny_folder, rows_of(phase), tmp_path / "waits", heldout=0.0, patience=2)


@pytest.mark.parametrize("samples", [0, 2])
def test_a_reward_model_with_nothing_held_out_is_not_measured_and_ppo_asks_to_be_told(
    samples: int, tiny_folder: Path, tmp_path: Path
) -> None:
    trainer = MAKERS["reward"](tiny_folder, PAIRS, tmp_path, heldout=0.0, normalize_samples=samples, max_new_tokens=4)
    result = trainer.train()
    assert (result["summary"]["verdict"], result["summary"]["heldout"]) == ("not measured", 0)
    assert result["summary"]["score_std"] != 1.0  # scaled by what was trained on, or sampled
    assert read_extra(models.resolve(tmp_path))["heldout_agreement"] is None
    with pytest.raises(
        ValueError, match=r"nothing held out, .* reward\.heldout above 0, or set ppo\.min_reward_agreement"
    ):
        resolve_reward(tmp_path, 0.6, 100)
    rewards = resolve_reward(tmp_path, 0.0, 100)
    assert len(rewards.parts) == 1
    assert "not measured" in write_reward_report(tmp_path).read_text()


@pytest.mark.parametrize("phase", ["reward", "dpo"])
def test_one_prompt_for_all_comparisons_is_trained_on(phase: str, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 prompt is too few to hold some out: . comparisons are held out whose"):
        trainer = MAKERS[phase](tiny_folder, ONE, tmp_path, heldout=1 / 3, batch_size=4)
    assert [group.pairs for group in trainer.heldout] == [1, 1, 1, 1]
    result = trainer.train()
    assert len([row for row in metrics(tmp_path) if "loss" in row]) == 2  # of four comparisons each
    if phase == "reward":
        assert (result["summary"]["heldout"], result["summary"]["heldout_prompts"]) == (4, 1)
        report = json.loads((tmp_path / "reward_report.json").read_text())
        assert any("prompts were trained on" in note for note in report["notes"])
        write_reward_report(tmp_path)


def test_heads_resample_the_comparisons_of_a_single_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    """A prompt's own weight is the same for all of them, and may be 0 for a head, which would learn nothing."""
    with pytest.warns(UserWarning, match="too few to hold some out"):
        trainer = MAKERS["reward"](tiny_folder, ONE, tmp_path, heads=3)
    weights = trainer._resample_weights(trainer.training).view(3, -1)
    assert all(len(set(head.tolist())) > 1 for head in weights) and not torch.equal(weights[0], weights[1])
    prompt, chosen, _ = next(trainer.training[0].sides())
    assert poisson_weight(0, 1, prompt) == poisson_weight(0, 1, prompt, ())
    assert float(poisson_weight(0, 0, prompt, (chosen.response,))) >= 0
