"""linear_cross_entropy: cross_entropy of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks
from rlhf_fast.ops.linear_token_logprobs import linear_token_logprobs
from rlhf_fast.ops.reference import divide


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
) -> Tensor:
    """Mean of -log p[token] over the rows that count, in nats, straight from the hidden states.

    Equal to :func:`cross_entropy` of the logits hidden @ weight.T + bias after logit_scale and softcap (as in
    :func:`token_logprobs`), with the product in float32 at least (autocast does not change it). Differentiable in
    hidden, weight, bias and the adapter.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; its dtype may differ from that of hidden.
        tokens: (...), int32 or int64, in [0, V) or ignore_index.
        bias: (V,) or None.
        lora: an adapter of the lm_head, as in :func:`linear_token_logprobs`.
        softcap: > 0, or None; logit_scale: > 0.
        mask: (...), bool, or None for all. A row counts when it is unmasked and its token is not ignore_index; any
            other row gets gradient exactly 0, adds nothing to those of weight and bias, and may hold anything.
        ignore_index, denominator: as in :func:`cross_entropy`.

    Returns:
        A scalar, float32 (float64 if hidden or weight is); 0, with a graph, when no row counts.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy`, and when H or V do not agree between the arguments.
    """
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(hidden=hidden, weight=weight, tokens=tokens, bias=bias, mask=mask)
    _checks.labels(hidden.shape[:-1], "hidden", weight.shape[0], tokens, mask, ignore_index)
    if softcap is not None:
        _checks.number("softcap", softcap, above=0)
    _checks.number("logit_scale", logit_scale, above=0)
    _checks.denominators(denominator)
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    logprobs, _ = linear_token_logprobs(hidden, weight, tokens, bias, lora, 1.0, softcap, logit_scale, counted)
    return divide(-logprobs.sum(), counted.sum(), denominator)
