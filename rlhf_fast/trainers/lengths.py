"""How long a trainer's rows may be: as its settings and its model say."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.data.fitting import Fitting
from rlhf_fast.models.adapters import Model
from rlhf_fast.models.forward import unwrapped
from rlhf_fast.rollout.requests import context_length

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
