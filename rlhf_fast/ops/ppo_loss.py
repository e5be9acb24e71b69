"""ppo_loss: the clipped PPO loss per token, with value, entropy and KL terms, padded or packed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, PPOInputs, PPOOptions
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op, places
from rlhf_fast.ops._rows import plain
from rlhf_fast.ops.kl_estimate import ESTIMATES, KINDS
from rlhf_fast.ops.sequence_sum import spread, sums_of

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_mean")
BACKENDS = ("cpu", "cuda", "triton", "reference")
OBJECTIVES = ("clip", "cispo")
RATIOS = ("token", "sequence")
STATS = (  # as csrc/common/ppo_loss.h orders them, after the loss
    "policy_loss value_loss entropy kl ratio_mean ratio_max ratio_min ratio_p05 ratio_p95 clip_fraction "
    "dual_clip_fraction value_clip_fraction approx_kl approx_kl_k3 rollout_weight rollout_clip_fraction "
    "explained_variance"
).split()


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
    objective: str = "clip",
    ratio: str = "token",
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    advantage_sums: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped PPO (Schulman et al., arXiv:1707.06347, equation 7) on tokens, with the terms that RLHF adds.

    Per unmasked token, with r = exp(clamp(logprobs - old_logprobs, -20, 20)) and A the advantage:

        policy  = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and where A < 0 at most -A dual_clip if given
        value   = 0.5 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)
        loss    = policy + value_coef * value - entropy_coef * entropy + kl_coef * kl_estimate(logprobs, ref_logprobs)

    each aggregated to one number. Gradients flow to logprobs, values and entropy; everything else is a constant.

    Position t of every input is of the same predicted token, as :func:`token_logprobs` scores it: shifted already.
    Values are those of the states that the tokens are predicted from.

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
            micro-batches add up to those of the batch. A tensor of 0 counts as 1. Dr. GRPO (arXiv:2503.20783):
            "token_mean" with the number of sequences times the longest possible response.
        objective: "clip" as above, or "cispo" (MiniMax-M1, arXiv:2506.13585): -A log p * clip(r, 1 - clip_low,
            1 + clip_high), in which the clipped ratio is a constant, so that no token loses its gradient; then
            dual_clip must be None.
        ratio: "token" as above, or "sequence" (GSPO, arXiv:2507.18071): r = exp(mean of log r over the sequence's
            unmasked tokens) for all of its tokens, each with the gradient of its own log-probability (GSPO-token,
            which is GSPO where a sequence has one advantage and aggregation is "sequence_mean").
        rollout_logprobs: same shape: the log-probabilities of the engine that sampled, where its arithmetic is not
            that of old_logprobs. The policy term is then multiplied by min(old p / rollout p, rollout_cap), a constant
            (truncated importance sampling; Ionides 2008, doi:10.1198/106186008X320456).
        rollout_cap: > 0.
        advantage_sums: (3,) float64: number, sum and sum of squares of all advantages of the batch, as :func:`gae`
            returns them with ``sums=True``; add those of all micro-batches and ranks up first. The advantages are
            then whitened by them, as :func:`whiten` does it, inside the loss.

    Returns:
        loss: a scalar, float32 (float64 if an input is). With everything masked: 0, with a graph.
        stats: detached scalars.

            - policy_loss, value_loss (with its 0.5), entropy, kl: the terms of the loss before their coefficients,
              aggregated like it (0 for what was not given; entropy and kl also when their coefficient is 0);
            - ratio_mean; clip_fraction and value_clip_fraction (tokens where the clipped side was the larger, in
              "cispo" where the ratio was clipped); dual_clip_fraction (where that bound held); approx_kl, mean of
              old - new; approx_kl_k3, mean of r - 1 - log r, both of single tokens; rollout_weight and
              rollout_clip_fraction (tokens at rollout_cap): means over unmasked tokens, divided by ``denominator``
              if that is given and aggregation is "token_mean", so that they add up as well;
            - ratio_max, ratio_min, and ratio_p05 and ratio_p95, the range of all but one in twenty on either side
              (from counts between log-ratios 0, 1/128, 1/64, ... 1/2, interpolated); explained_variance =
              1 - var(R - V) / var(R), 0 when var(R) is 0: of this call.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, a name is unknown, or a tensor that a
            term needs is missing.
    """
    tensors = {
        "logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "values": values,
        "old_values": old_values, "returns": returns, "entropy": entropy, "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }  # fmt: skip
    _checks.floats(logprobs=logprobs)
    check_tensors(logprobs.shape, "logprobs", tensors, mask, cu_seqlens)
    check_terms(values, old_values, returns, value_clip, ref_logprobs, kl_coef)
    if entropy_coef != 0 and entropy is None:
        raise ValueError("entropy: None, expected a tensor because entropy_coef is not 0")
    check_numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, kl)
    check_objective(objective, ratio, dual_clip, rollout_cap, advantage_sums)
    check_aggregation(logprobs, cu_seqlens, aggregation, denominator, ratio)
    given = [x for x in tensors.values() if x is not None]
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in given])
    backend = dispatch.choose("ppo_loss", BACKENDS, next((x for x in given if x.dtype == torch.float64), logprobs))
    if backend == "reference":
        return reference.ppo_loss(
            logprobs, old_logprobs, advantages, values, old_values, returns, mask, cu_seqlens, clip_low, clip_high,
            dual_clip, value_clip, value_coef, entropy, entropy_coef, ref_logprobs, kl_coef, kl, aggregation,
            denominator, objective, ratio, rollout_logprobs, rollout_cap, advantage_sums,
        )  # fmt: skip
    weights, there, number = shares(logprobs, mask, cu_seqlens, aggregation, denominator)
    log_ratios = None
    if ratio == "sequence":
        log_ratios = sequence_log_ratios(logprobs, old_logprobs, mask, cu_seqlens, backend)
    constants = [
        None if x is None else x.detach()
        for x in (old_logprobs, advantages, old_values, returns, ref_logprobs, rollout_logprobs)
    ]
    differentiable = (logprobs, values if value_coef != 0 else None, entropy if entropy_coef != 0 else None)
    loss, stats, *_ = _op(
        logprobs, values, entropy, *constants, mask, weights, log_ratios,
        None if advantage_sums is None else advantage_sums.detach(), there, number, aggregation == "token_mean",
        numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, rollout_cap),
        kl, objective, [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable], dtype,
        backend,
    )  # fmt: skip
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def numbers(
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    value_clip: float | None,
    value_coef: float,
    entropy_coef: float,
    kl_coef: float,
    rollout_cap: float,
) -> list[float]:
    """As csrc/common/ppo_loss.h has them, with a number in place of None."""
    value_clip = -1.0 if value_clip is None else value_clip
    return [clip_low, clip_high, dual_clip or 0.0, value_clip, value_coef, entropy_coef, kl_coef, rollout_cap]


