"""dpo_loss and reward_loss in all their forms, and the kernel that they share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels.arguments import PairTensors
from rlhf_fast.ops.options import PairOptions
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.conftest import Backend

DPO: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.2, "beta": 0.5},
    {"loss": "robust", "label_smoothing": 0.1},
    {"loss": "hinge", "beta": 0.3},
    {"loss": "ipo", "beta": 0.7},
    {"loss": "kto", "kl": 0.4},
)
REWARD: tuple[dict[str, Any], ...] = (
    {},
    {"margin": 0.5, "center_coef": 0.01},
    {"label_smoothing": 0.1, "margin": cases.random(9, seed=8)},
)
FORMS = [(ops.dpo_loss, options) for options in DPO] + [(ops.reward_loss, options) for options in REWARD]


def form_id(form: Any) -> str:
    op, options = form
    return f"{op.__name__} {options.get('loss', '')} {' '.join(options)}"


def pairs(op: Any, n: int = 9, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> dict[str, Tensor]:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")[: 4 if op is ops.dpo_loss else 2]
    return {name: cases.random(n, seed=i, scale=scale, dtype=dtype) for i, name in enumerate(names)}


def everything(backend: Backend, op: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    x = {k: v.detach().clone().requires_grad_(k in ("chosen", "rejected")) for k, v in inputs.items()}
    loss, stats = backend(op, **x, **options)
    assert not any(value.requires_grad for value in stats.values())
    (loss * 1.5).backward()
    return {"loss": loss.detach(), **stats, **{f"in {k}": gradient_of(x[k]) for k in ("chosen", "rejected")}}


def by_the_papers(c: float, r: float, ref_c: float, ref_r: float, o: dict[str, Any]) -> float:
    """One pair's loss, each as its paper has it, of likelihood ratios and not of log-ratios where it can."""
    beta, e, name = o.get("beta", 0.1), o.get("label_smoothing", 0.0), o.get("loss", "sigmoid")
    odds = (math.exp(c - ref_c) / math.exp(r - ref_r)) ** beta
    right, wrong = -math.log(odds / (1 + odds)), -math.log(1 / (1 + odds))
    if name == "sigmoid":
        return (1 - e) * right + e * wrong
    if name == "robust":
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if name == "hinge":
        return max(0.0, 1 - math.log(odds))
    if name == "ipo":
        return (math.log(odds) / beta - 1 / (2 * beta)) ** 2
    good, bad = beta * (c - ref_c - o["kl"]), beta * (o["kl"] - (r - ref_r))
    return ((1 - 1 / (1 + math.exp(-good))) + (1 - 1 / (1 + math.exp(-bad)))) / 2


@pytest.mark.parametrize("options", DPO, ids=lambda o: " ".join(map(str, o.values())))
@pytest.mark.parametrize("weighted", [False, True])
def test_dpo_loss_is_what_the_papers_say(options: dict[str, Any], weighted: bool) -> None:
    inputs, weights = pairs(ops.dpo_loss), cases.random(9, seed=5).abs() if weighted else None
    rows = zip(*(x.tolist() for x in inputs.values()), strict=True)
    losses = torch.tensor([by_the_papers(*row, options) for row in rows], dtype=torch.float64)
    shares = torch.ones(9).double() if weights is None else weights.double()
    loss, stats = ops.dpo_loss(**inputs, **options, weights=weights)
    assert_close(loss, (losses * shares).sum() / shares.sum(), 1e-12)
    beta = options.get("beta", 0.1)
    rewards = beta * (inputs["chosen"] - inputs["ref_chosen"]), beta * (inputs["rejected"] - inputs["ref_rejected"])
    assert_close(stats["chosen_reward"], (rewards[0] * shares).sum() / shares.sum(), 1e-12)
    assert_close(stats["margin"], ((rewards[0] - rewards[1]) * shares).sum() / shares.sum(), 1e-12)
    assert_close(stats["accuracy"], ((rewards[0] > rewards[1]) * shares).sum() / shares.sum(), 1e-12)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    inputs, e = pairs(ops.dpo_loss), 0.3
    flipped = dict(zip(("rejected", "chosen", "ref_rejected", "ref_chosen"), inputs.values(), strict=True))
    robust = [ops.dpo_loss(**x, loss="robust", label_smoothing=e)[0] for x in (inputs, flipped)]
    assert_close((1 - e) * robust[0] + e * robust[1], ops.dpo_loss(**inputs)[0], 1e-12)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_gradients_check_in_float64(form: Any) -> None:
    op, options = form
    inputs = pairs(op)
    chosen, rejected = (inputs[name].requires_grad_() for name in ("chosen", "rejected"))
    rest = {k: v for k, v in inputs.items() if k.startswith("ref")}
    weights = cases.random(9, seed=5).abs()
    assert torch.autograd.gradcheck(
        lambda c, r: op(chosen=c, rejected=r, **rest, **options, weights=weights)[0], [chosen, rejected]
    )


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
def test_kernels_are_no_worse_than_torch(kernel_backend: Backend, form: Any, dtype: torch.dtype) -> None:
    op, options = form
    inputs = pairs(op, dtype=dtype)
    for extra in ({}, {"weights": cases.random(9, seed=5).abs(), "denominator": 7}, {"denominator": torch.tensor(5)}):
        mine = everything(kernel_backend, op, inputs, **options, **extra)
        stock = everything(Backend("reference"), op, inputs, **options, **extra)
        truth = everything(Backend("reference"), op, {k: v.double() for k, v in inputs.items()}, **options, **extra)
        assert list(mine) == list(stock)
        for name in mine:
            assert mine[name].dtype == stock[name].dtype
            assert_no_worse_than_torch(mine[name], stock[name], truth[name], name)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_a_pair_of_no_weight_may_hold_anything(kernel_backend: Backend, form: Any) -> None:
    op, options = form
    inputs = pairs(op, dtype=torch.float32)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.0])
    poisoned = {k: cases.poison(v, weights > 0, math.nan) for k, v in inputs.items()}
    for backend in (kernel_backend, Backend("reference")):
        got = everything(backend, op, poisoned, **options, weights=weights)
        want = everything(backend, op, inputs, **options, weights=weights)
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert not got["in chosen"][weights == 0].any() and not got["in rejected"][weights == 0].any()


