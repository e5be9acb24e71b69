"""PPO on a language model: sample, score, estimate advantages, and improve the policy within a clipped ratio. With
advantages of a prompt's responses against each other (GRPO, RLOO and their like) the same without a critic.

`PPOTrainer.step` is the algorithm. Its objects: `sampler` (sampler.py) draws responses, `scorer` (experience.py) finds
their log-probabilities and rewards, `advantage` (advantages.py) weighs tokens, and `update` is one optimiser step on
the clipped loss. Policy, reference and critic share the weights that nobody trains (build.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_fast import models, ops
from rlhf_fast.config import PPOConfig, settings
from rlhf_fast.data.batches import microbatches_of_examples, pad
from rlhf_fast.models.token_budget import TokenBudget
from rlhf_fast.ops.ppo_loss import STATS
from rlhf_fast.pages.run_report import write_run_report
from rlhf_fast.rewards import names as reward_names
from rlhf_fast.rewards.model import Reward
from rlhf_fast.runs.folder import RunFolder
from rlhf_fast.trainers.loop.chat_settings import use_settings
from rlhf_fast.trainers.loop.checkpoints import Checkpoints, Goal
from rlhf_fast.trainers.loop.lengths import fitting_for
from rlhf_fast.trainers.loop.monitor import Monitor
from rlhf_fast.trainers.loop.optimizer import Optimizer
from rlhf_fast.trainers.loop.preflight import begin
from rlhf_fast.trainers.loop.state import Data, weights_digest
from rlhf_fast.trainers.loop.steps import Row, Stats, learn, run_steps
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES, AdvantageFunction, traits_of
from rlhf_fast.trainers.ppo.build import (
    Prompts,
    make_models,
    make_reward,
    read_prompt_splits,
    require_prompts,
    reward_tokenizers,
)
from rlhf_fast.trainers.ppo.checks import KLLimit, check_first_update, check_start
from rlhf_fast.trainers.ppo.critic import critic_of_checkpoint
from rlhf_fast.trainers.ppo.experience import Experience, Scorer, minibatches, scored_tokens
from rlhf_fast.trainers.ppo.kl_controller import KLController
from rlhf_fast.trainers.ppo.loss import Divisor, Loss, batch_loss
from rlhf_fast.trainers.ppo.metrics import SampleMetrics, StepMeter, critic_metrics, mean, operations
from rlhf_fast.trainers.ppo.sampler import Sampler

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
        monitors: are asked after every step (trainers/loop/monitor.py).
    """

    def __init__(
        self,
        policy: str | Path,
        reward: Reward,
        prompts: Prompts,
        out: str | Path = "runs/ppo",
        config: PPOConfig | dict[str, Any] | None = None,
        advantage: AdvantageFunction | None = None,
        loss: Loss = ops.linear_ppo_loss,
        heldout_data: Prompts | None = None,
        monitors: Sequence[Monitor] = (),
    ) -> None:
        own_loss = None if loss is ops.linear_ppo_loss else loss
        config, inputs = begin(
            "ppo", PPOConfig, config, monitors, policy=policy, reward=reward, prompts=prompts, out=out,
            advantage=advantage, loss=own_loss, heldout_data=heldout_data,
        )  # fmt: skip
        self.monitors = monitors
        learned, heldout = read_prompt_splits(prompts, heldout_data)
        require_prompts(learned, config)
        if isinstance(reward, str | Path):
            reward_names.check(str(reward))
        self.dtype = getattr(torch, config.dtype)
        loaded, self.tokenizer = models.load(policy, self.dtype)
        config = use_settings(config, "ppo", out, self.tokenizer)
        self.fitting = fitting_for(loaded, self.tokenizer, config, "ppo")
        self.prompts = self.fitting.prompts(learned, config.max_new_tokens)
        self.heldout = self.fitting.prompts(heldout, config.max_new_tokens)
        self.fitting.done()
        require_prompts(self.prompts, config)
        self.reward = make_reward(reward, config)
        self.config = config = use_settings(config, "ppo", out, self.tokenizer, reward_tokenizers(self.reward))
        self.reward.check([*self.prompts, *self.heldout])
        self.advantage, self.loss = advantage or ADVANTAGES[config.advantage], loss
        self.traits = traits_of(self.advantage, config)
        made = make_models(
            loaded, config, self.traits.needs_critic, lambda: critic_of_checkpoint(reward, self.tokenizer, config)
        )
        self.model, self.reference, self.critic = made
        self.shared = models.longest_shared(self.model)  # as in `pad`: samples that share a row with their prompt
        self.budget = TokenBudget(config.optim.max_tokens_per_microbatch)
        # Values as a by-product of sampling, where they are a head's on the policy's states.
        value_head = self.critic.head if self.critic is not None and self.critic.model is None else None
        self.sampler = Sampler(
            self.model, self.tokenizer, self.reward, self.prompts, config, value_head, self.traits.needs_greedy
        )
        self.scorer = Scorer(self.model, self.reference, self.critic, config, self.budget, self.shared)
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
                    identity={"prompts": Data(self.prompts + self.heldout), "policy": weights_digest(self.model)},
                    every=config.run.save_every or config.steps,
                    evaluate=self.evaluate if self.heldout else None,
                    monitors=self.monitors if config.max_kl is None else [KLLimit(config.max_kl), *self.monitors],
                    stateful={"kl_controller": self.kl_controller, "sampler": self.sampler},
                )
                told = [name for name in SUMMARY if name in outcome.row]
                summary = {name: outcome.row[name] for name in told} | run.before(told)
                result = run.finish({**summary, **self.fitting.summary()}, outcome.step)
            write_run_report(self.out)
            return result
        finally:
            self.reward.forget()

    def step(self, run: RunFolder, step: int) -> Row:
        """Take one step of PPO (arXiv 1707.06347, algorithm 1); return its metrics."""
        config, kl_coef = self.config, self.kl_controller.coef
        updates: list[Row] = []
        with StepMeter(self.model.device, self.dtype) as meter:
            samples, lag = self.sampler.take(step)  # responses of the policy as it was `lag` updates ago
            meter.lap("rollout")
            policy = self.scorer.of_policy(samples, lag)  # log-probabilities, entropies and values
            reference = self.scorer.of_reference(samples)  # log-probabilities
            rewards = self.scorer.rewards(samples)  # waits for scores that are on their way
            scored = scored_tokens(samples, policy, reference, rewards)
            advantages = self.advantage(scored, 0.0 if config.kl_estimator else kl_coef, config)
            experience = Experience.of(samples, policy, reference, advantages, config)
            figures = SampleMetrics(samples, lag, policy, reference, scored, rewards)
            run.samples(step, figures.shown())
            meter.lap("scoring")
            if step == 1:
                check_start(scored.kl, self.dtype)
            for epoch in range(config.epochs):
                rng = np.random.default_rng((config.seed, step, epoch))
                for part in minibatches(experience.examples, config.minibatches, rng):
                    if not self._moved_enough(updates):
                        updates.append(self.update(run, experience, part, step))
            meter.lap("training")
        row = figures.row(kl_coef, config, self.traits.compares_samples)
        self.kl_controller.update(row["kl"], len(samples.examples))
        done = operations(self.model, samples.examples, bool(self.shared)) * len(updates) / config.minibatches
        return {**meter.row(samples, row, mean(updates, experience), done), "kl_coef": kl_coef, **meter.busy}

    def update(self, run: RunFolder, experience: Experience, rows: list[int], step: int) -> Row:
        """Take one optimiser step on the clipped loss of a minibatch, these rows of a step's experience; return its
        statistics."""
        batch = [experience.examples[row] for row in rows]
        critic_only = step <= self.config.critic_warmup
        row = learn(run, step, batch, lambda: self._losses(experience, rows, critic_only), self.optimizer, self.budget)
        if self.optimizer.steps == 1:
            check_first_update({**row, **critic_metrics(experience)}, self.dtype)
        return row

    def evaluate(self, step: int) -> Row:
        """Score one response to each held-out prompt, sampled with the same random numbers after any step."""
        return self.sampler.measure(self.heldout)

    def _moved_enough(self, updates: list[Row]) -> bool:
        """Return whether a step's updates have moved the policy as far as they may, by the estimator that is never
        negative."""
        limit = self.config.max_update_kl
        return limit is not None and bool(updates) and updates[-1]["approx_kl_k3"] > limit

    def _losses(
        self, experience: Experience, rows: list[int], critic_only: bool = False
    ) -> Iterator[tuple[torch.Tensor, Stats]]:
        """Yield loss and statistics of each micro-batch of a minibatch, all with the minibatch's divisor.

        With `critic_only` (critic warm-up) only the value loss has a gradient, and only in the critic's own weights.
        """
        examples = experience.examples
        divisor = Divisor.of(self.config, [len(examples[row].response) for row in rows])
        logged = LOGGED | (OF_LAG if experience.rollout_logprobs else set())
        logged = logged | ({"dual_clip_fraction"} if self.config.dual_clip else set())
        logged = logged - (set() if self.critic else {"value_loss"})
        for group in microbatches_of_examples([examples[row] for row in rows], self.budget.tokens, self.shared):
            part = [rows[i] for i in group]
            batch = pad([examples[row] for row in part], self.model.device, self.shared)
            loss, stats = batch_loss(
                self.config,
                self.model,
                self.critic,
                batch,
                experience.of_rows(part),
                denominator=divisor.denominator,
                kl_coef=self.kl_controller.coef,
                advantage_sums=experience.advantage_sums,
                critic_only=critic_only,
                function=self.loss,
            )
            stats = divisor.rescale(stats, self.config, len(batch.response_tokens))
            yield loss, {name: x for name, x in stats.items() if name in logged or name not in STATS}

    def _save(self, folder: Path) -> None:
        extra = {"kl_controller": self.kl_controller.state_dict()}
        models.save(folder, self.model, self.tokenizer, extra, self.critic.state_dict() if self.critic else None)
