"""Rewards of PPO: a reward model, a Python function or one in a file, a rule, a URL, or a weighted list."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import models
from rlhf_fast.data.batches import Example
from rlhf_fast.data.records import OPTIONAL_COLUMNS, PromptRecord, read_record
from rlhf_fast.data.templates import Prompt
from rlhf_fast.data.tokenize import tokenize_example
from rlhf_fast.models.checkpoint import read_extra, resolve
from rlhf_fast.models.scoring import per_example
from rlhf_fast.rewards import names as reward_names
from rlhf_fast.rewards.calls import is_async, patient, wants
from rlhf_fast.rewards.rules import rule
from rlhf_fast.rewards.scoring import Background, Part, RewardFunction, Scores, Scoring
from rlhf_fast.rewards.url import RewardURL
from rlhf_fast.runs import model_names

Reward = str | Path | RewardFunction | Sequence[tuple[float, Any]]
MAX_TOKENS = 4096  # that a reward model reads at a time


class Rewards:
    """A weighted sum of reward functions."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = _with_names_of_their_own(parts)
        self._background = Background()

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Refuse prompts that could not be scored, before anything is sampled.

        Raises:
            RecordError: a row lacks a column that a part asks for.
            ValueError: one that the chat template of a reward model does not render.
        """
        for part in self.parts:
            columns = part.wants.of(records, part.name)
            if isinstance(part.function, RewardModel):
                part.function.examples([record.prompt for record in records], ["."] * len(records), **columns)

    def start(self, records: Sequence[PromptRecord]) -> Scoring:
        """Begin to score responses to `records`, one each, that are still to come."""
        return Scoring(self.parts, records, self._background)

    def forget(self) -> None:
        """Cancel scores that are no longer wanted: calls that have not begun are not made."""
        self._background.forget()

    def __call__(self, records: Sequence[PromptRecord], responses: Sequence[str]) -> Scores:
        """Score `responses[i]` to `records[i]`; raises as `Scoring` says."""
        scoring = self.start(records)
        for i, response in enumerate(responses):
            scoring.finished(i, response)
        return scoring.result()


class RewardModel:
    """A trained reward model as a function: scores with mean 0 and deviation 1 over the policy it was trained on.

    With several heads the score is their mean less so many deviations as its trainer was told; `measure` also says how
    far they are apart. `agreement` is what its trainer measured on held-out comparisons, None when the checkpoint does
    not say; `unmeasured` when it says that nothing was held out.
    """

    def __init__(
        self,
        name: str | Path,
        max_tokens: int = MAX_TOKENS,
        max_length: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        model_names.check(name, "reward", "reward")
        extra = read_extra(resolve(name))
        self.model, self.tokenizer = models.load_reward(name, dtype, merged=True)
        self.device = next(self.model.parameters()).device
        self.agreement: dict[str, float] | None = extra.get("heldout_agreement")
        self.unmeasured = "heldout_agreement" in extra and self.agreement is None
        self.mean, self.std = extra.get("score_mean", 0.0), extra.get("score_std", 1.0)
        self.lcb = extra.get("lcb", 0.0)
        self.max_tokens, self.max_length = max_tokens, max_length
        self.shared = models.longest_shared(self.model)

    def __call__(
        self,
        prompts: list[Prompt],
        responses: list[str],
        tools: list[Any] | None = None,
        chat_template_kwargs: list[Any] | None = None,
    ) -> list[float]:
        return self.measure(prompts, responses, tools, chat_template_kwargs)[0]

    def examples(
        self,
        prompts: list[Prompt],
        responses: list[str],
        tools: list[Any] | None = None,
        chat_template_kwargs: list[Any] | None = None,
    ) -> list[Example]:
        """Prompts and responses as the model's own tokenizer reads them, through the end of the turn, just as in its
        training."""
        none: list[Any] = [None] * len(prompts)
        rows = zip(prompts, responses, tools or none, chat_template_kwargs or none, strict=True)
        examples = []
        for i, (prompt, response, *others) in enumerate(rows):
            record = read_record({"prompt": prompt, **dict(zip(OPTIONAL_COLUMNS, others, strict=True))})
            assert isinstance(record, PromptRecord)
            own, name = (record.tools, record.template_kwargs), f"response {i}"
            example = tokenize_example(
                self.tokenizer, prompt, response, *own, max_length=self.max_length, name=name, strict=False
            )
            examples.append(example)
        return examples

    def measure(
        self,
        prompts: list[Prompt],
        responses: list[str],
        tools: list[Any] | None = None,
        chat_template_kwargs: list[Any] | None = None,
    ) -> tuple[list[float], list[float]]:
        """The score of each response, and the deviation of its heads' scores in the same unit (0 for one head)."""
        examples = self.examples(prompts, responses, tools, chat_template_kwargs)
        if not examples:
            return [], []
        (parts,) = per_example(
            examples,
            lambda batch: [models.score_last(self.model, batch)],
            self.max_tokens,
            self.device,
            self.shared,
        )
        by_head = torch.cat(parts)  # (B, K)
        scores, spread = models.lower_bound(by_head, self.lcb), by_head.std(dim=1, correction=0)
        return [(score - self.mean) / self.std for score in scores.tolist()], [s / self.std for s in spread.tolist()]


