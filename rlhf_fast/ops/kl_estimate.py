"""kl_estimate: per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

KINDS = ("k1", "k2", "k3")
_BACKENDS = {"reference": reference.kl_estimate}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(p || q), in nats, for tokens sampled from p (Schulman, "Approximating KL divergence").

    With d = logprobs - ref_logprobs:

    - ``"k1"`` = d: unbiased, may be negative. As a *loss* it is useless: the expectation of its gradient is 0
      whatever q is. It belongs in the reward.
    - ``"k2"`` = d^2 / 2: biased as a value, but its gradient d * grad log p is an unbiased estimate of the gradient of
      KL(p || q): the one to use as a loss.
    - ``"k3"`` = exp(-d) - 1 + d: unbiased, never negative, low variance. As a loss its gradient,
      (1 - exp(-d)) * grad log p, is in expectation that of the *reverse* KL(q || p), not of KL(p || q).

    No value is clamped: k3 of a token that the reference finds far more likely than the policy does is large.

    Args:
        logprobs: any shape, float32, bfloat16, float16 or float64: log p of the sampled tokens.
        ref_logprobs: same shape: log q.
        kind: "k1", "k2" or "k3".

    Returns:
        The estimates, same shape, float32 (float64 if an input is). Differentiable in both.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices differ, or kind is unknown.
    """
    _checks.floats(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.devices(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.shapes(logprobs.shape, "logprobs", ref_logprobs=ref_logprobs)
    _checks.option("kind", kind, KINDS)
    return _dispatch.choose("kl_estimate", _BACKENDS)(logprobs, ref_logprobs, kind)
