"""The settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.config.common import LoRAConfig, OptimConfig, RunConfig, check, check_date
from rlhf_fast.config.settings import Settings


@dataclass(frozen=True)
class SFTConfig(Settings):
    """Supervised fine-tuning on demonstrations: cross-entropy on the answers only, their ends included."""

    epochs: int = 2  # passes over the demonstrations
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 8  # demonstrations an optimiser step
    heldout: float = 0.1  # share of the demonstrations kept for measuring, unless rows have a split; 0: none
    turns: Literal["all", "last"] = "all"  # which of the assistant's turns in a conversation are learned
    packing: bool = True  # several demonstrations in a row without padding, none seeing another; only speed differs
    samples: int = 4  # held-out prompts answered greedily at each evaluation, into samples.jsonl; 0: none
    sample_tokens: int = 48  # tokens of such an answer at most
    patience: int | None = None  # evaluations without a lower loss until it ends with its best checkpoint
    max_length: int = 1024  # tokens of a demonstration
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of longer ones, which are counted
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)
        check(self, count="epochs max_steps batch_size max_length sample_tokens patience", part="heldout")
        check(self, not_negative="samples seed")
