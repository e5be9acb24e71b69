"""What PPO is rewarded by: a reward model's checkpoint, a Python function, or a weighted list of those."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_fast import models
from rlhf_fast.data.chat import Prompt, encode
from rlhf_fast.models.checkpoint import read_extra, resolve
from rlhf_fast.trainers.loop import per_example

RewardFunction = Callable[[list[Prompt], list[str]], Sequence[float]]
Reward = str | Path | RewardFunction | Sequence[tuple[float, Any]]


class RewardModel:
    """A trained reward model as a function: scores with mean 0 and deviation 1 over the policy it was trained on.

    With several heads the score is their mean less so many deviations as its trainer was told; `measure` also says how
    far they are apart. `agreement` is what its trainer measured on held-out comparisons, None when the checkpoint does
    not say.
    """

    def __init__(self, name: str | Path, max_tokens: int = 4096, max_length: int = 1024) -> None:
        extra = read_extra(resolve(name))
        self.model, self.tokenizer = models.load_reward(name, merged=True)
        self.device = next(self.model.parameters()).device
        self.agreement: dict[str, float] | None = extra.get("heldout_agreement")
        self.mean, self.std = extra.get("score_mean", 0.0), extra.get("score_std", 1.0)
        self.lcb = extra.get("lcb", 0.0)
        self.max_tokens, self.max_length = max_tokens, max_length
        self.shared = models.longest_shared(self.model)

    def __call__(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        return self.measure(prompts, responses)[0]

    def measure(self, prompts: list[Prompt], responses: list[str]) -> tuple[list[float], list[float]]:
        """The score of each response, and the deviation of its heads' scores in the same unit (0 for one head)."""
        # The text is read with the reward model's own tokenizer and an end token, just as in its training.
        examples = [
            encode(self.tokenizer, prompt, response, self.max_length, f"response {i}")
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
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


def resolve_reward(reward: Reward, min_agreement: float, max_length: int) -> RewardFunction:
    """The function that `reward` means.

    Raises:
        ValueError: a reward model whose held-out agreement is below `min_agreement`, or a URL.
        TypeError: none of the known forms.
    """
    if isinstance(reward, str | Path):
        if str(reward).startswith(("http://", "https://")):
            raise ValueError(f"reward: {reward} is a URL, which is not supported yet; pass a function that calls it")
        model = RewardModel(reward, max_length=max_length)
        require_agreement(model, min_agreement, reward)
        return model
    if callable(reward):
        return reward
    if isinstance(reward, Sequence) and reward:  # strings were dealt with above
        parts = [
            (weight, resolve_reward(part, min_agreement, max_length))
            for weight, part in typing.cast(Sequence[tuple[float, Any]], reward)
        ]
        return lambda prompts, responses: [
            math.fsum(weight * score for (weight, _), score in zip(parts, scores, strict=True))
            for scores in zip(*(part(prompts, responses) for _, part in parts), strict=True)
        ]
    raise TypeError(
        f"reward: got {type(reward).__name__}; expected a checkpoint, a function (prompts, responses) -> scores, "
        "or a list of (weight, one of those)"
    )


def require_agreement(model: RewardModel, minimum: float, name: str | Path) -> None:
    """Refuse a reward model that is known to agree too little with people: PPO would optimise its errors."""
    if model.agreement is not None and model.agreement["mean"] < minimum:
        raise ValueError(
            f"reward: {name} agrees with {model.agreement['mean']:.0%} of the held-out comparisons, less than "
            f"ppo.min_reward_agreement = {minimum:.0%}; collect more comparisons, or lower the setting to go on"
        )


def checked_scores(reward: RewardFunction, prompts: list[Prompt], responses: list[str]) -> list[float]:
    """Call a reward function and refuse a wrong number of scores, or one that is not finite."""
    scores = [float(score) for score in reward(prompts, responses)]
    if len(scores) != len(responses):
        raise ValueError(f"reward: the function returned {len(scores)} scores for {len(responses)} responses")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"reward: the score of response {index} is {score}: {responses[index][:80]!r}")
    return scores
