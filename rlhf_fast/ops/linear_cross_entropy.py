"""linear_cross_entropy: cross_entropy of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, dispatch, reference
from rlhf_fast.ops._gradients import in_x
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._sweep import sweep
from rlhf_fast.ops.cross_entropy import check_terms, smoothed_losses
from rlhf_fast.ops.linear_token_logprobs import LinearInputs, Problem, in_its_own_dtypes, linear_token_logprobs
from rlhf_fast.ops.lm_head import whole_rows_pay
from rlhf_fast.ops.reference import divide
from rlhf_fast.ops.token_logprobs import BACKENDS

# torch.library reads the annotations of registered functions and knows no other form of Optional.


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """:func:`cross_entropy` straight from the hidden states.

    Equal to :func:`cross_entropy` of the logits hidden @ weight.T + bias after logit_scale and softcap (as in
    :func:`token_logprobs`), with the product in float32 at least (autocast does not change it). Differentiable in
    hidden, weight, bias and the adapter; the forward pass computes their gradients too, as in
    :func:`linear_ppo_loss`: three products, two with a frozen weight, none for rows that do not count.

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``hidden[:, :-1]``
    with ``tokens[:, 1:]`` and ``mask[:, 1:]``, as :func:`token_logprobs` says.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; its dtype may differ from that of hidden.
        tokens: (...), int32 or int64, in [0, V) or ignore_index.
        bias: (V,) or None.
        lora: an adapter of the lm_head, as in :func:`linear_token_logprobs`.
        softcap: > 0, or None; logit_scale: > 0.
        mask: (...), bool, or None for all. A row counts when it is unmasked and its token is not ignore_index; any
            other row gets gradient exactly 0, adds nothing to those of weight and bias, and may hold anything.
        ignore_index, denominator, label_smoothing, z_loss: as in :func:`cross_entropy`.

    Returns:
        A scalar, float32 (float64 if hidden or weight is); 0, with a graph, when no row counts.

    Raises:
        TypeError, ValueError: as :func:`cross_entropy`, and when H or V do not agree between the arguments.
    """
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(hidden=hidden, weight=weight, tokens=tokens, bias=bias, mask=mask)
    _checks.labels(hidden.shape[:-1], "hidden", weight.shape[0], tokens=tokens, mask=mask, ignore_index=ignore_index)
    _checks.denominators(denominator)
    check_terms(softcap, logit_scale, label_smoothing, z_loss)
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    backend = dispatch.choose("linear_cross_entropy", BACKENDS, weight if weight.dtype == torch.float64 else hidden)
    a, b, scaling = lora or (None, None, 0.0)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias, a, b)]
    pays = backend != "reference" and whole_rows_pay(tokens.numel(), weight.shape[0], hidden.device)
    more = label_smoothing != 0 or z_loss != 0
    if more and backend == "reference":
        return reference.linear_cross_entropy(
            hidden, weight, tokens, bias=bias, lora=lora, softcap=softcap, logit_scale=logit_scale, mask=mask,
            ignore_index=ignore_index, denominator=denominator, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
    if more or (any(needs) and pays):
        inputs = LinearInputs(
            hidden=hidden, weight=weight, tokens=tokens, bias=bias, a=a, b=b, scaling=float(scaling),
            temperatures=None, temperature=1.0, softcap=softcap, logit_scale=float(logit_scale),
        )  # fmt: skip
        total, *_ = _op(*inputs, counted, float(label_smoothing), float(z_loss), needs, True, backend)
    else:
        logprobs, _ = linear_token_logprobs(
            hidden, weight, tokens, bias=bias, lora=lora, softcap=softcap, logit_scale=logit_scale, mask=counted
        )
        total = -logprobs.sum()
    return divide(total, counted.sum(), denominator)


@in_its_own_dtypes
@flattened
def linear_cross_entropy_forward(
    inputs: LinearInputs,
    mask: Tensor,
    label_smoothing: float,
    z_loss: float,
    needs: list[bool],
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the rows' losses (), and its gradients in hidden, weight, bias, a and b: float32, empty if not needed.

    ``inplace_backward``: the backward pass may write over those gradients; the caller reads only the sum.
    """
    problem = Problem(inputs, mask, backend)
    losses = torch.zeros(problem.rows, device=problem.device)
    more, each = label_smoothing != 0 or z_loss != 0, -label_smoothing / problem.vocabulary

    def upstream(rows: slice, results: list[Tensor], logits: Tensor) -> tuple[Tensor | None, ...]:
        logprobs = results[0]
        if not more:
            losses[rows] = -logprobs
            return torch.full_like(logprobs, -1.0), None
        left = None if problem.mask is None else problem.mask[rows]
        numbers = inputs.softcap, inputs.logit_scale, label_smoothing, z_loss
        losses[rows], in_log_sum = smoothed_losses(logits, tuple(results), left, *numbers)
        in_each = torch.full_like(logprobs, each) if label_smoothing else None
        return torch.full_like(logprobs, label_smoothing - 1), None, in_log_sum, in_each

    _, _, (first, second, third, fourth, fifth) = sweep(problem, needs, upstream)
    return losses.sum(), first, second, third, fourth, fifth


_OWN = ("hidden", "weight", "bias", "a", "b")  # what has a gradient
_PLACES = places(linear_cross_entropy_forward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs, ctx.inplace = inputs[_PLACES["needs"]], inputs[_PLACES["inplace_backward"]]
    own = [inputs[_PLACES[name]] if needed else None for name, needed in zip(_OWN, needs, strict=True)]
    ctx.save_for_backward(*own, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    saved = ctx.saved_tensors  # once: a checkpoint gives them once
    own, gradients = saved[: len(_OWN)], saved[len(_OWN) :]
    given = zip(_OWN, own, gradients, strict=True)
    return {name: in_x(upstream, g, x, ctx.inplace) for name, x, g in given if x is not None}


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    own, needs = [args[_PLACES[name]] for name in _OWN], args[_PLACES["needs"]]
    new = own[0].new_empty
    shapes = [x.shape if x is not None and needed else 0 for x, needed in zip(own, needs, strict=True)]
    return tuple(new(shape, dtype=torch.float32) for shape in ((), *shapes))


_op = Op(linear_cross_entropy_forward, _fake_forward, _setup_context, _backward)
