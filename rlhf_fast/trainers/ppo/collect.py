"""What a step of PPO learns from: of the policy's responses and their scores, an advantage for every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Batch, Example, by_prompt
from rlhf_fast.data.records import PromptRecord, prompt_text
from rlhf_fast.machine import DeviceRates
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.scoring import per_example
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.ppo.advantages import AdvantageFunction, Scored, equal_groups, traits_of
from rlhf_fast.trainers.ppo.critic import Critic
from rlhf_fast.trainers.ppo.sampler import Sampled, Sampler, paid

SHOWN = 4  # samples that are kept of a step


@dataclass(frozen=True)
class Experience:
    """One step's rollouts with all that PPO's loss needs. Lists hold one tensor (response length,) a sequence."""

    examples: list[Example]
    old_logprobs: list[torch.Tensor]  # of the policy that the update starts from
    ref_logprobs: list[torch.Tensor]  # of the reference, where the KL penalty is in the loss; else empty
    rollout_logprobs: list[torch.Tensor]  # of the policy that sampled, where it may be an older one; else empty
    old_values: list[torch.Tensor]  # empty without a critic, like returns
    advantages: list[torch.Tensor]
    advantage_sums: torch.Tensor | None  # (3,) by which the loss whitens them
    returns: list[torch.Tensor]
    kl: torch.Tensor  # (R,): log-probability less that of the reference, at each sampled token
    metrics: dict[str, float]


class Collector:
    """Makes of what a policy said, and was paid for it, what it learns from.

    Args:
        policy, reference: the model that is trained, and the one that it is kept near.
        critic: whose values go with the samples, if the advantage takes any.
        sampler: of the policy's responses.
        shared: as in `pad`.
    """

    def __init__(
        self,
        policy: Model,
        reference: Model,
        critic: Critic | None,
        sampler: Sampler,
        advantage: AdvantageFunction,
        config: PPOConfig,
        budget: TokenBudget,
        shared: int,
    ) -> None:
        self.policy, self.reference, self.critic, self.sampler = policy, reference, critic, sampler
        self.advantage, self.config, self.budget, self.shared = advantage, config, budget, shared

    def collect(self, run: RunFolder, step: int, kl_coef: float, rates: DeviceRates | None = None) -> Experience:
        """Turn the scores of responses to this step's prompts into advantages for every token."""
        started = time.monotonic()
        sampled, lag = self.sampler.take(step)
        seconds = time.monotonic() - started
        experience = self._experience(run, step, sampled, kl_coef, lag)
        if rates is not None and sampled.statistics is not None:
            experience.metrics["decode_roofline"] = sampled.statistics.roofline(rates.read, rates.product)
        experience.metrics["seconds_rollout"] = seconds
        experience.metrics["seconds_scoring"] = time.monotonic() - started - seconds
        return experience

    def _experience(self, run: RunFolder, step: int, sampled: Sampled, kl_coef: float, lag: int) -> Experience:
        """What there is to learn from samples of the policy as it was `lag` updates ago.

        Log-probabilities, values, and with them advantages and the KL penalty in them, are those of the models as they
        are now, which the update starts from. What the metrics tell of the samples is of the policy that drew them.
        """
        config, rollouts = self.config, sampled.rollouts
        examples = rollouts.examples()
        lengths = [len(example.response) for example in examples]
        device = self.policy.device
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

        old_logprobs, entropies, old_values = self._policy_outputs(rollouts, examples, lag)
        (ref_logprobs,) = self._each(examples, self._reference_logprobs)
        reference = torch.cat(ref_logprobs)  # (R,)
        kl = ops.kl_estimate(torch.cat(old_logprobs), reference, kind="k1")  # (R,)
        drawn_logprobs = rollouts.logprobs[rollouts.response_mask]  # (R,)
        drawn_kl, drawn_entropy = kl, torch.cat(entropies)
        if lag:
            drawn_kl = ops.kl_estimate(drawn_logprobs, reference, kind="k1")
            drawn_entropy = rollouts.entropy[rollouts.response_mask]

        rewarded = sampled.scoring.result()
        rewards = paid(rewarded.scores, rollouts.finish_reasons, config)
        scored = Scored(
            torch.tensor(rewards, device=device),
            kl,
            cu_seqlens,
            torch.cat(old_values) if old_values else None,
            self._baselines(sampled),
        )
        in_loss = config.kl_estimator is not None
        found = self.advantage(scored, 0.0 if in_loss else kl_coef, config)

        sequence_kl = ops.sequence_sum(drawn_kl, cu_seqlens=cu_seqlens)  # (B,)
        self._keep_samples(run, step, sampled.records, rollouts, rewarded.scores, sequence_kl.tolist())
        metrics = {
            "score": float(np.mean(rewarded.scores)),
            **{f"score/{name}": mean for name, mean in rewarded.means.items()},
            "reward": float(np.mean(rewards)) - kl_coef * float(sequence_kl.mean()),
            "kl": float(sequence_kl.mean()),
            "entropy": float(drawn_entropy.mean()),
            "response_tokens": float(np.mean(lengths)),
            "finished": float(np.mean([reason == "stop" for reason in rollouts.finish_reasons])),
        }
        if config.lag:
            metrics["lag"] = float(lag)
        if traits_of(self.advantage, config).compares_samples:
            metrics["equal_groups"] = len(equal_groups(rewards, config.samples_per_prompt)) / len(sampled.records)
        if config.resample:
            metrics["resampled"] = float(sampled.resampled)
        return Experience(
            examples=examples,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs if in_loss else [],
            rollout_logprobs=list(drawn_logprobs.split(lengths)) if config.lag else [],
            old_values=old_values,
            advantages=list(found.advantages.split(lengths)),
            advantage_sums=found.sums,
            returns=[] if found.returns is None else list(found.returns.split(lengths)),
            kl=kl,
            metrics=metrics,
        )

    def _baselines(self, sampled: Sampled) -> torch.Tensor | None:
        """What is paid for the likeliest response to each prompt, for each of its samples: (B,)."""
        if sampled.greedy is None:
            return None
        rollouts, scoring = sampled.greedy
        found = paid(scoring.result().scores, rollouts.finish_reasons, self.config)
        return torch.tensor(found, device=self.policy.device).repeat_interleave(self.config.samples_per_prompt)

    def _policy_outputs(self, rollouts: Rollouts, examples: list[Example], lag: int = 0) -> list[list[torch.Tensor]]:
        """Log-probability, entropy and value (without a critic none) of each response token, as training has them, so
        that ratios begin at 1.

        In float32 the sampler's are the same to rounding, if the weights are still those that it had; in narrower
        dtypes it rounds elsewhere than training does. Then they are computed again.
        """
        own_critic = self.critic is not None and self.critic.model is not None
        if self.policy.dtype == torch.float32 and not lag:
            lengths = [len(example.response) for example in examples]
            found = (rollouts.logprobs, rollouts.entropy, rollouts.values)
            outputs = [[] if x is None else list(x[rollouts.response_mask].split(lengths)) for x in found]
            if own_critic:
                (outputs[2],) = self._each(examples, lambda batch: [self._values(batch)])
            return outputs
        logprobs, entropies, *values = self._each(examples, self._outputs)
        return [logprobs, entropies, values[0] if values else []]

    def _outputs(self, batch: Batch) -> list[torch.Tensor]:
        states = models.response_states(self.policy, batch)  # (R, H)
        found = list(models.response_logprobs(self.policy, batch, self.config.temperature, states))
        return found if self.critic is None else [*found, self.critic.values(batch, states)]

    def _values(self, batch: Batch) -> torch.Tensor:
        assert self.critic is not None
        return self.critic.values(batch, batch.input_ids)  # its own model reads the batch

    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        return [models.response_logprobs(self.reference, batch, self.config.temperature)[0]]

    def _each(
        self, examples: Sequence[Example], function: Callable[[Batch], Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        return per_example(examples, function, self.budget.tokens, self.policy.device, self.shared)

    @staticmethod
    def _keep_samples(
        run: RunFolder,
        step: int,
        records: Sequence[PromptRecord],
        rollouts: Rollouts,
        scores: list[float],
        kl: list[float],
    ) -> None:
        prompts = [records[i].prompt for i in rollouts.prompt_index.tolist()]
        chosen = range(0, len(scores), max(1, len(scores) // SHOWN))
        run.samples(
            step,
            [
                {"prompt": prompt_text(prompts[i]), "text": rollouts.texts[i], "score": scores[i], "kl": kl[i]}
                for i in chosen
            ],
        )


def minibatches(examples: Sequence[Example], count: int, rng: np.random.Generator) -> list[list[int]]:
    """Example numbers in random order, cut into `count` parts.

    The samples of a prompt stay together, so that it is read once for all of them, unless there are too few prompts.
    """
    units = by_prompt(examples)
    if len(units) < count:
        units = [[i] for i in range(len(examples))]
    parts = np.array_split(rng.permutation(len(units)), count)
    return [[i for unit in part for i in units[unit]] for part in parts]
