"""A run that keeps its state after every step, at a pace at which it can be hit: a process of test_resume.

python -m tests.scenarios.trainers.killed_run FOLDER OUT NAME... does the runs of these names, each in OUT/NAME.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, PPOConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_fast.pages import plots
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.loop import state
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

WORDS: dict[str, Any] = {
    "lora": LoRAConfig(r=4),
    "optim": OptimConfig(lr=1e-3),
    "run": RunConfig(save_every=2, keep_last=1),
}
PAIRS = [{"prompt": f"q{i % 5}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]


def train(name: str, folder: str, out: str, pause: float, errors: str = "") -> None:
    """With `errors`, what it says goes into that file."""
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    torch.set_num_threads(1)
    plots.available = lambda: False  # they take a second a page, and are nothing that a kill could change
    state.EVERY, state.MOST = 0.0, 1e9
    after = state.TrainState.after

    def slowly(self: state.TrainState, step: int) -> None:
        after(self, step)
        time.sleep(pause)

    state.TrainState.after = slowly  # type: ignore[method-assign]
    trainer(name, folder, out).train()


def trainer(name: str, folder: str, out: str) -> Any:
    if name == "sft":
        data = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(12)]
        return SFTTrainer(folder, data, out, SFTConfig(batch_size=2, epochs=4, patience=2, **WORDS))
    if name == "reward":
        return RewardTrainer(folder, PAIRS, out, RewardConfig(batch_size=2, epochs=3, heldout=0.4, **WORDS))
    if name == "dpo":
        return DPOTrainer(folder, PAIRS, out, DPOConfig(batch_size=2, epochs=3, heldout=0.4, **WORDS))
    options: dict[str, Any] = {"critic": "separate", "critic_warmup": 1} if name == "ppo" else {}
    config = PPOConfig(
        steps=6, prompts_per_step=3, samples_per_prompt=2, minibatches=2, max_new_tokens=8, kl_target=0.5,
        advantage=name.removesuffix("-lag") if name in ("grpo", "remax-lag") else "gae", lag=int(name.endswith("-lag")),
        **options, **WORDS,
    )  # fmt: skip
    prompts = [{"prompt": f"q{i}"} for i in range(5)]
    return PPOTrainer(folder, lambda prompts, texts: [float(len(text)) for text in texts], prompts, out, config)


if __name__ == "__main__":
    for each in sys.argv[3:]:
        train(each, sys.argv[1], f"{sys.argv[2]}/{each}", pause=0.0)
