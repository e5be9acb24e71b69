"""The settings of a reward model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.config.common import LoRAConfig, OptimConfig, RunConfig, check, check_date
from rlhf_fast.config.settings import Settings


@dataclass(frozen=True)
class RewardConfig(Settings):
    """A Bradley-Terry reward model: a scalar head, or several, at the last token of prompt and response."""

    epochs: int = 1  # passes over the comparisons
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 16  # comparisons an optimiser step
    heldout: float = 0.125  # share of the prompts kept for measuring agreement, unless rows have a split; 0: none
    center_coef: float = 0.01  # weight of (chosen + rejected)^2, which keeps scores near zero
    heads: int = 1  # scores of each response, every head trained on its own resample of the prompts
    lcb: float = 1.0  # the score is the heads' mean less this many of their deviations (arXiv 2310.02743)
    normalize_samples: int = 0  # answers sampled to each held-out prompt to scale scores by; 0: those compared
    max_new_tokens: int = 128  # tokens of such an answer
    patience: int | None = None  # evaluations without higher agreement until it ends with its best checkpoint
    max_length: int = 1024  # tokens of prompt and response
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
        check(self, count="epochs max_steps batch_size heads max_new_tokens max_length patience", part="heldout")
        check(self, not_negative="center_coef lcb normalize_samples seed")
