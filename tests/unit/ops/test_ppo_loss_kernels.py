"""The kernels of ppo_loss on every backend, held against the reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels.arguments import PPOTensors
from rlhf_fast.ops.options import PPOOptions
from rlhf_fast.ops.ppo_loss import PPOCall
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.conftest import Backend
from tests.unit.ops.ppo_batches import ADD_UP, ADD_UP_WITH_TOKENS, AGGREGATIONS, ALL_TERMS, OWN, PER_TOKEN, batch

SUMS = torch.tensor([36.0, 5.0, 60.0], dtype=torch.float64)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"objective": "cispo", "rollout_logprobs": None, "rollout_cap": 1.3, "advantage_sums": SUMS},
    {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04, "dual_clip": 1.1, "rollout_logprobs": None},
    ALL_TERMS | {"clip_high": 0.28},
    {"objective": "sapo", "tau_neg": 2.5, "value_clip": None, "kl_coef": 0.1, "kl": "k2", "denominator": 7},
    {"clip_low": 0.0, "kl": "k1+", "kl_coef": 1.0, "entropy_coef": 0.1, "denominator": torch.tensor(11)},
)


# What lies at a quantile is below or above all edges, or between two.
@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.4])
def test_ratio_quantiles_are_the_definitions_in_every_backend(kernel_backend: Backend, shift: float) -> None:
    old, d = torch.zeros(7, 50), cases.random(7, 50, scale=0.2) + shift
    _, stats = kernel_backend(ops.ppo_loss, d, old, old)
    _, defined = Backend("reference")(ops.ppo_loss, d, old, old)
    for name in ("ratio_p05", "ratio_p95"):
        assert_close(stats[name], defined[name], 1e-5, name)


def everything(backend: Backend, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss, the statistics and the gradients by name."""
    leaves = {k: v.detach().clone().requires_grad_(k in OWN) for k, v in inputs.items()}
    loss, stats = backend(ops.ppo_loss, **leaves, **options)
    assert not any(x.requires_grad for x in stats.values())
    (loss * 1.5).backward()
    gradients = {f"in {k}": torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items() if k in OWN}
    return {"loss": loss.detach(), **stats, **gradients}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
