"""Every setting, as frozen dataclasses with their ranges. Knows nothing of models or training.

A setting has one name everywhere: `ppo.kl_coef` is `--ppo.kl_coef 0.1` on the command line, `ppo: {kl_coef: 0.1}` in
YAML and `PPOConfig(kl_coef=0.1)` in Python. settings.py turns the first two into the third.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf_fast.settings import Settings

# What a setting may be, by the words of `_check`; NaN is in no range, and only a limit may be infinite.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "count": ("at least 1", lambda value: 1 <= value < math.inf),
    "not_negative": ("at least 0", lambda value: 0 <= value < math.inf),
    "positive": ("more than 0", lambda value: 0 < value < math.inf),
    "limit": ("at least 0; inf is no limit", lambda value: value >= 0),
    "positive_limit": ("more than 0; inf is no limit", lambda value: value > 0),
    "share": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "part": ("at least 0 and less than 1", lambda value: 0 <= value < 1),
    "below_half": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "several": ("at least 2", lambda value: 2 <= value < math.inf),
}


def _check(config: Any, **settings: str) -> None:
    """Raise ValueError for a setting out of its range: `_check(self, count="epochs batch_size", part="heldout")`."""
    for kind, names in settings.items():
        expected, holds = _RANGES[kind]
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}: {value}; expected {expected}")


def _check_date(date: str | None) -> None:
    try:
        datetime.date.fromisoformat(date or "2026-01-01")
    except ValueError as error:
        raise ValueError(f"date: {date!r}; expected a day such as 2026-01-31") from error


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adapters (arXiv 2106.09685) on linear layers; `r=0` trains all weights."""

    r: int = 16  # rank; 0: no adapter, all weights are trained
    alpha: float = 32.0  # the adapter's output is multiplied by alpha / r
    targets: tuple[str, ...] = ()  # names of the layers: q_proj,v_proj; none: every linear layer but the head

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, not_negative="r", positive="alpha")


@dataclass(frozen=True)
class OptimConfig(Settings):
    """AdamW with gradient clipping, linear warm-up and a schedule. The micro-batch never changes the gradient."""

    lr: float = 2e-4  # learning rate after warm-up
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # of the learning rate after warm-up
    warmup: float = 0.05  # share of all steps
    weight_decay: float = 0.0  # decoupled: each step takes lr * weight_decay of a weight away
    adam_eps: float = 1e-5  # PPO diverges less than with 1e-8 (arXiv 2403.17031)
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it; inf: none is
    max_tokens_per_microbatch: int = 1024  # padded tokens on the device at once; halved where memory is short
    checkpointing: bool = False  # compute activations again for the gradient: less memory, a third more time
    max_skipped: int = 3  # steps in a row that are skipped because loss or gradient is not finite; then it stops

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, not_negative="weight_decay max_skipped", share="warmup", positive="lr adam_eps")
        _check(self, positive_limit="max_grad_norm", count="max_tokens_per_microbatch")


@dataclass(frozen=True)
class RunConfig(Settings):
    """What a run keeps, and where else it is shown."""

    save_every: int = 0  # steps from one evaluation and checkpoint to the next; 0: evaluate each epoch, save at the end
    keep_last: int = 2  # checkpoints that are kept beside the best
    trackers: tuple[str, ...] = ()  # of tensorboard, wandb and trackio: tensorboard,wandb

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, not_negative="save_every", count="keep_last")
        if unknown := [name for name in self.trackers if name not in ("tensorboard", "wandb", "trackio")]:
            raise ValueError(f"trackers: {unknown[0]!r}; expected some of tensorboard, wandb and trackio")


@dataclass(frozen=True)
class SFTConfig(Settings):
    """Supervised fine-tuning on demonstrations: cross-entropy on the answers only, their ends included."""

    epochs: int = 2  # passes over the demonstrations
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 8  # demonstrations an optimiser step
    heldout: float = 0.1  # share of the demonstrations kept for measuring, unless rows have a split; 0: none
    turns: Literal["all", "last"] = "all"  # which of the assistant's turns in a conversation are learned
    packing: bool = True  # several demonstrations in a row without padding, none seeing another; only speed differs
    samples: int = 4  # held-out prompts answered greedily at each evaluation, into samples.jsonl; 0: none
    sample_tokens: int = 48  # tokens of such an answer at most
    patience: int | None = None  # evaluations without a lower loss until it ends with its best checkpoint
    max_length: int = 1024  # tokens of a demonstration
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of longer ones, which are counted
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_date(self.date)
        _check(self, count="epochs max_steps batch_size max_length sample_tokens patience", part="heldout")
        _check(self, not_negative="samples seed")


@dataclass(frozen=True)
class RewardConfig(Settings):
    """A Bradley-Terry reward model: a scalar head, or several, at the last token of prompt and response."""

    epochs: int = 1  # passes over the comparisons
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 16  # comparisons an optimiser step
    heldout: float = 0.125  # share of the prompts kept for measuring agreement, unless rows have a split; 0: none
    center_coef: float = 0.01  # weight of (chosen + rejected)^2, which keeps scores near zero
    heads: int = 1  # scores of each response, every head trained on its own resample of the prompts
    lcb: float = 1.0  # the score is the heads' mean less this many of their deviations (arXiv 2310.02743)
    normalize_samples: int = 0  # answers sampled to each held-out prompt to scale scores by; 0: those compared
    max_new_tokens: int = 128  # tokens of such an answer
    patience: int | None = None  # evaluations without higher agreement until it ends with its best checkpoint
    max_length: int = 1024  # tokens of prompt and response
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of longer ones, which are counted
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_date(self.date)
        _check(self, count="epochs max_steps batch_size heads max_new_tokens max_length patience", part="heldout")
        _check(self, not_negative="center_coef lcb normalize_samples seed")


