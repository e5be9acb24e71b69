"""Settings that all phases share: their ranges, adapters, the optimiser, what a run keeps."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_fast.config.settings import Settings

# What a setting may be, by the words of `_check`; NaN is in no range, and only a limit may be infinite.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "count": ("at least 1", lambda value: 1 <= value < math.inf),
    "not_negative": ("at least 0", lambda value: 0 <= value < math.inf),
    "positive": ("more than 0", lambda value: 0 < value < math.inf),
    "limit": ("at least 0; inf is no limit", lambda value: value >= 0),
    "positive_limit": ("more than 0; inf is no limit", lambda value: value > 0),
    "above_one": ("more than 1", lambda value: 1 < value < math.inf),
    "share": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "part": ("at least 0 and less than 1", lambda value: 0 <= value < 1),
    "below_half": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "several": ("at least 2", lambda value: 2 <= value < math.inf),
    "four": ("at least 4", lambda value: 4 <= value < math.inf),
    "port": ("from 0 to 65535", lambda value: 0 <= value < 65536),
}


def check(config: Any, **settings: str) -> None:
    """Raise ValueError for a setting out of its range: `check(self, count="epochs batch_size", part="heldout")`."""
    for kind, names in settings.items():
        expected, holds = _RANGES[kind]
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}: {value}; expected {expected}")


def check_date(date: str | None) -> None:
    try:
        datetime.date.fromisoformat(date or "2026-01-01")
    except ValueError as error:
        raise ValueError(f"date: {date!r}; expected a day such as 2026-01-31") from error


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685) on linear layers; `r=0` trains all weights."""

    r: int = 16  # rank; 0: no adapter, all weights are trained
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / r
    targets: tuple[str, ...] = ()  # names of the layers: q_proj,v_proj; none: every linear layer but the head

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, not_negative="r", positive="alpha")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """AdamW with gradient clipping, linear warm-up and a schedule. The micro-batch never changes the gradient."""

    lr: float = 2e-4  # learning rate after warm-up
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # of the learning rate after warm-up
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.0  # decoupled: each step takes lr * weight_decay of a weight away
    adam_eps: float = 1e-5  # PPO diverges less than with 1e-8 (arXiv 2403.17031)
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it; inf: none is
    max_tokens_per_microbatch: int = 1024  # padded tokens on the device at once; halved where memory is short
    checkpointing: bool = False  # compute activations again for the gradient: less memory, a third more time
    max_skipped: int = 3  # steps in a row that are skipped because loss or gradient is not finite; then it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, not_negative="weight_decay max_skipped", share="warmup", positive="lr adam_eps")
        check(self, positive_limit="max_grad_norm", count="max_tokens_per_microbatch")


@dataclass(frozen=True)
class RunConfig(Settings):
    """Files that a run keeps, and where else it is shown."""

    save_every: int = 0  # steps from one evaluation and checkpoint to the next; 0: evaluate each epoch, save at the end
    keep_last: int = 2  # checkpoints that are kept beside the best
    trackers: tuple[str, ...] = ()  # of tensorboard, wandb and trackio: tensorboard,wandb

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, not_negative="save_every", count="keep_last")
        if unknown := [name for name in self.trackers if name not in ("tensorboard", "wandb", "trackio")]:
            raise ValueError(f"trackers: {unknown[0]!r}; expected some of tensorboard, wandb and trackio")
