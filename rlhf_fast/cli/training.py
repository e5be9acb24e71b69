"""The verbs that train: sft, reward, dpo, ppo, and its forms grpo and rloo."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_fast.cli import inputs
from rlhf_fast.cli.told import tell
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.runs.folder import check_place


@dataclass(frozen=True)
class SFTCommand:
    """Teach a model to answer as demonstrations do."""

    data: str  # demonstrations: {"prompt", "completion"} or {"messages": [...]} a line
    out: str  # folder of the run
    heldout_data: str = ""  # demonstrations that are only measured on; empty: a share of the data, or its own splits
    model: str = "smollm2-135m"  # folder, run, hub name or smollm2-135m
    sft: SFTConfig = field(default_factory=SFTConfig)


@dataclass(frozen=True)
class RewardCommand:
    """Train a reward model on comparisons, and measure how far it agrees with held-out ones."""

    data: str  # comparisons: {"prompt", "chosen", "rejected"} a line, .gz too
    out: str  # folder of the run
    heldout_data: str = ""  # comparisons that are only measured on; empty: a share of the data, or its own splits
    model: str = "smollm2-135m"  # the policy to start from
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True)
class DPOCommand:
    """Fit a policy to comparisons directly, without a reward model."""

    data: str  # comparisons: {"prompt", "chosen", "rejected"} a line, .gz too
    out: str  # folder of the run
    heldout_data: str = ""  # comparisons that are only measured on; empty: a share of the data, or its own splits
    model: str = "smollm2-135m"  # the policy to start from, and the reference
    dpo: DPOConfig = field(default_factory=DPOConfig)


@dataclass(frozen=True)
class PPOCommand:
    """Improve a policy by rewards, kept near its start by a KL penalty."""

    policy: str  # the policy to start from, and the reference
    reward: str  # a reward model's run, rule:NAME, FILE.py:function, a URL, or a list "1*runs/reward, 0.5*rule:math"
    prompts: str  # {"prompt"} a line, with further columns for rules, functions and URLs
    out: str  # folder of the run
    heldout_data: str = ""  # prompts that are only measured on, before and after, as are those of another split
    ppo: PPOConfig = field(default_factory=PPOConfig)


@dataclass(frozen=True)
class GRPOCommand(PPOCommand):
    """PPO without a critic: answers to a prompt are compared with each other (GRPO, arXiv 2402.03300).

    The settings are those of `rlhf-fast ppo`, with ppo.advantage grpo or dr_grpo (arXiv 2503.20783).
    """

    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(advantage="grpo"))

    def __post_init__(self) -> None:
        _require_advantage(self.ppo, "grpo", "dr_grpo")


@dataclass(frozen=True)
class RLOOCommand(PPOCommand):
    """PPO without a critic: an answer is compared with the mean of the prompt's others (arXiv 2402.14740).

    The settings are those of `rlhf-fast ppo`, with ppo.advantage rloo.
    """

    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(advantage="rloo"))

    def __post_init__(self) -> None:
        _require_advantage(self.ppo, "rloo")


def _require_advantage(config: PPOConfig, *allowed: str) -> None:
    """Raise ValueError where a setting, or a run's config.yaml, says something else than the verb."""
    if config.advantage not in allowed:
        raise ValueError(
            f"ppo.advantage: {config.advantage!r}; the verb {allowed[0]} is for {' or '.join(map(repr, allowed))}; "
            "rlhf-fast ppo takes any"
        )


# Heavy imports happen inside the verbs, so that --help and errors in settings come at once.


def sft(command: SFTCommand) -> None:
    inputs.check(file=_files(command), model={"model": command.model})
    check_place(command.out, "sft", command.sft.run.trackers)
    from rlhf_fast.trainers.sft import SFTTrainer

    heldout = command.heldout_data or None
    trainer = SFTTrainer(command.model, command.data, command.out, command.sft, heldout)
    tell(trainer.train(), command.out, f"rlhf-fast generate --model {command.out}")


def reward(command: RewardCommand) -> None:
    inputs.check(file=_files(command), model={"model": command.model})
    check_place(command.out, "reward", command.reward.run.trackers)
    from rlhf_fast.trainers.reward import RewardTrainer

    heldout = command.heldout_data or None
    trainer = RewardTrainer(command.model, command.data, command.out, command.reward, heldout)
    improve = f"rlhf-fast ppo --policy {command.model} --reward {command.out} --prompts FILE --out runs/ppo"
    tell(trainer.train(), command.out, improve)


def dpo(command: DPOCommand) -> None:
    inputs.check(file=_files(command), model={"model": command.model})
    check_place(command.out, "dpo", command.dpo.run.trackers)
    from rlhf_fast.trainers.dpo import DPOTrainer

    heldout = command.heldout_data or None
    trainer = DPOTrainer(command.model, command.data, command.out, command.dpo, heldout)
    tell(trainer.train(), command.out, _compare(command.out, command.model))


def ppo(command: PPOCommand) -> None:
    files = {"prompts": command.prompts, "heldout_data": command.heldout_data}
    inputs.check({"policy": command.policy}, _given(files), {"reward": command.reward})
    check_place(command.out, "ppo", command.ppo.run.trackers)
    from rlhf_fast.trainers.ppo.trainer import PPOTrainer

    heldout = command.heldout_data or None
    trainer = PPOTrainer(
        command.policy, command.reward, command.prompts, command.out, command.ppo, heldout_data=heldout
    )
    tell(trainer.train(), command.out, _compare(command.out, command.policy))


def _files(command: SFTCommand | RewardCommand | DPOCommand) -> dict[str, str]:
    return _given({"data": command.data, "heldout_data": command.heldout_data})


def _given(files: dict[str, str]) -> dict[str, str]:
    return {setting: name for setting, name in files.items() if name}


def _compare(out: str, start: str) -> str:
    return f"rlhf-fast evaluate --candidate {out} --baseline {start} --prompts FILE --judge REWARD --out runs/compared"
