"""ppo_loss: the clipped PPO loss per token, with value, entropy and KL terms, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_fast.ops import _checks, _dispatch, reference
from rlhf_fast.ops.kl_estimate import KINDS

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_mean")
BACKENDS = ("reference",)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
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
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    aggregation: str = "token_mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO (Schulman et al., arXiv:1707.06347, equation 7) on tokens, with the terms that RLHF adds.

    Per unmasked token, with r = exp(clamp(logprobs - old_logprobs, -20, 20)) and A the advantage:

        policy  = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -A dual_clip if given
        value   = 0.5 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)
        loss    = policy + value_coef * value - entropy_coef * entropy + kl_coef * kl_estimate(logprobs, ref_logprobs)

    each aggregated to one number. Gradients flow to logprobs, values and entropy; everything else is a constant.

    Args:
        logprobs, old_logprobs, advantages: (B, T) padded, or (N,); float32, bfloat16, float16 or float64.
        values, old_values, returns: same shape; the value loss needs values and returns, and old_values unless
            value_clip is None. Without values there is no value loss.
        mask: same shape, bool, or None for all. Where False, nothing is added, the gradient is exactly 0 and every
            input may hold anything.
        cu_seqlens: (B + 1,), int32 or int64, for (N,) inputs: sequence b is [cu_seqlens[b], cu_seqlens[b + 1]).
        clip_low, clip_high: >= 0. Different ones: DAPO, arXiv:2503.14476.
        dual_clip: > 1, or None (arXiv:1912.09729).
        value_clip: >= 0, or None for the plain squared error.
        value_coef, entropy_coef, kl_coef: weights of the terms; value_coef and kl_coef >= 0.
        entropy: same shape, as :func:`token_logprobs` returns it; needed when entropy_coef is not 0.
        ref_logprobs: same shape; needed when kl_coef is not 0.
        kl: "k1", "k2" or "k3"; :func:`kl_estimate` says which is fit for a loss.
        aggregation: "token_mean": sum over unmasked tokens / their number. "sequence_mean": each sequence's token
            mean, averaged over sequences. "sequence_sum_mean": each sequence's token sum, averaged over sequences.
            A sequence without an unmasked token is not counted.
        denominator: what to divide by instead of this call's number of unmasked tokens (resp. sequences): a number
            > 0 or a tensor of shape (). With the number of the whole batch, the losses (and gradients) of
            micro-batches add up to those of the batch. A tensor of 0 counts as 1.

    Returns:
        loss: a scalar, float32 (float64 if an input is). With everything masked: 0, with a graph.
        stats: detached scalars.

            - policy_loss, value_loss (with its 0.5), entropy, kl: the terms of the loss before their coefficients,
              aggregated like it (0 for what was not given; entropy and kl also when their coefficient is 0);
            - ratio_mean; clip_fraction and value_clip_fraction (tokens where the clipped side was the larger);
              approx_kl, mean of old - new; approx_kl_k3, mean of r - 1 - log r: means over unmasked tokens, divided
              by ``denominator`` if that is given and aggregation is "token_mean", so that they add up as well;
            - ratio_max, and explained_variance = 1 - var(R - V) / var(R), 0 when var(R) is 0: of this call.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, a name is unknown, or a tensor that a
            term needs is missing.
    """
    tensors = {
        "logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values,
        "old_values": old_values, "returns": returns, "entropy": entropy, "ref_logprobs": ref_logprobs,
    }  # fmt: skip
    _checks.floats(logprobs=logprobs)
    check_tensors(logprobs.shape, "logprobs", tensors, mask, cu_seqlens)
    check_terms(values, old_values, returns, value_clip, ref_logprobs, kl_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError("entropy: None, expected a tensor because entropy_coef is not 0")
    check_numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, kl)
    check_aggregation(logprobs, cu_seqlens, aggregation, denominator)
    _dispatch.choose("ppo_loss", BACKENDS, logprobs)
    return reference.ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, cu_seqlens, clip_low, clip_high,
        dual_clip, value_clip, value_coef, entropy, entropy_coef, ref_logprobs, kl_coef, kl, aggregation, denominator,
    )  # fmt: skip


# The checks that linear_ppo_loss shares.


def check_tensors(
    shape: Sequence[int],
    like: str,
    tensors: dict[str, Tensor | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """All per-token tensors have the given shape; the first of ``tensors`` gives the device."""
    _checks.floats(**tensors)
    _checks.shapes(shape, like, **tensors)
    _checks.masks(shape, like, mask)
    _checks.devices(**tensors, mask=mask, cu_seqlens=cu_seqlens)


def check_terms(
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_clip: float | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
) -> None:
    """Every term that is asked for has the tensors that it needs."""
    if values is None and (returns is not None or old_values is not None):
        raise ValueError("values: None, expected a tensor because returns or old_values is given")
    if values is not None and returns is None:
        raise ValueError("returns: None, expected a tensor because values is given")
    if values is not None and value_clip is not None and old_values is None:
        raise ValueError("old_values: None, expected a tensor because value_clip is not None")
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError("ref_logprobs: None, expected a tensor because kl_coef is not 0")


def check_numbers(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    kl: str,
) -> None:
    _checks.number("clip_low", clip_low, least=0)
    _checks.number("clip_high", clip_high, least=0)
    if dual_clip is not None:
        _checks.number("dual_clip", dual_clip, above=1)
    if value_clip is not None:
        _checks.number("value_clip", value_clip, least=0)
    _checks.number("value_coef", value_coef, least=0)
    _checks.number("entropy_coef", entropy_coef)
    _checks.number("kl_coef", kl_coef, least=0)
    _checks.option("kl", kl, KINDS)


def check_aggregation(
    tokens: Tensor, cu_seqlens: Tensor | None, aggregation: str, denominator: float | Tensor | None
) -> None:
    """``tokens`` is any per-token tensor: it says whether sequences can be told apart."""
    _checks.option("aggregation", aggregation, AGGREGATIONS)
    _checks.denominators(denominator)
    if cu_seqlens is not None or tokens.dim() != 1:
        _checks.sequences("logprobs", tokens, cu_seqlens)
    elif aggregation != "token_mean":
        raise ValueError(f"cu_seqlens: None, expected (B + 1,) because aggregation is {aggregation!r} of (N,) tensors")
