"""The op that dpo_loss and reward_loss share: a loss of the two rewards of each pair, with gradients and statistics."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels.arguments import Denominator, PairNumbers, PairResults, PairTensors
from rlhf_fast.ops import compiled
from rlhf_fast.ops._gradients import in_x, needs_gradient, with_constants
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._rows import divisor_of, plain
from rlhf_fast.ops.options import PairOptions

BACKENDS = ("cpu", "cuda", "triton", "reference")
_OWN = ("chosen", "rejected")  # what has a gradient
STATS = ("accuracy", "margin", "chosen_reward", "rejected_reward")  # after the loss
_split: Any = torch.split_with_sizes_copy  # its stub knows no result


def pair_loss(
    tensors: PairTensors, options: PairOptions, denominator: float | Tensor | None, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the pairs and its statistics, of tensors and options that have been checked."""
    call = PairCall(
        numbers=options.numbers().pack(),
        needs=[needs_gradient(tensors.chosen), needs_gradient(tensors.rejected)],
        backend=backend,
    )
    loss, stats, *_ = _op(*with_constants(tensors, _OWN), *divisor_of(denominator), *call)
    return loss, dict(zip(STATS, stats.unbind(), strict=True))


@functools.cache
def kernels(backend: str) -> Any:
    """The kernel of a backend: forward (see csrc/common/pair_loss.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import pair_loss

        return pair_loss
    return compiled.PairLoss(backend)


class PairCall(NamedTuple):
    """Arguments of the registered op beside its tensors and its divisor."""

    numbers: list[float]  # PairNumbers
    needs: list[bool]  # gradients
    backend: str


@flattened
def pair_loss_forward(
    tensors: PairTensors, divisor: Denominator, call: PairCall
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), stats (4,), inverse () of what divides, and the gradients of the pairs' sum in chosen and rejected:
    float32, empty if not needed."""
    dtype = functools.reduce(torch.promote_types, {x.dtype for x in tensors.rewards if x is not None})
    x = PairTensors._make(
        [*(plain(x, dtype) for x in tensors.rewards), *(plain(x, torch.float32) for x in tensors.others)]
    )
    new = functools.partial(tensors.chosen.new_empty, dtype=torch.float32)
    gradients = [new(tensors.chosen.shape) if needed else None for needed in call.needs]
    results = PairResults(new(2 + len(STATS)), *gradients)
    denominator = divisor if divisor.tensor is None else Denominator(tensor=plain(divisor.tensor, torch.float32))
    kernels(call.backend).forward(x, PairNumbers.unpack(call.numbers), denominator, results)
    in_chosen, in_rejected = (new(0) if g is None else g for g in gradients)
    # Tensors of their own, as results of an op have to be: one call for the three.
    loss, stats, inverse = _split(results.stats, (1, len(STATS), 1))
    return loss.squeeze_(0), stats, inverse.squeeze_(0), in_chosen, in_rejected


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
