"""Experience that a step of PPO learns from: responses with their log-probabilities, values, rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Batch, Example, by_prompt
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.scoring import per_example
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.rewards.scoring import Scores
from rlhf_fast.trainers.loop.steps import concatenated
from rlhf_fast.trainers.ppo.advantages import Advantages, Scored
from rlhf_fast.trainers.ppo.critic import Critic
from rlhf_fast.trainers.ppo.sampler import Sampled, paid

Parts = list[torch.Tensor]  # one tensor (response length,) for each response
Pass = Callable[[Batch], Sequence[torch.Tensor]]  # over a batch of responses


class Outputs(NamedTuple):
    """Outputs of the policy at each response token, as training computes them."""

    logprobs: Parts
    entropies: Parts
    values: Parts  # empty without a critic


class ResponseRewards(NamedTuple):
    """Rewards of each response."""

    raw: Scores  # as the reward gave them
    paid: list[float]  # those within `ppo.reward_clip`, less the penalty for responses that were cut
    greedy: list[float] | None  # what is paid for the likeliest response to each response's prompt, if it was sampled


class Scorer:
    """Log-probabilities, values and rewards of sampled responses, without gradients.

    Args:
        policy, reference: the model that is trained, and the one that it is kept near.
        critic: whose values go with the responses, if the advantage takes any.
        shared: as in `pad`.
    """

    def __init__(
        self,
        policy: Model,
        reference: Model,
        critic: Critic | None,
        config: PPOConfig,
        budget: TokenBudget,
        shared: int,
    ) -> None:
        self.policy, self.reference, self.critic = policy, reference, critic
        self.config, self.budget, self.shared = config, budget, shared

    def of_policy(self, samples: Sampled, lag: int) -> Outputs:
        """Log-probabilities, entropies and values by the policy and critic as they are now, `lag` updates after the
        samples were drawn. Training has the same, so that ratios begin at 1.

        In float32 the sampler's are the same to rounding, if the weights are still those that it had; in narrower
        dtypes it rounds elsewhere than training does. Then they are computed again.
        """
        rollouts = samples.rollouts
        if not computed_again(self.policy.dtype, lag):
            sampled = (rollouts.logprobs, rollouts.entropy, rollouts.values)
            logprobs, entropies, values = (
                [] if x is None else list(x[rollouts.response_mask].split(samples.lengths)) for x in sampled
            )
            if self._has_own_critic:
                (values,) = self._each(samples, self._values)
            return Outputs(logprobs, entropies, values)
        logprobs, entropies, *rest = self._each(samples, self._outputs)
        return Outputs(logprobs, entropies, rest[0] if rest else [])

    def of_reference(self, samples: Sampled) -> Parts:
        """Compute the log-probabilities under the reference."""
        (logprobs,) = self._each(samples, self._reference_logprobs)
        return logprobs

    def passes(self, lag: int) -> list[Pass]:
        """List the passes over each batch of a step's samples, `lag` updates old, before training on it."""
        of_policy = [self._outputs] if computed_again(self.policy.dtype, lag) else []
        of_critic = [self._values] if self._has_own_critic and not of_policy else []
        return [self._reference_logprobs, *of_policy, *of_critic]

    def rewards(self, samples: Sampled) -> ResponseRewards:
        """Rewards of the responses; waits for scores that are on their way."""
        raw = samples.scoring.result()
        rewards = paid(raw.scores, samples.rollouts.finish_reasons, self.config)
        if samples.greedy is None:
            return ResponseRewards(raw, rewards, None)
        rollouts, scoring = samples.greedy
        greedy = paid(scoring.result().scores, rollouts.finish_reasons, self.config)
        of_each = [reward for reward in greedy for _ in range(self.config.samples_per_prompt)]
        return ResponseRewards(raw, rewards, of_each)

    @property
    def _has_own_critic(self) -> bool:
        return self.critic is not None and self.critic.model is not None

    def _outputs(self, batch: Batch) -> list[torch.Tensor]:
        states = models.response_states(self.policy, batch)  # (R, H)
        outputs = list(models.response_logprobs(self.policy, batch, self.config.temperature, states))
        return outputs if self.critic is None else [*outputs, self.critic.values(batch, states)]

    def _values(self, batch: Batch) -> list[torch.Tensor]:
        assert self.critic is not None
        return [self.critic.values(batch, batch.input_ids)]  # its own model reads the batch

    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        return [models.response_logprobs(self.reference, batch, self.config.temperature)[0]]

    def _each(self, samples: Sampled, function: Pass) -> list[Parts]:
        return per_example(samples.examples, function, self.budget.tokens, self.policy.device, self.shared)


