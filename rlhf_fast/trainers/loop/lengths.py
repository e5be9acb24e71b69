"""Limit how long a trainer's rows may be: as its settings and its model say."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.fitting import Fitting
from rlhf_fast.models.adapters import Model, adapter_config, is_adapter
from rlhf_fast.models.checkpoint import reading_errors, resolve
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rollout.requests import context_length

Sizes = tuple[int | None, int | None]  # positions and tokens of a model
Config = SFTConfig | RewardConfig | DPOConfig | PPOConfig


def fitting_for(model: Model, tokenizer: PreTrainedTokenizerBase, config: Config, phase: str) -> Fitting:
    inner = unwrapped(model)
    return Fitting(
        tokenizer,
        config.max_length,
        config.overlong,
        phase,
        context=context_length(inner.config.get_text_config()),
        vocabulary=inner.get_input_embeddings().weight.shape[0],
    )


def sizes_of(name: str | Path) -> Sizes:
    """Read (positions, vocabulary) of a model from its config alone; names and errors as for `models.load`."""
    folder = resolve(name)
    if is_adapter(folder):
        folder = resolve(adapter_config(folder)["base_model_name_or_path"])
    with reading_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    return context_length(config), getattr(config, "vocab_size", None)
