from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops.linear import Weight
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_no_worse_than_torch
from tests.unit.ops.conftest import Backend, only

kernel_backend = only("cpu")


def weights(k: int, rows: tuple[int, ...], dtype: torch.dtype, extras: bool) -> list[Weight]:
    found = []
    for i, n in enumerate(rows):
        weight = cases.random(n, k, seed=i, scale=k**-0.5, dtype=dtype)
        if not extras:
            found.append(Weight(weight))
            continue
        a, b = cases.random(6, k, seed=20 + i, scale=k**-0.5, dtype=dtype), cases.random(n, 6, seed=30 + i, dtype=dtype)
        found.append(Weight(weight, cases.random(n, seed=10 + i, dtype=dtype), (a, b, 0.5) if i != 1 else None))
    return found


def exact(x: Tensor, every: list[Weight], gate: str) -> list[Tensor]:
    wide = [
        Weight(
            w.double(), None if b is None else b.double(), None if l is None else (l[0].double(), l[1].double(), l[2])
        )
        for w, b, l in every
    ]
    return list(Backend("reference")(ops.linear, x.double(), wide, gate))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias and adapter"])
@pytest.mark.parametrize("k", [1, 16, 40, 576])
def test_values_are_no_worse_than_torch(kernel_backend: Backend, k: int, extras: bool, dtype: torch.dtype) -> None:
    x = cases.random(70, k, seed=99, dtype=dtype)
    for shapes, gate in (((33,), "none"), ((40, 33, 30), "none"), ((33, 33), "silu"), ((32, 32), "gelu_tanh")):
        every = weights(k, shapes, dtype, extras)
        got = kernel_backend(ops.linear, x, every, gate)
        stock = Backend("reference")(ops.linear, x, every, gate)
        for mine, other, true in zip(got, stock, exact(x, every, gate), strict=True):
            assert mine.dtype == dtype
            assert_no_worse_than_torch(mine, other, true)
        for rows in (1, 2, 3, 4, 5, 6, 7, 13):
            for mine, whole in zip(kernel_backend(ops.linear, x[:rows], every, gate), got, strict=True):
                assert torch.equal(mine, whole[:rows])


@pytest.mark.parametrize("k", [40, 576])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(kernel_backend: Backend, k: int) -> None:
    x, every = cases.random(70, k, seed=5), weights(k, (33, 7), torch.float32, True)
    whole = kernel_backend(ops.linear, x, every)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for begin, end in ((0, 70), (3, 4), (10, 15), (60, 70), (1, 68)):
                for mine, all_of_it in zip(kernel_backend(ops.linear, x[begin:end], every), whole, strict=True):
                    assert torch.equal(mine, all_of_it[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize(("shape", "offset"), [((5, 576), 0.0), ((2, 3, 40), 1.0), ((7, 1), 0.0), ((0, 16), 0.0)])
def test_rms_norm_is_no_worse_than_torch(
    kernel_backend: Backend, shape: tuple[int, ...], offset: float, dtype: torch.dtype
) -> None:
    x, weight = cases.random(*shape, seed=1, dtype=dtype), cases.random(shape[-1], seed=2, dtype=dtype)
    got = kernel_backend(ops.rms_norm, x, weight, 1e-5, offset)
    stock = Backend("reference")(ops.rms_norm, x, weight, 1e-5, offset)
    true = Backend("reference")(ops.rms_norm, x.double(), weight.double(), 1e-5, offset)
    assert got.dtype == dtype and got.shape == x.shape
    if x.numel():
        assert_no_worse_than_torch(got, stock, true)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5)}, r"x: shape \(5,\), expected \(M, K\)"),
        ({"weights": []}, "weights: 0, expected 1 to 3"),
        ({"gate": "silu"}, "weights: 1, expected 2 with a gate"),
        ({"weights": [Weight(torch.zeros(3, 4))]}, r"weights: shape \(3, 4\) of torch.float32, expected \(n, 5\)"),
        ({"gate": "relu"}, "gate: 'relu', did you mean"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 5), "weights": [Weight(torch.zeros(3, 5))]}
    with pytest.raises(ValueError, match=message):
        ops.linear(**given | change)
