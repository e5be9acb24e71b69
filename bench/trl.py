"""`python -m bench.trl [sft] [dpo] [reward]`: five optimiser steps here and five of TRL, on the same weights and the
same rows in the same order; docs/trl.md has what came of it.

Both get text and tokenise it themselves, and both take whole batches: what is compared is the trainer, not the loss
alone. Losses must agree to 1e-4 at every step, relative, or the command fails. TRL is no dependency: `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, LoRAConfig, OptimConfig, RewardConfig, SFTConfig
from rlhf_fast.data.batches import shuffled
from rlhf_fast.data.splits import split_heldout
from rlhf_fast.models.byte_tokenizer import CHAT_TEMPLATE
from rlhf_fast.pipeline import tiny_model
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer

STEPS, BATCH, LR, SEED = 5, 8, 1e-3, 0
HELDOUT = 0.1
TOLERANCE = 1e-4
# Micro-batches of half a batch or less here; TRL takes a batch at once.
OPTIM = OptimConfig(lr=LR, schedule="constant", warmup=0.0, adam_eps=1e-8, max_tokens_per_microbatch=512)
COMMON: dict[str, Any] = {
    "heldout": HELDOUT,
    "batch_size": BATCH,
    "epochs": 1,
    "seed": SEED,
    "lora": LoRAConfig(r=0),
    "optim": OPTIM,
}
# TRL finds the answers in a conversation by marks in the template; the text is the same.
MARKED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<assistant>{% generation %}{{ message['content'] }}<eos>{% endgeneration %}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

Row = dict[str, Any]
Losses = list[float]


def sft(folder: Path, out: Path) -> tuple[Losses, Losses]:
    """Conversations of one to three answers, all of which are learned; packed here, padded there."""
    from trl import SFTConfig as TheirConfig
    from trl import SFTTrainer as TheirTrainer

    rng = np.random.default_rng(SEED)
    rows = [
        {"messages": [_message(rng, role) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]}
        for _ in range(_rows())
    ]
    SFTTrainer(folder, rows, out / "ours", SFTConfig(**COMMON, samples=0)).train()
    model, tokenizer = models.load(folder)
    tokenizer.chat_template = MARKED_TEMPLATE
    assert tokenizer.apply_chat_template(rows[0]["messages"]) == tokenizer.apply_chat_template(
        rows[0]["messages"], chat_template=CHAT_TEMPLATE
    )
    config = TheirConfig(**_theirs(out), assistant_only_loss=True)
    return _our_losses(out), _train(TheirTrainer, model, tokenizer, config, _training_order(rows))


def dpo(folder: Path, out: Path) -> tuple[Losses, Losses]:
    """Comparisons of two answers to a message, each of another prompt."""
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    rows = _comparisons()
    DPOTrainer(folder, rows, out / "ours", DPOConfig(**COMMON)).train()
    model, tokenizer = models.load(folder)
    config = TheirConfig(**_theirs(out), beta=DPOConfig().beta)
    return _our_losses(out), _train(TheirTrainer, model, tokenizer, config, _training_order(rows))


def reward(folder: Path, out: Path) -> tuple[Losses, Losses]:
    """The same comparisons for a reward model, with scores drawn towards zero."""
    from trl import RewardConfig as TheirConfig
    from trl import RewardTrainer as TheirTrainer

    rows = _comparisons()
    trainer = RewardTrainer(folder, rows, out / "ours", RewardConfig(**COMMON))
    models.save(out / "start", trainer.model, trainer.tokenizer)  # its head is random
    trainer.train()
    model, tokenizer = models.load_reward(out / "start")
    config = TheirConfig(**_theirs(out), center_rewards_coefficient=RewardConfig().center_coef)
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    return _our_losses(out), _train(TheirTrainer, model, tokenizer, config, _training_order(whole))


TASKS: dict[str, Callable[[Path, Path], tuple[Losses, Losses]]] = {"sft": sft, "dpo": dpo, "reward": reward}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trl", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"of {', '.join(TASKS)}; all of them by default")
    tasks = parser.parse_args(words).tasks or list(TASKS)
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"{unknown[0]}: expected one of {', '.join(TASKS)}")
    try:
        import trl
    except ImportError as error:
        print(f"bench.trl compares with TRL, which cannot be imported ({error}): pip install trl", file=sys.stderr)
        return 1
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        models.save(folder, *models.load(tiny_model(), seed=SEED))
        for task in tasks:
            ours, theirs = TASKS[task](folder, Path(name) / task)
            print(f"\n{task}: rlhf-fast and TRL {trl.__version__}\n")
            print("| step | ours | TRL | relative difference |\n|---|---|---|---|")
            for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
                difference = abs(a - b) / abs(b)
                worst = max(worst, difference)
                print(f"| {step} | {a:.7f} | {b:.7f} | {difference:.1e} |")
    print(f"\nlargest relative difference: {worst:.1e}, of {TOLERANCE} allowed")
    return int(not worst <= TOLERANCE)


def _train(trainer: Any, model: Any, tokenizer: Any, config: Any, rows: list[Row]) -> Losses:
    """The loss of each of TRL's steps."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    run = trainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    run.remove_callback(PrinterCallback)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    return losses


def _theirs(out: Path) -> dict[str, Any]:
    """Settings that make TRL's trainers do as ours do."""
    return {
        "output_dir": str(out / "theirs"),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": OPTIM.schedule,
        "warmup_steps": 0,
        "weight_decay": OPTIM.weight_decay,
        "adam_epsilon": OPTIM.adam_eps,
        "max_grad_norm": OPTIM.max_grad_norm,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def _our_losses(out: Path) -> Losses:
    rows = [json.loads(line) for line in (out / "ours" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def _training_order(rows: list[Row]) -> list[Row]:
    """The rows that ours trains on, in the order of its only epoch."""
    training, _ = split_heldout(rows, HELDOUT, SEED)
    assert len(training) == STEPS * BATCH
    return shuffled(training, SEED)


def _rows() -> int:
    """Count the rows that leave a whole number of batches without those held out."""
    return next(n for n in range(STEPS * BATCH + 1, 1000) if n - max(1, round(HELDOUT * n)) == STEPS * BATCH)


def _comparisons() -> list[Row]:
    rng = np.random.default_rng(SEED)
    return [
        {
            "prompt": [_message(rng, "user")],
            "chosen": [_message(rng, "assistant")],
            "rejected": [_message(rng, "assistant")],
        }
        for _ in range(_rows())
    ]


def _message(rng: np.random.Generator, role: str) -> dict[str, str]:
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(rng.integers(1, 12))]
    return {"role": role, "content": " ".join(words)}


if __name__ == "__main__":
    sys.exit(main())
