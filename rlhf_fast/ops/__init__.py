"""The ops: log-probabilities, divergences, advantages and losses of RLHF, each one differentiable function.

Every op takes padded (B, T) and packed (N,) + cu_seqlens (B + 1,) tensors where sequences matter, computes in float32
(float64 for float64 inputs), and leaves its inputs alone. Needs torch and nothing else.
"""

from rlhf_fast.ops.cross_entropy import cross_entropy
from rlhf_fast.ops.dispatch import use_backend
from rlhf_fast.ops.dpo_loss import dpo_loss
from rlhf_fast.ops.full_kl import full_kl
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.group_advantages import group_advantages
from rlhf_fast.ops.kl_estimate import kl_estimate
from rlhf_fast.ops.linear import linear, rms_norm
from rlhf_fast.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_fast.ops.linear_dpo_loss import linear_dpo_loss
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.paged_attention import paged_attention, write_kv
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.reward_loss import reward_loss
from rlhf_fast.ops.sample import sample
from rlhf_fast.ops.sequence_sum import sequence_sum
from rlhf_fast.ops.token_logprobs import token_logprobs
from rlhf_fast.ops.whiten import whiten

__all__ = [
    "cross_entropy",
    "dpo_loss",
    "full_kl",
    "gae",
    "group_advantages",
    "kl_estimate",
    "linear",
    "linear_cross_entropy",
    "linear_dpo_loss",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "paged_attention",
    "ppo_loss",
    "reward_loss",
    "rms_norm",
    "sample",
    "sequence_sum",
    "token_logprobs",
    "use_backend",
    "whiten",
    "write_kv",
]
