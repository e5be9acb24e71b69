"""The settings of comparisons and of who makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.config.common import check
from rlhf_fast.config.settings import ConfigError, Settings


@dataclass(frozen=True)
class AnnotatorConfig(Settings):
    """The simulated annotator: a written rule in place of people, so that the loop runs unattended."""

    error_rate: float = 0.05  # share of comparisons answered the wrong way round
    tie_margin: float = 0.05  # replies whose scores (0 to 1) are this near are a tie, which is left out
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, below_half="error_rate", share="tie_margin")


@dataclass(frozen=True)
class ComparisonsConfig(Settings):
    """Number of responses sampled for comparison, and the annotator that compares them."""

    prompts: int = 0  # 0: every training prompt
    samples_per_prompt: int = 4  # every pair among them is compared
    max_new_tokens: int = 128  # tokens; a response that has not ended by then is cut off
    temperature: float = 1.0
    seed: int = 0
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, not_negative="prompts seed", several="samples_per_prompt", count="max_new_tokens")
        check(self, positive="temperature")  # at 0 all replies to a prompt are the same


@dataclass(frozen=True)
class AnnotateConfig(Settings):
    """How many people judge a pair, and how the answers are sampled where models are given."""

    judgements: int = 3  # people who judge each pair
    samples_per_model: int = 1  # answers to each prompt by each of several models; one model alone gives at least 2
    max_new_tokens: int = 128  # tokens; an answer that has not ended by then is cut off
    temperature: float = 1.0
    seed: int = 0
    warnings: dict[str, Any] = field(default_factory=dict)  # {category: words}: its items are hidden until agreed to

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, count="judgements samples_per_model max_new_tokens", positive="temperature", not_negative="seed")
        if not all(isinstance(words, str) and words.strip() for words in self.warnings.values()):
            raise ConfigError(f"warnings: {self.warnings}; expected {{category: words for people before an item}}")
