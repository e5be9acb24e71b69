"""Forecast of a run from its settings file, before it begins: the memory of each phase, the settings to change if that
does not fit, and the hours of each phase. `rlhf-fast doctor --config FILE` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, settings
from rlhf_fast.config.settings import ConfigError
from rlhf_fast.models.adapters import adapter_config, is_adapter
from rlhf_fast.models.checkpoint import reading_errors
from rlhf_fast.planning import cost, memory
from rlhf_fast.planning.memory import Device, Prediction, TrainerConfig
from rlhf_fast.rewards.names import reward_models
from rlhf_fast.rollout.memory import free_memory

CONFIGS: dict[str, type[TrainerConfig]] = {
    "sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig,
}  # fmt: skip
SPARE = 0.05  # of the device, for its context and for fragments between blocks
_BUDGET = "optim.max_tokens_per_microbatch"
GRANULE = 64  # tokens; budgets that are proposed are multiples
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}  # powers of 1000, or with an i of 1024


@dataclass(frozen=True)
class Run:
    """What a run's YAML says, as far as memory depends on it."""

    verb: str
    config: TrainerConfig
    shape: PreTrainedConfig
    rewards: tuple[PreTrainedConfig, ...] = ()  # PPO's reward models

    def predict(self, config: TrainerConfig, device: Device, available: int) -> Prediction:
        return memory.predict(config, self.shape, device, self.rewards, available)


@dataclass(frozen=True)
class Change:
    """Settings that differ, and the memory that the run then takes."""

    settings: dict[str, Any]  # by key, such as ppo.optim.max_tokens_per_microbatch
    prediction: Prediction
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """Memory that a run takes of a device with `available` bytes, and changes that make it fit."""

    run: Run
    device: Device
    available: int
    prediction: Prediction
    changes: tuple[Change, ...]  # none if it fits

    @property
    def fits(self) -> bool:
        return fits(self.prediction, self.available)


def read_run(file: Path, model: str = "") -> Run:
    """The run of a file that `rlhf-fast VERB --config` takes.

    Args:
        model: a folder with a config.json, in place of the models that the file names.

    Raises:
        ConfigError: it is no such file, or one of its settings is out of range.
        FileNotFoundError: a model's config is nowhere.
    """
    tree = settings.read_yaml(file)
    verb = _verb(file, tree)
    values = settings.flatten(tree[verb] or {}) if verb in tree else {}
    config = settings.from_flat(CONFIGS[verb], values)
    shape = shape_of(model or tree.get("policy" if verb == "ppo" else "model") or "smollm2-135m")
    reward = tree.get("reward")
    named = reward_models(reward) if verb == "ppo" and isinstance(reward, str) else []
    return Run(verb, config, shape, tuple(shape_of(model or name) for name in named if not name.startswith("(")))


def _verb(file: Path, tree: dict[str, Any]) -> str:
    """Which verb a file is for: the one whose section it has (`reward` names PPO's reward model, too)."""
    found = [verb for verb in CONFIGS if isinstance(tree.get(verb), dict)]
    if not found and "policy" in tree:
        return "ppo"
    if len(found) != 1:
        sections = ", ".join(f"`{verb}:`" for verb in CONFIGS)
        raise ConfigError(
            f"--config: {file} has {len(found)} of the sections {sections}; expected the file of one run, in which "
            "one of them says what is run"
        )
    return found[0]