@pytest.mark.parametrize("form", FORMS[:-1], ids=form_id)
def test_micro_batches_with_a_common_denominator_add_up(kernel_backend: Backend, form: Any) -> None:
    op, options = form
    inputs, weights = pairs(op, dtype=torch.float32), cases.random(9, seed=5).abs()
    whole = everything(kernel_backend, op, inputs, **options, weights=weights)
    parts = [
        everything(
            kernel_backend, op, {k: v[i] for k, v in inputs.items()}, **options, weights=weights[i],
            denominator=weights.sum(),
        )
        for i in (slice(0, 4), slice(4, 9))
    ]  # fmt: skip
    for name in whole:
        join = torch.cat if name.startswith("in ") else (lambda x: torch.stack(x).sum())
        allowed = 1e-6 * max(1.0, float(whole[name].abs().max()))
        assert_close(join([part[name] for part in parts]), whole[name], allowed, name)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_extremes_stay_finite(kernel_backend: Backend, form: Any) -> None:
    op, options = form
    if isinstance(options.get("margin"), Tensor):
        options = {**options, "margin": options["margin"][:4]}
    ends = torch.tensor([1e4, -1e4, 1e4, -1e4])
    inputs = {**pairs(op, 4, torch.float32), "chosen": ends, "rejected": -ends}
    found = everything(kernel_backend, op, inputs, **options)
    assert all(x.isfinite().all() for x in found.values())


@cases.property_test
@given(st.integers(0, 300), st.sampled_from(DPO), st.sampled_from(cases.FLOATS), st.booleans())
def test_any_number_of_pairs(n: int, options: dict[str, Any], dtype: torch.dtype, weighted: bool) -> None:
    inputs = pairs(ops.dpo_loss, n, dtype)
    weights = (cases.random(n, seed=5) > 0).float() if weighted else None
    mine = everything(Backend("cpu"), ops.dpo_loss, inputs, **options, weights=weights)
    exact = {k: v.double() for k, v in inputs.items()}
    truth = everything(Backend("reference"), ops.dpo_loss, exact, **options, weights=weights)
    for name, want in truth.items():
        size = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        narrow = dtype != torch.float32 and name.startswith("in ")
        assert_close(mine[name], want, (1e-2 if narrow else 1e-6) * size, name)


@pytest.mark.parametrize("form", FORMS[:1] + FORMS[-2:-1], ids=form_id)
def test_same_call_same_bits_and_permuted_the_same_gradients(kernel_backend: Backend, form: Any) -> None:
    op, options = form
    inputs, order = pairs(op, 700, torch.float32), torch.randperm(700, generator=torch.Generator().manual_seed(0))
    options = {**options, "denominator": 700}
    first = everything(kernel_backend, op, inputs, **options)
    for _ in range(2 if kernel_backend.slow else 30):
        again = everything(kernel_backend, op, inputs, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)
    permuted = everything(kernel_backend, op, {k: v[order] for k, v in inputs.items()}, **options)
    assert torch.equal(permuted["in chosen"], first["in chosen"][order])


def test_compiles_as_one_graph() -> None:
    for op, options in FORMS[:1] + FORMS[-2:-1]:
        inputs = pairs(op, dtype=torch.float32)
        chosen = inputs["chosen"].requires_grad_()
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        got, want = compiled(**inputs, **options)[0], op(**inputs, **options)[0]
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, chosen)[0], torch.autograd.grad(want, chosen)[0])


@pytest.mark.seconds(3)
def test_is_registered_as_torch_wants_it() -> None:
    x = pairs(ops.dpo_loss, dtype=torch.float32)
    chosen, rejected = x["chosen"].requires_grad_(), x["rejected"].requires_grad_()
    weights = cases.random(9, seed=5).abs()
    references = {name: x[name] for name in ("ref_chosen", "ref_rejected")}
    tensors = PairTensors(chosen, rejected, **references, margins=None, weights=weights, kl=None)
    numbers = PairOptions(label_smoothing=0.2).numbers().pack()
    op, divisor = torch.ops.rlhf_fast.pair_loss_forward.default, (torch.tensor(9.0), 0.0)
    torch.library.opcheck(op, (*tensors, *divisor, numbers, [True, True], "cpu"))
    without = tensors._replace(ref_chosen=None, ref_rejected=None)
    torch.library.opcheck(op, (*without, *divisor, numbers, [True, False], "cpu"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"loss": "sigmoidal"}, ValueError, "loss: 'sigmoidal', did you mean 'sigmoid'"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            ValueError,
            "label_smoothing: 0.1, expected less than 0.5 and loss",
        ),
        ({"loss": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing: 0.5, expected less than 0.5"),
        ({"kl": -1.0}, ValueError, "kl: -1.0, expected a number >= 0"),
        ({"kl": torch.zeros(2)}, ValueError, r"kl: shape \(2,\), expected a number or a tensor of shape \(\)"),
        ({"weights": torch.ones(4)}, ValueError, r"weights: shape \(4,\), expected \(9,\) like chosen"),
        ({"weights": -torch.ones(9)}, ValueError, r"weights: -1.0 at 0, expected none below 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.dpo_loss(**{**pairs(ops.dpo_loss), **change})
