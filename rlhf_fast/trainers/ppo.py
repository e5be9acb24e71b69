"""PPO on a language model: sample, score, estimate advantages, and improve the policy within a clipped ratio. With
advantages of a prompt's responses against each other (GRPO, RLOO and their like) the same without a critic.

One step is `_collect` (rollouts, rewards, advantages) and `_update` (epochs of minibatches over them). The policy and
its value head share one trunk; the reference is the policy as it was at the start, its frozen weights shared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf_fast import models, ops, settings
from rlhf_fast.config import PPOConfig
from rlhf_fast.data.batches import Batch, Example, by_prompt, microbatches_of_examples, pad, shuffled
from rlhf_fast.data.chat import encode_prompt, prompt_text
from rlhf_fast.data.records import PromptRecord, Source, read_prompts
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.rollouts import Rollouts
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.run_folder import RunFolder, progress_bar
from rlhf_fast.trainers.advantages import Scored, against_critic, against_each_other
from rlhf_fast.trainers.kl_controller import KLController
from rlhf_fast.trainers.loop import Stats, add_stats, concatenated, per_example
from rlhf_fast.trainers.optimizer import Optimizer
from rlhf_fast.trainers.rewards import Reward, resolve_reward
from rlhf_fast.trainers.state import TrainState, digest, fingerprint

# How far the first update may be from exact in float32, where micro-batches differ only in the order of sums.
FIRST_UPDATE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Experience:
    """One step's rollouts with all that PPO's loss needs. Lists hold one tensor (response length,) a sequence."""

    examples: list[Example]
    old_logprobs: list[torch.Tensor]
    old_values: list[torch.Tensor]  # empty without a critic, like returns
    advantages: list[torch.Tensor]
    advantage_sums: torch.Tensor | None  # (3,) by which the loss whitens them
    returns: list[torch.Tensor]
    metrics: dict[str, float]


class PPOTrainer:
    """Improve a policy on prompts by a reward, kept near its start by a KL penalty on every token.

    Args:
        policy: the checkpoint to start from, which is also the reference.
        reward: a reward model's checkpoint, a function `(prompts, responses) -> scores`, a rule, a URL, or a weighted
            list of those; see docs/rewards.md.
        prompts: see data/records.py.
        out: the run's folder.
    """

    def __init__(
        self,
        policy: str | Path,
        reward: Reward,
        prompts: Source | Sequence[PromptRecord],
        out: str | Path = "runs/ppo",
        config: PPOConfig | None = None,
    ) -> None:
        self.config = config = config or PPOConfig()
        self.prompts = read_prompts(prompts)
        if len(self.prompts) < config.prompts_per_step:
            raise ValueError(
                f"ppo.prompts_per_step: {config.prompts_per_step}, but there are only {len(self.prompts)} prompts"
            )
        loaded, self.tokenizer = models.load(policy)
        self._check_lengths()
        self.reward = resolve_reward(
            reward, config.min_reward_agreement, config.max_length, config.reward_timeout, config.reward_retries
        )
        self.reward.require_columns(self.prompts)
        self.model = models.trainable(loaded, config.lora, config.seed)
        self.reference = models.frozen_copy(self.model)
        self.head = models.output_head(self.model)
        self.device = self.head.weight.device
        self.shared = models.longest_shared(self.model)
        # Starts at zero: its first values are no worse than none, and the trunk gets no gradient from a random head.
        self.value_head = self._new_value_head() if config.advantage == "gae" else None
        self.kl_controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.generator = Generator(self.model, self.tokenizer, value_head=self.value_head)
        trained = [self.model] if self.value_head is None else [self.model, self.value_head]
        self.optimizer = Optimizer(trained, config.optim, config.steps * config.epochs * config.minibatches)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("ppo", config, policy=policy, reward=reward, prompts=prompts, out=out)

    def train(self) -> dict[str, Any]:
        """Run all steps, save the checkpoint, and return the run's result."""
        config = self.config
        run = RunFolder(self.out, "ppo", self.config_yaml)
        identity = {"prompts": digest(self.prompts), "policy": fingerprint(self.model)}
        with TrainState(run, self.optimizer, identity) as state:
            done = state.load()
            row: dict[str, float] = state.extra.get("row", {})
            self.kl_controller.load_state_dict(state.extra.get("kl_controller", {}))
            with progress_bar(config.steps, "ppo", "step", done) as bar:
                for step in range(done + 1, config.steps + 1):
                    experience = self._collect(run, step)
                    started = time.monotonic()
                    row = {**experience.metrics, **self._update(experience, step)}
                    row["seconds_training"] = time.monotonic() - started
                    row["kl_coef"] = self.kl_controller.coef
                    self.kl_controller.update(row["kl"], len(experience.examples))
                    run.log({"step": step, **row})
                    bar.set_postfix({"score": f"{row['score']:.3f}", "kl": f"{row['kl']:.2f}"}, refresh=False)
                    bar.update()
                    state.extra = {"row": row, "kl_controller": self.kl_controller.state_dict()}
                    state.after(step)
        extra = {"step": config.steps, "kl_controller": self.kl_controller.state_dict()}
        models.save(run.checkpoint(config.steps), self.model, self.tokenizer, extra, heads=self.value_head)
        return run.finish({name: row[name] for name in ("score", "reward", "kl", "kl_coef", "entropy", "finished")})

    # Collecting -----------------------------------------------------------------------------------------------------

    def _collect(self, run: RunFolder, step: int) -> Experience:
        """Sample responses to this step's prompts and turn their scores into advantages for every token."""
        config = self.config
        started = time.monotonic()
        records = self._step_prompts(step)
        # No top-k or top-p: the ratio is only right when sampling and training use the same distribution.
        params = SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed + step,
        )
        rollouts = self.generator.generate([record.prompt for record in records], params)
        self.generator.release_memory()
        examples = rollouts.examples()
        sampled = time.monotonic()

        asked = [records[i] for i in rollouts.prompt_index.tolist()]
        rewarded = self.reward(asked, rollouts.texts)
        scores = rewarded.scores
        finished = [reason == "stop" for reason in rollouts.finish_reasons]
        paid = [s if done else s - config.missing_eos_penalty for s, done in zip(scores, finished, strict=True)]
        max_tokens = config.optim.max_tokens_per_microbatch
        old_logprobs, entropies, old_values = self._policy_outputs(rollouts, examples)
        (ref_logprobs,) = per_example(examples, self._reference_logprobs, max_tokens, self.device, self.shared)

        lengths = [len(example.response) for example in examples]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self.device)
        kl = ops.kl_estimate(torch.cat(old_logprobs), torch.cat(ref_logprobs), kind="k1")  # (R,)
        scored = Scored(torch.tensor(paid, device=self.device), kl, cu_seqlens)
        coef = self.kl_controller.coef
        if config.advantage == "gae":
            found = against_critic(scored, torch.cat(old_values), coef, config)
        else:
            found = against_each_other(scored, coef, config)

        sequence_kl = ops.sequence_sum(kl, cu_seqlens=cu_seqlens)  # (B,)
        prompts = [record.prompt for record in asked]
        self._keep_samples(run, step, prompts, rollouts.texts, scores, sequence_kl.tolist())
        if step == 1:
            _check_start(kl)
        return Experience(
            examples=examples,
            old_logprobs=old_logprobs,
            old_values=old_values,
            advantages=list(found.advantages.split(lengths)),
            advantage_sums=found.sums,
            returns=[] if found.returns is None else list(found.returns.split(lengths)),
            metrics={
                "score": float(np.mean(scores)),
                **{f"score/{name}": mean for name, mean in rewarded.means.items()},
                "reward": float(np.mean(paid)) - self.kl_controller.coef * float(sequence_kl.mean()),
                "kl": float(sequence_kl.mean()),
                "entropy": float(torch.cat(entropies).mean()),
                "response_tokens": float(np.mean(lengths)),
                "finished": float(np.mean(finished)),
                "seconds_rollout": sampled - started,
                "seconds_scoring": time.monotonic() - sampled,
            },
        )

    def _step_prompts(self, step: int) -> list[PromptRecord]:
        """The prompts of a step: consecutive ones of a permutation that is drawn anew for every pass."""
        per_step = self.config.prompts_per_step
        first = (step - 1) * per_step
        skipped, start = divmod(first, len(self.prompts))  # a step takes from two passes at most
        two_passes = [p for lap in (skipped, skipped + 1) for p in shuffled(self.prompts, self.config.seed + lap)]
        return two_passes[start : start + per_step]

    def _policy_outputs(self, rollouts: Rollouts, examples: list[Example]) -> list[list[torch.Tensor]]:
        """Log-probability, entropy and value (without a critic none) of each response token, as training has them, so
        that ratios begin at 1.

        In float32 the sampler's are the same to rounding; in narrower dtypes it rounds elsewhere than training does,
        and they are computed again.
        """
        if self.head.weight.dtype == torch.float32:
            lengths = [len(example.response) for example in examples]
            found = (rollouts.logprobs, rollouts.entropy, rollouts.values)
            return [[] if x is None else list(x[rollouts.response_mask].split(lengths)) for x in found]

        def outputs(batch: Batch) -> list[torch.Tensor]:
            states = models.response_states(self.model, batch)  # (R, H)
            logprobs, entropy = models.response_logprobs(self.model, batch, self.config.temperature, states)
            return [logprobs, entropy] if self.value_head is None else [logprobs, entropy, self._values(states)]

        max_tokens = self.config.optim.max_tokens_per_microbatch
        logprobs, entropies, *values = per_example(examples, outputs, max_tokens, self.device, self.shared)
        return [logprobs, entropies, values[0] if values else []]

    def _values(self, states: torch.Tensor) -> torch.Tensor:
        """(R, H) -> (R,), with the critic."""
        assert self.value_head is not None
        values: torch.Tensor = self.value_head(states.float()).squeeze(-1)
        return values

    def _reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        return [models.response_logprobs(self.reference, batch, self.config.temperature)[0]]

    # Updating -------------------------------------------------------------------------------------------------------

    def _update(self, experience: Experience, step: int) -> dict[str, float]:
        """Epochs of minibatches over the experience; returns the statistics averaged over all of them."""
        totals: dict[str, float] = {}
        count = 0
        # Of the values at sampling time: one for the step.
        of_critic = {} if self.value_head is None else {"explained_variance": self._explained_variance(experience)}
        for epoch in range(self.config.epochs):
            rng = np.random.default_rng((self.config.seed, step, epoch))
            for rows in minibatches(experience.examples, self.config.minibatches, rng):
                stats: dict[str, float] = {}
                worst_ratio = 0.0
                for loss, part in self._losses(experience, rows):
                    loss.backward()
                    worst_ratio = max(worst_ratio, float(part.pop("ratio_max")))
                    add_stats(stats, part)
                stats["ratio_max"] = worst_ratio
                stats.update(of_critic)
                if step == 1 and count == 0:
                    _check_first_update(stats)
                stats["grad_norm"] = self.optimizer.step()
                for name, value in stats.items():
                    totals[name] = totals.get(name, 0.0) + value
                count += 1
        return {name: value / count for name, value in totals.items()}

    def _losses(self, experience: Experience, rows: list[int]) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Loss and statistics of each micro-batch of a minibatch, all divided by the minibatch's tokens."""
        config = self.config
        examples = experience.examples
        tokens = sum(len(examples[row].response) for row in rows)
        chosen, max_tokens = [examples[row] for row in rows], config.optim.max_tokens_per_microbatch
        for group in microbatches_of_examples(chosen, max_tokens, self.shared):
            part = [rows[i] for i in group]
            batch = pad([examples[row] for row in part], self.device, self.shared)
            head = models.output_head(self.model)
            states = models.response_states(self.model, batch)  # (R, H)
            of_critic: dict[str, Any] = {}
            if self.value_head is not None:
                of_critic = {
                    "values": self._values(states),
                    "old_values": concatenated(experience.old_values, part),
                    "returns": concatenated(experience.returns, part),
                    "value_clip": config.value_clip,
                    "value_coef": config.value_coef,
                }
            loss, stats = ops.linear_ppo_loss(
                states,
                head.weight,
                batch.response_tokens,
                concatenated(experience.old_logprobs, part),
                concatenated(experience.advantages, part),
                **head.options(),
                temperature=config.temperature,
                **of_critic,
                cu_seqlens=batch.cu_seqlens,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                denominator=tokens,
                advantage_sums=experience.advantage_sums,
            )
            kept = ["policy_loss", "clip_fraction", "approx_kl", "ratio_mean", "ratio_max"]
            kept += ["value_loss"] * (self.value_head is not None)
            yield loss, {name: stats[name] for name in kept}

    @staticmethod
    def _explained_variance(experience: Experience) -> float:
        """How much of the returns' variance the values at sampling time explain; 0 when the returns do not vary."""
        returns, values = torch.cat(experience.returns), torch.cat(experience.old_values)
        variance = float(returns.var(correction=0))
        return 1.0 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0

    def _new_value_head(self) -> nn.Linear:
        head = nn.Linear(self.head.weight.shape[1], 1, device=self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    # Checks and records ---------------------------------------------------------------------------------------------

    def _check_lengths(self) -> None:
        """Refuse prompts that leave no room for a response, before any work is done."""
        for record in self.prompts:
            tokens = len(encode_prompt(self.tokenizer, record.prompt)) + self.config.max_new_tokens
            if tokens > self.config.max_length:
                raise ValueError(
                    f"{record.name or 'a prompt'}: with max_new_tokens = {self.config.max_new_tokens} it comes to "
                    f"{tokens} tokens, more than ppo.max_length = {self.config.max_length}; shorten it or raise the "
                    "setting"
                )

    @staticmethod
    def _keep_samples(
        run: RunFolder, step: int, prompts: list[Any], texts: list[str], scores: list[float], kl: list[float]
    ) -> None:
        for i in range(0, len(texts), max(1, len(texts) // 4)):
            run.sample(
                {"step": step, "prompt": prompt_text(prompts[i]), "text": texts[i], "score": scores[i], "kl": kl[i]}
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


def _check_start(kl: torch.Tensor) -> None:
    """Before the first update the policy is its reference."""
    if (worst := float(kl.abs().max())) > FIRST_UPDATE_TOLERANCE:
        _raise_if([f"KL to the reference {worst:.2e} instead of 0"])


def _check_first_update(stats: dict[str, float]) -> None:
    """In the first update every ratio is 1: a difference means that sampling and training disagree on the model."""
    wrong = []
    for name, expected in (("ratio_mean", 1.0), ("ratio_max", 1.0), ("approx_kl", 0.0)):
        if not abs(stats[name] - expected) <= FIRST_UPDATE_TOLERANCE:
            wrong.append(f"{name} {stats[name]:.6f} instead of {expected}")
    if stats["clip_fraction"] != 0.0:
        wrong.append(f"clip_fraction {stats['clip_fraction']} instead of 0")
    if not math.isfinite(stats.get("explained_variance", 0.0)):
        wrong.append(f"explained_variance {stats['explained_variance']}")
    _raise_if(wrong)


def _raise_if(wrong: list[str]) -> None:
    if wrong:
        raise RuntimeError("PPO's first update is not what it must be: " + "; ".join(wrong))