def shape_of(name: str) -> PreTrainedConfig:
    """transformers' config of a model; no weights are read."""
    try:
        folder = models.resolve(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; give --model FOLDER with the config.json of the model") from error
    if is_adapter(folder):
        return shape_of(str(adapter_config(folder).get("base_model_name_or_path") or ""))
    with reading_errors(folder):
        shape: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return shape


# What to change -----------------------------------------------------------------------------------------------------


def changes(run: Run, device: Device, available: int) -> Iterator[Change]:
    """What to change until a run fits, the least harmful first, each beside those before it: smaller micro-batches
    and activations computed again change no result, an adapter and narrower weights do. The last one fits, or nothing
    here makes it fit."""
    config, changed = run.config, dict[str, Any]()
    for step in ({}, *_larger_changes(config)):
        config = settings.from_flat(type(config), step, config)
        changed |= step
        prediction = run.predict(config, device, available)
        budget = None if fits(prediction, available) else _budget_that_fits(run, config, prediction, device, available)
        if budget is not None:
            changed[_BUDGET], prediction = budget
        if changed:
            named = {f"{run.verb}.{key}": value for key, value in changed.items()}
            yield Change(named, prediction, fits(prediction, available))
        if fits(prediction, available):
            return


def fits(prediction: Prediction, available: int) -> bool:
    """Beside what the device keeps for itself."""
    return prediction.peak <= available * (1 - SPARE)


def _larger_changes(config: TrainerConfig) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if not config.optim.checkpointing:
        found.append({"optim.checkpointing": True})
    if config.lora.r == 0:
        found.append({"lora.r": 16})
    if config.dtype == "float32":
        found.append({"dtype": "bfloat16"})
    return found


def _budget_that_fits(
    run: Run, config: TrainerConfig, whole: Prediction, device: Device, available: int
) -> tuple[int, Prediction] | None:
    """The largest token budget of a micro-batch with which a run fits, and what it then takes; None: no budget does.

    Memory grows in proportion to it, down to the longest sequence (or comparison), which is never cut.
    """
    most, least = config.optim.max_tokens_per_microbatch, memory.longest_microbatch(config)
    if most <= least:
        return None

    def at(tokens: int) -> Prediction:
        return run.predict(settings.from_flat(type(config), {_BUDGET: tokens}, config), device, available)

    smallest = at(least)
    if not fits(smallest, available):
        return None
    room = (available * (1 - SPARE) - smallest.peak) / (whole.peak - smallest.peak)
    tokens = int(least + room * (most - least)) // GRANULE * GRANULE
    while tokens > least:
        found = at(tokens)
        if fits(found, available):
            return tokens, found
        tokens = int(0.9 * tokens) // GRANULE * GRANULE
    return least, smallest


def forecast(run: Run, device: Device, available: int) -> Forecast:
    """Whether a run fits, and what to change if not."""
    prediction = run.predict(run.config, device, available)
    proposed = () if fits(prediction, available) else tuple(changes(run, device, available))
    return Forecast(run, device, available, prediction, proposed)


def hours(run: Run, data: cost.Data, machine: cost.Machine) -> dict[str, float]:
    """Of each phase."""
    found = cost.seconds(run.config, cost.count(run.config, run.shape, run.rewards), data, machine)
    return {phase: seconds / 3600 for phase, seconds in found.items()}


def device_and_memory(device: str, size: str) -> tuple[Device, int]:
    """Where a run is to be (`auto`: what is here), and the bytes there: `size`, or what is free.

    Raises:
        ConfigError: no size, or no such device to look at.
    """
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    where: Device = "cuda" if device == "cuda" else "cpu" if device == "cpu" else here
    if size:
        return where, read_bytes(size)
    if where == "cuda" and here == "cpu":
        raise ConfigError("--memory: there is no GPU here; say how much memory the device has, such as 80GB")
    return where, free_memory(torch.device(where))


# Saying it ----------------------------------------------------------------------------------------------------------


def as_text(found: Forecast) -> str:
    """A table, the verdict, and what to change."""
    peak, available = found.prediction.peak / 1e9, found.available / 1e9
    lines = [table(found.prediction), ""]
    lines.append(
        f"{found.run.verb} takes most in {found.prediction.fullest}: {peak:.1f} GB of {available:.1f} GB on "
        f"{found.device}, {SPARE:.0%} of which are left to the device itself: it "
        f"{'fits' if found.fits else 'does not fit'}."
    )
    if found.changes:
        lines.append("What to change, the least harmful first:")
    for change in found.changes:
        words = " ".join(f"--{key} {str(value).lower()}" for key, value in change.settings.items())
        verdict = "fits" if change.fits else "does not fit yet"
        lines.append(f"  {words}: {change.prediction.peak / 1e9:.1f} GB, {verdict}")
    if not found.fits and not any(change.fits for change in found.changes):
        lines.append(
            "No setting that is known here makes it fit: take shorter sequences, a smaller model or more memory."
        )
    return "\n".join(lines)


def refusal(found: Forecast) -> str:
    """In a line why it does not fit."""
    room, available = found.available * (1 - SPARE) / 1e9, found.available / 1e9
    return (
        f"{found.prediction.peak / 1e9:.4g} GB do not fit into the {room:.4g} GB that a run may have of "
        f"{available:.4g} GB: {SPARE:.0%} are left to the device itself"
    )


def as_dict(found: Forecast) -> dict[str, Any]:
    """The same for programs."""
    return {
        "verb": found.run.verb,
        "device": found.device,
        "available": found.available,
        "peak": found.prediction.peak,
        "fullest": found.prediction.fullest,
        "fits": found.fits,
        "phases": found.prediction.phases,
        "changes": [{"settings": c.settings, "peak": c.prediction.peak, "fits": c.fits} for c in found.changes],
    }


def table(prediction: Prediction) -> str:
    """Parts by phases, in GB (10^9 bytes); parts too small to be seen are left out, but not of the sums."""
    phases = list(prediction.phases)
    digits = 2 if prediction.peak > 5e9 else 3
    rows = [["GB", *phases]]
    for part in dict.fromkeys(part for phase in phases for part in prediction.phases[phase]):
        shown = [f"{prediction.phases[phase].get(part, 0) / 1e9:.{digits}f}" for phase in phases]
        if any(float(size) for size in shown):
            rows.append([part, *(size if float(size) else "" for size in shown)])
    rows.append(["all", *(f"{prediction.total(phase) / 1e9:.{digits}f}" for phase in phases)])
    return _aligned(rows)


def cost_table(hours: dict[str, float], price: float) -> str:
    """Hours and dollars of each phase."""
    rows = [["", "hours", "dollars"]]
    for phase, taken in (*hours.items(), ("all", sum(hours.values()))):
        rows.append([phase, f"{taken:.2f}", f"{taken * price:.2f}"])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        right = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{name:<{widths[0]}}{right}".rstrip())
    return "\n".join(lines)


def read_bytes(text: str) -> int:
    """A size such as 80GB (10^9 bytes) or 24GiB (2^30).

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kmgt])(i?)b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--memory: {text!r} is not a size such as 80GB or 24GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2] or ""])
