"""Memory that runs out in the middle of a batch: its gradient is the whole batch's, no part counted twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.models.inner import trunk
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer
from tests.unit.trainers.conftest import Update

ROWS = [{"prompt": f"q{i}" * (1 + i % 3), "completion": "answer " * (1 + i % 4)} for i in range(12)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no" * (1 + len(row))} for row in ROWS]
TIMED = ("seconds", "decode_roofline", "training_utilisation", "busy")


def make(method: str, folder: Path, out: Path, tokens: int) -> Any:
    """One optimiser step on all the data, with the gradient as it is: not clipped."""
    optim = OptimConfig(max_tokens_per_microbatch=tokens, max_grad_norm=math.inf, schedule="constant", warmup=0.0)
    common: dict[str, Any] = {"lora": LoRAConfig(r=4), "optim": optim}
    if method == "sft":
        config = SFTConfig(batch_size=12, epochs=1, heldout=0.0, samples=0, packing=False, **common)
        return SFTTrainer(folder, ROWS, out, config)
    if method == "reward":
        return RewardTrainer(folder, PAIRS, out, RewardConfig(batch_size=12, heldout=0.0, **common))
    if method == "dpo":
        return DPOTrainer(folder, PAIRS, out, DPOConfig(batch_size=12, heldout=0.0, **common))
    return PPOTrainer(
        folder,
        lambda prompts, responses: [float(len(response)) for response in responses],
        [{"prompt": row["prompt"]} for row in ROWS],
        out,
        PPOConfig(
            steps=1, prompts_per_step=6, samples_per_prompt=2, epochs=1, minibatches=1, max_new_tokens=6, **common
        ),
    )


def fail(model: Any, where: str, number: int) -> list[int]:
    """Let memory run out once, in the given forward or backward pass of training; returns a counter of these."""
    passes = [0]

    def after_first_layer(_: Any, __: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        passes[0] += 1
        if passes[0] != number:
            return
        if where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        states = output[0] if isinstance(output, tuple) else output

        def refuse(_: torch.Tensor) -> None:  # once the layers above have their gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        states.register_hook(refuse)

    trunk(unwrapped(model)).layers[0].register_forward_hook(after_first_layer)
    return passes


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo"])
def test_the_gradient_after_it_is_the_whole_batchs(
    method: str, tiny_folder: Path, tmp_path: Path, updates: list[Update]
) -> None:
    found, counts = [], []
    for where, number in (("nowhere", 0), ("forward", 2), ("backward", 3)):
        out = tmp_path / f"{where}-{number}"
        trainer = make(method, tiny_folder, out, 64)
        passes = fail(trainer.model, where, number)
        trainer.train()
        counts.append(passes[0] - number)
        assert trainer.budget.tokens == (32 if number else 64)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append({name: x for name, x in rows[-1].items() if not name.startswith(TIMED)})
    assert counts[0] >= 3 and min(counts[1:]) > counts[0], "several parts, and more once they are smaller"
    whole, *others = [update.gradient for update in updates]
    assert len(others) == 2 and float(whole.norm()) > 0
    for other in others:
        assert float((whole - other).double().norm() / whole.norm()) < 1e-5
    for row in found[1:]:
        assert row == pytest.approx(found[0], rel=1e-4, abs=1e-6)