def computed_again(dtype: torch.dtype, lag: int) -> bool:
    """Return whether the policy's log-probabilities are computed again, beside the sampler's of `lag` updates ago."""
    return dtype != torch.float32 or lag > 0


def scored_tokens(samples: Sampled, policy: Outputs, reference: Parts, rewards: ResponseRewards) -> Scored:
    """Collect what an advantage is made of: rewards, values, and the KL of each token to the reference."""
    logprobs = torch.cat(policy.logprobs)  # (R,)
    device = logprobs.device
    return Scored(
        scores=torch.tensor(rewards.paid, device=device),
        kl=ops.kl_estimate(logprobs, torch.cat(reference), kind="k1"),
        cu_seqlens=torch.tensor([0, *samples.lengths]).cumsum(0).to(torch.int32).to(device),
        values=torch.cat(policy.values) if policy.values else None,
        baselines=None if rewards.greedy is None else torch.tensor(rewards.greedy, device=device),
    )


@dataclass(frozen=True)
class Experience:
    """Samples of one step with all that PPO's loss needs. Lists hold one tensor (response length,) a response."""

    examples: list[Example]
    old_logprobs: Parts  # of the policy that the update starts from
    ref_logprobs: Parts  # of the reference, where the KL penalty is in the loss; else empty
    rollout_logprobs: Parts  # of the policy that sampled, where it may be an older one; else empty
    old_values: Parts  # empty without a critic, like returns
    advantages: Parts
    advantage_sums: torch.Tensor | None  # (3,) by which the loss whitens them
    returns: Parts

    @staticmethod
    def of(
        samples: Sampled, policy: Outputs, reference: Parts, advantages: Advantages, config: PPOConfig
    ) -> Experience:
        """Collect what the loss needs by these settings.

        Raises:
            ValueError: there is a critic, and the advantage says nothing of what its values are to become.
        """
        if policy.values and advantages.returns is None:
            raise ValueError(
                "advantage: it gave no returns, by which the critic learns; return them, or say needs_critic = False, "
                "or choose a ppo.advantage without a critic"
            )
        lengths, rollouts = samples.lengths, samples.rollouts
        given = inputs(config, bool(policy.values))
        sampled = rollouts.logprobs[rollouts.response_mask].split(lengths) if "rollout_logprobs" in given else ()
        return Experience(
            examples=samples.examples,
            old_logprobs=policy.logprobs,
            ref_logprobs=reference if "ref_logprobs" in given else [],
            rollout_logprobs=list(sampled),
            old_values=policy.values,
            advantages=list(advantages.advantages.split(lengths)),
            advantage_sums=advantages.sums,
            returns=[] if advantages.returns is None or not policy.values else list(advantages.returns.split(lengths)),
        )

    def of_rows(self, rows: Iterable[int]) -> dict[str, torch.Tensor]:
        """The tensors of some responses, packed, by the names that `ops.linear_ppo_loss` has for them."""
        names = ("old_logprobs", "advantages", "old_values", "returns", "ref_logprobs", "rollout_logprobs")
        return {name: concatenated(getattr(self, name), rows) for name in names if getattr(self, name)}


def inputs(config: PPOConfig, has_critic: bool) -> list[str]:
    """List the tensors that the loss takes of each response token, as `ops.linear_ppo_loss` names them."""
    of_critic = ["old_values", "returns"] if has_critic else []
    of_reference = ["ref_logprobs"] if config.kl_estimator else []
    of_sampler = ["rollout_logprobs"] if config.lag else []
    return ["old_logprobs", "advantages", *of_critic, *of_reference, *of_sampler]


def minibatches(examples: Sequence[Example], count: int, rng: np.random.Generator) -> list[list[int]]:
    """Example numbers in random order, cut into `count` parts.

    The samples of a prompt stay together, so that it is read once for all of them, unless there are too few prompts.
    """
    units = by_prompt(examples)
    if len(units) < count:
        units = [[i] for i in range(len(examples))]
    parts = np.array_split(rng.permutation(len(units)), count)
    return [[i for unit in part for i in units[unit]] for part in parts]
