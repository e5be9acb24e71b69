"""PPO on a language model: sample, score, estimate advantages, and improve the policy within a clipped ratio. With
advantages of a prompt's responses against each other (GRPO, RLOO and their like) the same without a critic.

One step is `Collector.collect` (rollouts, rewards, advantages) and `_update` (epochs of minibatches over them). Policy,
reference and critic share the weights that nobody trains; the reference is the policy as it was at the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast import machine, models, ops
from rlhf_fast.config import PPOConfig, settings
from rlhf_fast.data.batches import microbatches_of_examples, pad
from rlhf_fast.data.records import PromptRecord, Source, read_prompts
from rlhf_fast.data.splits import split_prompts, warn_of_shared
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.ops.ppo_loss import STATS
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.rewards import names as reward_names
from rlhf_fast.rewards.model import Reward, RewardModel, resolve_reward
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.chat_settings import use_settings
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop.lengths import fitting_for
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.preflight import preflight
from rlhf_fast.trainers.loop.state import digest, weights_digest
from rlhf_fast.trainers.loop.steps import Stats, concatenated, learn, run_steps
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES, AdvantageFunction, traits_of
from rlhf_fast.trainers.ppo.checks import check_first_update, check_start
from rlhf_fast.trainers.ppo.collect import Collector, Experience, minibatches
from rlhf_fast.trainers.ppo.critic import make_critic
from rlhf_fast.trainers.ppo.kl_controller import KLController
from rlhf_fast.trainers.ppo.sampler import Sampler

Loss = Callable[..., tuple[torch.Tensor, Stats]]
# Of the loss's statistics those that are logged; a loss of the user's own may have any others.
LOGGED = {"policy_loss", "value_loss", "clip_fraction", "approx_kl", "approx_kl_k3", "ratio_mean", "ratio_max"}
# What a run ends with, first as it was before: held-out prompts if there are any, and the last step's own.
SUMMARY = (
    "heldout_score", "heldout_finished", "heldout_tokens", "score", "reward", "kl", "kl_coef", "entropy", "finished",
)  # fmt: skip
OF_LAG = {"rollout_weight", "rollout_clip_fraction"}  # and these where samples may be of an older policy


class PPOTrainer:
    """Improve a policy on prompts by a reward, kept near its start by a KL penalty on every token.

    Args:
        policy: the checkpoint to start from, which is also the reference.
        reward: a reward model's checkpoint, a function `(prompts, responses) -> scores`, a rule, a URL, or a weighted
            list of those; see docs/rewards.md.
        prompts: see data/records.py.
        out: the run's folder.
        advantage: instead of the one that `ppo.advantage` names (advantages.py says what it is given).
        loss: instead of `ops.linear_ppo_loss`, with its arguments and results.
        heldout_data: prompts that are only measured on, besides those whose `split` is another than train.
    """

    def __init__(
        self,
        policy: str | Path,
        reward: Reward,
        prompts: Source | Sequence[PromptRecord],
        out: str | Path = "runs/ppo",
        config: PPOConfig | dict[str, Any] | None = None,
        advantage: AdvantageFunction | None = None,
        loss: Loss = ops.linear_ppo_loss,
        heldout_data: Source | Sequence[PromptRecord] | None = None,
    ) -> None:
        config = settings.given(PPOConfig, config)
        own = {
            "advantage": advantage,
            "loss": None if loss is ops.linear_ppo_loss else loss,
            "heldout_data": heldout_data,
        }
        inputs = {"policy": policy, "reward": reward, "prompts": prompts, "out": out}
        inputs |= {name: value for name, value in own.items() if value is not None}
        preflight("ppo", config, inputs)
        self.prompts, heldout = split_prompts(read_prompts(prompts))
        self.heldout = heldout + ([] if heldout_data is None else read_prompts(heldout_data))
        warn_of_shared(self.prompts, self.heldout)
        _require_prompts(self.prompts, config)
        if isinstance(reward, str | Path):
            reward_names.check(str(reward))  # before a model is loaded
        self.dtype = getattr(torch, config.dtype)
        loaded, self.tokenizer = models.load(policy, self.dtype)
        config = use_settings(config, "ppo", out, self.tokenizer)
        self.fitting = fitting_for(loaded, self.tokenizer, config, "ppo")
        self.prompts = self.fitting.prompts(self.prompts, config.max_new_tokens)
        self.heldout = self.fitting.prompts(self.heldout, config.max_new_tokens)
        self.fitting.done()
        _require_prompts(self.prompts, config)
        self.reward = resolve_reward(
            reward,
            config.min_reward_agreement,
            config.max_length,
            config.reward_timeout,
            config.reward_retries,
            self.dtype,
            config.reward_batch,
        )
        others = [part.function.tokenizer for part in self.reward.parts if isinstance(part.function, RewardModel)]
        self.config = config = use_settings(config, "ppo", out, self.tokenizer, others)
        self.reward.check([*self.prompts, *self.heldout])
        self.model = models.trainable(loaded, config.lora, config.seed)
        models.require_reach(self.model, config.max_length)
        self.reference = models.frozen_copy(self.model)
        self.shared = models.longest_shared(self.model)
        self.critic = None
        self.advantage = advantage or ADVANTAGES[config.advantage]
        needs = traits_of(self.advantage, config)
        if needs.needs_critic:
            options = {"lora": config.lora, "seed": config.seed, "dtype": self.dtype}
            self.critic = make_critic(config.critic, self.model, reward, self.tokenizer, **options)
        if config.optim.checkpointing:  # after all copies were made
            models.recompute_activations(self.model)
            if self.critic is not None and self.critic.model is not None:
                models.recompute_activations(self.critic.model)
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        self.loss = loss
        # Values as a by-product of sampling, where they are a head's on the policy's states.
        value_head = self.critic.head if self.critic is not None and self.critic.model is None else None
        self.sampler = Sampler(
            self.model, self.tokenizer, self.reward, self.prompts, config, value_head, needs.needs_greedy
        )
        self.collector = Collector(
            self.model,
            self.reference,
            self.critic,
            self.sampler,
            self.advantage,
            config,
            self.budget,
            self.shared,
        )
        trained = [self.model] if self.critic is None else [self.model, *self.critic.modules]
        self.optimizer = Optimizer(trained, config.optim, config.steps * config.epochs * config.minibatches)
        self.kl_controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.out = Path(out)
        self.config_yaml = settings.run_yaml("ppo", config, **inputs)

    def train(self) -> dict[str, Any]:
        """Run all steps, save the checkpoint, write `report.html`, and return the run's result."""
        config, goal = self.config, "heldout_score" if self.heldout else "reward"
        try:
            with RunFolder(self.out, "ppo", self.config_yaml, config.run.trackers) as run:
                outcome = run_steps(
                    run,
                    config.steps,
                    lambda n: self.step(run, n),
                    self.optimizer,
                    Checkpoints(run, config.run, Goal(goal, higher=True), self._save),
                    identity={"prompts": digest(self.prompts + self.heldout), "policy": weights_digest(self.model)},
                    every=config.run.save_every or config.steps,
                    evaluate=self.evaluate if self.heldout else None,
                    over=self._over,
                    stateful={"kl_controller": self.kl_controller, "sampler": self.sampler},
                )
                told = [name for name in SUMMARY if name in outcome.row]
                summary = {name: outcome.row[name] for name in told} | run.before(told)
                result = run.finish({**summary, **self.fitting.summary()}, outcome.step)
            write_run_report(self.out)
            return result
        finally:
            self.reward.forget()

    def step(self, run: RunFolder, step: int) -> dict[str, float]:
        """Collect and learn; returns the step's metrics."""
        with machine.Busy(self.model.device) as busy:
            row = self._collect_and_learn(run, step)
        return row if busy.share is None else {**row, "busy": busy.share}

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores of one response to each held-out prompt, drawn by the same random numbers after any step."""
        return self.sampler.measure(self.heldout)

    def _collect_and_learn(self, run: RunFolder, step: int) -> dict[str, float]:
        limits = machine.measured(self.model.device, self.dtype)
        experience = self.collector.collect(run, step, self.kl_controller.coef, limits)
        if step == 1:
            check_start(experience.kl, self.dtype)
        started = time.monotonic()
        row = {**experience.metrics, **self._update(run, experience, step)}
        row["seconds_training"] = time.monotonic() - started
        done = self._operations(experience) * row["updates"] / self.config.minibatches
        row["training_utilisation"] = done / row["seconds_training"] / limits.product
        row["kl_coef"] = self.kl_controller.coef
        self.kl_controller.update(row["kl"], len(experience.examples))
        return row

    def _over(self, row: dict[str, float]) -> str:
        limit = self.config.max_kl
        return "" if limit is None or row["kl"] <= limit else f"kl {row['kl']:.3f} is above ppo.max_kl = {limit}"

    def _save(self, folder: Path) -> None:
        extra = {"kl_controller": self.kl_controller.state_dict()}
        models.save(folder, self.model, self.tokenizer, extra, self.critic.state_dict() if self.critic else None)

    # Updating -------------------------------------------------------------------------------------------------------

    def _update(self, run: RunFolder, experience: Experience, step: int) -> dict[str, float]:
        """Epochs of minibatches over the experience; returns the statistics averaged over all updates."""
        config = self.config
        rows: list[dict[str, float]] = []
        # Of the values at sampling time: one for the step.
        of_critic = {} if self.critic is None else {"explained_variance": explained_variance(experience)}
        for epoch in range(config.epochs):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in minibatches(experience.examples, config.minibatches, rng):
                # Of the estimators the one that is never negative.
                if config.max_update_kl is not None and rows and rows[-1]["approx_kl_k3"] > config.max_update_kl:
                    continue
                row = self._learn(run, experience, part, step)
                if step == 1 and not rows:
                    check_first_update({**row, **of_critic}, self.dtype)
                rows.append(row)
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {**mean, **of_critic, "updates": float(len(rows))}

    def _learn(self, run: RunFolder, experience: Experience, part: list[int], step: int) -> dict[str, float]:
        batch = [experience.examples[row] for row in part]
        warming = step <= self.config.critic_warmup
        return learn(run, step, batch, lambda: self._losses(experience, part, warming), self.optimizer, self.budget)

    def _losses(
        self, experience: Experience, rows: list[int], warming: bool = False
    ) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Loss and statistics of each micro-batch of a minibatch, all divided by the minibatch's tokens.

        While `warming`, the critic's part alone has a gradient, in the critic alone.
        """
        config = self.config
        examples = experience.examples
        tokens = sum(len(examples[row].response) for row in rows)
        for group in microbatches_of_examples([examples[row] for row in rows], self.budget.tokens, self.shared):
            part = [rows[i] for i in group]
            batch = pad([examples[row] for row in part], self.model.device, self.shared)
            with torch.set_grad_enabled(not warming):
                head = models.output_head(self.model)  # of this micro-batch's own graph, where it is computed
                states = models.response_states(self.model, batch)  # (R, H)
            of_critic: dict[str, Any] = {}
            if self.critic is not None:
                of_critic = {
                    "values": self.critic.values(batch, states),
                    "old_values": concatenated(experience.old_values, part),
                    "returns": concatenated(experience.returns, part),
                    "value_clip": config.value_clip,
                    "value_coef": config.value_coef,
                }
            of_lag: dict[str, Any] = {}
            if experience.rollout_logprobs:
                of_lag = {
                    "rollout_logprobs": concatenated(experience.rollout_logprobs, part),
                    "rollout_cap": config.rollout_cap,
                }
            of_kl: dict[str, Any] = {}
            if experience.ref_logprobs:
                of_kl = {
                    "ref_logprobs": concatenated(experience.ref_logprobs, part),
                    "kl_coef": self.kl_controller.coef,
                    "kl": config.kl_estimator,
                }
            loss, stats = self.loss(
                states,
                head.weight.detach() if warming else head.weight,
                batch.response_tokens,
                concatenated(experience.old_logprobs, part),
                concatenated(experience.advantages, part),
                **head.options(),
                temperature=config.temperature,
                **of_critic,
                **of_lag,
                **of_kl,
                cu_seqlens=batch.cu_seqlens,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                denominator=tokens,
                advantage_sums=experience.advantage_sums,
            )
            unused = set(STATS) - LOGGED - (OF_LAG if of_lag else set()) | (set() if self.critic else {"value_loss"})
            yield loss, {name: x for name, x in stats.items() if name not in unused}

    # Records --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _operations(self, experience: Experience) -> float:
        """Of an epoch's training, in products with weights: forward, and backward for states and trained weights. Each
        token counts once, a prompt that is read once for all its samples too."""
        prompts = {e.prompt for e in experience.examples} if self.shared else [e.prompt for e in experience.examples]
        tokens = sum(map(len, prompts)) + sum(len(e.response) for e in experience.examples)
        table = self.model.get_input_embeddings().weight  # only looked up, unless it is the head, too
        looked_up = 0 if table is models.output_head(self.model).weight else table.numel()
        weights = sum(p.numel() for p in self.model.parameters() if p.dim() == 2) - looked_up
        trained = sum(p.numel() for p in self.model.parameters() if p.dim() == 2 and p.requires_grad)
        return tokens * (4.0 * weights + 2.0 * trained)


def _require_prompts(prompts: Sequence[PromptRecord], config: PPOConfig) -> None:
    if len(prompts) < config.prompts_per_step:
        raise ValueError(f"ppo.prompts_per_step: {config.prompts_per_step}, but there are only {len(prompts)} prompts")


def explained_variance(experience: Experience) -> float:
    """How much of the returns' variance the values at sampling time explain; 0 when the returns do not vary."""
    returns, values = torch.cat(experience.returns), torch.cat(experience.old_values)
    variance = float(returns.var(correction=0))
    return 1.0 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0
