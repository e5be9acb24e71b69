"""What a run of a trainer did with its settings, seen from outside: what the model read, what torch's optimiser, the
sampler and the ops were given, and what files it left."""

from __future__ import annotations

import json
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.models.inner import trunk
from rlhf_fast.rollout.generator import Generator
from rlhf_fast.rollout.sampling import SamplingParams
from rlhf_fast.trainers.dpo import DPOTrainer
from rlhf_fast.trainers.ppo.advantages import ADVANTAGES, Advantages, Scored
from rlhf_fast.trainers.ppo.experience import Experience
from rlhf_fast.trainers.ppo.trainer import PPOTrainer
from rlhf_fast.trainers.reward import RewardTrainer
from rlhf_fast.trainers.sft import SFTTrainer
from tests.unit.trainers.conftest import Update, recorded_updates


class _Collected(Exception):
    """Ends a step before its first update, with what that would learn from."""


def collect(trainer: PPOTrainer, step: int = 1, kl_coef: float | None = None) -> Experience:
    """What a step of PPO learns from: the step itself, up to its first update, from any policy."""

    def update(run: Any, experience: Experience, rows: list[int], step: int) -> None:
        raise _Collected(experience)

    run = types.SimpleNamespace(samples=lambda step, rows: None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Collected) as found:
        patch.setattr(trainer, "update", update)
        patch.setattr("rlhf_fast.trainers.ppo.trainer.check_start", lambda kl, dtype: None)
        if kl_coef is not None:
            patch.setattr(trainer.kl_controller, "coef", kl_coef)
        trainer.step(run, step)  # type: ignore[arg-type]
    experience: Experience = found.value.args[0]
    return experience


CONFIGS: dict[str, Any] = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig}


@dataclass
class Call:
    """Of an op, or of the loss."""

    inputs: tuple[torch.Tensor, ...]
    words: dict[str, Any]
    stats: dict[str, torch.Tensor]


@dataclass
class Seen:
    out: Path
    config: Any
    trainer: Any = None
    result: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None
    updates: list[Update] = field(default_factory=list)
    read: list[torch.Tensor] = field(default_factory=list)  # token ids (rows, T) of each forward pass with a gradient
    layers: int = 0  # how often the first layer was computed in these, once more for recomputed activations
    losses: list[Call] = field(default_factory=list)  # of ops.reward_loss, ops.dpo_loss and PPO's loss
    sampled: list[tuple[Any, Any]] = field(default_factory=list)  # parameters and rollouts of each generation
    scored: list[tuple[Scored, float, Advantages]] = field(default_factory=list)  # what PPO's advantages are made of
    tracked: list[dict[str, Any]] = field(default_factory=list)  # rows that a tracker was given
    rewarded: list[tuple[list[Any], list[str], list[float]]] = field(default_factory=list)  # calls of the reward

    def rows(self, name: str = "metrics") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / f"{name}.jsonl").read_text().splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The metrics of each step of the optimiser, or of PPO."""
        return [row for row in self.rows() if "lr" in row]

    @property
    def texts(self) -> list[str]:
        """What the model read in training, special tokens written out."""
        return [self.trainer.tokenizer.decode(row) for ids in self.read for row in ids]

    @property
    def checkpoints(self) -> list[int]:
        return sorted(int(folder.name.removeprefix("step-")) for folder in (self.out / "checkpoints").iterdir())

    def learned_from(self, step: int) -> Counter[tuple[int, ...]]:
        """How often PPO's loss was given each response of a step."""
        found: Counter[tuple[int, ...]] = Counter()
        each = len(self.losses) // len(self.steps)
        for call in self.losses[step * each : (step + 1) * each]:
            parts = call.inputs[2].split(call.words["cu_seqlens"].diff().tolist())
            found.update(tuple(part.tolist()) for part in parts)
        return found


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def run(
    method: str,
    folder: Path,
    out: Path,
    data: Any,
    reward: Any = length,
    spoil: bool = False,
    **options: Any,
) -> Seen:
    """Train, and say what was seen of it. `spoil`: after one step no gradient is a number."""
    seen = Seen(out, CONFIGS[method](**options))
    with pytest.MonkeyPatch.context() as patch, recorded_updates() as seen.updates:
        for name in ("reward_loss", "dpo_loss"):
            patch.setattr(ops, name, _recorded(getattr(ops, name), seen.losses))
        generate = Generator.generate

        def generated(own: Generator, prompts: Any, params: Any = None, *more: Any, **words: Any) -> Any:
            seen.sampled.append((params, generate(own, prompts, params or SamplingParams(), *more, **words)))
            return seen.sampled[-1][1]

        patch.setattr(Generator, "generate", generated)
        try:
            seen.trainer = trainer = _make(method, folder, data, reward, seen)
            _watch(trainer.model, seen, spoil)
            seen.result = trainer.train()
        except Exception as error:
            seen.error = error
    return seen


def _make(method: str, folder: Path, data: Any, reward: Any, seen: Seen) -> Any:
    if method == "sft":
        return SFTTrainer(folder, data, seen.out, seen.config)
    if method == "reward":
        return RewardTrainer(folder, data, seen.out, seen.config)
    if method == "dpo":
        return DPOTrainer(folder, data, seen.out, seen.config)

    def advantage(scored: Scored, kl_coef: float, config: PPOConfig) -> Advantages:
        found = ADVANTAGES[config.advantage](scored, kl_coef, config)
        seen.scored.append((scored, kl_coef, found))
        return found

    def rewarded(prompts: list[Any], responses: list[str]) -> list[float]:
        scores = reward(prompts, responses)
        seen.rewarded.append((prompts, responses, scores))
        return list(scores)

    loss = _recorded(ops.linear_ppo_loss, seen.losses)
    return PPOTrainer(folder, rewarded, data, seen.out, seen.config, advantage=advantage, loss=loss)


def _recorded(op: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    def call(*inputs: Any, **words: Any) -> Any:
        loss, stats = op(*inputs, **words)
        calls.append(Call(inputs, words, stats))
        return loss, stats

    return call


def _watch(model: Any, seen: Seen, spoil: bool) -> None:
    """Record what the model reads and computes with a gradient."""
    inner = unwrapped(model)

    def embedded(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        seen.read.append(inputs[0])
        return output * torch.nan if spoil and seen.updates else None

    def computed(*_: Any) -> None:
        seen.layers += torch.is_grad_enabled()

    inner.get_input_embeddings().register_forward_hook(embedded)
    trunk(inner).layers[0].mlp.register_forward_pre_hook(computed)
