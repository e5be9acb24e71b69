"""The settings of PPO and its relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.config.common import LoRAConfig, OptimConfig, RunConfig, check, check_date
from rlhf_fast.config.settings import Settings


@dataclass(frozen=True)
class PPOConfig(Settings):
    """PPO with a per-token KL penalty to the frozen start (arXiv 1707.06347, 2203.02155)."""

    steps: int = 50  # rounds of sampling and learning
    prompts_per_step: int = 16
    samples_per_prompt: int = 4
    max_new_tokens: int = 128  # tokens; a response that has not ended by then is cut off
    stop_token_ids: tuple[int, ...] = ()  # tokens that end a response besides the tokenizer's end token: 13,198
    temperature: float = 1.0  # divides the logits, in sampling and in training alike
    epochs: int = 2  # passes over the samples of a step
    minibatches: int = 4  # optimiser steps an epoch
    kl_coef: float = 0.05  # weight of the KL penalty: reward lost for each nat of KL
    kl_target: float | None = None  # nats a sequence; when set, kl_coef adapts towards it (arXiv 1909.08593)
    kl_horizon: float = 10_000.0  # sequences
    max_kl: float | None = None  # nats a sequence; a step whose samples are further from the reference ends the run
    max_update_kl: float | None = None  # nats a token; a step ends its updates when they have moved the policy further
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "remax"] = "gae"  # only gae has a critic
    kl_in: Literal["loss", "reward"] | None = None  # where the KL penalty is; none: where the advantage's paper has it
    scale: Literal["group", "batch", "none"] | None = None  # deviation of scores that grpo, dr_grpo, rloo divide by
    resample: int = 0  # times that prompts whose responses all score alike are replaced by others in a step (DAPO)
    critic: Literal["shared", "separate", "reward"] = "shared"  # policy with a head, own model, or reward model
    critic_warmup: int = 0  # how many of the first steps only the critic learns in
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # of generalised advantage estimation (arXiv 1506.02438)
    ratio: Literal["token", "sequence"] = "token"  # of probabilities: each token's, or one for a response (GSPO)
    objective: Literal["clip", "cispo", "sapo"] = "clip"  # cispo keeps clipped tokens' gradient, sapo lets it fade
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum_mean", "longest_mean"] = "token_mean"  # of losses
    clip_low: float = 0.2  # the probability ratio is clipped at 1 - clip_low
    clip_high: float = 0.2  # and at 1 + clip_high
    tau_pos: float = 1.0  # how fast sapo's gradient fades as the ratio leaves 1, where the advantage is positive
    tau_neg: float = 1.05  # and where it is not
    dual_clip: float | None = None  # most that a ratio counts where the advantage is negative (arXiv 1912.09729)
    value_clip: float = 0.2  # most that a value may move from the sampled one in a step
    value_coef: float = 0.1  # weight of the value loss
    whiten_rewards: bool = False  # scale a step's rewards to deviation 1
    reward_clip: float = math.inf  # scores are limited to between -reward_clip and reward_clip
    missing_eos: Literal["subtract", "replace"] = "subtract"  # what the penalty does: score - penalty, or -penalty
    missing_eos_penalty: float = 1.0  # for a response cut off by max_new_tokens
    min_reward_agreement: float = 0.6  # held-out agreement below which PPO refuses to start
    reward_timeout: float | None = 300.0  # seconds for a call of a reward function or URL; none: no limit
    reward_retries: int = 2  # how often a failed call is made again, after longer and longer pauses
    reward_batch: int | None = None  # responses in a call of a URL or async function, made as they end; none: all
    lag: int = 0  # 1: sample a step ahead, so that scores come while the policy learns, with an older policy's samples
    rollout_cap: float = 2.0  # most that a token of an older policy's samples weighs
    cuda_graphs: bool = False  # launch a step of sampling at once on a GPU; its keys and values stay while training
    max_length: int = 1024  # tokens of prompt and response
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of prompts that leave no room for these
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of all models; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, schedule="constant", warmup=0.0))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_date(self.date)
        check(self, count="steps prompts_per_step samples_per_prompt max_new_tokens epochs minibatches max_length")
        check(self, count="reward_batch")
        check(
            self,
            positive="tau_pos tau_neg temperature kl_target kl_horizon max_kl max_update_kl reward_timeout rollout_cap",
        )
        check(self, not_negative="kl_coef value_coef missing_eos_penalty critic_warmup reward_retries resample seed")
        check(self, limit="clip_low clip_high value_clip reward_clip", share="gamma lam min_reward_agreement")
        check(self, above_one="dual_clip")
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(
                f"dual_clip: {self.dual_clip}; expected none with objective {self.objective!r}, which bounds ratios "
                "itself"
            )
        if self.objective != "sapo" and (self.tau_pos, self.tau_neg) != (PPOConfig.tau_pos, PPOConfig.tau_neg):
            raise ValueError(
                f"tau_pos, tau_neg: {self.tau_pos:g}, {self.tau_neg:g}; expected none of them set with objective "
                f"{self.objective!r}, as only 'sapo' reads them"
            )
        if self.lag not in (0, 1):
            raise ValueError(f"lag: {self.lag}; expected 0 or 1")
        if self.critic_warmup and self.advantage != "gae":
            raise ValueError(
                f"critic_warmup: {self.critic_warmup}; expected 0, as advantage {self.advantage!r} has no critic"
            )
        if self.advantage not in ("gae", "remax") and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt}; expected at least 2 for advantage {self.advantage!r}, "
                "which compares the responses of a prompt"
            )
        if self.scale is not None and self.advantage not in ("grpo", "dr_grpo", "rloo"):
            raise ValueError(f"scale: {self.scale!r}; expected none, as advantage {self.advantage!r} has its own")
        if self.resample and self.advantage in ("gae", "remax"):
            raise ValueError(
                f"resample: {self.resample}; expected 0, as equal scores do say something to advantage "
                f"{self.advantage!r}"
            )
        if self.resample and self.lag:
            raise ValueError(
                f"resample: {self.resample} with lag: {self.lag}; expected one of them to be 0, as who is sampled "
                "again hangs on scores, which are still on their way"
            )
        sequences = self.prompts_per_step * self.samples_per_prompt
        if self.minibatches > sequences:
            raise ValueError(f"minibatches: {self.minibatches}; expected at most the {sequences} sequences of a step")

    @property
    def kl_estimator(self) -> str | None:
        """Name the estimator of the loss's KL penalty, that of the advantage's paper; None: it is in the reward."""
        in_papers = {"grpo": "k3", "dr_grpo": "k3", "reinforce++": "k2"}
        return None if self.kl_in == "reward" else in_papers.get(self.advantage, "k3" if self.kl_in else None)
