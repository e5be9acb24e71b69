"""full_kl: a divergence between two distributions over the whole vocabulary, per row."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op, places
from rlhf_fast.ops._rows import flat, matrix, per_row, transform

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")
KINDS = ("kl", "reverse_kl", "js")


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None = None,
    kind: str = "kl",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Divergence between p = softmax(z) of logits and q = softmax(z) of ref_logits per row, in nats.

    - ``"kl"``: KL(p || q) = sum_v p_v (log p_v - log q_v), what RLHF penalises;
    - ``"reverse_kl"``: KL(q || p), what distillation from q minimises when it samples from q;
    - ``"js"``: Jensen-Shannon, (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2: symmetric and at most ln 2.

    Position t of every input is of the same predicted token: row t of a model's output is of token t + 1,
    and so is the mask's.

    z is made of either side's logits as in :func:`token_logprobs`. Both are read once, and once more for the gradient.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides: those of p. ``-inf`` is allowed: a term
        with
            p = 0 counts as 0 and gets no gradient.
        ref_logits: (..., V): those of q. Where q = 0 and p > 0, KL(p || q) is +inf, with no usable gradient.
        mask: (...), bool. Where False, the output and the row's gradients are exactly 0 and the row may hold anything.
        kind: "kl", "reverse_kl" or "js".
        temperature, softcap, logit_scale: as in :func:`token_logprobs`, the same for both sides.

    Returns:
        (...), float32 (float64 if an input is). Differentiable in both; a side that needs no gradient costs none.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices differ, the vocabulary is empty, or an option is out of range.
    """
    _checks.floats(logits=logits, ref_logits=ref_logits)
    _checks.devices(logits=logits, ref_logits=ref_logits, temperature=temperature, mask=mask)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (..., V) with V > 0")
    _checks.shapes(logits.shape, "logits", ref_logits=ref_logits)
    rows = logits.shape[:-1]
    _checks.masks(rows, "the rows of logits", mask)
    _checks.option("kind", kind, KINDS)
    _checks.transforms(temperature, rows, mask, softcap, logit_scale)
    if logits.dtype != ref_logits.dtype:
        widest = torch.promote_types(logits.dtype, ref_logits.dtype)
        logits, ref_logits = logits.to(widest), ref_logits.to(widest)
    if logits.dtype != torch.float64 and _checks.is_low(temperature, mask):
        p, q = logits.double(), ref_logits.double()
        return reference.full_kl(
            p, q, mask, kind, temperature=temperature, softcap=softcap, logit_scale=logit_scale
        ).float()
    backend = dispatch.choose("full_kl", BACKENDS, logits)
    if backend == "reference":
        return reference.full_kl(
            logits, ref_logits, mask, kind, temperature=temperature, softcap=softcap, logit_scale=logit_scale
        )
    if kind == "reverse_kl":
        logits, ref_logits, kind = ref_logits, logits, "kl"
    temperatures, number = per_row(temperature, rows)
    divergence, *_ = _op(logits, ref_logits, temperatures, number, softcap, float(logit_scale), mask, kind, backend)
    return divergence


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend: forward and gradient (see csrc/common/full_kl.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import full_kl

        return full_kl
    return compiled.FullKL(backend)


def full_kl_forward(
    p: Tensor,
    q: Tensor,
    temperatures: Optional[Tensor],
    temperature: float,
    softcap: Optional[float],
    logit_scale: float,
    mask: Optional[Tensor],
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The divergence (...), and eight numbers a row for the gradient (see csrc/common/full_kl.h): (8, ...)."""
    rows = p.shape[:-1]
    divergence = torch.empty(rows, dtype=torch.float32, device=p.device)
    saved = torch.empty((8, *rows), dtype=torch.float32, device=p.device)
    x, y = matrix(p), matrix(q)
    if x.rows:
        t = transform(temperatures, temperature, softcap, logit_scale)
        kernels(backend).forward(x, y, t, flat(mask), divergence=int(kind == "js"), results=(divergence, *saved))
    return divergence, saved


def full_kl_backward(
    grad: Tensor,
    p: Tensor,
    q: Tensor,
    temperatures: Optional[Tensor],
    temperature: float,
    softcap: Optional[float],
    logit_scale: float,
    mask: Optional[Tensor],
    divergence: Tensor,
    saved: Tensor,
    kind: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients in the logits of p and of q; an empty tensor for one not needed."""
    in_p = compiled.new_like(p) if needs[0] else None
    in_q = compiled.new_like(q) if needs[1] else None
    x, y = matrix(p), matrix(q)
    if x.rows:
        t = transform(temperatures, temperature, softcap, logit_scale)
        results = (divergence, *saved)
        upstream = grad.reshape(-1).contiguous()
        kernels(backend).gradient(
            x, y, t, flat(mask), divergence=int(kind == "js"), results=results, grad=upstream, out_p=in_p, out_q=in_q
        )
    return p.new_empty(0) if in_p is None else in_p, q.new_empty(0) if in_q is None else in_q


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p, q, temperatures, temperature, softcap, logit_scale, mask, kind, backend = inputs
    ctx.save_for_backward(p, q, temperatures, mask, *output)
    ctx.numbers = (temperature, softcap, logit_scale)
    ctx.kind, ctx.backend = kind, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    p, q, temperatures, mask, *results = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    in_p, in_q = _backward_op(
        grad, p, q, temperatures, *ctx.numbers, mask, *results, ctx.kind, needs, ctx.backend
    )  # fmt: skip
    return {"p": in_p if needs[0] else None, "q": in_q if needs[1] else None}


def _fake_forward(p: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = p.shape[:-1]
    return p.new_empty(rows, dtype=torch.float32), p.new_empty((8, *rows), dtype=torch.float32)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    p, q, needs = (args[_BACKWARD_PLACES[name]] for name in ("p", "q", "needs"))
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)
        for x, needed in zip((p, q), needs, strict=True)
    )


_BACKWARD_PLACES = places(full_kl_backward)
_op = Op(full_kl_forward, _fake_forward, _setup_context, _backward)
_backward_op = Op(full_kl_backward, _fake_backward)
