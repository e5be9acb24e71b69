"""Forecast a run from its settings file, before it begins: the memory of each phase, the settings to change if that
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
    """Run that a YAML file describes, as far as its memory and time depend on it."""

    verb: str
    config: TrainerConfig
    shape: PreTrainedConfig
    rewards: tuple[PreTrainedConfig, ...] = ()  # PPO's reward models

    def predict(self, config: TrainerConfig, device: Device, available: int) -> Prediction:
        """Predict the memory of this run with other settings; arguments and errors as for `memory.predict`."""
        return memory.predict(config, self.shape, device, self.rewards, available)


@dataclass(frozen=True)
class Change:
    """Change of settings, and the memory that the run then takes."""

    settings: dict[str, Any]  # by key, such as ppo.optim.max_tokens_per_microbatch
    prediction: Prediction
    fits: bool


@dataclass(frozen=True)
class Forecast:
    """Forecast of the memory that a run takes of a device with `available` bytes, and of changes that make it fit."""

    run: Run
    device: Device
    available: int
    prediction: Prediction
    changes: tuple[Change, ...]  # none if it fits

    @property
    def fits(self) -> bool:
        """Return whether the run fits as it is."""
        return fits(self.prediction, self.available)


def read_run(file: Path, model: str = "") -> Run:
    """Read a run from a file that `rlhf-fast VERB --config` takes; no weights are loaded.

    Args:
        model: a folder with a config.json, in place of the models that the file names; "": those.

    Raises:
        ConfigError: the file is not that of one run, or one of its settings is out of range.
        FileNotFoundError: the config of a model was not found.
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
    """Tell which verb a file is for: the one whose section it has (`reward` names PPO's reward model, too)."""
    verbs = [verb for verb in CONFIGS if isinstance(tree.get(verb), dict)]
    if not verbs and "policy" in tree:
        return "ppo"
    if len(verbs) != 1:
        sections = ", ".join(f"`{verb}:`" for verb in CONFIGS)
        raise ConfigError(
            f"--config: {file} has {len(verbs)} of the sections {sections}; expected the file of one run, in which "
            "one of them says what is run"
        )
    return verbs[0]


def shape_of(name: str) -> PreTrainedConfig:
    """Read transformers' config of a model, for an adapter that of its base; no weights are read.

    Args:
        name: as for `models.load`.

    Raises:
        FileNotFoundError: there is no such model here.
    """
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


def propose_changes(run: Run, device: Device, available: int) -> Iterator[Change]:
    """Propose changes until a run fits, the least harmful first; each includes those before it.

    Smaller micro-batches and activation checkpointing change no result; an adapter and bfloat16 weights do. The last
    change fits, unless none does.
    """
    config, changed = run.config, dict[str, Any]()
    for step in ({}, *_steps(config)):
        config = settings.from_flat(type(config), step, config)
        changed |= step
        prediction = run.predict(config, device, available)
        budget = None if fits(prediction, available) else _largest_budget(run, config, prediction, device, available)
        if budget is not None:
            changed[_BUDGET], prediction = budget
        if changed:
            named = {f"{run.verb}.{key}": value for key, value in changed.items()}
            yield Change(named, prediction, fits(prediction, available))
        if fits(prediction, available):
            return


def fits(prediction: Prediction, available: int) -> bool:
    """Return whether a run fits into `available` bytes, less the share that the device keeps for itself (SPARE)."""
    return prediction.peak <= available * (1 - SPARE)


def _steps(config: TrainerConfig) -> list[dict[str, Any]]:
    """List the settings to change besides the token budget, the least harmful first."""
    steps: list[dict[str, Any]] = []
    if not config.optim.checkpointing:
        steps.append({"optim.checkpointing": True})
    if config.lora.r == 0:
        steps.append({"lora.r": 16})
    if config.dtype == "float32":
        steps.append({"dtype": "bfloat16"})
    return steps


def _largest_budget(
    run: Run, config: TrainerConfig, whole: Prediction, device: Device, available: int
) -> tuple[int, Prediction] | None:
    """Find the largest token budget of a micro-batch with which a run fits, and the memory then; None if none does.

    Memory is linear in the budget, down to the longest sequence (or comparison), which is never cut.

    Args:
        whole: the memory with the budget of `config`, which does not fit.
    """
    most, least = config.optim.max_tokens_per_microbatch, memory.longest_microbatch(config)
    if most <= least:
        return None

    def predict_with(tokens: int) -> Prediction:
        return run.predict(settings.from_flat(type(config), {_BUDGET: tokens}, config), device, available)

    smallest = predict_with(least)
    if not fits(smallest, available):
        return None
    room = (available * (1 - SPARE) - smallest.peak) / (whole.peak - smallest.peak)
    tokens = int(least + room * (most - least)) // GRANULE * GRANULE
    while tokens > least:
        prediction = predict_with(tokens)
        if fits(prediction, available):
            return tokens, prediction
        tokens = int(0.9 * tokens) // GRANULE * GRANULE
    return least, smallest


