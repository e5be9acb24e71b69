"""linear_ppo_loss: ppo_loss of the log-probabilities of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.ppo_loss import check_aggregation, check_numbers, check_tensors, check_terms, ppo_loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "token_mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """:func:`ppo_loss` of ``linear_token_logprobs(hidden, weight, tokens, ...)``, entropy included, in one op.

    Gradients flow to hidden, weight, bias, the adapter and values; everything else is a constant.

    Args:
        hidden: (B, T, H) padded, or (N, H); float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; bias: (V,) or None; lora: as in :func:`linear_token_logprobs`.
        tokens: (B, T) or (N,), int32 or int64, in [0, V).
        old_logprobs, advantages: the shape of tokens. old_logprobs (and ref_logprobs) must have been computed at the
            same temperature, softcap and logit_scale.
        temperature, softcap, logit_scale: as in :func:`token_logprobs`.
        mask: the shape of tokens, bool, or None for all. Where False, nothing is added, gradients are exactly 0, and
            hidden, tokens and all else there may hold anything.
        All others: as in :func:`ppo_loss`.

    Returns:
        loss: a scalar, float32 (float64 if an input is); stats: as :func:`ppo_loss`, entropy always among them.

    Raises:
        TypeError, ValueError: as :func:`linear_token_logprobs` and :func:`ppo_loss`.
    """
    tensors = {
        "hidden": hidden, "weight": weight, "bias": bias, "temperature": temperature, "tokens": tokens,
    }  # fmt: skip
    per_token = {
        "old_logprobs": old_logprobs, "advantages": advantages, "values": values, "old_values": old_values,
        "returns": returns, "ref_logprobs": ref_logprobs,
    }  # fmt: skip
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(**tensors, old_logprobs=old_logprobs)
    _checks.scoring(hidden.shape[:-1], "hidden", weight.shape[0], tokens, mask, temperature, softcap, logit_scale)
    check_tensors(tokens.shape, "tokens", per_token, mask, cu_seqlens)
    check_terms(values, old_values, returns, value_clip, ref_logprobs, kl_coef)
    check_numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, kl)
    check_aggregation(tokens, cu_seqlens, aggregation, denominator)
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, tokens, bias, lora, temperature, softcap, logit_scale, mask
    )
    return ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, cu_seqlens, clip_low, clip_high,
        dual_clip, value_clip, value_coef, entropy, entropy_coef, ref_logprobs, kl_coef, kl, aggregation, denominator,
    )  # fmt: skip
