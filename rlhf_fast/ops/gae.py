"""gae: generalised advantage estimation over padded or packed token sequences."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference

BACKENDS = ("reference",)


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman et al., arXiv:1506.02438, equation 16), from the last token to the first:

        delta_t = r_t + gamma * V_next - V_t,    A_t = delta_t + gamma * lam * A_next,    return_t = A_t + V_t,

    where "next" is the next *unmasked* token of the sequence: masked tokens (padding, tool output inside a response)
    are stepped over as if they were not there, without an extra factor of gamma or lam. After the last unmasked token
    V is ``bootstrap``, or 0 (the sequence ended), and A is 0.

    Args:
        rewards: (B, T) padded, or (N,) packed with ``cu_seqlens``; float32, bfloat16, float16 or float64. A reward at
            a masked position is ignored, not moved to a neighbour: put the score on an unmasked token.
        values: same shape.
        gamma, lam: in [0, 1].
        mask: same shape, bool, or None for all. Where False, both outputs and the gradients are exactly 0 and the
            inputs may hold anything.
        cu_seqlens: (B + 1,), int32 or int64: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]).
        bootstrap: (B,): the value after each sequence's last unmasked token, for responses that were cut off.

    Returns:
        advantages and returns, the shape of rewards, float32 (float64 if rewards or values is). Not whitened.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, gamma or lam is out of range, or cu_seqlens does not run from 0
            to N without falling (its values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(rewards=rewards, values=values, bootstrap=bootstrap)
    _checks.devices(rewards=rewards, values=values, mask=mask, cu_seqlens=cu_seqlens, bootstrap=bootstrap)
    sequences = _checks.sequences("rewards", rewards, cu_seqlens)
    _checks.shapes(rewards.shape, "rewards", values=values)
    _checks.masks(rewards.shape, "rewards", mask)
    _checks.shapes((sequences,), "the number of sequences", bootstrap=bootstrap)
    _checks.number("gamma", gamma, least=0, most=1)
    _checks.number("lam", lam, least=0, most=1)
    _dispatch.choose("gae", BACKENDS, rewards)
    return reference.gae(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