def forecast(run: Run, device: Device, available: int) -> Forecast:
    """Forecast whether a run fits into `available` bytes of a device, and what to change if not."""
    prediction = run.predict(run.config, device, available)
    proposed = () if fits(prediction, available) else tuple(propose_changes(run, device, available))
    return Forecast(run, device, available, prediction, proposed)


def hours(run: Run, data: cost.Data, machine: cost.Machine) -> dict[str, float]:
    """Estimate the hours of each phase, by its name (cost.py)."""
    phases = cost.seconds(run.config, cost.count(run.config, run.shape, run.rewards), data, machine)
    return {phase: seconds / 3600 for phase, seconds in phases.items()}


def device_and_memory(device: str, size: str) -> tuple[Device, int]:
    """Resolve the device of a run and its memory in bytes.

    Args:
        device: "cuda", "cpu", or "auto": the GPU if there is one here.
        size: such as 80GB; "": what is free on the device.

    Raises:
        ConfigError: `size` is no size, or the memory of a GPU is asked for where there is none.
    """
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    where: Device = "cuda" if device == "cuda" else "cpu" if device == "cpu" else here
    if size:
        return where, read_bytes(size)
    if where == "cuda" and here == "cpu":
        raise ConfigError("--memory: there is no GPU here; say how much memory the device has, such as 80GB")
    return where, free_memory(torch.device(where))


# Texts --------------------------------------------------------------------------------------------------------------


def as_text(result: Forecast) -> str:
    """Write a forecast for a terminal: a table, the verdict, and what to change."""
    peak, available = result.prediction.peak / 1e9, result.available / 1e9
    lines = [table(result.prediction), ""]
    lines.append(
        f"{result.run.verb} takes most in {result.prediction.fullest}: {peak:.1f} GB of {available:.1f} GB on "
        f"{result.device}, {SPARE:.0%} of which are left to the device itself: it "
        f"{'fits' if result.fits else 'does not fit'}."
    )
    if result.changes:
        lines.append("What to change, the least harmful first:")
    for change in result.changes:
        words = " ".join(f"--{key} {str(value).lower()}" for key, value in change.settings.items())
        verdict = "fits" if change.fits else "does not fit yet"
        lines.append(f"  {words}: {change.prediction.peak / 1e9:.1f} GB, {verdict}")
    if not result.fits and not any(change.fits for change in result.changes):
        lines.append(
            "No setting that is known here makes it fit: take shorter sequences, a smaller model or more memory."
        )
    return "\n".join(lines)


def refusal(result: Forecast) -> str:
    """Say in one line why a run does not fit."""
    room, available = result.available * (1 - SPARE) / 1e9, result.available / 1e9
    return (
        f"{result.prediction.peak / 1e9:.4g} GB do not fit into the {room:.4g} GB that a run may have of "
        f"{available:.4g} GB: {SPARE:.0%} are left to the device itself"
    )


def as_dict(result: Forecast) -> dict[str, Any]:
    """Convert a forecast to plain data, for JSON; sizes in bytes."""
    return {
        "verb": result.run.verb,
        "device": result.device,
        "available": result.available,
        "peak": result.prediction.peak,
        "fullest": result.prediction.fullest,
        "fits": result.fits,
        "phases": result.prediction.phases,
        "changes": [{"settings": c.settings, "peak": c.prediction.peak, "fits": c.fits} for c in result.changes],
    }


def table(prediction: Prediction) -> str:
    """Write a table of parts by phases in GB (10^9 bytes), with sums; parts that would read 0.00 are left out."""
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
    """Write a table of the hours and dollars of each phase.

    Args:
        price: dollars an hour.
    """
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
    """Read a size such as 80GB (10^9 bytes) or 24GiB (2^30 bytes), in bytes.

    Raises:
        ConfigError: the text is no size, or it is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kmgt])(i?)b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--memory: {text!r} is not a size such as 80GB or 24GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2] or ""])
