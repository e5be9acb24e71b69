"""Metrics of a step of PPO: of its samples, of its updates, and of the time that it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf_fast import machine, models, ops
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Example
from rlhf_fast.data.records import prompt_text
from rlhf_fast.models.adapters import Model
from rlhf_fast.trainers.loop.steps import Row
from rlhf_fast.trainers.ppo.advantages import Scored, equal_groups
from rlhf_fast.trainers.ppo.experience import Experience, Outputs, Parts, ResponseRewards
from rlhf_fast.trainers.ppo.sampler import Sampled

SHOWN = 4  # samples that are kept of a step


class SampleMetrics:
    """Figures of one step's samples, of the policy that drew them: where it is `lag` updates older than the one that
    learns, its own log-probabilities count."""

    def __init__(
        self, samples: Sampled, lag: int, policy: Outputs, reference: Parts, scored: Scored, rewards: ResponseRewards
    ) -> None:
        self.samples, self.lag, self.rewards = samples, lag, rewards
        rollouts = samples.rollouts
        kl, self.entropy = scored.kl, torch.cat(policy.entropies)  # (R,)
        if lag:
            logprobs = rollouts.logprobs[rollouts.response_mask]  # (R,)
            kl = ops.kl_estimate(logprobs, torch.cat(reference), kind="k1")
            self.entropy = rollouts.entropy[rollouts.response_mask]
        self.kl = ops.sequence_sum(kl, cu_seqlens=scored.cu_seqlens)  # (B,)

    def row(self, kl_coef: float, config: PPOConfig, compares_samples: bool) -> Row:
        scores, rewards, ends = self.rewards.raw, self.rewards.paid, self.samples.rollouts.finish_reasons
        row = {
            "score": float(np.mean(scores.scores)),
            **{f"score/{name}": mean for name, mean in scores.means.items()},
            "reward": float(np.mean(rewards)) - kl_coef * float(self.kl.mean()),
            "kl": float(self.kl.mean()),
            "entropy": float(self.entropy.mean()),
            "response_tokens": float(np.mean(self.samples.lengths)),
            "finished": float(np.mean([reason == "stop" for reason in ends])),
        }
        if config.lag:
            row["lag"] = float(self.lag)
        if compares_samples:
            row["equal_groups"] = len(equal_groups(rewards, config.samples_per_prompt)) / len(self.samples.records)
        if config.resample:
            row["resampled"] = float(self.samples.resampled)
        return row

    def shown(self) -> list[dict[str, Any]]:
        """Pick a few of the samples for people to read."""
        records, rollouts, kl = self.samples.records, self.samples.rollouts, self.kl.tolist()
        prompts = [records[i].prompt for i in rollouts.prompt_index.tolist()]
        scores = self.rewards.raw.scores
        return [
            {"prompt": prompt_text(prompts[i]), "text": rollouts.texts[i], "score": scores[i], "kl": kl[i]}
            for i in range(0, len(scores), max(1, len(scores) // SHOWN))
        ]


class StepMeter:
    """Measures one step while it is the context: the seconds of its parts, and how busy they kept the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._busy = device, dtype, machine.Busy(device)
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> StepMeter:
        self._busy.__enter__()
        self.limits = machine.measured(self.device, self.dtype)
        self._at = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._busy.__exit__(*error)

    @property
    def busy(self) -> Row:
        return {} if self._busy.share is None else {"busy": self._busy.share}

    def lap(self, part: str) -> None:
        """Count the time since the last lap as that of a part."""
        before, self._at = self._at, time.monotonic()
        self.seconds[f"seconds_{part}"] = self._at - before

    def row(self, samples: Sampled, of_samples: Row, of_updates: Row, operations: float) -> Row:
        """Join all metrics of the step. `operations`: what all its updates take, in products with weights."""
        row = {**of_samples}
        if samples.statistics is not None:
            row["decode_roofline"] = samples.statistics.roofline(self.limits.read, self.limits.product)
        row |= {name: self.seconds[name] for name in ("seconds_rollout", "seconds_scoring")} | of_updates
        row["seconds_training"] = self.seconds["seconds_training"]
        row["training_utilisation"] = operations / row["seconds_training"] / self.limits.product
        return row


def mean(updates: Sequence[Row], experience: Experience) -> Row:
    """Average statistics over a step's updates, and count those."""
    row = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
    return {**row, **critic_metrics(experience), "updates": float(len(updates))}


def critic_metrics(experience: Experience) -> Row:
    """Measure the values at sampling time: the same for all updates of a step."""
    return {"explained_variance": explained_variance(experience)} if experience.old_values else {}


def explained_variance(experience: Experience) -> float:
    """Measure how much of the returns' variance the values at sampling time explain; 0 when the returns do not vary."""
    returns, values = torch.cat(experience.returns), torch.cat(experience.old_values)
    variance = float(returns.var(correction=0))
    return 1.0 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


@torch.no_grad()
def operations(model: Model, examples: Sequence[Example], shared: bool) -> float:
    """Count the products with weights that an epoch's training takes: forward, and backward for states and trained
    weights. Each token counts once; a prompt that is read once for all its samples (`shared`) too."""
    prompts = {e.prompt for e in examples} if shared else [e.prompt for e in examples]
    tokens = sum(map(len, prompts)) + sum(len(e.response) for e in examples)
    table = model.get_input_embeddings().weight  # only looked up, unless it is the head, too
    looked_up = 0 if table is models.output_head(model).weight else table.numel()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - looked_up
    trained = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p.requires_grad)
    return tokens * (4.0 * weights + 2.0 * trained)
