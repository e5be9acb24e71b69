"""Log-probabilities of tokens, their entropies and the cross-entropy, from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.ops.reference.common import divide, keep


def log_softmax(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """log softmax(z), z = logit_scale * logits, softcap * tanh(z / softcap), z / temperature. Masked rows: uniform."""
    z = keep(logits, None if mask is None else mask[..., None]) * logit_scale  # (..., V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = keep(temperature.detach(), mask, fill=1.0).to(z.dtype)[..., None]
    return torch.log_softmax(z / temperature, dim=-1)  # (..., V)


def pick(logp: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """log p[token] per row, 0 in masked rows."""
    tokens = tokens.long() if mask is None else torch.where(mask, tokens.long(), 0)
    return keep(logp.gather(-1, tokens[..., None])[..., 0], mask)  # (...)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p[token] and H = -sum_v p_v log p_v.

    A term with p = 0 counts as 0. Through exp, dH/dz is p * (E[log p] - log p), which is 0 there and not 0 * inf.
    """
    logp = log_softmax(logits, temperature, softcap, logit_scale, mask)  # (..., V)
    p = logp.exp()
    entropy = -(p * torch.where(p == 0, 0, logp)).sum(-1)  # (...)
    return pick(logp, tokens, mask), keep(entropy, mask)


def cross_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean of -(1 - e) log p[token] - e mean log p + z_loss (log sum exp z)^2 over the rows that are unmasked and whose
    token is not ignore_index."""
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    z = keep(logits, counted[..., None]) * logit_scale  # (..., V)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = -(1 - label_smoothing) * pick(torch.log_softmax(z, -1), tokens, counted)
    log_sum = torch.logsumexp(z, -1)
    if label_smoothing != 0:
        losses = losses + label_smoothing * keep(log_sum - z.mean(-1), counted)
    if z_loss != 0:
        losses = losses + z_loss * keep(log_sum.square(), counted)
    return divide(losses.sum(), counted.sum(), denominator)
