"""linear_token_logprobs: token_logprobs of ``hidden @ weight.T + bias``, from the hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, dispatch, reference
from rlhf_fast.ops._library import Op, flattened, places
from rlhf_fast.ops._rows import flat, matrix, per_row, transform
from rlhf_fast.ops.lm_head import Block, Head, HeadGradients, LoRA, blocks, whole_rows
from rlhf_fast.ops.token_logprobs import BACKENDS, kernels

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and each row's entropy, in nats, straight from the hidden states.

    Equal to ``token_logprobs(hidden @ weight.T + bias + scaling * (hidden @ a.T) @ b.T, tokens, ...)``, with the
    products in float32 at least (autocast does not change it), but the logits never exist: a block of a few megabytes
    at a time is computed, folded into the results, and computed again for the gradient. Differentiable in hidden,
    weight, bias, a and b; what needs no gradient, such as a frozen weight, costs none. Sums over rows are in float32.

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``hidden[:, :-1]``
    with ``tokens[:, 1:]`` and ``mask[:, 1:]``, as :func:`token_logprobs` says.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64.
        weight: (V, H), the lm_head; its dtype may differ from that of hidden.
        tokens: (...), int32 or int64, in [0, V).
        bias: (V,) or None.
        lora: (a (r, H), b (V, r), scaling), an adapter of the lm_head as peft has it, or None.
        temperature, softcap, logit_scale: as in :func:`token_logprobs`.
        mask: (...), bool. Where False, both outputs and the row's gradient are exactly 0, the row adds nothing to the
            gradients of weight and bias, and hidden and token there may hold anything.

    Returns:
        logprobs and entropy, both (...), float32 (float64 if hidden or weight is).

    Raises:
        TypeError, ValueError: as :func:`token_logprobs`, and when H or V do not agree between the arguments.
    """
    _checks.linear(hidden, weight, bias, lora)
    _checks.devices(hidden=hidden, weight=weight, tokens=tokens, bias=bias, temperature=temperature, mask=mask)
    rows, size = hidden.shape[:-1], weight.shape[0]
    _checks.scoring(
        rows, "hidden", size, tokens=tokens, mask=mask, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale,
    )  # fmt: skip
    widest = weight if weight.dtype == torch.float64 else hidden
    if widest.dtype != torch.float64 and _checks.is_low(temperature, mask):
        adapter = None if lora is None else (lora[0].double(), lora[1].double(), lora[2])
        exact = reference.linear_token_logprobs(
            hidden.double(), weight.double(), tokens, bias=None if bias is None else bias.double(), lora=adapter,
            temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=mask,
        )  # fmt: skip
        return exact[0].float(), exact[1].float()
    backend = dispatch.choose("linear_token_logprobs", BACKENDS, widest)
    if backend == "reference":
        return reference.linear_token_logprobs(
            hidden, weight, tokens, bias=bias, lora=lora, temperature=temperature, softcap=softcap,
            logit_scale=logit_scale, mask=mask,
        )  # fmt: skip
    temperatures, number = per_row(temperature, rows)
    a, b, scaling = (None, None, 0.0) if lora is None else lora
    inputs = LinearInputs(
        hidden=hidden, weight=weight, tokens=tokens, bias=bias, a=a, b=b, scaling=float(scaling),
        temperatures=temperatures, temperature=number, softcap=softcap, logit_scale=float(logit_scale),
    )  # fmt: skip
    logprobs, entropy, _ = _op(*inputs, mask, backend)
    return logprobs, entropy


