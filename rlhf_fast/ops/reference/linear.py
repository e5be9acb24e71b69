"""Linear layers, and the ops that begin at an output layer's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.common import keep, widen
from rlhf_fast.ops.reference.logprobs import cross_entropy, token_logprobs


def linear_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T, in float32 at least, whatever autocast says.

    Masked rows are rows of zeros first.
    """
    hidden = keep(hidden, None if mask is None else mask[..., None])  # (..., H)
    dtype = torch.promote_types(hidden.dtype, widen(weight).dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))  # (..., V)
        if lora is not None:
            a, b, scaling = lora
            logits = logits + scaling * F.linear(F.linear(hidden.to(dtype), a.to(dtype)), b.to(dtype))
    return logits


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """token_logprobs of logits = hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T."""
    logits = linear_logits(hidden, weight, bias, lora, mask)
    return token_logprobs(
        logits, tokens, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=mask
    )  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """cross_entropy of logits = hidden @ weight.T + bias, with an adapter as in linear_token_logprobs."""
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    logits = linear_logits(hidden, weight, bias, lora, counted)
    return cross_entropy(
        logits, tokens, mask=counted, ignore_index=ignore_index, denominator=denominator, softcap=softcap,
        logit_scale=logit_scale, label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


def linear(x: Tensor, weights: Sequence[Any], gate: str = "none") -> list[Tensor]:
    products = []
    for weight, bias, lora in weights:
        y = F.linear(x, weight, bias)
        if lora is not None:
            a, b, scaling = lora
            y = y + scaling * F.linear(F.linear(x, a), b)
        products.append(y)
    if gate == "none":
        return products
    gated = F.silu(products[0]) if gate == "silu" else F.gelu(products[0], approximate="tanh")
    return [gated * products[1]]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (offset + widen(weight))).to(x.dtype)
