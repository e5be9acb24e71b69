"""full_kl: KL(p || q) over the whole vocabulary, per row."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

_BACKENDS = {"reference": reference.full_kl}


def full_kl(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(softmax(logits) || softmax(ref_logits)) = sum_v p_v (log p_v - log q_v) per row, in nats.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64: those of p. ``-inf`` is allowed: a term with p = 0
            counts as 0 and gets no gradient.
        ref_logits: (..., V): those of q. Where q = 0 and p > 0 the divergence is +inf, with no usable gradient.
        mask: (...), bool. Where False, the output and the row's gradients are exactly 0 and the row may hold anything.

    Returns:
        (...), float32 (float64 if an input is). Differentiable in both.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices differ, or the vocabulary is empty.
    """
    _checks.floats(logits=logits, ref_logits=ref_logits)
    _checks.devices(logits=logits, ref_logits=ref_logits, mask=mask)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (..., V) with V > 0")
    _checks.shapes(logits.shape, "logits", ref_logits=ref_logits)
    _checks.masks(logits.shape[:-1], "the rows of logits", mask)
    return _dispatch.choose("full_kl", _BACKENDS)(logits, ref_logits, mask)
