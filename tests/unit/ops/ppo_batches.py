"""Batches for the tests of ppo_loss, its options, and the names of its inputs and statistics."""

from __future__ import annotations

from typing import Any

import torch

from tests.unit.ops import cases

PER_TOKEN = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "entropy", "ref_logprobs")
ALL_TERMS: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "value_coef": 0.5, "dual_clip": 3.0}
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_mean")
ADD_UP_WITH_TOKENS = (
    "ratio_mean", "clip_fraction", "dual_clip_fraction", "value_clip_fraction", "approx_kl", "approx_kl_k3",
    "rollout_weight", "rollout_clip_fraction",
)  # fmt: skip
ADD_UP = ("policy_loss", "value_loss", "entropy", "kl")
OWN = ("logprobs", "values", "entropy")


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every per-token input; ratios from about 0.3 to 3, so that all the clips bite."""
    return {name: cases.random(*shape, seed=i, scale=0.4, dtype=dtype) for i, name in enumerate(PER_TOKEN)}
