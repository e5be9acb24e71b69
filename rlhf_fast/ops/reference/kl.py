"""KL divergences: estimates from sampled tokens, and sums over the vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.common import keep
from rlhf_fast.ops.reference.logprobs import log_softmax


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1", mask: Tensor | None = None) -> Tensor:
    """d = log p - log q per sampled token; k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; with "+", the gradient of k2."""
    d = keep(logprobs, mask) - keep(ref_logprobs, mask)
    k2 = d.square() / 2
    value = {"k1": d, "k2": k2, "k3": torch.expm1(-d) + d}[kind[:2]]
    if not kind.endswith("+"):
        return value
    straight = torch.where(d.isinf(), 0, d).square() / 2  # infinity less itself would hide the value
    return value.detach() + (straight - straight.detach())


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    kind: str = "kl",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) per row, or KL(q || p), or half of KL(p || m) + KL(q || m), m = (p +
    q) / 2.

    A term with p = 0 counts as 0. In the last, log p - log m = log 2 - log(1 + q / p) = log 2 - softplus(log q - log
    p).
    """
    logp = log_softmax(logits, temperature, softcap, logit_scale, mask)  # (..., V)
    logq = log_softmax(ref_logits, temperature, softcap, logit_scale, mask)
    p, q = logp.exp(), logq.exp()
    if kind == "kl":
        terms = p * torch.where(p == 0, 0, logp - logq)
    elif kind == "reverse_kl":
        terms = q * torch.where(q == 0, 0, logq - logp)
    else:
        apart = logq.clamp(min=-1e4) - logp.clamp(min=-1e4)  # where p is 0 already, and -inf - -inf would be nan
        terms = (p * (math.log(2) - F.softplus(apart)) + q * (math.log(2) - F.softplus(-apart))) / 2
    return keep(terms.sum(-1), mask)  # (...)
