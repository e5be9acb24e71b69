"""The settings of comparisons and of who makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
    """How pairs are given out and disputed ones decided, and how answers are sampled where models are given."""

    judgements: int = 3  # people who judge each pair
    lease: float = 1800.0  # seconds until an unanswered pair goes to another
    gold_share: float = 0.05  # of what a person judges, pairs whose answer is known (--gold), while there are any
    repeat_share: float = 0.05  # of it, pairs shown again with sides swapped
    repeat_after: int = 10  # pairs in between
    random_share: float = 0.2  # of it, pairs drawn at random where others come first (--unsure)
    least_seconds: float = 3.0  # a vote given faster is flagged
    reports: int = 1  # so many people's reports take a pair out
    dispute_below: float = 0.67  # pairs of which fewer pairs of votes agree are disputed
    disputed: Literal["senior", "discard"] = "senior"  # goes to a senior, or is left out of an export
    samples_per_model: int = 1  # answers to each prompt by each of several models; one model alone gives at least 2
    max_new_tokens: int = 128  # tokens; an answer that has not ended by then is cut off
    temperature: float = 1.0
    seed: int = 0
    warnings: dict[str, Any] = field(default_factory=dict)  # {category: words}: its items are hidden until agreed to

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self, count="judgements samples_per_model max_new_tokens repeat_after reports", positive="temperature lease"
        )
        check(self, share="gold_share repeat_share random_share dispute_below", not_negative="seed least_seconds")
        if self.gold_share + self.repeat_share >= 1:
            name = max("gold_share", "repeat_share", key=lambda one: float(getattr(self, one)))
            raise ConfigError(
                f"{name}: {getattr(self, name)}; expected less than 1 for gold_share and repeat_share together, or no "
                "new pairs would come"
            )
        if not self.random_share:
            raise ConfigError(
                f"random_share: {self.random_share}; expected more (0.2 is usual), or what order gains cannot be told"
            )
        if not all(isinstance(words, str) and words.strip() for words in self.warnings.values()):
            raise ConfigError(f"warnings: {self.warnings}; expected {{category: words for people before an item}}")
