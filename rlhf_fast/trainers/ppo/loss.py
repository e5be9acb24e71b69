"""PPO's loss on a micro-batch: the options of `ops.linear_ppo_loss` from the settings, and the divisor of its sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rlhf_fast import models, ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Batch
from rlhf_fast.models.adapters import Model
from rlhf_fast.trainers.loop.steps import Stats
from rlhf_fast.trainers.ppo.critic import Critic

Loss = Callable[..., tuple[torch.Tensor, Stats]]

# Statistics that the op averages over the tokens of its call, whatever the aggregation of the loss.
TOKEN_MEANS = set(
    "ratio_mean clip_fraction dual_clip_fraction value_clip_fraction approx_kl approx_kl_k3 rollout_weight "
    "rollout_clip_fraction".split()
)


def batch_loss(
    config: PPOConfig,
    policy: Model,
    critic: Critic | None,
    batch: Batch,
    inputs: dict[str, torch.Tensor],
    *,
    denominator: int,
    kl_coef: float,
    advantage_sums: torch.Tensor | None = None,
    critic_only: bool = False,
    function: Loss = ops.linear_ppo_loss,
) -> tuple[torch.Tensor, Stats]:
    """Compute PPO's loss and its statistics on one micro-batch of R response tokens.

    Args:
        critic: whose values enter the value loss; None: there is no value loss.
        inputs: tensors (R,) by the names that `experience.inputs` lists.
        denominator: divisor of the loss, that of the whole minibatch.
        kl_coef: coefficient of the KL penalty, where the penalty is in the loss.
        advantage_sums: (3,) float64, by which the advantages are whitened (`ops.gae`); None: they are not.
        critic_only: only the value loss has a gradient, and only in the critic's own weights (critic warm-up).
        function: a loss in place of `ops.linear_ppo_loss`, with its arguments and results.

    Returns:
        The loss, float32 of shape (), and detached statistics by name.
    """
    with torch.set_grad_enabled(not critic_only):
        head = models.output_head(policy)  # of this micro-batch's own graph, where it is computed
        states = models.response_states(policy, batch)  # (R, H)
    rest = dict(inputs)
    old_logprobs, advantages = rest.pop("old_logprobs"), rest.pop("advantages")
    if critic is not None:
        rest["values"] = critic.values(batch, states)
    return function(
        states,
        head.weight.detach() if critic_only else head.weight,
        batch.response_tokens,
        old_logprobs,
        advantages,
        **rest,
        **head.options(),
        **_options(config, inputs, kl_coef, critic is not None),
        cu_seqlens=batch.cu_seqlens,
        denominator=denominator,
        advantage_sums=advantage_sums,
    )


def _options(config: PPOConfig, inputs: dict[str, torch.Tensor], kl_coef: float, has_critic: bool) -> dict[str, Any]:
    """Name the settings as `ops.linear_ppo_loss` does, without those of terms that this run's loss does not have."""
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        **non_default_options(config),
    }
    if has_critic:
        options |= {"value_clip": config.value_clip, "value_coef": config.value_coef}
    if "rollout_logprobs" in inputs:
        options |= {"rollout_cap": config.rollout_cap}
    if "ref_logprobs" in inputs:
        options |= {"kl_coef": kl_coef, "kl": config.kl_estimator}
    return options


def non_default_options(config: PPOConfig) -> dict[str, Any]:
    """List ratio, objective, dual clip, taus and aggregation where a run changes them from their defaults.

    Defaults are left out, so that a loss of the user's own need not take arguments that it does not use.
    """
    named = ("ratio", "objective", "dual_clip", "aggregation", "tau_pos", "tau_neg")
    options = {name: getattr(config, name) for name in named if getattr(config, name) != getattr(PPOConfig, name)}
    if config.aggregation == "longest_mean":  # for the op a token mean with another denominator (Divisor)
        del options["aggregation"]
    return options


class Divisor(NamedTuple):
    """Divisor of a minibatch's sums, the same for all its micro-batches, so that their losses add up."""

    tokens: int
    denominator: int  # of the loss

    @staticmethod
    def of(config: PPOConfig, lengths: Sequence[int]) -> Divisor:
        """Make the divisor of a minibatch whose responses have these lengths in tokens."""
        tokens, responses = sum(lengths), sum(length > 0 for length in lengths)
        denominators = {"token_mean": tokens, "longest_mean": responses * config.max_new_tokens}
        return Divisor(tokens, denominators.get(config.aggregation, responses))

    def rescale(self, stats: Stats, config: PPOConfig, tokens: int) -> Stats:
        """Rescale the statistics of a micro-batch of `tokens` tokens to add up to means over the minibatch."""
        if config.aggregation == "token_mean":
            return stats
        scale = (self.denominator if config.aggregation == "longest_mean" else tokens) / self.tokens
        return {name: x * scale if name in TOKEN_MEANS else x for name, x in stats.items()}
