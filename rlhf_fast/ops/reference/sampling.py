"""Drawing a token from a row of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import SampleOptions


def sample(logits: Tensor, options: SampleOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort likeliest first (stably), cut, put back in the order of the vocabulary, and invert the cumulative sum. In
    float64: sums over a vocabulary lose digits in float32."""
    temperature, top_k, top_p, min_p, uniform = options
    logits = logits.double()  # (B, V)
    columns = logits.shape[1]
    greedy = temperature == 0
    below = logits - logits.amax(-1, keepdim=True)  # first, for a quotient may leave the range
    logprobs = torch.log_softmax(below / torch.where(greedy, 1, temperature)[:, None].to(logits.dtype), dim=-1)
    probabilities = logprobs.exp()
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(columns, device=logits.device)
    most = torch.where(greedy, 1, torch.where(top_k > 0, top_k, columns))[:, None]
    ordered = torch.where(rank < most, ordered, 0)
    mass = ordered.sum(-1, keepdim=True)
    cut_mass = (top_p < 1)[:, None]
    stays = ~cut_mass | (ordered.cumsum(-1) - ordered < top_p[:, None].double() * mass)
    stays &= ordered >= min_p[:, None] * ordered[:, :1]
    stays[:, 0] = True
    ordered = torch.where(stays, ordered, 0)
    kept = torch.zeros_like(probabilities).scatter(-1, index, ordered)  # (B, V)
    cumulative = kept.cumsum(-1)
    target = (uniform * cumulative[:, -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)  # (B,)
    last = columns - 1 - (kept > 0).flip(-1).int().argmax(-1)
    tokens = torch.where(greedy, logits.argmax(-1), torch.minimum(tokens, last))
    broken = ~torch.isfinite(logits.amax(-1)) | logits.isnan().any(-1)
    chosen_logprobs = logprobs.gather(-1, tokens.clamp(0, columns - 1)[:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    nan = torch.full_like(chosen_logprobs, math.nan, dtype=torch.float32)
    return (
        torch.where(broken, -1, tokens),
        torch.where(broken, nan, chosen_logprobs.float()),
        torch.where(broken, nan, cumulative[:, -1].float()),
        torch.where(broken, nan, entropy.float()),
    )
