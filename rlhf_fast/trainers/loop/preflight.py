"""Refuse all that can be refused before a model is loaded, which takes longest, and make a model ready that is trained
alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast import models
from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, settings
from rlhf_fast.data.templates import require_template
from rlhf_fast.models.adapters import Model
from rlhf_fast.runs.folder import check_folder
from rlhf_fast.trainers.loop.monitor import Monitor, Monitors

Config = TypeVar("Config", SFTConfig, RewardConfig, DPOConfig, PPOConfig)


def begin(
    phase: str, cls: type[Config], config: Config | dict[str, Any] | None, monitors: Sequence[Monitor], **inputs: Any
) -> tuple[Config, dict[str, Any]]:
    """The settings and the inputs of a run, once its folder, trackers, chat template and monitors can be used.

    Args:
        inputs: of the run, by name, of which `out` is its folder; None for one that was not given, which is left out.

    Raises:
        OSError, TypeError, ValueError: one of them cannot be used; says which, and what to do.
    """
    Monitors(monitors)
    read, out = settings.given(cls, config), Path(inputs["out"])
    inputs = {name: value for name, value in inputs.items() if value is not None}
    described = settings.run_yaml(phase, read, **inputs)
    # Which day templates are told is known once a tokenizer is there.
    check_folder(out, phase, described, read.run.trackers, but=(f"{phase}.date",))
    require_template(read.chat_template)
    return read, inputs


def made_ready(model: Model, config: SFTConfig | RewardConfig | DPOConfig) -> Model:
    """Return the model itself, once it reaches as far as its sequences and recomputes what the settings say.

    Raises:
        ValueError: it cannot be trained on sequences so long, or has no layers to compute again.
    """
    models.require_reach(model, config.max_length)
    if config.optim.checkpointing:
        models.recompute_activations(model)
    return model
