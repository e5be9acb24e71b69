"""The settings of a win rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.config.common import check
from rlhf_fast.config.settings import Settings


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Win rate of one checkpoint against another on held-out prompts."""

    samples_per_prompt: int = 2
    max_new_tokens: int = 128  # tokens; a response that has not ended by then is cut off
    temperature: float = 1.0  # 0.0 takes the likeliest token
    tie_margin: float = 0.0  # replies whose scores are this near, in the judge's unit, are a tie
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, count="samples_per_prompt max_new_tokens", not_negative="temperature tie_margin seed")
        if self.temperature == 0.0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} replies at temperature 0 would all be the same; "
                "expected 1, or a temperature above 0"
            )
