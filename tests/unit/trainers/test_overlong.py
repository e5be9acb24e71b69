"""Rows that are too long for the settings or for the model, in every trainer: found before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

ROWS = [
    {"prompt": f"question {i}" + "x" * (60 * (i == 3)), "completion": "yes", "chosen": "yes", "rejected": "no"}
    for i in range(8)
]
FEW: dict[str, Any] = {"max_new_tokens": 4, "steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2, "epochs": 1}


def zero(prompts: list[Any], responses: list[str]) -> list[float]:
    return [0.0] * len(responses)


def make(phase: str, folder: Path, out: Path, rows: Any = ROWS, **options: Any) -> Any:
    options["lora"] = LoRAConfig(r=4)
    if phase == "sft":
        return SFTTrainer(folder, rows, out, SFTConfig(samples=0, **options))
    if phase == "reward":
        return RewardTrainer(folder, rows, out, RewardConfig(**options))
    if phase == "dpo":
        return DPOTrainer(folder, rows, out, DPOConfig(**options))
    return PPOTrainer(folder, zero, rows, out, PPOConfig(**FEW, minibatches=1, **options))


PHASES = ["sft", "reward", "dpo", "ppo"]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize("phase", PHASES)
def test_what_was_cut_or_left_out_is_said_at_the_start_and_kept_in_the_result(
    phase: str, overlong: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(ValueError, match=rf"rows\.jsonl line 4: .* more than {phase}\.max_length = 40; .*overlong"):
        make(phase, tiny_folder, tmp_path / "error", data, max_length=40)
    trainer = make(phase, tiny_folder, tmp_path / "run", data, max_length=40, overlong=overlong)
    name, word = ("truncated", "cut to 40 tokens") if overlong == "truncate" else ("dropped", "left out, being")
    name = f"rows_{name}"
    assert f"{phase}: of 8 rows 1 {word}" in capsys.readouterr().err
    assert trainer.train()["summary"][name] == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["summary"][name] == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert (f"Of 8 rows 1 {word}" if phase == "reward" else name.replace("_", " ")) in page


@pytest.mark.parametrize("phase", PHASES)
def test_rows_beyond_the_positions_of_a_model_are_found_first(phase: str, tmp_path: Path) -> None:
    """GPT-2 looks them up in a table, out of which they would run in the middle of training."""
    config = GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=1)
    model, tokenizer = models.load(config)
    models.save(tmp_path / "base", model, tokenizer)
    with pytest.raises(ValueError, match=r"^row 3: .* more than the 40 positions that the model has; shorten"):
        make(phase, tmp_path / "base", tmp_path / "run")
    trainer = make(phase, tmp_path / "base", tmp_path / "run", overlong="truncate")
    assert trainer.train()["summary"]["rows_truncated"] == 1


@pytest.mark.parametrize("phase", PHASES)
def test_tokens_beyond_the_embeddings_of_a_model_are_found_first(
    phase: str, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny
    tokenizer.add_tokens(["@@@"])
    models.save(tmp_path / "base", model, tokenizer)
    rows = [*ROWS[:3], {**ROWS[4], "prompt": "a @@@ b"}, *ROWS[5:]]
    with pytest.raises(ValueError, match=r"^row 3: its token 260 \('@@@'\) is beyond the model's 260 embeddings"):
        make(phase, tmp_path / "base", tmp_path / "run", rows)


def test_too_few_prompts_that_are_short_enough_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[3]]
    with pytest.raises(ValueError, match=r"ppo\.prompts_per_step: 2, but there are only 1 prompts"):
        make("ppo", tiny_folder, tmp_path, rows, max_length=40, overlong="drop")


def test_prompts_that_leave_the_policy_no_room_are_found_before_a_reward_model_is_trained(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny
    model.config.max_position_embeddings = 64
    models.save(tmp_path / "base", model, tokenizer)
    with pytest.raises(ValueError, match=r"reward\.max_new_tokens = 60 exceeds the 64 positions that the model has"):
        make("reward", tmp_path / "base", tmp_path / "run", ROWS[:3] + ROWS[4:], normalize_samples=1, max_new_tokens=60)