def resolve_reward(
    reward: Reward,
    min_agreement: float,
    max_length: int,
    timeout: float | None = None,
    retries: int = 0,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
) -> Rewards:
    """Resolve what `reward` means: docs/rewards.md has the forms.

    Args:
        min_agreement: held-out agreement that a reward model must have.
        max_length: tokens of prompt and response that a reward model reads.
        timeout: seconds for one call of a function or one request to a URL, None without a limit.
        retries: how often a failed call is made again.
        dtype: of the weights of reward models.
        batch: responses in a call of a URL or an async function, None for all.

    Raises:
        ValueError: a reward model whose held-out agreement is below `min_agreement`, an unknown rule, a bad weight, a
            `batch` for what always gets all responses.
        TypeError: none of the known forms.
    """

    def own(weight: float, function: RewardFunction, who: str) -> Part:
        name, call = _function_name(function), patient(function, who, timeout, retries)
        return Part(weight, name, call, wants(function, who), waits=is_async(function), batch=batch)

    def part(weight: float, source: Any) -> list[Part]:
        if isinstance(source, str) and reward_names.is_list(source):
            source = reward_names.written_list(source)
        if isinstance(source, Sequence) and not isinstance(source, str) and source:
            return [inner for each in source for inner in part(*_weighted(weight, each))]
        if isinstance(source, str) and source.startswith("rule:"):
            checker = rule(source.removeprefix("rule:"))
            return [Part(weight, source.split(":")[1], checker, wants(checker, source))]
        if isinstance(source, str) and source.startswith(reward_names.URLS):
            url = RewardURL(source, timeout, retries)
            return [Part(weight, url.name, url, wants(url, url.name), waits=True, batch=batch)]
        if isinstance(source, str | Path) and reward_names.is_function(str(source)):
            function = reward_names.load_function(str(source))
            return [own(weight, function, reward_names.line_of(function, str(source)))]
        if isinstance(source, str | Path):
            model = RewardModel(source, max_length=max_length, dtype=dtype)
            require_agreement(model, min_agreement, source)
            return [Part(weight, Path(source).name, model, wants(model, str(source)))]
        if callable(source):
            return [own(weight, source, _function_name(source))]
        raise TypeError(
            f"reward: got {type(source).__name__}; expected a checkpoint, a function (prompts, responses) -> scores, "
            "FILE.py:function, a URL, rule:NAME, or a list of (weight, one of those)"
        )

    parts = part(1.0, reward)
    if batch is not None and not any(each.waits for each in parts):
        raise ValueError(
            f"ppo.reward_batch: {batch}, but the reward is neither a URL nor an async function, and gets all responses "
            "at once; leave the setting out, or make the function async"
        )
    return Rewards(parts)


def _weighted(outer: float, each: Any) -> tuple[float, Any]:
    """The weight of a part of a list, times that of the list, and what is weighted."""
    if not isinstance(each, Sequence) or isinstance(each, str) or len(each) != 2:
        raise TypeError(f"reward: a list holds {each!r:.80}; expected (weight, reward)")
    weight, source = each
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"reward: the weight {weight!r:.40}; expected a finite number")
    return outer * weight, source


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "function" if name == "<lambda>" else str(name)


def _with_names_of_their_own(parts: Sequence[Part]) -> list[Part]:
    """Parts of the same name become name, name_2, name_3, as their means are told apart by it."""
    named: list[Part] = []
    for part in parts:
        taken = {other.name for other in named}
        same = (part.name, *(f"{part.name}_{i}" for i in range(2, len(parts) + 2)))
        named.append(replace(part, name=next(name for name in same if name not in taken)))
    return named


def require_agreement(model: RewardModel, minimum: float, name: str | Path) -> None:
    """Refuse a reward model that is known to agree too little with people: PPO would optimise its errors."""
    if model.unmeasured and minimum > 0:
        raise ValueError(
            f"reward: {name} was trained with nothing held out, so that its agreement is not known, and "
            f"ppo.min_reward_agreement = {minimum:.0%} cannot be seen to hold; train it with reward.heldout above 0, "
            "or set ppo.min_reward_agreement: 0 to go on"
        )
    if model.agreement is not None and model.agreement["mean"] < minimum:
        raise ValueError(
            f"reward: {name} agrees with {model.agreement['mean']:.0%} of the held-out comparisons, less than "
            f"ppo.min_reward_agreement = {minimum:.0%}; collect more comparisons, or lower the setting to go on"
        )