class LinearInputs(NamedTuple):
    """An output layer, its hidden states, their tokens, and what is done to a logit."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    tokens: Tensor  # (...)
    bias: Tensor | None  # (V,)
    a: Tensor | None  # (r, H), of an adapter
    b: Tensor | None  # (V, r)
    scaling: float
    temperatures: Tensor | None  # (...) float32, in place of the number
    temperature: float
    softcap: float | None
    logit_scale: float


class Problem:
    """Tensors of one call as rows, without the masked ones.

    To leave them out on a GPU is to wait for it, microseconds against the milliseconds that their products would take;
    in a CUDA graph, where nobody can wait, they are kept as zeros.
    """

    def __init__(self, inputs: LinearInputs, mask: Tensor | None, backend: str) -> None:
        self.kernels = kernels(backend)
        self.device, self.shape = inputs.hidden.device, inputs.hidden.shape
        self.mask = flat(mask)
        self.kept: Tensor | None = None
        hidden, tokens = inputs.hidden.reshape(-1, self.shape[-1]), inputs.tokens.reshape(-1)
        temperatures = flat(inputs.temperatures)
        all_rows = hidden.shape[0]
        if self.mask is not None and not (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.kept, self.mask = self.mask.nonzero()[:, 0], None
            hidden, tokens = hidden[self.kept], tokens[self.kept]
            temperatures = None if temperatures is None else temperatures[self.kept]
        elif self.mask is not None:
            hidden = torch.where(self.mask[:, None], hidden, 0)  # products would spread what a masked row holds
        self.rows, self.all_rows, self.vocabulary = hidden.shape[0], all_rows, inputs.weight.shape[0]
        self.tokens, self.temperatures = tokens.contiguous(), temperatures
        self.numbers = inputs.temperature, inputs.softcap, inputs.logit_scale
        lora = None if inputs.a is None or inputs.b is None else LoRA(inputs.a, inputs.b, inputs.scaling)
        self.head = Head(hidden, inputs.weight, inputs.bias, lora)

    def blocks(self) -> Iterator[Block]:
        return blocks(self.rows, self.vocabulary, self.kernels.segment(self.device), self.device)

    def whole_rows(self, frozen: bool) -> Iterator[Block]:
        return whole_rows(self.rows, self.vocabulary, self.device, frozen)

    def part(self, rows: slice) -> tuple[Any, Tensor, Tensor | None]:
        """The transform, tokens and mask of some rows."""
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        mask = None if self.mask is None else self.mask[rows]
        return transform(temperatures, *self.numbers), self.tokens[rows], mask

    def spread(self, x: Tensor) -> Tensor:
        """Values (rows, ...) of the rows that were kept, among zeros for those that were left out."""
        return x if self.kept is None else x.new_zeros(self.all_rows, *x.shape[1:]).index_copy_(0, self.kept, x)

    def gather(self, x: Tensor | None) -> Tensor | None:
        x = flat(x)
        return x if x is None or self.kept is None else x[self.kept]


def in_its_own_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` with no autocast of the products inside it."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return call


@in_its_own_dtypes
@flattened
def linear_token_logprobs_forward(
    inputs: LinearInputs, mask: Optional[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs (...), entropy (...), and for the gradient the largest z and the sum of exp(z - largest): (2, ...)."""
    problem = Problem(inputs, mask, backend)
    run, rows = problem.kernels, inputs.tokens.shape
    results = [torch.zeros(problem.rows, device=problem.device) for _ in range(4)]
    if problem.rows:
        states = run.new_states(problem.rows, problem.vocabulary, problem.device)
        for block in problem.blocks():
            problem.head.fill(block)
            run.update(matrix(block.logits), *problem.part(block.rows), block.columns.start, states[block.rows])
        run.finish(states, problem.mask, results)
    logprobs, entropy, shift, total = (problem.spread(x).view(rows) for x in results)
    return logprobs, entropy, torch.stack((shift, total))


@in_its_own_dtypes
@flattened
def linear_token_logprobs_backward(
    grad_logprobs: Optional[Tensor],
    grad_entropy: Optional[Tensor],
    inputs: LinearInputs,
    mask: Optional[Tensor],
    logprobs: Tensor,
    entropy: Tensor,
    saved: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in hidden, weight, bias, a and b; an empty tensor for those not needed."""
    problem, hidden = Problem(inputs, mask, backend), inputs.hidden
    gradients = HeadGradients(problem.head, needs)
    results = [problem.gather(x) for x in (logprobs, entropy, *saved)]
    in_logprobs, in_entropy = (problem.gather(x) for x in (grad_logprobs, grad_entropy))
    for block in problem.blocks():
        problem.head.fill(block)
        problem.kernels.gradient(
            matrix(block.logits), *problem.part(block.rows), first_column=block.columns.start,
            results=[None if x is None else x[block.rows] for x in results],
            grad_logprobs=None if in_logprobs is None else in_logprobs[block.rows],
            grad_entropy=None if in_entropy is None else in_entropy[block.rows],
            out=block.logits,
        )  # fmt: skip
        gradients.add(block)
    in_hidden, *others = gradients.finish()
    if in_hidden is not None:
        in_hidden = problem.spread(in_hidden).view(hidden.shape).to(hidden.dtype)
    nothing = hidden.new_empty(0)
    first, second, third, fourth, fifth = (nothing.clone() if x is None else x for x in (in_hidden, *others))
    return first, second, third, fourth, fifth


_OWN = ("hidden", "weight", "bias", "a", "b")  # what has a gradient
_PLACES, _BACKWARD_PLACES = places(linear_token_logprobs_forward), places(linear_token_logprobs_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, mask, ctx.backend = inputs
    x = LinearInputs._make(fields)
    ctx.save_for_backward(x.hidden, x.weight, x.tokens, x.bias, x.a, x.b, x.temperatures, mask, *output)
    ctx.numbers = x.scaling, x.temperature, x.softcap, x.logit_scale
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> dict[str, Tensor | None]:
    if grad_logprobs is None and grad_entropy is None:
        return {}
    hidden, weight, tokens, bias, a, b, temperatures, mask, *results = ctx.saved_tensors
    scaling, temperature, softcap, logit_scale = ctx.numbers
    inputs = LinearInputs(
        hidden=hidden, weight=weight, tokens=tokens, bias=bias, a=a, b=b, scaling=scaling, temperatures=temperatures,
        temperature=temperature, softcap=softcap, logit_scale=logit_scale,
    )  # fmt: skip
    asked = ctx.needs_input_grad
    needs = [asked[_PLACES[name]] for name in _OWN]
    gradients = _backward_op(grad_logprobs, grad_entropy, *inputs, mask, *results, needs, ctx.backend)
    return {name: g if needed else None for name, g, needed in zip(_OWN, gradients, needs, strict=True)}


def _fake_forward(hidden: Tensor, weight: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = tokens.shape
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, (2, *rows)))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    own, needs = [args[_BACKWARD_PLACES[name]] for name in _OWN], args[_BACKWARD_PLACES["needs"]]
    nothing = own[0].new_empty
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and needed else nothing(0)
        for x, needed in zip(own, needs, strict=True)
    )


_op = Op(linear_token_logprobs_forward, _fake_forward, _setup_context, _backward)
_backward_op = Op(linear_token_logprobs_backward, _fake_backward)