@dataclass(frozen=True)
class DPOConfig(Settings):
    """Direct preference optimisation (arXiv 2305.18290), from the same comparisons as the reward model."""

    epochs: int = 1  # passes over the comparisons
    max_steps: int | None = None  # optimiser steps at most; none: those of all epochs
    batch_size: int = 16  # comparisons an optimiser step
    heldout: float = 0.125  # share of the prompts kept for measuring, unless rows have a split; 0: none
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"  # ops.dpo_loss says what each is
    beta: float = 0.1  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # share of comparisons presumed to be the wrong way round
    patience: int | None = None  # evaluations without a lower loss until it ends with its best checkpoint
    max_length: int = 1024  # tokens of prompt and response
    overlong: Literal["error", "truncate", "drop"] = "error"  # what becomes of longer ones, which are counted
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    date: str | None = None  # the day that a template is told which asks for it; none: that of the run's start
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model; what is trained is kept in float32
    seed: int = 0
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_date(self.date)
        _check(self, count="epochs max_steps batch_size max_length patience", part="heldout", positive="beta")
        _check(self, below_half="label_smoothing", not_negative="seed")


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
    clip_low: float = 0.2  # the probability ratio is clipped at 1 - clip_low
    clip_high: float = 0.2  # and at 1 + clip_high
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
        _check_date(self.date)
        _check(self, count="steps prompts_per_step samples_per_prompt max_new_tokens epochs minibatches max_length")
        _check(self, count="reward_batch")
        _check(self, positive="temperature kl_target kl_horizon max_kl max_update_kl reward_timeout rollout_cap")
        _check(self, not_negative="kl_coef value_coef missing_eos_penalty critic_warmup reward_retries resample seed")
        _check(self, limit="clip_low clip_high value_clip reward_clip", share="gamma lam min_reward_agreement")
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
        """Of the KL penalty as a term of the loss: that of the advantage's paper. None: it is in the reward."""
        in_papers = {"grpo": "k3", "dr_grpo": "k3", "reinforce++": "k2"}
        return None if self.kl_in == "reward" else in_papers.get(self.advantage, "k3" if self.kl_in else None)


@dataclass(frozen=True)
class AnnotatorConfig(Settings):
    """The simulated annotator: a written rule in place of people, so that the loop runs unattended."""

    error_rate: float = 0.05  # share of comparisons answered the wrong way round
    tie_margin: float = 0.05  # replies whose scores (0 to 1) are this near are a tie, which is left out
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, below_half="error_rate", share="tie_margin")


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Win rate of one checkpoint against another on held-out prompts."""

    samples_per_prompt: int = 2
    max_new_tokens: int = 128  # tokens; a response that has not ended by then is cut off
    temperature: float = 1.0  # 0.0 takes the likeliest token
    tie_margin: float = 0.0  # replies whose scores are this near, in the judge's unit, are a tie
    chat_template: str | None = None  # chatml, plain or the file of a Jinja template; none: the model's own
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # what it reads besides messages: enable_thinking
    parse_special_tokens: bool = False  # special tokens that are spelled out in messages become tokens
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, count="samples_per_prompt max_new_tokens", not_negative="temperature tie_margin seed")


@dataclass(frozen=True)
class ComparisonsConfig(Settings):
    """How many responses are sampled for comparison, and by which annotator they are compared."""

    prompts: int = 0  # 0: every training prompt
    samples_per_prompt: int = 4  # every pair among them is compared
    max_new_tokens: int = 128  # tokens; a response that has not ended by then is cut off
    temperature: float = 1.0
    seed: int = 0
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, not_negative="prompts seed", several="samples_per_prompt", count="max_new_tokens")
        _check(self, positive="temperature")  # at 0 all replies to a prompt are the same


@dataclass(frozen=True)
class DemoConfig(Settings):
    """The demo: an assistant for an agency's client messages, from SmolLM2-135M to a policy trained by PPO."""

    out: str = "runs/demo"  # folder of the run
    tiny: bool = False  # a random model over bytes, in under a minute
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(optim=OptimConfig(lr=5e-4)))
    comparisons: ComparisonsConfig = field(default_factory=lambda: ComparisonsConfig(prompts=96, max_new_tokens=72))
    reward: RewardConfig = field(
        default_factory=lambda: RewardConfig(batch_size=8, heldout=0.2, optim=OptimConfig(lr=3e-4))
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=6,
            prompts_per_step=8,
            max_new_tokens=72,
            epochs=1,
            optim=OptimConfig(lr=5e-4, schedule="constant", warmup=0.0),
        )
    )
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(max_new_tokens=72))


def tiny_demo() -> DemoConfig:
    """The same phases on a random model of 0.1 million weights: it learns little, but it runs everything."""
    optim = OptimConfig(lr=3e-3, max_tokens_per_microbatch=8192)
    lora = LoRAConfig(r=4, alpha=8.0)
    return DemoConfig(
        tiny=True,
        model="random",
        sft=SFTConfig(epochs=3, lora=LoRAConfig(r=0), optim=optim),
        comparisons=ComparisonsConfig(prompts=24, max_new_tokens=48, annotator=AnnotatorConfig(tie_margin=0.0)),
        reward=RewardConfig(lora=lora, optim=optim),
        ppo=PPOConfig(
            steps=3,
            prompts_per_step=8,
            minibatches=2,
            max_new_tokens=48,
            min_reward_agreement=0.0,  # a random model learns no preferences worth the name
            lora=lora,
            optim=replace(optim, lr=1e-3, schedule="constant", warmup=0.0),
        ),
        evaluation=EvaluationConfig(samples_per_prompt=1, max_new_tokens=48),
    )
