"""How good each sampled token was: what PPO's loss weighs its log-probabilities by.

An advantage function is given a step's scores and returns an advantage for every token; PPOTrainer takes any such
function in place of these.
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
    advantages: torch.Tensor  # (R,)
    returns: torch.Tensor | None  # (R,): what the values are to become; without a critic None
    sums: torch.Tensor | None  # (3,): number, sum and squares of the advantages, by which the loss whitens; None: as is


class AdvantageFunction(Protocol):
    """`kl_coef` is what the KL penalty weighs in the reward: 0 where it is a term of the loss (`ppo.kl_in`)."""

    def __call__(self, scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages: ...


def against_critic(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """Generalised advantage estimation over token rewards: the KL penalty on each, the score on the last."""
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


def against_each_other(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """One advantage for all tokens of a response: its score beside those of its prompt's others, scaled, and only then
    less the KL penalty beside theirs.

    Scaled with the scores, a penalty would be as large as they are, whatever it weighs: `kl_coef` would cancel where
    scores are equal, and small scores would be drowned.
    """
    against = "rloo" if config.advantage == "rloo" else "dr_grpo"
    advantages = _scaled(scored.scores.view(-1, config.samples_per_prompt), against, config)  # (G, n)
    if kl_coef:
        kl = ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens).view_as(advantages)
        advantages = advantages - kl_coef * ops.group_advantages(kl, against)
    return Advantages(_of_tokens(advantages.flatten(), scored), None, None)


def _scaled(scores: torch.Tensor, against: str, config: PPOConfig) -> torch.Tensor:
    """Scores less their group's mean (of the others in it, for RLOO), over the deviation that `ppo.scale` names."""
    scale = config.scale or ("group" if config.advantage == "grpo" else "none")
    if scale == "group":
        others = scores.shape[1] - 1
        return ops.group_advantages(scores, "grpo") * (scores.shape[1] / others if against == "rloo" else 1.0)
    apart = ops.group_advantages(scores, against)  # (G, n)
    return apart / (scores.double().std() + EPS).float() if scale == "batch" else apart


def against_the_step(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """REINFORCE++ with a baseline (arXiv 2501.03262): a score less its group's mean, whitened over the step's tokens.

    A penalty in the reward comes after that, on each token what it and those that follow pay.
    """
    scores = scored.scores.view(-1, config.samples_per_prompt)  # (G, n)
    advantages = _of_tokens(ops.group_advantages(scores, "dr_grpo").flatten(), scored)  # (R,)
    if not kl_coef:
        exact = advantages.double()
        number = torch.full_like(exact.sum(), exact.numel())
        return Advantages(advantages, None, torch.stack([number, exact.sum(), exact.square().sum()]))
    to_come, _ = ops.gae(
        rewards=kl_coef * scored.kl, values=torch.zeros_like(scored.kl), gamma=1.0, lam=1.0,
        cu_seqlens=scored.cu_seqlens,
    )  # fmt: skip
    return Advantages(ops.whiten(advantages) - to_come, None, None)


def against_greedy(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """ReMax (arXiv 2310.10505): the score less the KL penalty, less the score of the likeliest response.

    That response's own penalty is left out, for it would change no gradient in expectation.
    """
    assert scored.baselines is not None
    kl = ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens)  # (B,)
    return Advantages(_of_tokens(scored.scores - kl_coef * kl - scored.baselines, scored), None, None)


def equal_groups(scores: Sequence[float], size: int) -> list[int]:
    """The prompts whose `size` responses all have the same score: they say nothing about each other."""
    groups = [scores[i : i + size] for i in range(0, len(scores), size)]
    return [g for g, group in enumerate(groups) if len(set(group)) == 1]


def _of_tokens(of_responses: torch.Tensor, scored: Scored) -> torch.Tensor:
    """(B,) -> (R,)."""
    lengths = scored.cu_seqlens.diff().long()
    return of_responses.repeat_interleave(lengths, output_size=scored.kl.numel())


FUNCTIONS: dict[str, AdvantageFunction] = {
    "gae": against_critic,
    "grpo": against_each_other,
    "dr_grpo": against_each_other,
    "rloo": against_each_other,
    "reinforce++": against_the_step,
    "remax": against_greedy,
}
