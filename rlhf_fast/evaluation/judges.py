"""Judges of how good a reply is when two policies are compared: the built-in annotator, or a reward of any form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf_fast.data.records import PromptRecord
from rlhf_fast.feedback.simulated import WEIGHTS, SimulatedAnnotator
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rewards.model import Reward, RewardModel, resolve_reward
from rlhf_fast.rollout.requests import context_length

BUILT_IN = "simulated"  # the judge's name in settings


@dataclass(frozen=True)
class Verdict:
    """Judgement of one reply: the higher the score, the better."""

    score: float
    parts: dict[str, float] = field(default_factory=dict)  # by criterion, if the judge has several


class Judge(Protocol):
    """Scores replies. `name` and `note` go into the report: who it is, and what its scores do not say."""

    name: str
    note: str

    def check(self, prompts: Sequence[PromptRecord]) -> None:
        """Refuse prompts whose replies could not be judged, before anything is sampled."""

    def rate(self, prompts: Sequence[PromptRecord], replies: Sequence[str]) -> list[Verdict]:
        """A verdict on each of `replies[i]` to `prompts[i]`."""


class BuiltInAnnotator:
    """The rule of feedback/simulated.py, without error."""

    name = "simulated annotator, without error"
    note = (
        "its rule is made for the demo's subject, replies of an agency to its clients, and says nothing about another; "
        "--judge takes a reward model, a rule, FILE.py:function or a URL in its place"
    )

    def check(self, prompts: Sequence[PromptRecord]) -> None:
        """Require a category of every prompt: the rule expects adversarial and off-topic requests to be declined."""
        without = [prompt for prompt in prompts if not prompt.category]
        if without:
            raise ValueError(
                f"{without[0].name or 'a prompt'}: it has no category ({len(without)} of {len(prompts)} prompts have "
                "none), by which the built-in annotator tells what should be declined. Its rule is made for replies of "
                "an agency to its clients: for another subject choose a judge (--judge runs/reward, rule:NAME, "
                "FILE.py:function or a URL), else add the categories"
            )

    def rate(self, prompts: Sequence[PromptRecord], replies: Sequence[str]) -> list[Verdict]:
        annotator = SimulatedAnnotator()
        ratings = [annotator.rate(p.prompt, p.category, reply) for p, reply in zip(prompts, replies, strict=True)]
        return [Verdict(rating.score, {name: getattr(rating, name) for name in WEIGHTS}) for rating in ratings]


class RewardJudge:
    """Judge by any reward that PPO takes. A policy trained on it is expected to please it, whatever it is worth."""

    def __init__(self, reward: Reward, max_length: int = 4096) -> None:
        self.rewards = resolve_reward(reward, 0.0, max_length, timeout=300.0, retries=2)
        parts = " + ".join(part.name for part in self.rewards.parts)
        self.name = str(reward) if isinstance(reward, str | Path) else parts
        self.note = "a policy that was trained on this very reward pleases it, whether or not it pleases people"
        for part in self.rewards.parts:
            if isinstance(part.function, RewardModel):
                positions = context_length(unwrapped(part.function.model).config.get_text_config())
                part.function.max_length = min(max_length, positions or max_length)
                if part.function.agreement is not None:
                    agreement = part.function.agreement["mean"]
                    self.note += f"; {part.name} agrees with {agreement:.0%} of its held-out comparisons"

    def check(self, prompts: Sequence[PromptRecord]) -> None:
        self.rewards.check(prompts)

    def rate(self, prompts: Sequence[PromptRecord], replies: Sequence[str]) -> list[Verdict]:
        scored = self.rewards(prompts, replies)
        rows = [{name: scores[i] for name, scores in scored.parts.items()} for i in range(len(replies))]
        given = [{name: score for name, score in row.items() if score is not None} for row in rows]
        return [Verdict(score, parts) for score, parts in zip(scored.scores, given, strict=True)]


def judge_of(judge: Judge | Reward | None) -> Judge:
    """A judge as it is, or by its name: `simulated` (None) or a reward in any form (docs/rewards.md)."""
    if judge is None or judge == BUILT_IN:
        return BuiltInAnnotator()
    if hasattr(judge, "rate") and hasattr(judge, "check"):
        return judge  # type: ignore[return-value]
    return RewardJudge(judge)


def mean_parts(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The mean of each criterion over the verdicts that have it."""
    names: dict[str, Any] = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    given = {name: [verdict.parts[name] for verdict in verdicts if name in verdict.parts] for name in names}
    return {name: math.fsum(values) / len(values) for name, values in given.items()}