@pytest.mark.parametrize("shape", [(4, 9), (1, 2100)], ids=str)
def test_kernels_are_no_worse_than_torch(
    kernel_backend: Backend, shape: tuple[int, int], options: dict[str, Any], aggregation: str, dtype: torch.dtype
) -> None:
    if kernel_backend.slow and shape == (1, 2100) and dtype != torch.float32:
        pytest.skip("an element takes a while there, and the narrow dtypes are loaded alike at (4, 9)")
    inputs, plain = batch(*shape, dtype=dtype), Backend("reference")
    if "rollout_logprobs" in options:
        inputs["rollout_logprobs"] = cases.random(*shape, seed=21, scale=0.4, dtype=dtype)
    for mask in (None, cases.random(*shape, seed=20) > -0.5):
        given = {**options, "mask": mask, "aggregation": aggregation}
        given.pop("rollout_logprobs", None)
        mine = everything(kernel_backend, inputs, **given)
        stock = everything(plain, inputs, **given)
        truth = everything(plain, {k: v.double() for k, v in inputs.items()}, **given)
        assert list(mine) == list(stock)
        for name in mine:
            assert mine[name].dtype == stock[name].dtype
            if name.startswith("in "):
                assert_no_worse_than_torch(mine[name], stock[name], truth[name], name)
            else:  # a sum of terms of the size of 1, which may cancel
                error = abs(float(stock[name]) - float(truth[name]))
                n, denominator = shape[0] * shape[1], float(options.get("denominator", math.inf))
                summed = math.sqrt(n) if aggregation == "sequence_sum_mean" else 0.0  # of whole sequences, not meaned
                size = max(1.0, abs(float(truth[name])), n / denominator, summed)
                rounding = 4 * torch.finfo(torch.float32).eps * size
                assert_close(mine[name], truth[name], 1.5 * error + rounding, name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded_on_kernels(kernel_backend: Backend, aggregation: str) -> None:
    lengths = [5, 0, 9, 1, 7]
    inputs, inside = batch(5, 9, dtype=torch.float32), cases.inside(lengths, 9)
    mask = inside & (cases.random(5, 9, seed=20) > -0.5)
    padded = everything(kernel_backend, inputs, mask=mask, aggregation=aggregation, ratio="sequence", **ALL_TERMS)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    options: dict[str, Any] = {"cu_seqlens": cases.cu_seqlens_of(lengths), "mask": cases.pack(mask, lengths)}
    packed = everything(kernel_backend, flat, aggregation=aggregation, ratio="sequence", **options, **ALL_TERMS)
    for name in padded:
        want = cases.pack(padded[name], lengths) if name.startswith("in ") else padded[name]
        assert_close(packed[name], want, 1e-6, name)


@cases.property_test
@given(
    cases.ragged_masks(), st.sampled_from(AGGREGATIONS), st.sampled_from(("clip", "cispo", "sapo")),
    st.sampled_from(("token", "sequence")), st.sampled_from(cases.FLOATS), st.floats(0, 0.9), st.floats(0, 3),
)  # fmt: skip
def test_kernels_find_what_the_definition_says_of_any_batch(
    ragged: tuple[list[int], Tensor], aggregation: str, objective: str, ratio: str, dtype: torch.dtype, low: float,
    high: float,
) -> None:  # fmt: skip
    lengths, mask = ragged
    inputs = {**batch(*mask.shape, dtype=dtype), "rollout_logprobs": cases.random(*mask.shape, seed=21, dtype=dtype)}
    options: dict[str, Any] = {"aggregation": aggregation, "objective": objective, "ratio": ratio}
    options |= {"clip_low": low, "clip_high": high, "entropy_coef": 0.01, "kl_coef": 0.05}
    exact = {k: v.double() for k, v in inputs.items()}
    truth = everything(Backend("reference"), exact, mask=mask, **options)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    where = {"mask": cases.pack(mask, lengths), "cu_seqlens": cases.cu_seqlens_of(lengths)}
    padded = everything(Backend("cpu"), inputs, mask=mask, **options)
    packed = everything(Backend("cpu"), flat, **where, **options)
    edge = is_near_a_bound(exact, mask, low, high, ratio)
    for name, want in truth.items():
        if edge and ("in logprobs" in name or "fraction" in name):
            continue  # a ratio so near to a bound may fall on its other side in float32
        size = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        narrow = 1e-5 if dtype == torch.float32 or not name.startswith("in ") else 1e-2
        assert_close(padded[name], want, narrow * size, name)
        spread = cases.pack(want, lengths) if name.startswith("in ") else want
        assert_close(packed[name], spread, narrow * size, name)


def is_near_a_bound(x: dict[str, Tensor], mask: Tensor, low: float, high: float, ratio: str) -> bool:
    """Whether some ratio is within rounding of a bound."""
    d = x["logprobs"] - x["old_logprobs"]
    if ratio == "sequence":
        d = (d * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    r = d.exp()
    return bool(((r - (1 - low)).abs() < 1e-5).any() or ((r - (1 + high)).abs() < 1e-5).any())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_permuted_or_alone_a_sequence_gets_the_same_bits(kernel_backend: Backend, ratio: str) -> None:
    inputs, mask = batch(5, 70, dtype=torch.float32), cases.random(5, 70, seed=20) > -0.5
    options: dict[str, Any] = {**ALL_TERMS, "ratio": ratio, "aggregation": "sequence_mean", "denominator": 5}
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = everything(kernel_backend, inputs, mask=mask, **options)
    permuted = everything(kernel_backend, {k: v[order] for k, v in inputs.items()}, mask=mask[order], **options)
    alone = everything(kernel_backend, {k: v[2:3] for k, v in inputs.items()}, mask=mask[2:3], **options)
    for name in (name for name in whole if name.startswith("in ")):
        assert torch.equal(permuted[name], whole[name][order]), name
        assert torch.equal(alone[name], whole[name][2:3]), name


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything_on_kernels(
    kernel_backend: Backend, aggregation: str, garbage: float
) -> None:
    inputs, mask = batch(4, 9, dtype=torch.float32), cases.holes()
    options = {**ALL_TERMS, "mask": mask, "aggregation": aggregation}
    poisoned = {k: cases.poison(v, mask, garbage) for k, v in inputs.items()}
    got, want = (everything(kernel_backend, x, **options) for x in (poisoned, inputs))
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert not name.startswith("in ") or not got[name][~mask].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_on_kernels(kernel_backend: Backend, aggregation: str) -> None:
    inputs, mask = batch(4, 9, dtype=torch.float32), cases.holes()
    options = {**ALL_TERMS, "aggregation": aggregation}
    count = mask.sum() if aggregation == "token_mean" else mask.any(1).sum()
    whole = everything(kernel_backend, inputs, mask=mask, **options)
    parts = [
        everything(
            kernel_backend, {k: v[rows] for k, v in inputs.items()}, mask=mask[rows], denominator=count, **options
        )
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    for name in ("loss", *ADD_UP, *(ADD_UP_WITH_TOKENS if aggregation == "token_mean" else ())):
        assert_close(torch.stack([part[name] for part in parts]).sum(), whole[name], 1e-6, name)
    for name in (name for name in whole if name.startswith("in ")):
        assert_close(torch.cat([part[name] for part in parts]), whole[name], 1e-6, name)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 5, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_gives_zeros_on_kernels(
    kernel_backend: Backend, aggregation: str, denominator: Any, shape: tuple[int, ...]
) -> None:
    inputs, mask = batch(*shape, dtype=torch.float32), torch.zeros(shape, dtype=torch.bool)
    options = {**ALL_TERMS, "aggregation": aggregation, "denominator": denominator}
    for name, x in everything(kernel_backend, inputs, mask=mask, **options).items():
        assert not x.any(), name


def test_edges_on_kernels(kernel_backend: Backend) -> None:
    d = torch.tensor([0.0, -900.0], requires_grad=True)
    loss, stats = kernel_backend(ops.ppo_loss, d, torch.tensor([-900.0, 0.0]), torch.tensor([-1.0, -1.0]))
    loss.backward()
    assert loss.isfinite() and gradient_of(d).tolist() == [0.0, 0.0]
    assert_close(stats["ratio_max"], torch.tensor(math.exp(20)), 100)

    inputs = batch(2, 3, dtype=torch.float32)
    inputs["ref_logprobs"][0, 0] = -math.inf
    loss, stats = kernel_backend(ops.ppo_loss, **inputs, kl="k1")
    assert loss.isfinite() and stats["kl"].item() == math.inf

    _, stats = kernel_backend(ops.ppo_loss, **{**inputs, "returns": torch.full((2, 3), 0.1)})
    assert stats["explained_variance"].item() == 0

    loss, stats = kernel_backend(ops.ppo_loss, *(inputs[k] for k in PER_TOKEN[:3]))
    assert torch.equal(loss, stats["policy_loss"])
    assert all(stats[name].item() == 0 for name in ("value_loss", "entropy", "kl", "explained_variance"))

    nan = kernel_backend(ops.ppo_loss, *(torch.full((3,), math.nan) if i == 2 else torch.zeros(3) for i in range(3)))
    assert nan[0].isnan()


def test_same_call_same_bits(kernel_backend: Backend) -> None:
    inputs, options = batch(2, 600, dtype=torch.float32), {**ALL_TERMS, "mask": cases.random(2, 600, seed=20) > -0.5}
    first = everything(kernel_backend, inputs, **options)
    for _ in range(5 if kernel_backend.slow else 100):
        again = everything(kernel_backend, inputs, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, before, found = batch(30, 3000, dtype=torch.float32), torch.get_num_threads(), []
    mask = cases.random(30, 3000, seed=20) > -0.5
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(everything(Backend("cpu"), inputs, mask=mask, **ALL_TERMS))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_layout_changes_no_bit(kernel_backend: Backend) -> None:
    inputs = batch(6, 50, dtype=torch.float32)
    want = everything(kernel_backend, inputs)
    for layout in (cases.transposed, cases.unaligned):
        got = everything(kernel_backend, {k: layout(v) for k, v in inputs.items()})
        assert all(torch.equal(got[name], want[name]) for name in want)


def call(needs: list[bool]) -> PPOCall:
    options = PPOOptions(dual_clip=3.0, value_coef=0.5, entropy_coef=0.01, kl_coef=0.05)
    return PPOCall(True, options.numbers().pack(), needs, torch.float32, "cpu")


def test_beside_its_kernels_it_asks_for_memory_only() -> None:
    """Each operation of PyTorch's would be a launch, which takes as long as a kernel of its own on a small batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from rlhf_fast.ops.ppo_loss import ppo_loss_forward, ppo_loss_gradients

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operations: set[str] = set()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operations.add(str(function))
            return function(*args, **(kwargs or {}))

    x = batch(3, 7, dtype=torch.float32)
    own, mask = [x[name] for name in OWN], cases.random(3, 7, seed=20) > -0.5
    tensors = PPOTensors(
        **x, rollout_logprobs=None, mask=mask, weights=None, log_ratios=None, advantage_sums=SUMS
    )  # fmt: skip
    denominator, upstream = torch.tensor(9.0), torch.tensor(1.0)
    with Record() as record:
        _, _, *found = ppo_loss_forward(*tensors, denominator, 0.0, *call([True, True, True]))
        ppo_loss_gradients(upstream, *found, *own, "cpu")
    memory = {"aten.new_empty.default", "aten.empty_like.default", "aten.empty.memory_format"}
    assert record.operations <= memory, record.operations


def test_is_registered_as_torch_wants_it() -> None:
    inputs = batch(3, 7, dtype=torch.float32)
    for name in OWN:
        inputs[name].requires_grad_()
    tensors = PPOTensors(
        **inputs, rollout_logprobs=cases.random(3, 7, seed=21), mask=cases.random(3, 7, seed=20) > -0.5, weights=None,
        log_ratios=None, advantage_sums=SUMS,
    )  # fmt: skip
    op = torch.ops.rlhf_fast.ppo_loss_forward.default
    torch.library.opcheck(op, (*tensors, torch.tensor(9.0), 0.0, *call([True, True, True])))
    few = PPOTensors._make([*tensors[:3], *[None] * 10])
    torch.library.opcheck(op, (*few, None, 0.0, *call([True, False, False])))
