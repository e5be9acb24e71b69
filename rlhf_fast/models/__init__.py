"""Language models: loading, adapters, scalar heads, the forward passes that training needs, and checkpoints."""

from rlhf_fast.models.adapters import frozen_copy, trainable
from rlhf_fast.models.checkpoint import resolve, save
from rlhf_fast.models.forward import (
    Head,
    hidden_states,
    longest_packed,
    longest_shared,
    output_head,
    response_logprobs,
    response_states,
    score_last,
)
from rlhf_fast.models.load import load, load_reward, reward_from

__all__ = [
    "Head",
    "frozen_copy",
    "hidden_states",
    "load",
    "load_reward",
    "longest_packed",
    "longest_shared",
    "output_head",
    "resolve",
    "response_logprobs",
    "response_states",
    "reward_from",
    "save",
    "score_last",
    "trainable",
]
