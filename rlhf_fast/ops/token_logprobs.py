"""token_logprobs: log-probability of one token per row of logits, and the row's entropy."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._rows import flat, matrix, per_row, transform

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and each row's entropy, in nats.

    With z = logit_scale * logits, then z = softcap * tanh(z / softcap) if softcap is given, then z / temperature:

        logprob = z[token] - log sum_v exp(z_v),    entropy = -sum_v p_v log p_v,    p = softmax(z).

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``logits[:, :-1]``
    with ``tokens[:, 1:]`` and ``mask[:, 1:]``. Unshifted rows are no error: each token is
    then scored as what follows itself.

    One sweep reads the logits once for both, and one reads them and writes the gradient. The same row gives the same
    bits in any batch, on any number of threads.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides. ``-inf`` is allowed (p = 0, which adds
            nothing to the entropy and gets no gradient from it); softcap makes it -softcap like any very low logit.
        tokens: (...), int32 or int64, in [0, V).
        temperature: > 0; a number, or a tensor that broadcasts to the shape of ``tokens`` (one per row). A constant:
            no gradient flows to it. Below 1e-20, down to the smallest float32, plain PyTorch divides in float64
            whatever the backend is (a tensor on a GPU is not looked at); what is too large for float32 is inf.
        softcap: > 0, or None (Gemma 2, arXiv:2408.00118).
        logit_scale: > 0 (Cohere, Granite).
        mask: (...), bool. Where False, both outputs and the row's gradient are exactly 0, the row is not read, and it
            may hold anything: NaN logits, a token outside the vocabulary.
        inplace_backward: allow backward to write the gradient over the logits, which saves memory as large as they are.
            Only for logits that nothing reads again: reading them afterwards, or a second backward, is an error. It
            is a permission: where it cannot be used (strided logits, the reference, torch.compile), it changes
            nothing.

    Returns:
        logprobs and entropy, both (...), float32 (float64 for float64 logits). Both are differentiable in logits.
        A row without one finite logit is no distribution and gives NaN.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, a token is outside the vocabulary
            (token and temperature values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``), or inplace_backward
            is asked of a leaf, whose own gradient would be written over it.
    """
    _checks.floats(logits=logits)
    if logits.dim() < 1:
        raise ValueError("logits: shape (), expected (..., V)")
    rows, size = logits.shape[:-1], logits.shape[-1]
    _checks.devices(logits=logits, tokens=tokens, temperature=temperature, mask=mask)
    _checks.scoring(
        rows, "logits", size, tokens=tokens, mask=mask, temperature=temperature, softcap=softcap,
        logit_scale=logit_scale,
    )  # fmt: skip
    if inplace_backward and logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward: logits are a leaf that requires a gradient, which would be written over them"
        )
    if logits.dtype != torch.float64 and _checks.is_low(temperature, mask):
        exact = reference.token_logprobs(
            logits.double(), tokens, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=mask
        )  # fmt: skip
        return exact[0].float(), exact[1].float()
    backend = dispatch.choose("token_logprobs", BACKENDS, logits)
    if backend == "reference":
        return reference.token_logprobs(
            logits, tokens, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=mask
        )  # fmt: skip
    temperatures, number = per_row(temperature, rows)
    logprobs, entropy, *_ = _op(
        logits, tokens, temperatures, number, softcap, float(logit_scale), mask, inplace_backward, backend
    )
    return logprobs, entropy


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend: new_states, update, finish and gradient (see csrc/common/token_logprobs.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import token_logprobs

        return token_logprobs
    return compiled.TokenLogprobs(backend)


def token_logprobs_forward(
    logits: Tensor,
    tokens: Tensor,
    temperatures: Optional[Tensor],
    temperature: float,
    softcap: Optional[float],
    logit_scale: float,
    mask: Optional[Tensor],
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs (...), entropy (...), and for the gradient the largest z and the sum of exp(z - largest): (2, ...)."""
    saved = torch.empty((2, *logits.shape[:-1]), dtype=torch.float32, device=logits.device)
    logprobs, entropy = _run(
        logits, tokens, temperatures, temperature, softcap, logit_scale, mask, inplace_backward, backend, saved=saved
    )
    return logprobs, entropy, saved


def _run(*arguments: Any, saved: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """token_logprobs_forward of these arguments, which keeps nothing for a gradient unless there is a place for it."""
    logits, tokens, temperatures, *numbers, mask, _, backend = arguments
    tokens = tokens.contiguous()
    logprobs, entropy = torch.empty_like(tokens, dtype=torch.float32), torch.empty_like(tokens, dtype=torch.float32)
    shift, total = (None, None) if saved is None else saved
    x = matrix(logits)
    if x.rows:
        t = transform(temperatures, *numbers)
        kernels(backend).forward(x, t, tokens, flat(mask), (logprobs, entropy, shift, total))
    return logprobs, entropy


def token_logprobs_backward(
    grad_logprobs: Optional[Tensor],
    grad_entropy: Optional[Tensor],
    logits: Tensor,
    tokens: Tensor,
    temperatures: Optional[Tensor],
    temperature: float,
    softcap: Optional[float],
    logit_scale: float,
    mask: Optional[Tensor],
    logprobs: Tensor,
    entropy: Tensor,
    saved: Tensor,
    backend: str,
) -> Tensor:
    """The gradient in logits, contiguous."""
    return _write_gradient(
        compiled.new_like(logits), grad_logprobs, grad_entropy, logits, tokens, temperatures, temperature, softcap,
        logit_scale, mask, logprobs, entropy, saved, backend,
    )  # fmt: skip


def _write_gradient(out: Tensor, *arguments: Any) -> Tensor:
    """token_logprobs_backward of these arguments, written to out; returns out."""
    grad_logprobs, grad_entropy, logits, tokens, temperatures, *others = arguments
    *numbers, mask, logprobs, entropy, saved, backend = others
    x = matrix(logits)
    if x.rows:
        kernels(backend).gradient(
            x, transform(temperatures, *numbers), tokens.contiguous(), flat(mask), first_column=0,
            results=(logprobs, entropy, *saved), grad_logprobs=flat(grad_logprobs), grad_entropy=flat(grad_entropy),
            out=out,
        )  # fmt: skip
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, temperatures, temperature, softcap, logit_scale, mask, inplace_backward, backend = inputs
    ctx.save_for_backward(logits, tokens, temperatures, mask, *output)
    ctx.numbers = (temperature, softcap, logit_scale)
    ctx.inplace_backward, ctx.backend = inplace_backward, backend
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> dict[str, Tensor]:
    if grad_logprobs is None and grad_entropy is None:
        return {}
    logits, tokens, temperatures, mask, *results = ctx.saved_tensors
    arguments = (
        grad_logprobs, grad_entropy, logits, tokens, temperatures, *ctx.numbers, mask, *results, ctx.backend
    )  # fmt: skip
    if ctx.inplace_backward and _may_overwrite(logits):
        gradient = _write_gradient(logits.detach(), *arguments)
        torch.autograd.graph.increment_version(logits)  # whoever reads them again must be told
        return {"logits": gradient}
    return {"logits": _backward_op(*arguments)}


def _may_overwrite(logits: Tensor) -> bool:
    eager = not torch.compiler.is_compiling() and type(logits) is Tensor
    return eager and not torch.is_grad_enabled() and logits.is_contiguous()


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[:-1]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, (2, *rows)))


def _fake_backward(grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_op = Op(token_logprobs_forward, _fake_forward, _setup_context, _backward, inference=_run)
_backward_op = Op(token_logprobs_backward, _fake_backward)
