"""Language models: loading, adapters, scalar heads, the forward passes that training needs, and checkpoints."""

from rlhf_fast.models.adapters import copy_weights, frozen_copy, trainable, trainable_copy, trainable_scorer
from rlhf_fast.models.checkpoint import resolve, save
from rlhf_fast.models.ends import end_tokens, pad_apart
from rlhf_fast.models.forward import (
    Head,
    hidden_states,
    longest_packed,
    longest_shared,
    lower_bound,
    output_head,
    require_reach,
    response_logprobs,
    response_states,
    score_last,
)
from rlhf_fast.models.load import (
    critic_from,
    from_shape,
    load,
    load_reward,
    load_tokenizer,
    reward_from,
    reward_from_shape,
)
from rlhf_fast.models.recompute import recompute_activations

__all__ = [
    "Head",
    "copy_weights",
    "critic_from",
    "end_tokens",
    "from_shape",
    "frozen_copy",
    "hidden_states",
    "load",
    "load_reward",
    "load_tokenizer",
    "longest_packed",
    "longest_shared",
    "lower_bound",
    "output_head",
    "pad_apart",
    "recompute_activations",
    "require_reach",
    "resolve",
    "response_logprobs",
    "response_states",
    "reward_from",
    "reward_from_shape",
    "save",
    "score_last",
    "trainable",
    "trainable_copy",
    "trainable_scorer",
]
