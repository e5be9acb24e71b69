"""Advantages: how good each sampled token was, by which PPO's loss weighs its log-probabilities.

An advantage is given a step's scores and returns a number for every token. The methods are classes of their own names;
PPOTrainer takes any function with their arguments and results in place of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from rlhf_fast import ops
from rlhf_fast.config import PPOConfig

EPS = 1e-6  # is added to a deviation of scores, as in ops.group_advantages


class Scored(NamedTuple):
    """A step's samples with their rewards, packed: R response tokens of B responses; those of a prompt follow each
    other, `ppo.samples_per_prompt` of them."""

    scores: torch.Tensor  # (B,), with the penalty for responses that were cut
    kl: torch.Tensor  # (R,): log-probability less that of the reference, at each sampled token
    cu_seqlens: torch.Tensor  # (B + 1,), int32: where responses begin
    values: torch.Tensor | None  # (R,), of the critic, if there is one
    baselines: torch.Tensor | None  # (B,): scores of the greedy response to the same prompt, for ReMax


class Advantages(NamedTuple):
    """Advantages of a step's R response tokens, with what the loss takes beside them."""

    advantages: torch.Tensor  # (R,)
    returns: torch.Tensor | None  # (R,): what the values are to become; without a critic None
    sums: torch.Tensor | None  # (3,): number, sum and squares of the advantages, by which the loss whitens; None: as is


class AdvantageFunction(Protocol):
    """Protocol of an advantage: from a step's scores to a number for every response token.

    `kl_coef` is the coefficient of the KL penalty in the reward, 0 where the penalty is in the loss (`ppo.kl_in`).

    A function that says nothing of what it needs (:class:`Advantage`) is given what the method that `ppo.advantage`
    names needs.
    """

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages: ...


class Advantage:
    """Needs of a method beside the scores of sampled responses; each method is a class of its own, named for it."""

    needs_critic = False  # `Scored.values`
    needs_greedy = False  # `Scored.baselines`
    compares_samples = False  # of a prompt: equal scores say nothing

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        raise NotImplementedError


class GAE(Advantage):
    """Generalised advantage estimation (arXiv 1506.02438) over token rewards: the KL penalty on each, the score on the
    last."""

    needs_critic = True

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        assert scored.values is not None
        rewards = -kl_coef * scored.kl  # (R,)
        scores: torch.Tensor | None = scored.scores  # (B,)
        if config.whiten_rewards:
            rewards[scored.cu_seqlens[1:].long() - 1] += scored.scores  # on the last token: the end
            rewards, scores = ops.whiten(rewards, shift_mean=False), None
        advantages, returns, sums = ops.gae(
            rewards=rewards, values=scored.values, gamma=config.gamma, lam=config.lam, cu_seqlens=scored.cu_seqlens,
            scores=scores, sums=True,
        )  # fmt: skip
        return Advantages(advantages, returns, sums)


class DrGRPO(Advantage):
    """Dr. GRPO (arXiv 2503.20783): one advantage for all tokens of a response, its score less its group's mean, and
    only then less the KL penalty beside those of its prompt's others.

    Scaled with the scores, a penalty would be as large as they are, whatever it weighs: `kl_coef` would cancel where
    scores are equal, and small scores would be drowned.
    """

    compares_samples = True
    baseline = "dr_grpo"  # as ops.group_advantages names what is subtracted
    scale = "none"  # the deviation that divides, where `ppo.scale` names none

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        advantages = self._scaled(scored.scores.view(-1, config.samples_per_prompt), config.scale or self.scale)
        if kl_coef:
            kl = ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens).view_as(advantages)  # (G, n)
            advantages = advantages - kl_coef * ops.group_advantages(kl, self.baseline)
        return Advantages(_per_token(advantages.flatten(), scored), None, None)

    def _scaled(self, scores: torch.Tensor, scale: str) -> torch.Tensor:
        """Scores (G, n) less their baseline, over a deviation of the group, of the batch or none."""
        if scale == "group":
            n = scores.shape[1]
            return ops.group_advantages(scores, "grpo") * (n / (n - 1) if self.baseline == "rloo" else 1.0)
        centred = ops.group_advantages(scores, self.baseline)  # (G, n)
        return centred / (scores.double().std() + EPS).float() if scale == "batch" else centred


class GRPO(DrGRPO):
    """GRPO (arXiv 2402.03300): a score less its group's mean, over the standard deviation of the group's scores."""

    scale = "group"


class RLOO(DrGRPO):
    """RLOO (arXiv 2402.14740): a score less the mean of its prompt's other responses."""

    baseline = "rloo"


class ReinforcePlusPlus(Advantage):
    """REINFORCE++ with a baseline (arXiv 2501.03262): a score less its group's mean, whitened over the step's tokens.

    A penalty in the reward comes after that, on each token what it and those that follow pay.
    """

    compares_samples = True

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        scores = scored.scores.view(-1, config.samples_per_prompt)  # (G, n)
        advantages = _per_token(ops.group_advantages(scores, "dr_grpo").flatten(), scored)  # (R,)
        if not kl_coef:
            exact = advantages.double()
            number = torch.full_like(exact.sum(), exact.numel())
            return Advantages(advantages, None, torch.stack([number, exact.sum(), exact.square().sum()]))
        to_come, _ = ops.gae(
            rewards=kl_coef * scored.kl, values=torch.zeros_like(scored.kl), gamma=1.0, lam=1.0,
            cu_seqlens=scored.cu_seqlens,
        )  # fmt: skip
        return Advantages(ops.whiten(advantages) - to_come, None, None)


class ReMax(Advantage):
    """ReMax (arXiv 2310.10505): the score less the KL penalty, less the score of the likeliest response.

    That response's own penalty is left out, for it would change no gradient in expectation.
    """

    needs_greedy = True

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        assert scored.baselines is not None
        kl = ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens)  # (B,)
        return Advantages(_per_token(scored.scores - kl_coef * kl - scored.baselines, scored), None, None)


def equal_groups(scores: Sequence[float], size: int) -> list[int]:
    """Find the prompts whose `size` responses all have the same score, so that they say nothing about each other."""
    groups = [scores[i : i + size] for i in range(0, len(scores), size)]
    return [g for g, group in enumerate(groups) if len(set(group)) == 1]


def _per_token(of_responses: torch.Tensor, scored: Scored) -> torch.Tensor:
    """Repeat a number of each response (B,) for each of its tokens: (R,)."""
    lengths = scored.cu_seqlens.diff().long()
    return of_responses.repeat_interleave(lengths, output_size=scored.kl.numel())


ADVANTAGES: dict[str, Advantage] = {  # by the names of `ppo.advantage`
    "gae": GAE(),
    "grpo": GRPO(),
    "dr_grpo": DrGRPO(),
    "rloo": RLOO(),
    "reinforce++": ReinforcePlusPlus(),
    "remax": ReMax(),
}


class Traits(NamedTuple):
    """Traits of a method, as :class:`Advantage` says them."""

    needs_critic: bool
    needs_greedy: bool
    compares_samples: bool


def traits_of(advantage: AdvantageFunction, config: PPOConfig) -> Traits:
    """Ask an advantage for its traits; where it has none, they are those of the method that `ppo.advantage` names."""
    named = ADVANTAGES[config.advantage]
    return Traits(*(getattr(advantage, name, getattr(named, name)) for name in Traits._fields))
