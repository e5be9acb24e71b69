"""The settings of direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.config.common import LoRAConfig, OptimConfig, RunConfig, check, check_date
from rlhf_fast.config.settings import Settings


@dataclass(frozen=True)
class DPOConfig(Settings):
    """Direct preference optimisation (arXiv 2305.18290), from the same comparisons as the reward model."""

    epochs: int = 1  # passes over the comparisons
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 16  # comparisons an optimiser step
    heldout: float = 0.125  # share of the prompts kept for measuring, unless rows have a split; 0: none
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"  # ops.dpo_loss says what each is
    beta: float = 0.1  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # share of comparisons presumed to be the wrong way round
    patience: int | None = None  # evaluations without a lower loss until it ends with its best checkpoint
    max_length: int = 1024  # tokens of prompt and response
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of longer ones, which are counted
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)
        check(self, count="epochs max_steps batch_size max_length patience", part="heldout", positive="beta")
        check(self, below_half="label_smoothing", not_negative="seed")
