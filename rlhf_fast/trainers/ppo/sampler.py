"""Responses of the policy to a step's prompts, with their scores on the way; with a lag, a step ahead."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Example, shuffled
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.models.adapters import Model
from rlhf_fast.rewards.model import Rewards
from rlhf_fast.rewards.scoring import Scores, Scoring
from rlhf_fast.rollout import sequence as rollout
from rlhf_fast.rollout.engine import Statistics
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.requests import sequences_for
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.trainers.ppo.advantages import equal_groups

KEPT = ("response", "logprobs", "entropies", "finish_reason")  # of a sequence, to learn from it in another process


@dataclass(frozen=True)
class Sampled:
    """Responses of a step, and their scores, which may still be computed."""

    step: int
    records: list[PromptRecord]
    rollouts: Rollouts
    scoring: Scoring | Scores
    greedy: tuple[Rollouts, Scoring] | None  # the likeliest response to each prompt, where the advantage needs it
    statistics: Statistics | None  # None in a run that went on with them
    resampled: int = 0  # prompts whose responses all scored alike, and which others stand in for

    @functools.cached_property
    def examples(self) -> list[Example]:
        return self.rollouts.examples()

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Count the tokens of each response."""
        return [len(example.response) for example in self.examples]


class Sampler:
    """Sampler of a policy's responses, which also requests their scores.

    Args:
        tokenizer: the policy's.
        prompts: of which each step takes the next.
        value_head: as in `Generator`.
        greedy: the likeliest response to each prompt is sampled and scored, too.
    """

    def __init__(
        self,
        policy: Model,
        tokenizer: Any,
        reward: Rewards,
        prompts: Sequence[PromptRecord],
        config: PPOConfig,
        value_head: nn.Module | None = None,
        greedy: bool = False,
    ) -> None:
        self.policy, self.tokenizer, self.reward = policy, tokenizer, reward
        self.prompts, self.config, self.greedy = prompts, config, greedy
        self.generator = Generator(policy, tokenizer, value_head=value_head, cuda_graphs=config.cuda_graphs)
        if config.max_length > (longest := self.generator.runner.served.longest):
            raise ValueError(
                f"ppo.max_length: {config.max_length}, but {type(self.generator.runner.inner).__name__} generates "
                f"rightly up to {longest} tokens only (see docs/models.md); lower it to that"
            )
        self.ahead: Sampled | None = None  # the next step's, with ppo.lag

    def take(self, step: int) -> tuple[Sampled, int]:
        """Take the samples of a step; return them, and how many updates the policy has had since.

        With `ppo.lag` they were drawn a step ago, and the next step's are drawn now: their scores may come while this
        step is learned from.
        """
        ahead, self.ahead = self.ahead, None
        sampled = ahead or self._sample(step)
        if self.config.lag and step < self.config.steps:
            self.ahead = self._sample(step + 1)
        return sampled, 0 if ahead is None else 1

    def _sample(self, step: int) -> Sampled:
        """Sample responses of the policy as it is now to the prompts of `step`, and request their scores."""
        records = step_prompts(self.prompts, self.config, step)
        params = self._params(step)
        rollouts, scoring = self._scored_rollouts(records, params)
        statistics = self.generator.statistics  # of the first round, the large one
        greedy = self._scored_rollouts(records, _greedy(params)) if self.greedy else None
        sampled = Sampled(step, records, rollouts, scoring, greedy, statistics)
        for again in range(1, self.config.resample + 1):
            sampled = self._varied(sampled, again)
        if not self.config.cuda_graphs:  # which are recorded with this memory
            self.generator.release_memory()
        return sampled

    def measure(self, records: Sequence[PromptRecord]) -> dict[str, float]:
        """Sample a response to each of `records`, by the same random numbers each time; return the mean score, mean
        length and share of responses that ended."""
        rollouts, scoring = self._scored_rollouts(records, replace(self._params(0), n=1))
        scores = scoring.result().scores
        if not self.config.cuda_graphs:
            self.generator.release_memory()
        count = len(records)
        return {
            "heldout_score": sum(scores) / count,
            "heldout_finished": sum(reason == "stop" for reason in rollouts.finish_reasons) / count,
            "heldout_tokens": float(rollouts.response_mask.sum()) / count,
        }

    def _varied(self, sampled: Sampled, again: int) -> Sampled:
        """Replace the prompts whose responses are all paid alike (dynamic sampling: DAPO, arXiv 2503.14476), as far as
        any are left that are not in the step."""
        old, n = sampled.scoring.result(), self.config.samples_per_prompt
        drawn = set(map(id, sampled.records))
        others = [p for p in shuffled(self.prompts, (self.config.seed, sampled.step, again)) if id(p) not in drawn]
        equal = equal_groups(paid(old.scores, sampled.rollouts.finish_reasons, self.config), n)
        places = dict(zip(equal, others, strict=False))  # where each of the others goes
        if not places:
            return replace(sampled, scoring=old)
        # Random numbers belong to a seed and a place among the prompts; those of this step have been used.
        params = replace(self._params(sampled.step), seed=self._params(sampled.step).seed + (again << 32))
        rollouts, scoring = self._scored_rollouts(list(places.values()), params)
        new = scoring.result()

        def mixed(kept: Sequence[Any], fresh: Sequence[Any], size: int = n) -> list[Any]:
            groups = [kept[i : i + size] for i in range(0, len(kept), size)]
            for i, place in enumerate(places):
                groups[place] = fresh[i * size : (i + 1) * size]
            return [item for group in groups for item in group]

        sequences = mixed(sampled.rollouts.sequences, rollouts.sequences)
        for i, sequence in enumerate(sequences):
            sequence.prompt_index = i // n
        parts = {name: mixed(given, new.parts[name]) for name, given in old.parts.items()}
        texts = mixed(sampled.rollouts.texts, rollouts.texts)
        return replace(
            sampled,
            records=mixed(sampled.records, list(places.values()), 1),
            rollouts=Rollouts.of(sequences, texts, self.generator.runner.device),
            scoring=Scores(mixed(old.scores, new.scores), parts),
            resampled=sampled.resampled + len(places),
        )

    def _params(self, step: int) -> SamplingParams:
        # No top-k or top-p: the ratio is only right when sampling and training use the same distribution.
        return SamplingParams(
            n=self.config.samples_per_prompt,
            temperature=self.config.temperature,
            max_new_tokens=self.config.max_new_tokens,
            stop_token_ids=self.config.stop_token_ids,
            seed=self.config.seed + step,
        )

    def _scored_rollouts(self, records: Sequence[PromptRecord], params: SamplingParams) -> tuple[Rollouts, Scoring]:
        scoring = self.reward.start([record for record in records for _ in range(params.n)])

        def finished(sequence: rollout.Sequence) -> None:
            scoring.finished(sequence.prompt_index * params.n + sequence.sample, self.generator.text(sequence))

        return self.generator.generate(records, params, on_finish=finished), scoring

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be computed again of the next step's samples: the weights that drew them are gone."""
        if self.ahead is None:
            return {}
        groups = [self.ahead.rollouts] + ([self.ahead.greedy[0]] if self.ahead.greedy else [])
        return {
            "step": self.ahead.step,
            "rollouts": [[{name: getattr(s, name) for name in KEPT} for s in group.sequences] for group in groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what was kept; it is scored again."""
        if not state:
            return
        step = state["step"]
        records, params = step_prompts(self.prompts, self.config, step), self._params(step)
        rollouts, *greedy = [
            self._again(records, p, kept) for p, kept in zip((params, _greedy(params)), state["rollouts"], strict=False)
        ]
        self.ahead = Sampled(step, records, *rollouts, greedy[0] if greedy else None, statistics=None)

    def _again(
        self, records: Sequence[PromptRecord], params: SamplingParams, kept: list[dict[str, Any]]
    ) -> tuple[Rollouts, Scoring]:
        sequences = sequences_for(self.policy, self.tokenizer, records, params)
        scoring = self.reward.start([records[sequence.prompt_index] for sequence in sequences])
        for i, (sequence, values) in enumerate(zip(sequences, kept, strict=True)):
            for name in KEPT:
                setattr(sequence, name, values[name])
            scoring.finished(i, self.generator.text(sequence))
        texts = [self.generator.text(sequence) for sequence in sequences]
        return Rollouts.of(sequences, texts, self.generator.runner.device), scoring


def paid(scores: Sequence[float], finish_reasons: Sequence[str], config: PPOConfig) -> list[float]:
    """Pay responses for their scores: within `ppo.reward_clip`, and less where they did not end by themselves."""
    rewards = [min(max(score, -config.reward_clip), config.reward_clip) for score in scores]
    for i, reason in enumerate(finish_reasons):
        if reason != "stop":
            rewards[i] = (rewards[i] if config.missing_eos == "subtract" else 0.0) - config.missing_eos_penalty
    return rewards


def _greedy(params: SamplingParams) -> SamplingParams:
    return replace(params, n=1, temperature=0.0)


def step_prompts(prompts: Sequence[PromptRecord], config: PPOConfig, step: int) -> list[PromptRecord]:
    """Choose the prompts of a step: consecutive ones of a permutation that is drawn anew for every pass."""
    first = (step - 1) * config.prompts_per_step
    skipped, start = divmod(first, len(prompts))  # a step takes from two passes at most
    two_passes = [p for lap in (skipped, skipped + 1) for p in shuffled(prompts, config.seed + lap)]
    return two_passes[start : start + config.prompts_per_step]
