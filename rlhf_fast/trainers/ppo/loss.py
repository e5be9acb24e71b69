"""PPO's loss by the settings: what `ops.linear_ppo_loss` is told, and what divides its sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_fast.config import PPOConfig
from rlhf_fast.trainers.loop.steps import Stats

# Statistics that the op takes over the tokens of its call, however the loss is aggregated.
TOKEN_MEANS = set(
    "ratio_mean clip_fraction dual_clip_fraction value_clip_fraction approx_kl approx_kl_k3 rollout_weight "
    "rollout_clip_fraction".split()
)


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
