"""The op that dpo_loss and reward_loss share: a loss of the two rewards of each pair, with gradients and statistics."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, PairInputs, PairOptions
from rlhf_fast.ops import compiled
from rlhf_fast.ops._gradients import in_x
from rlhf_fast.ops._library import Op, places
from rlhf_fast.ops._rows import plain

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")
KINDS = ("logistic", "hinge", "ipo", "kto")  # as csrc/common/pair_loss.h numbers them
STATS = ("accuracy", "margin", "chosen_reward", "rejected_reward")  # after the loss


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    margins: Tensor | None,
    weights: Tensor | None,
    kl: Tensor | None,
    kind: str,
    beta: float,
    agree: float,
    differ: float,
    center_coef: float,
    denominator: float | Tensor | None,
    backend: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    constants = [None if x is None else x.detach() for x in (ref_chosen, ref_rejected, margins, weights, kl)]
    there = denominator.detach() if isinstance(denominator, Tensor) else None
    number = 0.0 if denominator is None or there is not None else float(denominator)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (chosen, rejected)]
    loss, stats, *_ = _op(
        chosen, rejected, *constants, there, number, kind, [beta, agree, differ, center_coef], needs, backend
    )
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/pair_loss.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import pair_loss

        return pair_loss
    return compiled.PairLoss(backend)


def pair_loss_forward(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Optional[Tensor],
    ref_rejected: Optional[Tensor],
    margins: Optional[Tensor],
    weights: Optional[Tensor],
    kl: Optional[Tensor],
    denominator: Optional[Tensor],
    number: float,
    kind: str,
    options: list[float],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss (), stats (4,), the divisor, inverse (), and the gradients of the pairs' sum in chosen and rejected:
    float32, empty if not needed."""
    dtypes = [x.dtype for x in (chosen, rejected, ref_chosen, ref_rejected) if x is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    single = torch.float32
    x = PairInputs(
        chosen.to(dtype).contiguous(), rejected.to(dtype).contiguous(), plain(ref_chosen, dtype),
        plain(ref_rejected, dtype), plain(margins, single), plain(weights, single), plain(kl, single),
    )  # fmt: skip
    beta, agree, differ, center_coef = options
    stats = chosen.new_empty(2 + len(STATS), dtype=single)
    gradients = [chosen.new_empty(chosen.shape, dtype=single) if needed else None for needed in needs]
    chosen_options = PairOptions(KINDS.index(kind), beta, agree, differ, center_coef)
    kernels(backend).forward(x, chosen_options, Denominator(plain(denominator, single), number), stats, gradients)
    in_chosen, in_rejected = (chosen.new_empty(0, dtype=single) if g is None else g for g in gradients)
    return stats[0].clone(), stats[1:-1].clone(), stats[-1].clone(), in_chosen, in_rejected


_OWN = ("chosen", "rejected")  # what has a gradient
_PLACES = places(pair_loss_forward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs = inputs[_PLACES["needs"]]
    own = [inputs[_PLACES[name]] if needed else None for name, needed in zip(_OWN, needs, strict=True)]
    ctx.save_for_backward(*own, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> dict[str, Tensor]:
    if upstream is None:
        return {}
    chosen, rejected, inverse, in_chosen, in_rejected = ctx.saved_tensors  # once: a checkpoint gives them once
    upstream = upstream * inverse
    given = zip(_OWN, (chosen, rejected), (in_chosen, in_rejected), strict=True)
    return {name: in_x(upstream, g, x) for name, x, g in given if x is not None}


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    chosen, needs = args[_PLACES["chosen"]], args[_PLACES["needs"]]
    new = functools.partial(chosen.new_empty, dtype=torch.float32)
    return new(()), new(len(STATS)), new(()), *(new(chosen.shape if needed else 0) for needed in needs)


_op = Op(pair_loss_forward, _fake_forward, _setup_context, _backward)
