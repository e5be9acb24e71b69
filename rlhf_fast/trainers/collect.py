"""What a step of PPO learns from: responses sampled from the policy, their scores, and an advantage for every token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Batch, Example, by_prompt, shuffled
from rlhf_fast.data.chat import encode_prompt, prompt_text
from rlhf_fast.data.records import PromptRecord
from rlhf_fast.models.adapters import Model
from rlhf_fast.rates import DeviceRates
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.run_folder import RunFolder
from rlhf_fast.trainers.advantages import AdvantageFunction, Scored
from rlhf_fast.trainers.budget import TokenBudget
from rlhf_fast.trainers.critic import Critic
from rlhf_fast.trainers.loop import per_example
from rlhf_fast.trainers.rewards import Rewards, Scores

SHOWN = 4  # samples that are kept of a step


@dataclass(frozen=True)
class Experience:
    """One step's rollouts with all that PPO's loss needs. Lists hold one tensor (response length,) a sequence."""

    examples: list[Example]
    old_logprobs: list[torch.Tensor]
    old_values: list[torch.Tensor]  # empty without a critic, like returns
    advantages: list[torch.Tensor]
    advantage_sums: torch.Tensor | None  # (3,) by which the loss whitens them
    returns: list[torch.Tensor]
    kl: torch.Tensor  # (R,): log-probability less that of the reference, at each sampled token
    metrics: dict[str, float]


class Collector:
    """Samples from a policy as it is now, and scores what it said.

    Args:
        policy, reference: the model that is trained, and the one that it is kept near.
        critic: whose values go with the samples, if the advantage takes any.
        tokenizer: the policy's.
        prompts: of which each step takes the next.
        shared: as in `pad`.
    """

    def __init__(
        self,
        policy: Model,
        reference: Model,
        critic: Critic | None,
        tokenizer: Any,
        reward: Rewards,
        prompts: Sequence[PromptRecord],
        advantage: AdvantageFunction,
        config: PPOConfig,
        budget: TokenBudget,
        shared: int,
    ) -> None:
        self.policy, self.reference, self.critic, self.tokenizer = policy, reference, critic, tokenizer
        self.reward, self.prompts, self.advantage, self.config = reward, prompts, advantage, config
        self.budget, self.shared = budget, shared
        self.weight = models.output_head(policy).weight
        # Values as a by-product of sampling, where they are a head's on the policy's states.
        value_head = critic.head if critic is not None and critic.model is None else None
        self.generator = Generator(policy, tokenizer, value_head=value_head)

    def collect(self, run: RunFolder, step: int, kl_coef: float, rates: DeviceRates | None = None) -> Experience:
        """Sample responses to this step's prompts and turn their scores into advantages for every token."""
        config = self.config
        started = time.monotonic()
        records = step_prompts(self.prompts, config, step)
        # No top-k or top-p: the ratio is only right when sampling and training use the same distribution.
        params = SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            stop_token_ids=config.stop_token_ids,
            seed=config.seed + step,
        )
        rollouts = self.generator.generate([record.prompt for record in records], params)
        statistics = self.generator.statistics
        self.generator.release_memory()
        examples = rollouts.examples()
        sampled = time.monotonic()

        rewarded, paid = self._paid(records, rollouts)
        baselines = self._baselines(records, params) if config.advantage == "remax" else None
        old_logprobs, entropies, old_values = self._policy_outputs(rollouts, examples)
        (ref_logprobs,) = self._each(examples, self._reference_logprobs)

        lengths = [len(example.response) for example in examples]
        device = self.weight.device
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        kl = ops.kl_estimate(torch.cat(old_logprobs), torch.cat(ref_logprobs), kind="k1")  # (R,)
        scored = Scored(
            torch.tensor(paid, device=device),
            kl,
            cu_seqlens,
            torch.cat(old_values) if old_values else None,
            baselines,
        )
        found = self.advantage(scored, kl_coef, config)

        sequence_kl = ops.sequence_sum(kl, cu_seqlens=cu_seqlens)  # (B,)
        self._keep_samples(run, step, records, rollouts, rewarded.scores, sequence_kl.tolist())
        metrics = {
            "score": float(np.mean(rewarded.scores)),
            **{f"score/{name}": mean for name, mean in rewarded.means.items()},
            "reward": float(np.mean(paid)) - kl_coef * float(sequence_kl.mean()),
            "kl": float(sequence_kl.mean()),
            "entropy": float(torch.cat(entropies).mean()),
            "response_tokens": float(np.mean(lengths)),
            "finished": float(np.mean([reason == "stop" for reason in rollouts.finish_reasons])),
            "seconds_rollout": sampled - started,
            "seconds_scoring": time.monotonic() - sampled,
        }
        if rates is not None:
            metrics["decode_roofline"] = statistics.roofline(rates.read, rates.product)
        return Experience(
            examples=examples,
            old_logprobs=old_logprobs,
            old_values=old_values,
            advantages=list(found.advantages.split(lengths)),
            advantage_sums=found.sums,
            returns=[] if found.returns is None else list(found.returns.split(lengths)),
            kl=kl,
            metrics=metrics,
        )

    def _paid(self, records: Sequence[PromptRecord], rollouts: Rollouts) -> tuple[Scores, list[float]]:
        """The scores of all responses, and what is paid for them."""
        config = self.config
        rewarded = self.reward([records[i] for i in rollouts.prompt_index.tolist()], rollouts.texts)
        paid = [min(max(score, -config.reward_clip), config.reward_clip) for score in rewarded.scores]
        for i, reason in enumerate(rollouts.finish_reasons):
            if reason != "stop":
                kept = paid[i] if config.missing_eos == "subtract" else 0.0
                paid[i] = kept - config.missing_eos_penalty
        return rewarded, paid

    def _baselines(self, records: Sequence[PromptRecord], params: SamplingParams) -> torch.Tensor:
        """What is paid for the likeliest response to each prompt, for each of its samples: (B,)."""
        greedy = self.generator.generate([r.prompt for r in records], replace(params, n=1, temperature=0.0))
        self.generator.release_memory()
        _, paid = self._paid(records, greedy)
        return torch.tensor(paid, device=self.weight.device).repeat_interleave(params.n)

    def _policy_outputs(self, rollouts: Rollouts, examples: list[Example]) -> list[list[torch.Tensor]]:
        """Log-probability, entropy and value (without a critic none) of each response token, as training has them, so
        that ratios begin at 1.

        In float32 the sampler's are the same to rounding; in narrower dtypes it rounds elsewhere than training does,
        and they are computed again.
        """
        own_critic = self.critic is not None and self.critic.model is not None
        if self.weight.dtype == torch.float32:
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
        return per_example(examples, function, self.budget.tokens, self.weight.device, self.shared)

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


