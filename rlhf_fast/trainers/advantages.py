"""Advantages of a step's tokens: against a critic, or of a prompt's responses against each other."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlhf_fast import ops
from rlhf_fast.config import PPOConfig


class Scored(NamedTuple):
    """A step's responses, packed: B of them with R tokens, those of a prompt in a row."""

    scores: torch.Tensor  # (B,) float32: what each is paid
    kl: torch.Tensor  # (R,): log-probability of each token less that of the reference
    cu_seqlens: torch.Tensor  # (B + 1,) int32


class Advantages(NamedTuple):
    advantages: torch.Tensor  # (R,)
    returns: torch.Tensor | None  # (R,): what the values are to become; without a critic None
    sums: torch.Tensor | None  # (3,): number, sum and squares of the advantages, by which the loss whitens; None: as is


def against_critic(scored: Scored, values: torch.Tensor, kl_coef: float, config: PPOConfig) -> Advantages:
    """Generalised advantage estimation over token rewards: the KL penalty on each, the score on the last."""
    rewards = -kl_coef * scored.kl  # (R,)
    scores: torch.Tensor | None = scored.scores  # (B,)
    if config.whiten_rewards:
        rewards[scored.cu_seqlens[1:].long() - 1] += scored.scores  # on the last token: the end
        rewards, scores = ops.whiten(rewards, shift_mean=False), None
    advantages, returns, sums = ops.gae(
        rewards=rewards, values=values, gamma=config.gamma, lam=config.lam, cu_seqlens=scored.cu_seqlens,
        scores=scores, sums=True,
    )  # fmt: skip
    return Advantages(advantages, returns, sums)


def against_each_other(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """One advantage for all tokens of a response: its score less the KL penalty, beside those of its prompt's others.

    The penalty is part of the reward, as in RLOO: in the loss, as GRPO's paper has it, its gradient would be another
    one. REINFORCE++ with a baseline is what `dr_grpo` gives, whitened over all tokens of the step.
    """
    rewards = scored.scores - kl_coef * ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens)  # (B,)
    kind = "dr_grpo" if config.advantage == "reinforce++" else config.advantage
    of_responses = ops.group_advantages(rewards.view(-1, config.samples_per_prompt), kind)
    lengths = scored.cu_seqlens.diff().long()
    advantages = of_responses.flatten().repeat_interleave(lengths, output_size=scored.kl.numel())  # (R,)
    if config.advantage != "reinforce++":
        return Advantages(advantages, None, None)
    exact = advantages.double()
    number = torch.full_like(exact.sum(), exact.numel())
    sums = torch.stack([number, exact.sum(), exact.square().sum()])
    return Advantages(advantages, None, sums)
