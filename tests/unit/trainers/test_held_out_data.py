"""What is measured on and never trained on: a file of its own, or what rows say; and how many steps are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

KINDS: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig}
TRAINERS: dict[str, Any] = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer}


def data(verb: str, count: int, name: str = "q", **more: Any) -> list[dict[str, Any]]:
    if verb == "sft":
        return [{"prompt": f"{name}{i}", "completion": f"answer {i}", **more} for i in range(count)]
    return [{"prompt": f"{name}{i}", "chosen": f"yes {i}", "rejected": "no", **more} for i in range(count)]


def make(verb: str, folder: Path, out: Path, rows: Any, heldout: Any = None, **options: Any) -> Any:
    config = KINDS[verb](batch_size=2, lora=LoRAConfig(r=2), **options)
    return TRAINERS[verb](folder, rows, out, config, heldout)


@pytest.mark.parametrize("verb", KINDS)
def test_a_file_of_its_own_is_measured_on_and_all_else_is_trained_on(
    verb: str, tiny_folder: Path, tmp_path: Path
) -> None:
    # What splits say of either is overruled.
    rows, heldout = data(verb, 6, split="test"), data(verb, 3, "other", split="train")
    trainer = make(verb, tiny_folder, tmp_path / "run", rows, heldout, max_steps=2)
    assert (len(trainer.training), len(trainer.heldout)) == (6, 3)
    result = trainer.train()
    measured = {"sft": "heldout_loss", "reward": "heldout_accuracy", "dpo": "heldout_loss"}[verb]
    assert measured in result["summary"] and f"{measured}_before" in result["summary"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first[measured] == result["summary"][f"{measured}_before"]
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("verb", KINDS)
def test_no_more_steps_are_made_than_asked_for_and_the_schedule_ends_there(
    verb: str, tiny_folder: Path, tmp_path: Path
) -> None:
    optim = OptimConfig(schedule="linear", warmup=0.0, lr=1e-3)
    make(verb, tiny_folder, tmp_path, data(verb, 12), max_steps=3, epochs=2, optim=optim).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [round(row["lr"] / 1e-3, 3) for row in rows if "lr" in row] == [1.0, 0.667, 0.333]
    assert [row["step"] for row in rows if "heldout_loss" in row or "heldout_accuracy" in row] == [0, 3]
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == "step-3"


def test_more_steps_than_there_are_make_no_difference(tiny_folder: Path, tmp_path: Path) -> None:
    make("sft", tiny_folder, tmp_path, data("sft", 5), max_steps=99, epochs=1).train()
    assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == "step-2"


@pytest.mark.parametrize("verb", KINDS)
def test_prompts_that_are_in_both_are_warned_of(verb: str, tiny_folder: Path, tmp_path: Path) -> None:
    heldout = data(verb, 2) + data(verb, 2, "other")
    asked = [{"role": "user", "content": "q1"}]
    heldout[1]["prompt"] = asked  # the same, as a message
    words = (
        "2 of 4 held-out rows have a prompt that is trained on, too"
        if verb == "sft"
        else ("2 of 6 rows are not trained on, as heldout_data has their prompts")
    )
    with pytest.warns(UserWarning, match=words):
        trainer = make(verb, tiny_folder, tmp_path, data(verb, 6), heldout)
    assert (len(trainer.training), len(trainer.heldout)) == (6 if verb == "sft" else 4, 4)
    if verb != "sft":
        with pytest.raises(ValueError, match="it has every prompt of the data"):
            make(verb, tiny_folder, tmp_path, data(verb, 2), data(verb, 2))


def ppo(folder: Path, out: Path, prompts: Any, heldout: Any = None) -> PPOTrainer:
    config = PPOConfig(steps=2, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=6, minibatches=1, epochs=1)
    return PPOTrainer(
        folder, lambda asked, said: [float(len(text)) for text in said], prompts, out, config, heldout_data=heldout
    )


def test_ppo_measures_held_out_prompts_before_and_after_and_learns_from_the_others(
    tiny_folder: Path, tmp_path: Path
) -> None:
    prompts = [{"prompt": f"q{i}"} for i in range(4)] + [{"prompt": "apart", "split": "test"}]
    trainer = ppo(tiny_folder, tmp_path / "run", prompts, ["away", "off"])
    assert [p.prompt for p in trainer.prompts] == ["q0", "q1", "q2", "q3"]
    assert [p.prompt for p in trainer.heldout] == ["apart", "away", "off"]
    before = trainer.evaluate(0)
    assert trainer.evaluate(0) == before  # by the same random numbers
    summary = trainer.train()["summary"]
    assert summary["heldout_score_before"] == before["heldout_score"] and "heldout_score" in summary
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "heldout_score" in row] == [0, 2]
    assert summary["heldout_score"] == rows[-1]["heldout_score"] and summary["score_before"] == rows[1]["score"]
    seen = {json.loads(line)["prompt"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()}
    assert seen <= {"q0", "q1", "q2", "q3"}
    assert (tmp_path / "run" / "report.html").exists()


def test_ppo_without_held_out_prompts_says_before_and_after_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    summary = ppo(tiny_folder, tmp_path, [{"prompt": f"q{i}"} for i in range(4)]).train()["summary"]
    assert {"score", "score_before", "kl", "kl_before"} <= summary.keys() and "heldout_score" not in summary


def test_a_learning_rate_of_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr: 0\.0; expected more than 0"):
        OptimConfig(lr=0.0)