def check_lengths(prompts: Sequence[PromptRecord], tokenizer: Any, config: PPOConfig) -> None:
    """Refuse prompts that leave no room for a response, before any work is done."""
    for record in prompts:
        tokens = len(encode_prompt(tokenizer, record.prompt)) + config.max_new_tokens
        if tokens > config.max_length:
            raise ValueError(
                f"{record.name or 'a prompt'}: with max_new_tokens = {config.max_new_tokens} it comes to {tokens} "
                f"tokens, more than ppo.max_length = {config.max_length}; shorten it or raise the setting"
            )


def step_prompts(prompts: Sequence[PromptRecord], config: PPOConfig, step: int) -> list[PromptRecord]:
    """The prompts of a step: consecutive ones of a permutation that is drawn anew for every pass."""
    first = (step - 1) * config.prompts_per_step
    skipped, start = divmod(first, len(prompts))  # a step takes from two passes at most
    two_passes = [p for lap in (skipped, skipped + 1) for p in shuffled(prompts, config.seed + lap)]
    return two_passes[start : start + config.prompts_per_step]


def minibatches(examples: Sequence[Example], count: int, rng: np.random.Generator) -> list[list[int]]:
    """Example numbers in random order, cut into `count` parts.

    The samples of a prompt stay together, so that it is read once for all of them, unless there are too few prompts.
    """
    units = by_prompt(examples)
    if len(units) < count:
        units = [[i] for i in range(len(examples))]
    parts = np.array_split(rng.permutation(len(units)), count)
    return [[i for unit in part for i in units[unit]] for part in parts]
