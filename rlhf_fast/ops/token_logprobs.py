"""token_logprobs: log-probability of one token per row of logits, and the row's entropy."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

_BACKENDS = {"reference": reference.token_logprobs}


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and each row's entropy, in nats.

    With z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is given, then z / temperature:

        logprob = z[token] - log sum_v exp(z_v),    entropy = -sum_v p_v log p_v,    p = softmax(z).

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides. ``-inf`` is allowed (p = 0, which adds
            nothing to the entropy and gets no gradient from it); softcap makes it -softcap like any very low logit.
        tokens: (...), int32 or int64, in [0, V).
        temperature: > 0; a number, or a tensor that broadcasts to the shape of ``tokens`` (one per row). A constant:
            no gradient flows to it.
        softcap: > 0, or None (Gemma 2, arXiv:2408.00118).
        logit_scale: > 0 (Cohere, Granite).
        mask: (...), bool. Where False, both outputs and the row's gradient are exactly 0, and the row may hold
            anything: NaN logits, a token outside the vocabulary.

    Returns:
        logprobs and entropy, both (...), float32 (float64 for float64 logits). Both are differentiable in logits.
        A row without one finite logit is no distribution and gives NaN.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, a token is outside the vocabulary
            (token and temperature values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(logits=logits)
    if logits.dim() < 1:
        raise ValueError("logits: shape (), expected (..., V)")
    rows, size = logits.shape[:-1], logits.shape[-1]
    _checks.devices(logits=logits, tokens=tokens, temperature=temperature, mask=mask)
    _checks.scoring(rows, "logits", size, tokens, mask, temperature, softcap, logit_scale)
    return _dispatch.choose("token_logprobs", _BACKENDS)(logits, tokens, temperature, softcap, logit_scale, mask)
