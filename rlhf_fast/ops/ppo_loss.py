"""ppo_loss: the clipped PPO loss per token, with value, entropy and KL terms, padded or packed."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, PPONumbers, PPOResults, PPOTensors
from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._gradients import needs_gradient, with_constants
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._rows import divisor_of, plain
from rlhf_fast.ops.options import PPOOptions, check_aggregation, check_ppo_tensors
from rlhf_fast.ops.sequence_sum import spread, sums_of

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")
_OWN = ("logprobs", "values", "entropy")  # what has a gradient
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
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
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
            1 + clip_high), in which the clipped ratio is a constant, so that no token loses its gradient; or "sapo"
            (arXiv:2511.20347): -A (4 / tau) sigmoid(tau (r - 1)), tau_pos where A > 0 and tau_neg elsewhere, whose
            gradient fades as r leaves 1, and which reads no clip. For both dual_clip must be None.
        ratio: "token" as above, or "sequence" (GSPO, arXiv:2507.18071): r = exp(mean of log r over the sequence's
            unmasked tokens) for all of its tokens, each with the gradient of its own log-probability (GSPO-token,
            which is GSPO where a sequence has one advantage and aggregation is "sequence_mean").
        rollout_logprobs: same shape: the log-probabilities of the engine that sampled, where its arithmetic is not
            that of old_logprobs. The policy term is then multiplied by min(old p / rollout p, rollout_cap), a constant
            (truncated importance sampling; Ionides 2008, doi:10.1198/106186008X320456).
        rollout_cap: > 0.
        tau_pos, tau_neg: > 0; of "sapo" alone.
        advantage_sums: (3,) float64: number, sum and sum of squares of all advantages of the batch, as :func:`gae`
            returns them with ``sums=True``; add those of all micro-batches and ranks up first. The advantages are
            then whitened by them, as :func:`whiten` does it, inside the loss.

    Returns:
        loss: a scalar, float32 (float64 if an input is). With everything masked: 0, with a graph.
        stats: detached scalars.

            - policy_loss, value_loss (with its 0.5), entropy, kl: the terms of the loss before their coefficients,
              aggregated like it (0 for what was not given; entropy and kl also when their coefficient is 0);
            - ratio_mean; clip_fraction and value_clip_fraction (tokens where the clipped side was the larger, in
              "cispo" where the ratio was clipped, in "sapo" none); dual_clip_fraction (where that bound held);
              approx_kl, mean of old - new; approx_kl_k3, mean of r - 1 - log r, both of single tokens;
              rollout_weight and rollout_clip_fraction (tokens at rollout_cap): means over unmasked tokens, divided by
              ``denominator`` if that is given and aggregation is "token_mean", so that they add up as well;
            - ratio_max, ratio_min, and ratio_p05 and ratio_p95, the range of all but one in twenty on either side
              (from counts between log-ratios 0, 1/128, 1/64, ... 1/2, interpolated); explained_variance =
              1 - var(R - V) / var(R), 0 when var(R) is 0: of this call.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, a name is unknown, or a tensor that a
            term needs is missing.
    """
    _checks.floats(logprobs=logprobs)
    options = PPOOptions(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, value_clip=value_clip, value_coef=value_coef,
        entropy_coef=entropy_coef, kl_coef=kl_coef, kl=kl, aggregation=aggregation, objective=objective, ratio=ratio,
        rollout_cap=rollout_cap,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
    )  # fmt: skip
    tensors = PPOTensors(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, values=values, old_values=old_values,
        returns=returns, entropy=entropy, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, mask=mask,
        weights=None, log_ratios=None, advantage_sums=advantage_sums,
    )  # fmt: skip
    check_ppo_tensors(tensors, options, cu_seqlens, "logprobs", logprobs.shape)
    check_aggregation(options, logprobs, cu_seqlens, denominator)
    return loss_and_stats(tensors, options, cu_seqlens, denominator)


