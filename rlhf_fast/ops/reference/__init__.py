"""Definitions of every op in plain PyTorch, which all other backends are held against.

One file a family of ops. Written to be read beside the papers, not to be fast. Three rules hold throughout:

- float32 inputs give float32 arithmetic, float64 gives float64, bfloat16 and float16 are widened to float32 first;
- a masked position is replaced *before* anything is computed from it and its result is replaced again afterwards
  (double ``where``), so that it may hold anything, NaN included, and its gradient is exactly zero;
- no branch looks at data. (Packed inputs read their sequence lengths once, to know how wide the padded form is.)

Arguments are already checked by the public functions, whose docstrings give shapes and sources in full.
"""

from rlhf_fast.ops.reference.advantages import gae, group_advantages, whiten, whiten_by, whitening_sums
from rlhf_fast.ops.reference.attention import paged_attention, write_kv
from rlhf_fast.ops.reference.common import divide, sequence_sum
from rlhf_fast.ops.reference.kl import full_kl, kl_estimate
from rlhf_fast.ops.reference.linear import linear, linear_cross_entropy, linear_token_logprobs, rms_norm
from rlhf_fast.ops.reference.logprobs import cross_entropy, token_logprobs
from rlhf_fast.ops.reference.pairs import dpo_loss, reward_loss
from rlhf_fast.ops.reference.ppo import ppo_loss
from rlhf_fast.ops.reference.sampling import sample

__all__ = [
    "cross_entropy",
    "divide",
    "dpo_loss",
    "full_kl",
    "gae",
    "group_advantages",
    "kl_estimate",
    "linear",
    "linear_cross_entropy",
    "linear_token_logprobs",
    "paged_attention",
    "ppo_loss",
    "reward_loss",
    "rms_norm",
    "sample",
    "sequence_sum",
    "token_logprobs",
    "whiten",
    "whiten_by",
    "whitening_sums",
    "write_kv",
]
