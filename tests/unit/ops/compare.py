"""How the tests of ops compare: against float64 truth, and no worse than PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]  # a tensor, or several


def assert_no_worse_than_torch(got: Tensor, same_dtype: Tensor, truth: Tensor, name: str = "output") -> None:
    """max|got - truth| <= 1.5 * max|same_dtype - truth| + tiny, and inf and nan at the places where truth has them.

    ``same_dtype`` is plain PyTorch on the same inputs, ``truth`` the float64 answer. Tiny is a few float32 roundings
    of the largest true value: PyTorch is sometimes exact by luck.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    truth = torch.where(truth.abs() > torch.finfo(got.dtype).max, truth.sign() * torch.inf, truth)  # out of its range
    truth = torch.where(got.isinf() & (got == same_dtype), got, truth)  # and so was something on the way to it
    assert_same_specials(got, truth, name)
    tiny = 4 * torch.finfo(torch.float32).eps * _largest(truth[truth.isfinite()].abs()) + 1e-38
    allowed = 1.5 * _largest(_errors(same_dtype, truth)) + tiny
    assert_close(got, truth, allowed, name)


def assert_close(got: Tensor, truth: Tensor, allowed: float, name: str = "output") -> None:
    """Every finite element within ``allowed`` of truth; the message shows the worst one and where it is."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert_same_specials(got, truth, name)
    errors = _errors(got, truth)
    if bool((errors > allowed).any()):
        worst = tuple((errors == errors.max()).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(worst)}: {got[worst].item()!r}, truth {truth[worst].item()!r}, "
            f"error {errors.max():.3e} above {allowed:.3e} ({int((errors > allowed).sum())} of {errors.numel()} are)"
        )


def assert_same_specials(got: Tensor, truth: Tensor, name: str) -> None:
    """nan, +inf and -inf at the same places."""
    for kind, at in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = at(got) != at(truth)
        if bool(differ.any()):
            where = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(f"{name}{list(where)}: {got[where].item()}, truth {truth[where].item()} ({kind})")


def _errors(got: Tensor, truth: Tensor) -> Tensor:
    """|got - truth|, 0 where either is not finite: those places are compared by kind."""
    difference = (got.detach().double() - truth.detach().double()).abs()
    return torch.where(truth.isfinite() & got.isfinite(), difference, 0)


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def outputs_and_gradients(
    op: Op, inputs: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of op, and the gradients of its float inputs under these upstream gradients (None: unused)."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    result = op(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    used = [(out, g.to(out.dtype)) for out, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [x for x in leaves if x.requires_grad]
    torch.autograd.backward([out for out, _ in used], [g for _, g in used], inputs=wanted)
    return [out.detach() for out in outputs], [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted]


def assert_no_worse(
    op: Op, plain: Op, inputs: Sequence[Tensor], upstreams: Sequence[Sequence[Tensor | None]], names: Sequence[str]
) -> None:
    """Outputs and gradients of op are no worse than those of plain PyTorch on the same inputs, under each upstream."""
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    for used in upstreams:
        got, gradients = outputs_and_gradients(op, inputs, used)
        stock, stock_gradients = outputs_and_gradients(plain, inputs, used)
        truth, true_gradients = outputs_and_gradients(plain, exact, used)
        for name, mine, other, true in zip(names, got, stock, truth, strict=True):
            assert mine.dtype == torch.float32
            assert_no_worse_than_torch(mine, other, true, name)
        for i, (mine, other, true) in enumerate(zip(gradients, stock_gradients, true_gradients, strict=True)):
            assert mine.dtype == other.dtype
            assert_no_worse_than_torch(mine, other, true, f"gradient {i}")


def each_and_all(upstream: Sequence[Tensor]) -> list[tuple[Tensor | None, ...]]:
    """All upstream gradients together, then each alone with the other outputs unused."""
    alone = [tuple(g if i == j else None for j, g in enumerate(upstream)) for i in range(len(upstream))]
    return [tuple(upstream), *(alone if len(upstream) > 1 else [])]


def gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def assert_leaves_inputs_alone(op: Op, *inputs: object, **keywords: object) -> None:
    """Forward and backward change no input: neither its version counter nor its bits."""
    tensors = [x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor)]
    before = [(x._version, x.detach().clone()) for x in tensors]
    result = op(*inputs, **keywords)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    differentiable = [out.sum() for out in outputs if out.requires_grad]
    if differentiable:
        torch.stack(differentiable).sum().backward()
    for x, (version, bits) in zip(tensors, before, strict=True):
        assert x._version == version
        assert torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(bits))
