"""The verb export: a run's model as a folder that goes anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_fast.runs import model_names


@dataclass(frozen=True)
class ExportCommand:
    """Write the model of a run as one folder that transformers and vLLM load: its adapter folded into the weights.

    Of a run the checkpoint that is its outcome. A reward model becomes a sequence classifier. Nothing in the folder
    refers to another one.

      rlhf-fast export --model runs/ppo --out policy --dtype bfloat16
    """

    model: str  # folder, run or smollm2-135m
    out: str  # folder that is yet to be made
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; they were trained in float32


def run(command: ExportCommand) -> None:
    out = Path(command.out)
    if out.exists():
        raise FileExistsError(f"out: {out} is there already; choose another --out")
    is_reward = model_names.is_reward(command.model)
    model_names.check(command.model, "model", "reward" if is_reward else "policy")
    import torch

    from rlhf_fast import models
    from rlhf_fast.models.checkpoint import card, read_extra

    load = models.load_reward if is_reward else models.load
    model, tokenizer = load(command.model, getattr(torch, command.dtype), merged=True)
    extra = read_extra(models.resolve(command.model))
    models.save(out, model, tokenizer, extra if is_reward else None, card=card(command.model, is_reward))
    print(f"{'Reward model' if is_reward else 'Policy'} written to {out}")
