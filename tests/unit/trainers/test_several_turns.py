"""Comparisons whose answers have several turns: what a user says in one is read, and never scored as the answer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, RewardConfig
from rlhf_fast.data.batches import pad
from rlhf_fast.pages.reward_report import write_reward_report
from rlhf_fast.trainers.dpo import DPOTrainer, batch_logprobs
from rlhf_fast.trainers.reward import RewardTrainer


def transcript(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


ROWS = [
    {"chosen": transcript(f"q{i}", "yes", f"more {i}", "good"), "rejected": transcript(f"q{i}", "no" + "o" * (i % 3))}
    for i in range(10)
]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_sums_what_the_assistant_says(loss: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """Token by token from the model's own table, in any batch; of IPO means over the assistant's tokens alone."""
    dpo = DPOTrainer(tiny_folder, ROWS, tmp_path, DPOConfig(loss=loss, lora=LoRAConfig(r=4)))
    examples = [example for group in dpo.training for example in group.examples]
    assert any(example.own for example in examples)
    with torch.no_grad():
        for shared in (0, 1000):
            together = batch_logprobs(dpo.config, dpo.model, pad(examples, longest_shared=shared))
            for example, found in zip(examples, together, strict=True):
                ids = torch.tensor([[*example.prompt, *example.response]])
                table = torch.log_softmax(dpo.model(input_ids=ids).logits[0].double(), -1)
                own = example.own or (True,) * len(example.response)
                places = [len(example.prompt) + i for i, mine in enumerate(own) if mine]
                said = [float(table[place - 1, ids[0, place]]) for place in places]
                expected = sum(said) / (len(said) if loss == "ipo" else 1)
                assert float(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("phase", ["reward", "dpo"])
def test_such_rows_are_trained_on_beside_others(phase: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [*ROWS, *({"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(10))]
    options: dict[str, Any] = {"lora": LoRAConfig(r=4), "optim": OptimConfig(lr=3e-3), "heldout": 0.2, "epochs": 2}
    if phase == "dpo":
        result = DPOTrainer(tiny_folder, rows, tmp_path, DPOConfig(**options)).train()
        assert result["summary"]["heldout_accuracy"] == 1.0
        return
    RewardTrainer(tiny_folder, rows, tmp_path, RewardConfig(**options)).train()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    several = next(row for row in samples if isinstance(row["chosen"], list))
    assert [message["role"] for message in several["chosen"]] == ["assistant", "user", "assistant"]
    write_reward_report(tmp_path)
