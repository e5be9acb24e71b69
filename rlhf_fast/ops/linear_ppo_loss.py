"""linear_ppo_loss: ppo_loss of the log-probabilities of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, PPONumbers, PPOTensors
from rlhf_fast.ops import _checks, dispatch
from rlhf_fast.ops._gradients import in_x, needs_gradient, with_constants
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._rows import per_row
from rlhf_fast.ops._sweep import sweep
from rlhf_fast.ops.linear_token_logprobs import LinearInputs, Problem, in_its_own_dtypes, linear_token_logprobs
from rlhf_fast.ops.lm_head import whole_rows_pay
from rlhf_fast.ops.options import PPOOptions, check_aggregation, check_ppo_tensors
from rlhf_fast.ops.ppo_loss import (
    BACKENDS,
    STATS,
    PPOCall,
    loss_and_stats,
    ppo_loss_forward,
    shares,
)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
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
    """:func:`ppo_loss` of ``linear_token_logprobs(hidden, weight, tokens, ...)``, entropy included, in one op.

    Gradients flow to hidden, weight, bias, the adapter and values; everything else is a constant. The forward pass
    computes them too: a block of rows at a time, logits, log-probabilities, loss and gradients, so that every product
    is taken once and no more than a bounded workspace of logits exists. (Twice, as
    :func:`linear_token_logprobs` does, for ``ratio="sequence"``, whose ratios are known only after all rows, and
    where a block could hold only a few rows of a large vocabulary.) Masked tokens cost no products.

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``hidden[:, :-1]``
    with ``tokens[:, 1:]``, ``mask[:, 1:]``, and old_logprobs and the rest of those tokens.

    Args:
        hidden: (B, T, H) padded, or (N, H); float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; bias: (V,) or None; lora: as in :func:`linear_token_logprobs`.
        tokens: (B, T) or (N,), int32 or int64, in [0, V).
        old_logprobs, advantages: the shape of tokens. old_logprobs (and ref_logprobs) must have been computed at the
            same temperature, softcap and logit_scale.
        temperature, softcap, logit_scale: as in :func:`token_logprobs`.
        mask: the shape of tokens, bool, or None for all. Where False, nothing is added, gradients are exactly 0, and
            hidden, tokens and all else there may hold anything.
        All others: as in :func:`ppo_loss`.

    Returns:
        loss: a scalar, float32 (float64 if an input is); stats: as :func:`ppo_loss`, entropy always among them.

    Raises:
        TypeError, ValueError: as :func:`linear_token_logprobs` and :func:`ppo_loss`.
    """
    layer = {"hidden": hidden, "weight": weight, "bias": bias, "temperature": temperature, "tokens": tokens}
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(**layer, old_logprobs=old_logprobs)
    _checks.scoring(
        hidden.shape[:-1], "hidden", weight.shape[0], tokens=tokens, mask=mask, temperature=temperature,
        softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    options = PPOOptions(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, value_clip=value_clip, value_coef=value_coef,
        entropy_coef=entropy_coef, kl_coef=kl_coef, kl=kl, aggregation=aggregation, objective=objective, ratio=ratio,
        rollout_cap=rollout_cap,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
    )  # fmt: skip
    tensors = PPOTensors(
        logprobs=None, old_logprobs=old_logprobs, advantages=advantages, values=values, old_values=old_values,
        returns=returns, entropy=None, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs, mask=mask,
        weights=None, log_ratios=None, advantage_sums=advantage_sums,
    )  # fmt: skip
    check_ppo_tensors(tensors, options, cu_seqlens, "tokens", tokens.shape)
    check_aggregation(options, old_logprobs, cu_seqlens, denominator)
    given = [x for x in (*layer.values(), *tensors.per_token) if isinstance(x, Tensor)]
    backend = dispatch.choose("linear_ppo_loss", BACKENDS, next((x for x in given if x.dtype == torch.float64), hidden))
    a, b, scaling = lora or (None, None, 0.0)
    needs = [needs_gradient(x) for x in (hidden, weight, bias, a, b, values if value_coef != 0 else None)]
    pays = backend != "reference" and whole_rows_pay(tokens.numel(), weight.shape[0], hidden.device)
    pays = pays and not _checks.is_low(temperature, mask)
    if any(needs[: len(_OF_LAYER)]) and ratio == "token" and pays:
        temperatures, number = per_row(temperature, tokens.shape)
        inputs = LinearInputs(
            hidden=hidden, weight=weight, tokens=tokens, bias=bias, a=a, b=b, scaling=float(scaling),
            temperatures=temperatures, temperature=number, softcap=softcap, logit_scale=float(logit_scale),
        )  # fmt: skip
        weights, divisor = shares(old_logprobs, mask, cu_seqlens, aggregation, denominator)
        tensors = with_constants(tensors, _OWN)._replace(weights=weights)
        call = PPOCall(
            of_tokens=aggregation == "token_mean", numbers=options.numbers().pack(), needs=needs, dtype=torch.float32,
            backend=backend,
        )  # fmt: skip
        loss, stats, *_ = _op(*inputs, *tensors, *divisor, *call, True)
        return loss, dict(zip(STATS, stats.unbind(), strict=True))
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, tokens, bias=bias, lora=lora, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale, mask=mask,
    )  # fmt: skip
    return loss_and_stats(tensors._replace(logprobs=logprobs, entropy=entropy), options, cu_seqlens, denominator)


@in_its_own_dtypes
@flattened
def linear_ppo_loss_forward(
    inputs: LinearInputs, tensors: PPOTensors, divisor: Denominator, call: PPOCall, inplace_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), stats (17,), inverse () of what divides the loss's terms, and the gradients of their sum in hidden,
    weight, bias, a, b and values: float32, empty if not needed.

    ``inplace_backward``: the backward pass may write over those gradients; the caller reads only loss and stats.
    """
    problem = Problem(inputs, tensors.mask, call.backend)
    kept = tensors.of_rows(problem.gather, problem.mask)
    of_policy = kept._replace(values=None, old_values=None, returns=None)
    entropy_counts = PPONumbers.unpack(call.numbers).entropy_coef != 0

    def upstream(rows: slice, results: list[Tensor], _: Tensor) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy = results[:2]
        mask = None if problem.mask is None else problem.mask[rows]
        part = of_policy.of_rows(lambda x: x[rows], mask)._replace(logprobs=logprobs, entropy=entropy)
        of_part = call._replace(needs=[True, False, entropy_counts])
        _, _, _, in_logprobs, _, in_entropy = ppo_loss_forward(*part, *divisor, *of_part)
        return in_logprobs, in_entropy if entropy_counts else None

    *of_layer, of_values = call.needs
    logprobs, entropy, in_layer = sweep(problem, of_layer, upstream)
    whole = kept._replace(logprobs=logprobs, entropy=entropy)
    of_whole = call._replace(needs=[False, of_values, False])
    loss, stats, inverse, _, in_values, _ = ppo_loss_forward(*whole, *divisor, *of_whole)
    if of_values and tensors.values is not None:
        in_values = problem.spread(in_values).view(tensors.values.shape)
    in_hidden, in_weight, in_bias, in_a, in_b = in_layer
    return loss, stats, inverse, in_hidden, in_weight, in_bias, in_a, in_b, in_values


_OF_LAYER = ("hidden", "weight", "bias", "a", "b")
_OWN = (*_OF_LAYER, "values")  # what has a gradient
_PLACES = places(linear_ppo_loss_forward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs, ctx.inplace = inputs[_PLACES["needs"]], inputs[_PLACES["inplace_backward"]]
    own = [inputs[_PLACES[name]] if needed else None for name, needed in zip(_OWN, needs, strict=True)]
    ctx.save_for_backward(*own, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    own, inverse, gradients = saved[: len(_OWN)], saved[len(_OWN)], saved[len(_OWN) + 1 :]
    upstream = upstream * inverse
    given = zip(_OWN, own, gradients, strict=True)
    return {name: in_x(upstream, g, x, ctx.inplace) for name, x, g in given if x is not None}


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    own, needs = [args[_PLACES[name]] for name in _OWN], args[_PLACES["needs"]]
    new = functools.partial(own[0].new_empty, dtype=torch.float32)
    gradients = (new(x.shape if x is not None and needed else 0) for x, needed in zip(own, needs, strict=True))
    return new(()), new(len(STATS)), new(()), *gradients


_op = Op(linear_ppo_loss_forward, _fake_forward, _setup_context, _backward)
