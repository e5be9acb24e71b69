"""The settings that every trainer has of its tokenizer's chat template."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.templates import reads_date, use_template
from rlhf_fast.runs.folder import interrupted_settings

Config = TypeVar("Config", SFTConfig, RewardConfig, DPOConfig, PPOConfig)


def use_settings(config: Config, phase: str, out: str | Path, tokenizer: Any, others: Iterable[Any] = ()) -> Config:
    """Set a tokenizer to render as `config` says; return the config with the day that the run's templates are told.

    That is the day on which the run in `out` began, so that it goes on after midnight with the same tokens.

    Args:
        others: tokenizers of reward models, whose other settings are their own.
    """
    use_template(tokenizer, config.chat_template, config.template_kwargs, config.parse_special_tokens)
    tokenizers = [each for each in (tokenizer, *others) if reads_date(each)]
    if not tokenizers:
        return config
    began = interrupted_settings(Path(out)).get(f"{phase}.date")
    day = datetime.date.fromisoformat(config.date or began or datetime.date.today().isoformat())
    for each in tokenizers:
        use_template(each, date=day)
    return dataclasses.replace(config, date=day.isoformat())
