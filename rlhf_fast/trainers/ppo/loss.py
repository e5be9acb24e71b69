"""PPO's loss of a micro-batch: what `ops.linear_ppo_loss` is told by the settings, and what divides its sums."""

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

# Statistics that the op takes over the tokens of its call, however the loss is aggregated.
TOKEN_MEANS = set(
    "ratio_mean clip_fraction dual_clip_fraction value_clip_fraction approx_kl approx_kl_k3 rollout_weight "
    "rollout_clip_fraction".split()
)


def batch_loss(
    config: PPOConfig,
    policy: Model,
    critic: Critic | None,
    batch: Batch,
    given: dict[str, torch.Tensor],
    *,
    denominator: int,
    kl_coef: float,
    advantage_sums: torch.Tensor | None = None,
    warming: bool = False,
    function: Loss = ops.linear_ppo_loss,
) -> tuple[torch.Tensor, Stats]:
    """Loss and statistics of one micro-batch.

    Args:
        given: (R,) each, of the names that `inputs` lists (experience.py).
        denominator: of the whole minibatch's loss.
        kl_coef: what the KL penalty weighs, where it is in the loss.
        advantage_sums: (3,), by which the advantages are whitened; None: as they are.
        warming: the critic's part alone has a gradient, in the critic alone.
        function: instead of `ops.linear_ppo_loss`, with its arguments and results.
    """
    with torch.set_grad_enabled(not warming):
        head = models.output_head(policy)  # of this micro-batch's own graph, where it is computed
        states = models.response_states(policy, batch)  # (R, H)
    rest = dict(given)
    old_logprobs, advantages = rest.pop("old_logprobs"), rest.pop("advantages")
    if critic is not None:
        rest["values"] = critic.values(batch, states)
    return function(
        states,
        head.weight.detach() if warming else head.weight,
        batch.response_tokens,
        old_logprobs,
        advantages,
        **rest,
        **head.options(),
        **_options(config, given, kl_coef, critic is not None),
        cu_seqlens=batch.cu_seqlens,
        denominator=denominator,
        advantage_sums=advantage_sums,
    )


def _options(config: PPOConfig, given: dict[str, torch.Tensor], kl_coef: float, has_critic: bool) -> dict[str, Any]:
    """The settings of the loss, as `ops.linear_ppo_loss` names them; of terms that it has in this run alone."""
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        **variant(config),
    }
    if has_critic:
        options |= {"value_clip": config.value_clip, "value_coef": config.value_coef}
    if "rollout_logprobs" in given:
        options |= {"rollout_cap": config.rollout_cap}
    if "ref_logprobs" in given:
        options |= {"kl_coef": kl_coef, "kl": config.kl_estimator}
    return options


def variant(config: PPOConfig) -> dict[str, Any]:
    """Ratio, objective, bound and aggregation as the op names them, where they are not its defaults: a loss of one's
    own need not know what it is not told."""
    named = ("ratio", "objective", "dual_clip", "aggregation", "tau_pos", "tau_neg")
    options = {name: getattr(config, name) for name in named if getattr(config, name) != getattr(PPOConfig, name)}
    if config.aggregation == "longest_mean":  # the op has it as a token mean, by another denominator
        del options["aggregation"]
    return options


class Divisor(NamedTuple):
    """What divides the sums of a minibatch, the same for all its micro-batches, so that these add up."""

    tokens: int
    denominator: int  # of the loss

    @staticmethod
    def of(config: PPOConfig, lengths: Sequence[int]) -> Divisor:
        """Of responses of these lengths."""
        tokens, responses = sum(lengths), sum(length > 0 for length in lengths)
        denominators = {"token_mean": tokens, "longest_mean": responses * config.max_new_tokens}
        return Divisor(tokens, denominators.get(config.aggregation, responses))

    def of_minibatch(self, stats: Stats, config: PPOConfig, tokens: int) -> Stats:
        """Statistics of a micro-batch with so many tokens, as parts of means over the minibatch's tokens."""
        if config.aggregation == "token_mean":
            return stats
        scale = (self.denominator if config.aggregation == "longest_mean" else tokens) / self.tokens
        return {name: x * scale if name in TOKEN_MEANS else x for name, x in stats.items()}
