"""What can be refused before a model is loaded, which takes longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, settings
from rlhf_fast.data.templates import require_template
from rlhf_fast.runs.folder import check_folder


def preflight(phase: str, config: SFTConfig | RewardConfig | DPOConfig | PPOConfig, inputs: dict[str, Any]) -> None:
    """Look at the run's folder, its trackers and the chat template.

    Args:
        inputs: of the run, by name; `out` is its folder.

    Raises:
        OSError, ValueError: one of them cannot be used; says which, and what to do.
    """
    described = settings.run_yaml(phase, config, **inputs)
    # Which day templates are told is known once a tokenizer is there.
    check_folder(Path(inputs["out"]), phase, described, config.run.trackers, but=(f"{phase}.date",))
    require_template(config.chat_template)
