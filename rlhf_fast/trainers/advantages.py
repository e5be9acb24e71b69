"""How good each sampled token was: what PPO's loss weighs its log-probabilities by.

An advantage function is given a step's scores and returns an advantage for every token; PPOTrainer takes any such
function in place of these.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from rlhf_fast import ops
from rlhf_fast.config import PPOConfig


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
    """One advantage for all tokens of a response: its score less the KL penalty, beside those of its prompt's others.

    The penalty is part of the reward, as in RLOO: in the loss, as GRPO's paper has it, its gradient would be another
    one. REINFORCE++ with a baseline is what `dr_grpo` gives, whitened over all tokens of the step.
    """
    kind = "dr_grpo" if config.advantage == "reinforce++" else config.advantage
    rewards = _penalised(scored, kl_coef).view(-1, config.samples_per_prompt)
    advantages = _of_tokens(ops.group_advantages(rewards, kind).flatten(), scored)
    if config.advantage != "reinforce++":
        return Advantages(advantages, None, None)
    exact = advantages.double()
    number = torch.full_like(exact.sum(), exact.numel())
    sums = torch.stack([number, exact.sum(), exact.square().sum()])
    return Advantages(advantages, None, sums)


def against_greedy(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
    """ReMax (arXiv 2310.10505): the score less the KL penalty, less the score of the likeliest response.

    That response's own penalty is left out, for it would change no gradient in expectation.
    """
    assert scored.baselines is not None
    return Advantages(_of_tokens(_penalised(scored, kl_coef) - scored.baselines, scored), None, None)


def _penalised(scored: Scored, kl_coef: float) -> torch.Tensor:
    return scored.scores - kl_coef * ops.sequence_sum(scored.kl, cu_seqlens=scored.cu_seqlens)  # (B,)


def _of_tokens(of_responses: torch.Tensor, scored: Scored) -> torch.Tensor:
    """(B,) -> (R,)."""
    lengths = scored.cu_seqlens.diff().long()
    return of_responses.repeat_interleave(lengths, output_size=scored.kl.numel())


FUNCTIONS: dict[str, AdvantageFunction] = {
    "gae": against_critic,
    "grpo": against_each_other,
    "dr_grpo": against_each_other,
    "rloo": against_each_other,
    "reinforce++": against_each_other,
    "remax": against_greedy,
}