def loss_and_stats(
    tensors: PPOTensors, options: PPOOptions, cu_seqlens: Tensor | None, denominator: float | Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of tensors and options that have been checked."""
    given = [x for x in tensors.per_token if x is not None]
    dtype, widest = common_dtype(given)
    backend = dispatch.choose("ppo_loss", BACKENDS, widest)
    if backend == "reference":
        return reference.ppo_loss(tensors, options, cu_seqlens, denominator)
    weights, divisor = shares(tensors.old_logprobs, tensors.mask, cu_seqlens, options.aggregation, denominator)
    log_ratios = sequence_log_ratios(tensors, cu_seqlens, backend) if options.ratio == "sequence" else None
    call = PPOCall(
        of_tokens=options.aggregation == "token_mean",
        numbers=options.numbers().pack(),
        needs=[
            needs_gradient(tensors.logprobs),
            options.value_coef != 0 and needs_gradient(tensors.values),
            options.entropy_coef != 0 and needs_gradient(tensors.entropy),
        ],
        dtype=dtype,
        backend=backend,
    )
    tensors = with_constants(tensors, _OWN)
    if weights is not None or log_ratios is not None:
        tensors = tensors._replace(weights=weights, log_ratios=log_ratios)
    loss, stats, *_ = _op(*tensors, *divisor, *call)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


def common_dtype(tensors: list[Tensor]) -> tuple[torch.dtype, Tensor]:
    """Dtype that holds all of these floating-point tensors, and the one to choose a backend by: the first of float64,
    else the first."""
    dtype = functools.reduce(torch.promote_types, {x.dtype for x in tensors})
    if dtype != torch.float64:
        return dtype, tensors[0]
    return dtype, next(x for x in tensors if x.dtype == torch.float64)


def shares(
    like: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: str,
    denominator: float | Tensor | None,
) -> tuple[Tensor | None, Denominator]:
    """Weights of tokens in the shape of ``like`` (None: 1), and the divisor of the sum of their terms."""
    divisor = divisor_of(denominator)
    if aggregation == "token_mean":
        return None, divisor
    lengths = sequence_lengths(like, mask, cu_seqlens)  # (B,)
    if denominator is None:
        divisor = Denominator(tensor=(lengths > 0).sum())
    if aggregation == "sequence_sum_mean":
        return None, divisor
    return spread(1.0 / lengths.clamp(min=1).float(), like, cu_seqlens), divisor


def sequence_lengths(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Number of unmasked tokens of each sequence, (B,). Waits for no device."""
    if cu_seqlens is None:
        return like.new_full((like.shape[0],), like.shape[1], dtype=torch.int64) if mask is None else mask.sum(1)
    if mask is None:
        return cu_seqlens.diff()
    cumulative = torch.nn.functional.pad(mask.cumsum(0), (1, 0))  # (N + 1,)
    return cumulative[cu_seqlens.long()].diff()


def sequence_log_ratios(tensors: PPOTensors, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    """Mean of logprobs - old_logprobs over the unmasked tokens of each token's sequence, in float32."""
    assert tensors.logprobs is not None
    log_ratios = tensors.logprobs.detach().float() - tensors.old_logprobs.detach().float()
    lengths = sequence_lengths(log_ratios, tensors.mask, cu_seqlens)  # (B,)
    totals = sums_of(log_ratios, tensors.mask, cu_seqlens, lengths.shape[0], backend)
    return spread(totals / lengths.clamp(min=1), log_ratios, cu_seqlens)


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend: forward, scale, and how many tokens are a range (see csrc/common/ppo_loss.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import ppo_loss

        return ppo_loss
    return compiled.PPOLoss(backend)


class PPOCall(NamedTuple):
    """Arguments of the registered op beside its tensors and its divisor."""

    of_tokens: bool  # what divides the terms divides the statistics too; else the number of unmasked tokens does
    numbers: list[float]  # PPONumbers
    needs: list[bool]  # gradients
    dtype: torch.dtype  # in which kernels read the tensors
    backend: str


@flattened
def ppo_loss_forward(
    tensors: PPOTensors, divisor: Denominator, call: PPOCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), stats (17,), inverse () of what divides the loss's terms, and the gradients of their sum in logprobs,
    values and entropy: float32, empty if not needed."""
    run, like = kernels(call.backend), tensors.old_logprobs
    x = PPOTensors._make([plain(x, dtype or call.dtype) for x, dtype in zip(tensors, _DTYPES, strict=True)])
    of_terms = divisor if divisor.tensor is None else Denominator(tensor=plain(divisor.tensor, torch.float32))
    of_tokens = of_terms if call.of_tokens else Denominator()
    new = functools.partial(like.new_empty, dtype=torch.float32)
    gradients = [compiled.new_like(like, torch.float32) if needed else None for needed in call.needs]
    ranges = -(-like.numel() // run.range_size(like.device))
    partials = like.new_empty(ranges, run.SUMS, dtype=torch.float64)
    results = PPOResults._make((new(()), new(len(STATS)), new(()), *gradients, partials))
    run.forward(x, PPONumbers.unpack(call.numbers), of_terms, of_tokens, results)
    in_logprobs, in_values, in_entropy = (new(0) if g is None else g for g in gradients)
    return results.loss, results.stats, results.inverse, in_logprobs, in_values, in_entropy


_OTHER = {"mask": torch.bool, "weights": torch.float32, "log_ratios": torch.float32, "advantage_sums": torch.float64}
_DTYPES = [_OTHER.get(name) for name in PPOTensors._fields]  # None: the call's


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
    """upstream * inverse * the gradients that ppo_loss_forward returned, in the dtypes of what they are in; empty where
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
    gradients, own = others[: len(_OWN)], others[len(_OWN) : 2 * len(_OWN)]
    given = zip(own, gradients, strict=True)
    return tuple(inverse.new_empty(0) if x is None else torch.empty_like(g, dtype=x.dtype) for x, g in given)


_scaled = Op(ppo_loss_gradients, _fake_gradients)


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
