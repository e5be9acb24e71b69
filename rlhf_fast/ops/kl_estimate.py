"""kl_estimate: per-token estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op, places
from rlhf_fast.ops._rows import flat
from rlhf_fast.ops.options import ESTIMATES, KL_KINDS

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045

BACKENDS = ("cpu", "cuda", "triton", "reference")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1", mask: Tensor | None = None) -> Tensor:
    """Estimate of KL(p || q) per token, in nats, for tokens sampled from p (Schulman, "Approximating KL divergence").

    With d = logprobs - ref_logprobs:

    - ``"k1"`` = d: unbiased, may be negative. As a *loss* it is useless: the expectation of its gradient is 0
      whatever q is. It belongs in the reward.
    - ``"k2"`` = d^2 / 2: biased as a value, but its gradient d * grad log p is an unbiased estimate of the gradient of
      KL(p || q): the one to use as a loss.
    - ``"k3"`` = exp(-d) - 1 + d: unbiased, never negative, low variance. As a loss its gradient,
      (1 - exp(-d)) * grad log p, is in expectation that of the *reverse* KL(q || p), not of KL(p || q).
    - ``"k1+"``, ``"k3+"``: the value of k1 or k3 with the gradient of k2 (straight-through), right as a value and as a
      loss.

    Position t of every input is of the same predicted token, as :func:`token_logprobs` scores it: shifted already.

    No value is clamped: k3 of a token that the reference finds far more likely than the policy does is large.

    Args:
        logprobs: any shape, float32, bfloat16, float16 or float64: log p of the sampled tokens.
        ref_logprobs: same shape: log q.
        kind: "k1", "k2", "k3", "k1+" or "k3+".
        mask: same shape, bool. Where False, the estimate and the gradients are exactly 0 and the inputs may hold
        anything.

    Returns:
        The estimates, same shape, float32 (float64 if an input is). Differentiable in both.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices differ, or kind is unknown.
    """
    _checks.floats(logprobs=logprobs, ref_logprobs=ref_logprobs)
    _checks.devices(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    _checks.shapes(logprobs.shape, "logprobs", ref_logprobs=ref_logprobs)
    _checks.masks(logprobs.shape, "logprobs", mask)
    _checks.option("kind", kind, KL_KINDS)
    if logprobs.dtype != ref_logprobs.dtype:
        widest = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
        logprobs, ref_logprobs = logprobs.to(widest), ref_logprobs.to(widest)
    backend = dispatch.choose("kl_estimate", BACKENDS, logprobs)
    if backend == "reference":
        return reference.kl_estimate(logprobs, ref_logprobs, kind, mask)
    estimate: Tensor = _op(logprobs, ref_logprobs, mask, kind, backend)
    return estimate


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend: forward and gradient (see csrc/common/kl_estimate.h)."""
    if backend == "triton":
        from rlhf_fast.kernels import kl_estimate

        return kl_estimate
    return compiled.KLEstimate(backend)


def kl_estimate_forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Optional[Tensor],
    kind: str,
    backend: str,
) -> Tensor:
    """The estimates, float32."""
    out = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    if out.numel():
        estimate = ESTIMATES.index(kind[:2])
        kernels(backend).forward(logprobs.contiguous(), ref_logprobs.contiguous(), flat(mask), estimate, out)
    return out


def kl_estimate_backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Optional[Tensor],
    kind: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The gradients in logprobs and in ref_logprobs; an empty tensor for one not needed."""
    logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
    in_p = torch.empty_like(logprobs) if needs[0] else None
    in_q = torch.empty_like(logprobs) if needs[1] else None
    if logprobs.numel():
        estimate = ESTIMATES.index("k2" if kind.endswith("+") else kind)
        kernels(backend).gradient(
            logprobs, ref_logprobs, flat(mask), estimate=estimate, grad=grad.contiguous(), out=in_p, ref_out=in_q
        )
    return logprobs.new_empty(0) if in_p is None else in_p, logprobs.new_empty(0) if in_q is None else in_q


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logprobs, ref_logprobs, mask, kind, backend = inputs
    ctx.save_for_backward(logprobs, ref_logprobs, mask)
    ctx.kind, ctx.backend = kind, backend


def _backward(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    needs = list(ctx.needs_input_grad[:2])
    in_p, in_q = _backward_op(grad, *ctx.saved_tensors, ctx.kind, needs, ctx.backend)
    return {"logprobs": in_p if needs[0] else None, "ref_logprobs": in_q if needs[1] else None}


def _fake_forward(logprobs: Tensor, *_: Any) -> Tensor:
    return torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    logprobs, needs = (args[_BACKWARD_PLACES[name]] for name in ("logprobs", "needs"))
    return tuple(logprobs.new_empty(logprobs.shape if needed else 0) for needed in needs)


_BACKWARD_PLACES = places(kl_estimate_backward)
_op = Op(kl_estimate_forward, _fake_forward, _setup_context, _backward)
_backward_op = Op(kl_estimate_backward, _fake_backward)
