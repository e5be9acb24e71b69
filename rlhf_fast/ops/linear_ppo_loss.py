"""linear_ppo_loss: ppo_loss of the log-probabilities of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, dispatch
from rlhf_fast.ops._gradients import in_x
from rlhf_fast.ops._library import Op, places
from rlhf_fast.ops._rows import per_row
from rlhf_fast.ops._sweep import sweep
from rlhf_fast.ops.linear_token_logprobs import Problem, in_its_own_dtypes, linear_token_logprobs
from rlhf_fast.ops.lm_head import whole_rows_pay
from rlhf_fast.ops.ppo_loss import (
    BACKENDS,
    STATS,
    check_aggregation,
    check_numbers,
    check_objective,
    check_tensors,
    check_terms,
    numbers,
    ppo_loss,
    ppo_loss_forward,
    shares,
)

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045


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
    tensors = {
        "hidden": hidden, "weight": weight, "bias": bias, "temperature": temperature, "tokens": tokens,
    }  # fmt: skip
    per_token = {
        "old_logprobs": old_logprobs, "advantages": advantages, "values": values, "old_values": old_values,
        "returns": returns, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs,
    }  # fmt: skip
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(**tensors, old_logprobs=old_logprobs)
    _checks.scoring(hidden.shape[:-1], "hidden", weight.shape[0], tokens, mask, temperature, softcap, logit_scale)
    check_tensors(tokens.shape, "tokens", per_token, mask, cu_seqlens)
    check_terms(values, old_values, returns, value_clip, ref_logprobs, kl_coef)
    check_numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, kl)
    check_objective(objective, ratio, dual_clip, rollout_cap, advantage_sums)
    check_aggregation(old_logprobs, cu_seqlens, aggregation, denominator, ratio)
    a, b, scaling = lora or (None, None, 0.0)
    given = [x for x in (*tensors.values(), *per_token.values()) if isinstance(x, Tensor) and x.is_floating_point()]
    widest = next((x for x in given if x.dtype == torch.float64), hidden)
    backend = dispatch.choose("linear_ppo_loss", BACKENDS, widest)
    differentiable = (hidden, weight, bias, a, b, values if value_coef != 0 else None)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable]
    pays = backend != "reference" and whole_rows_pay(tokens.numel(), weight.shape[0], hidden.device)
    pays = pays and not _checks.is_low(temperature, mask)
    if any(needs[:5]) and ratio == "token" and pays:
        constants = [
            None if x is None else x.detach()
            for x in (old_logprobs, advantages, old_values, returns, ref_logprobs, rollout_logprobs)
        ]
        temperatures, number = per_row(temperature, tokens.shape)
        weights, there, divisor = shares(old_logprobs, mask, cu_seqlens, aggregation, denominator)
        loss, stats, *_ = _op(
            hidden, weight, bias, a, b, values, tokens, float(scaling), temperatures, number, softcap,
            float(logit_scale), *constants, mask, weights,
            None if advantage_sums is None else advantage_sums.detach(), there, divisor, aggregation == "token_mean",
            numbers(clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, rollout_cap),
            kl, objective, needs, True, backend,
        )  # fmt: skip
        return loss, dict(zip(STATS, stats.unbind(), strict=True))
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, tokens, bias, lora, temperature, softcap, logit_scale, mask
    )
    return ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, cu_seqlens, clip_low, clip_high,
        dual_clip, value_clip, value_coef, entropy, entropy_coef, ref_logprobs, kl_coef, kl, aggregation, denominator,
        objective, ratio, rollout_logprobs, rollout_cap, advantage_sums,
    )  # fmt: skip


@in_its_own_dtypes
def linear_ppo_loss_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    a: Optional[Tensor],
    b: Optional[Tensor],
    values: Optional[Tensor],
    tokens: Tensor,
    scaling: float,
    temperatures: Optional[Tensor],
    temperature: float,
    softcap: Optional[float],
    logit_scale: float,
    old_logprobs: Tensor,
    advantages: Tensor,
    old_values: Optional[Tensor],
    returns: Optional[Tensor],
    ref_logprobs: Optional[Tensor],
    rollout_logprobs: Optional[Tensor],
    mask: Optional[Tensor],
    weights: Optional[Tensor],
    advantage_sums: Optional[Tensor],
    denominator: Optional[Tensor],
    number: float,
    of_tokens: bool,
    options: list[float],
    kl: str,
    objective: str,
    needs: list[bool],
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), stats (17,), the divisor of the loss's terms, inverse (), and the gradients of their sum in hidden,
    weight, bias, a, b and values: float32, empty if not needed.

    ``inplace_backward``: the backward pass may write over those gradients; the caller reads only loss and stats.
    """
    problem = Problem(
        hidden, weight, tokens, bias, a, b, scaling, temperatures, temperature, softcap, logit_scale, mask, backend
    )
    given = {
        "values": values, "old_values": old_values, "returns": returns, "old_logprobs": old_logprobs,
        "advantages": advantages, "ref_logprobs": ref_logprobs, "rollout_logprobs": rollout_logprobs,
        "weights": weights,
    }  # fmt: skip
    per_token: dict[str, Any] = {name: problem.gather(x) for name, x in given.items()}
    per_token["mask"] = mask = problem.mask

    def loss_of(
        rows: slice, logprobs: Tensor, entropy: Tensor, per_token: dict[str, Any], needs: list[bool]
    ) -> tuple[Tensor, ...]:
        part: dict[str, Any] = {name: None if x is None else x[rows] for name, x in per_token.items()}
        return ppo_loss_forward(
            **part, logprobs=logprobs, entropy=entropy, log_ratios=None, advantage_sums=advantage_sums,
            denominator=denominator, number=number, of_tokens=of_tokens, options=options, kl=kl, objective=objective,
            needs=needs, dtype=torch.float32, backend=backend,
        )  # fmt: skip

    of_policy = {**per_token, "values": None, "old_values": None, "returns": None}
    entropy_counts = options[5] != 0

    def upstream(rows: slice, results: list[Tensor], _: Tensor) -> tuple[Tensor, Tensor | None]:
        needed = [True, False, entropy_counts]
        _, _, _, in_logprobs, _, in_entropy = loss_of(rows, results[0], results[1], of_policy, needed)
        return in_logprobs, in_entropy if entropy_counts else None

    logprobs, entropy, in_head = sweep(problem, needs[:5], upstream)
    needed = [False, needs[5], False]
    loss, stats, scale, _, in_values, _ = loss_of(slice(None), logprobs, entropy, per_token, needed)
    if needs[5] and values is not None:
        in_values = problem.spread(in_values).view(values.shape)
    first, second, third, fourth, fifth = in_head
    return loss, stats, scale, first, second, third, fourth, fifth, in_values


_OWN = ("hidden", "weight", "bias", "a", "b", "values")  # what has a gradient
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
    own, (inverse, *gradients) = saved[: len(_OWN)], saved[len(_OWN) :]
    upstream = upstream * inverse
    given = zip(_OWN, own, gradients, strict=True)
    return {name: in_x(upstream, g, x, ctx.inplace) for name, x, g in given if x is not None}


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    own, needs = [args[_PLACES[name]] for name in _OWN], args[_PLACES["needs"]]
    new = functools.partial(own[0].new_empty, dtype=torch.float32)
    gradients = (new(x.shape if x is not None and needed else 0) for x, needed in zip(own, needs, strict=True))
    return new(()), new(len(STATS)), new(()), *gradients


_op = Op(linear_ppo_loss_forward, _fake_forward, _setup_context, _backward)
