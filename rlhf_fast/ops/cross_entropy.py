"""cross_entropy: mean negative log-likelihood of tokens, for supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks
from rlhf_fast.ops.reference import divide
from rlhf_fast.ops.token_logprobs import token_logprobs


def cross_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean of -log softmax(logits)[token] over the rows that count, in nats.

    A row counts when it is unmasked and its token is not ``ignore_index``; any other row gets gradient exactly 0 and
    may hold anything. Rows and tokens are taken as they come: shifting by one is the caller's.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides; ``-inf`` is allowed.
        tokens: (...), int32 or int64, in [0, V) or ignore_index.
        mask: (...), bool, or None for all.
        ignore_index: the token that marks a row as not counting.
        denominator: what to divide by instead of the number of rows that count: a number > 0 or a tensor of shape (),
            so that micro-batches add up to their batch. A tensor of 0 counts as 1.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0, with a graph, when no row counts.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, or a token is outside the vocabulary (token values: on a CPU
            always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(logits=logits)
    if logits.dim() < 1:
        raise ValueError("logits: shape (), expected (..., V)")
    _checks.devices(logits=logits, tokens=tokens, mask=mask)
    _checks.labels(logits.shape[:-1], "logits", logits.shape[-1], tokens, mask, ignore_index)
    _checks.denominators(denominator)
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    logprobs, _ = token_logprobs(logits, tokens, mask=counted)
    return divide(-logprobs.sum(), counted.sum(), denominator)