def shares(
    like: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: str,
    denominator: float | Tensor | None,
) -> tuple[Tensor | None, Tensor | None, float]:
    """The weights of tokens in the shape of ``like`` (None: 1), and what divides: a tensor, or a number, 0 for the
    tokens that count."""
    there = denominator.detach() if isinstance(denominator, Tensor) else None
    number = 0.0 if denominator is None or there is not None else float(denominator)
    if aggregation == "token_mean":
        return None, there, number
    lengths = sequence_lengths(like, mask, cu_seqlens)  # (B,)
    if denominator is None:
        there = (lengths > 0).sum()
    if aggregation == "sequence_sum_mean":
        return None, there, number
    return spread(1.0 / lengths.clamp(min=1).float(), like, cu_seqlens), there, number


def sequence_lengths(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B,): how many tokens of each sequence are unmasked. Waits for no device."""
    if cu_seqlens is None:
        return like.new_full((like.shape[0],), like.shape[1], dtype=torch.int64) if mask is None else mask.sum(1)
    if mask is None:
        return cu_seqlens.diff()
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # (N + 1,)
    return before[cu_seqlens.long()].diff()


def sequence_log_ratios(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    """Each token's: the mean of logprobs - old_logprobs over its sequence's unmasked tokens, in float32."""
    log_ratios = logprobs.detach().float() - old_logprobs.detach().float()
    lengths = sequence_lengths(logprobs, mask, cu_seqlens)  # (B,)
    totals = sums_of(log_ratios, mask, cu_seqlens, lengths.shape[0], backend)
    return spread(totals / lengths.clamp(min=1), logprobs, cu_seqlens)


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend: forward, scale, and how many tokens are a range (see csrc/common/ppo_loss.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import ppo_loss

        return ppo_loss
    return compiled.PPOLoss(backend)


def ppo_loss_forward(
    logprobs: Tensor,
    values: Optional[Tensor],
    entropy: Optional[Tensor],
    old_logprobs: Tensor,
    advantages: Tensor,
    old_values: Optional[Tensor],
    returns: Optional[Tensor],
    ref_logprobs: Optional[Tensor],
    rollout_logprobs: Optional[Tensor],
    mask: Optional[Tensor],
    weights: Optional[Tensor],
    log_ratios: Optional[Tensor],
    advantage_sums: Optional[Tensor],
    denominator: Optional[Tensor],
    number: float,
    of_tokens: bool,
    options: list[float],
    kl: str,
    objective: str,
    needs: list[bool],
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), stats (17,), the divisor of the loss's terms, inverse (), and the gradients of their sum in logprobs,
    values and entropy: float32, empty if not needed.

    ``weights``: of each token's terms. ``log_ratios``: in place of logprobs - old_logprobs. ``denominator``, or else
    ``number`` if that is not 0, or else the number of unmasked tokens divides the terms; the statistics too if
    ``of_tokens``, else those are divided by the last.
    """

    run = kernels(backend)
    x = PPOInputs(
        logprobs.to(dtype).contiguous(), old_logprobs.to(dtype).contiguous(), advantages.to(dtype).contiguous(),
        plain(values, dtype), plain(old_values, dtype), plain(returns, dtype), plain(entropy, dtype),
        plain(ref_logprobs, dtype), plain(rollout_logprobs, dtype), plain(mask, torch.bool),
        plain(weights, torch.float32), plain(log_ratios, torch.float32), plain(advantage_sums, torch.float64),
    )  # fmt: skip
    low, high, dual, value_clip, value_coef, entropy_coef, kl_coef, cap = options
    estimates = ESTIMATES.index(kl[:2]), ESTIMATES.index("k2" if kl.endswith("+") else kl)
    terms = Denominator(plain(denominator, torch.float32), number)
    gradients = [compiled.new_like(logprobs, torch.float32) if needed else None for needed in needs]
    ranges = -(-logprobs.numel() // run.range_size(logprobs.device))
    new = functools.partial(logprobs.new_empty, dtype=torch.float32)
    loss, stats, inverse = new(()), new(len(STATS)), new(())
    partials = logprobs.new_empty(ranges, run.SUMS, dtype=torch.float64)
    chosen = PPOOptions(
        low, high, dual, value_clip, value_coef, entropy_coef, kl_coef, cap, objective == "cispo", *estimates
    )
    tokens = terms if of_tokens else Denominator(None, 0.0)
    run.forward(x, chosen, terms, tokens, (loss, stats, inverse), gradients, partials)
    in_logprobs, in_values, in_entropy = (new(0) if g is None else g for g in gradients)
    return loss, stats, inverse, in_logprobs, in_values, in_entropy


def ppo_loss_gradients(
    upstream: Tensor,
    inverse: Tensor,
    in_logprobs: Tensor,
    in_values: Tensor,
    in_entropy: Tensor,
    logprobs: Optional[Tensor],
    values: Optional[Tensor],
    entropy: Optional[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """upstream * inverse * the gradients that ppo_loss_forward found, in the dtypes of what they are in; empty where
    that is None. Knows those, so that autograd refuses to go on from here."""
    own = logprobs, values, entropy
    gradients = [None if x is None else g for x, g in zip(own, (in_logprobs, in_values, in_entropy), strict=True)]
    scaled = [None if g is None else compiled.new_like(g) for g in gradients]
    kernels(backend).scale(gradients, upstream, inverse, scaled)
    of_logprobs, of_values, of_entropy = (
        inverse.new_empty(0) if x is None or s is None else s.to(x.dtype) for x, s in zip(own, scaled, strict=True)
    )
    return of_logprobs, of_values, of_entropy


def _fake_gradients(upstream: Tensor, inverse: Tensor, *others: Any) -> tuple[Tensor, ...]:
    found = zip(others[:3], others[3:6], strict=True)
    return tuple(inverse.new_empty(0) if x is None else torch.empty_like(g, dtype=x.dtype) for g, x in found)


_scaled = Op(ppo_loss_gradients, _fake_gradients)


_OWN = ("logprobs", "values", "entropy")  # what has a gradient
_PLACES = places(ppo_loss_forward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs, ctx.backend = inputs[_PLACES["needs"]], inputs[_PLACES["backend"]]
    own = [inputs[_PLACES[name]] if needed else None for name, needed in zip(_OWN, needs, strict=True)]
    ctx.save_for_backward(*own, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    own, (inverse, *gradients) = saved[: len(_OWN)], saved[len(_OWN) :]
    if all(x is None for x in own):
        return {}
    scaled = _scaled(upstream, inverse, *gradients, *own, ctx.backend)
    return {name: g for name, x, g in zip(_OWN, own, scaled, strict=True) if x is not None}


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    logprobs, needs = args[_PLACES["logprobs"]], args[_PLACES["needs"]]
    new = functools.partial(logprobs.new_empty, dtype=torch.float32)
    return new(()), new(len(STATS)), new(()), *(new(logprobs.shape if needed else 0) for needed in needs)


_op = Op(ppo_loss_forward, _fake_forward, _setup_context, _backward)


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


def check_objective(
    objective: str, ratio: str, dual_clip: float | None, rollout_cap: float, advantage_sums: Tensor | None
) -> None:
    _checks.option("objective", objective, OBJECTIVES)
    _checks.option("ratio", ratio, RATIOS)
    if objective == "cispo" and dual_clip is not None:
        raise ValueError(f"dual_clip: {dual_clip}, expected None because objective is 'cispo'")
    _checks.number("rollout_cap", rollout_cap, above=0)
    if advantage_sums is not None and (advantage_sums.shape != (3,) or advantage_sums.dtype != torch.float64):
        dtype = str(advantage_sums.dtype).removeprefix("torch.")
        raise ValueError(
            f"advantage_sums: {dtype} of shape {tuple(advantage_sums.shape)}, expected float64 of shape (3,), "
            "as gae(..., sums=True) returns them"
        )


def check_aggregation(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    aggregation: str,
    denominator: float | Tensor | None,
    ratio: str = "token",
) -> None:
    """``tokens`` is any per-token tensor: it says whether sequences can be told apart."""
    _checks.option("aggregation", aggregation, AGGREGATIONS)
    _checks.denominators(denominator)
    if cu_seqlens is not None or tokens.dim() != 1:
        _checks.sequences("logprobs", tokens, cu_seqlens)
    elif aggregation != "token_mean":
        raise ValueError(f"cu_seqlens: None, expected (B + 1,) because aggregation is {aggregation!r} of (N,) tensors")
    elif ratio == "sequence":
        raise ValueError("cu_seqlens: None, expected (B + 1,) because ratio is 'sequence' of (N,) tensors")
