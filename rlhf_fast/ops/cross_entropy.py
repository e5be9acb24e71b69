"""cross_entropy: mean negative log-likelihood of tokens, for supervised fine-tuning."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, compiled, dispatch, reference
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._rows import matrix, transform
from rlhf_fast.ops.reference import divide
from rlhf_fast.ops.token_logprobs import BACKENDS, kernels, token_logprobs

# torch.library reads the annotations of registered functions and knows no other form of Optional.
# ruff: noqa: UP045


def cross_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    denominator: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Mean over the rows that count, in nats, of

        -(1 - e) log p[token] - e mean_v log p_v + z_loss (log sum_v exp(z_v))^2,

    with z the logits after logit_scale and softcap (as in :func:`token_logprobs`), p = softmax(z) and e the label
    smoothing, as ``torch.nn.functional.cross_entropy`` has it. A row counts when it is unmasked and its token is not
    ``ignore_index``; any other row gets gradient exactly 0 and may hold anything.

    The caller shifts: row t of a model's output predicts token t + 1, so of whole sequences give ``logits[:, :-1]``
    with ``tokens[:, 1:]`` and ``mask[:, 1:]``, as :func:`token_logprobs` says.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, any strides; ``-inf`` is allowed (with label smoothing
            it makes the loss infinite, for a word that cannot be is asked for).
        tokens: (...), int32 or int64, in [0, V) or ignore_index.
        mask: (...), bool, or None for all.
        ignore_index: the token that marks a row as not counting.
        denominator: what to divide by instead of the number of rows that count: a number > 0 or a tensor of shape (),
            so that micro-batches add up to their batch. A tensor of 0 counts as 1.
        softcap: > 0, or None; logit_scale: > 0.
        label_smoothing: in [0, 1].
        z_loss: >= 0; keeps the log of the sum near 0 (PaLM, arXiv:2204.02311, section 5: 1e-4).

    Returns:
        A scalar, float32 (float64 for float64 logits); 0, with a graph, when no row counts.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or a device does not fit, a number is out of range, or a token is outside the vocabulary
            (token values: on a CPU always, elsewhere under ``RLHF_FAST_DEBUG=1``).
    """
    _checks.floats(logits=logits)
    if logits.dim() < 1:
        raise ValueError("logits: shape (), expected (..., V)")
    _checks.devices(logits=logits, tokens=tokens, mask=mask)
    _checks.labels(logits.shape[:-1], "logits", logits.shape[-1], tokens=tokens, mask=mask, ignore_index=ignore_index)
    _checks.denominators(denominator)
    check_terms(softcap, logit_scale, label_smoothing, z_loss)
    counted = (tokens != ignore_index) if mask is None else mask & (tokens != ignore_index)
    if label_smoothing == 0 and z_loss == 0:
        logprobs, _ = token_logprobs(logits, tokens, softcap=softcap, logit_scale=logit_scale, mask=counted)
        return divide(-logprobs.sum(), counted.sum(), denominator)
    backend = dispatch.choose("cross_entropy", BACKENDS, logits)
    if backend == "reference":
        return reference.cross_entropy(
            logits, tokens, mask=mask, ignore_index=ignore_index, denominator=denominator, softcap=softcap,
            logit_scale=logit_scale, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip
    numbers = softcap, float(logit_scale), float(label_smoothing), float(z_loss)
    total, _ = _op(logits, tokens, counted, *numbers, backend)
    return divide(total, counted.sum(), denominator)


def check_terms(softcap: float | None, logit_scale: float, label_smoothing: float, z_loss: float) -> None:
    if softcap is not None:
        _checks.number("softcap", softcap, above=0)
    _checks.number("logit_scale", logit_scale, above=0)
    _checks.number("label_smoothing", label_smoothing, least=0, most=1)
    _checks.number("z_loss", z_loss, least=0)


def smoothed_losses(
    logits: Tensor,
    results: tuple[Tensor, ...],
    mask: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Compute each row's loss, and its gradient in the log of the row's sum.

    ``results``: what the kernel found, log-probabilities, entropies, largest z and sums below it. The mean of z is one
    more read of the logits, for which few ask.
    """
    logprobs, _, shift, total = results
    log_sum = shift + total.log()  # (rows,)
    loss = z_loss * log_sum.square() - (1 - label_smoothing) * logprobs
    if label_smoothing:
        if softcap is None:
            mean = logit_scale * logits.mean(-1, dtype=torch.float32)
        else:
            mean = (softcap * torch.tanh(logits.float() * (logit_scale / softcap))).mean(-1)
        loss = loss + label_smoothing * (log_sum - mean)
    in_log_sum = label_smoothing + 2 * z_loss * log_sum
    if mask is None:
        return loss, in_log_sum
    return torch.where(mask, loss, 0), torch.where(mask, in_log_sum, 0)


def cross_entropy_forward(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    softcap: Optional[float],
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses (), and what the gradient needs: (5, ...)."""
    rows = logits.shape[:-1]
    results = torch.empty(5, *rows, dtype=torch.float32, device=logits.device)
    x = matrix(logits)
    if x.rows:
        flat = [each.view(-1) for each in results[:4]]
        flags, t = mask.reshape(-1).contiguous(), transform(None, 1.0, softcap, logit_scale)
        kernels(backend).forward(x, t, tokens.reshape(-1).contiguous(), flags, flat)
    losses, results[4] = smoothed_losses(
        logits, tuple(results[:4]), mask, softcap, logit_scale, label_smoothing, z_loss
    )
    return losses.sum(), results


def cross_entropy_backward(
    upstream: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    results: Tensor,
    softcap: Optional[float],
    logit_scale: float,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    """The gradient in logits, contiguous."""
    out, x = compiled.new_like(logits), matrix(logits)
    if x.rows:
        every = upstream.expand(mask.shape).reshape(-1)
        kernels(backend).gradient(
            x,
            transform(None, 1.0, softcap, logit_scale),
            tokens=tokens.reshape(-1).contiguous(),
            mask=mask.reshape(-1).contiguous(),
            first_column=0,
            results=[each.view(-1) for each in results[:4]],
            grad_logprobs=(every * (label_smoothing - 1)).contiguous(),
            grad_entropy=None,
            out=out,
            grad_log_sum=(every * results[4].view(-1)).contiguous(),
            grad_each=(every * (-label_smoothing / x.columns)).contiguous() if label_smoothing else None,
        )
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, softcap, logit_scale, label_smoothing, _, backend = inputs
    ctx.save_for_backward(logits, tokens, mask, output[1])
    ctx.numbers = softcap, logit_scale, label_smoothing, backend
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> dict[str, Tensor]:
    return {} if upstream is None else {"logits": _backward_op(upstream, *ctx.saved_tensors, *ctx.numbers)}


def _fake_forward(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), (5, *logits.shape[:-1])))


def _fake_backward(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_op = Op(cross_entropy_forward, _fake_forward, _setup_context, _backward)
_backward_op = Op(cross_entropy_backward, _fake_backward)
