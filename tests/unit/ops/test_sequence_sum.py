from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import reference
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend


@cases.property_test
@given(cases.ragged_masks())
def test_packed_equals_padded_equals_definition(ragged: tuple[list[int], Tensor]) -> None:
    lengths, mask = ragged
    x = cases.random(*mask.shape, dtype=torch.float64)
    want = torch.tensor([math.fsum(row[real].tolist()) for row, real in zip(x, mask, strict=True)])
    assert_close(ops.sequence_sum(x, mask), want.double(), 1e-6)
    packed = ops.sequence_sum(cases.pack(x, lengths), cases.pack(mask, lengths), cases.cu_seqlens_of(lengths))
    assert_close(packed, ops.sequence_sum(x, mask), 1e-12)


def test_without_a_mask_every_token_counts() -> None:
    x = cases.random(3, 4, dtype=torch.float64)
    assert_close(ops.sequence_sum(x), x.sum(1), 1e-12)
    cu_seqlens = torch.tensor([0, 0, 5, 12])
    want = torch.stack([x.new_zeros(()), x.flatten()[:5].sum(), x.flatten()[5:].sum()])
    assert_close(ops.sequence_sum(x.flatten(), cu_seqlens=cu_seqlens), want, 1e-12)


def test_masked_positions_may_hold_anything_and_get_no_gradient() -> None:
    mask = cases.holes()
    x, upstream = cases.random(4, 9), [cases.random(4, seed=1)]
    got, gradients = run(lambda x: ops.sequence_sum(x, mask), [cases.poison(x, mask)], upstream)
    assert_close(got[0], torch.where(mask, x, 0).double().sum(1), 1e-5)
    assert torch.equal(gradients[0], torch.where(mask, upstream[0][:, None].expand(4, 9), 0))


def test_gradient_checks_in_float64() -> None:
    x = cases.random(9, dtype=torch.float64).requires_grad_()
    cu_seqlens = cases.cu_seqlens_of([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: ops.sequence_sum(x, cases.holes()[0], cu_seqlens), [x])


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_sums_of_narrow_floats_are_float32(dtype: torch.dtype) -> None:
    x = cases.random(2, 500, dtype=dtype)
    assert ops.sequence_sum(x).dtype == torch.float32
    assert_close(ops.sequence_sum(x), x.double().sum(1), 1e-3)


def test_empty_batches_give_empty_sums() -> None:
    assert ops.sequence_sum(torch.zeros(0, 4)).shape == (0,)
    assert ops.sequence_sum(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    assert ops.sequence_sum(torch.zeros(0), cu_seqlens=torch.tensor([0, 0, 0])).tolist() == [0, 0]


def test_leaves_its_inputs_alone() -> None:
    assert_leaves_inputs_alone(ops.sequence_sum, cases.random(4, 9).requires_grad_(), cases.holes())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"x: shape \(3,\), expected \(B, T\), or \(N,\) with cu_seqlens"):
        ops.sequence_sum(torch.zeros(3))
    with pytest.raises(TypeError, match="cu_seqlens: float32, expected int64 or int32"):
        ops.sequence_sum(torch.zeros(3), cu_seqlens=torch.tensor([0.0, 3.0]))
    with pytest.raises(ValueError, match="cu_seqlens: runs from 0 to 2, expected from 0 to 3 like x"):
        ops.sequence_sum(torch.zeros(3), cu_seqlens=torch.tensor([0, 2]))


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("lengths", [[5, 0, 9, 1], [2100, 3], [0]], ids=str)
def test_kernels_are_no_worse_than_torch_packed_and_padded(
    kernel_backend: Backend, lengths: list[int], dtype: torch.dtype
) -> None:
    width = max(lengths, default=3)
    x, real = cases.random(len(lengths), width, dtype=dtype), cases.inside(lengths, width)
    mask = real & (cases.random(len(lengths), width, seed=2) > -0.5)
    upstream, cu_seqlens = [cases.random(len(lengths), seed=1)], cases.cu_seqlens_of(lengths)
    garbage = cases.poison(x, mask, math.nan)
    got, gradients = run(lambda x: kernel_backend(ops.sequence_sum, x, mask), [garbage], upstream)
    stock, stock_gradients = run(lambda x: reference.sequence_sum(x, mask), [garbage], upstream)
    truth, true_gradients = run(lambda x: reference.sequence_sum(x, mask), [garbage.double()], upstream)
    assert [t.dtype for t in got + gradients] == [torch.float32, dtype]
    for a, b, c in zip(got + gradients, stock + stock_gradients, truth + true_gradients, strict=True):
        assert_no_worse_than_torch(a, b, c)
    packed, packed_gradients = run(
        lambda x: kernel_backend(ops.sequence_sum, x, cases.pack(mask, lengths), cu_seqlens),
        [cases.pack(garbage, lengths)],
        upstream,
    )
    assert torch.equal(packed[0], got[0])
    assert torch.equal(packed_gradients[0], cases.pack(gradients[0], lengths))


def test_kernels_sum_without_a_mask_and_give_the_same_bits(kernel_backend: Backend) -> None:
    x, order = cases.random(5, 700), torch.tensor([3, 0, 4, 2, 1])
    first = kernel_backend(ops.sequence_sum, x)
    assert_close(first, x.double().sum(1), 1e-5)
    assert torch.equal(kernel_backend(ops.sequence_sum, x), first)
    assert torch.equal(kernel_backend(ops.sequence_sum, x[order]), first[order])
    packed = kernel_backend(ops.sequence_sum, x.flatten(), cu_seqlens=torch.arange(0, 3501, 700, dtype=torch.int32))
    assert torch.equal(packed, first)


def test_compiles_and_is_registered_as_torch_wants_it() -> None:
    x, mask = cases.random(3, 7).requires_grad_(), cases.random(3, 7, seed=1) > -0.5
    compiled = torch.compile(ops.sequence_sum, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), ops.sequence_sum(x, mask))
    op = torch.ops.rlhf_fast.sequence_sum_forward.default
    torch.library.opcheck(op, (x, mask, None, 3, "cpu"))
    flat = cases.random(9).requires_grad_()
    torch.library.opcheck(op, (flat, None, torch.tensor([0, 4, 9]), 2, "cpu"))
