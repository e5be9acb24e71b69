"""linear_token_logprobs: token_logprobs of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

_BACKENDS = {"reference": reference.linear_token_logprobs}


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and each row's entropy, in nats, straight from the hidden states.

    Equal to ``token_logprobs(hidden @ weight.T + bias, tokens, ...)`` with the product in float32 at least (autocast
    does not change it). Differentiable in hidden, weight and bias.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; its dtype may differ from that of hidden.
        tokens: (...), int32 or int64, in [0, V).
        bias: (V,) or None.
        temperature, softcap, logit_scale: as in :func:`token_logprobs`.
        mask: (...), bool. Where False, both outputs and the row's gradient are exactly 0, the row adds nothing to the
            gradients of weight and bias, and hidden and token there may hold anything.

    Returns:
        logprobs and entropy, both (...), float32 (float64 if hidden or weight is).

    Raises:
        TypeError, ValueError: as :func:`token_logprobs`, and when H or V do not agree between the arguments.
    """
    _checks.linear(hidden, weight, bias)
    _checks.devices(hidden=hidden, weight=weight, tokens=tokens, bias=bias, temperature=temperature, mask=mask)
    rows, size = hidden.shape[:-1], weight.shape[0]
    _checks.scoring(rows, "hidden", size, tokens, mask, temperature, softcap, logit_scale)
    run = _dispatch.choose("linear_token_logprobs", _BACKENDS)
    return run(hidden, weight, tokens, bias, temperature, softcap, logit_scale, mask)
