"""Each tensor that an op is given, and each gradient that comes back to it, begins one element past where vectors are
loaded at once; the others do not. Not a bit changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import reference
from rlhf_fast.ops.linear import Weight
from rlhf_fast.ops.paged_attention import KVCache
from tests.unit.ops import cases
from tests.unit.ops.conftest import Backend
from tests.unit.ops.test_paged_attention import problem

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
N = 83  # more than one vector of every dtype, and a rest


def matrix(seed: int, rows: int = 3, columns: int = N) -> Tensor:
    return cases.random(rows, columns, seed=seed, scale=2.0)


def vector(seed: int, n: int = N) -> Tensor:
    return cases.random(n, seed=seed)


def some(*shape: int) -> Tensor:
    return cases.random(*shape, seed=9) < 1.0


TOKENS = cases.random_tokens(3, vocabulary=N)
PACKED = cases.cu_seqlens_of([20, 0, 40, N - 60])


def attention() -> Call:
    p = problem([40, 3, 17], [2, 1, 1])
    return ops.paged_attention, (p.query, p.cache, p.batch), {"sinks": vector(1, 4)}


def linear(gate: str) -> Call:
    weights = [Weight(matrix(i, 16, 24), vector(i, 16), (matrix(2, 4, 24), matrix(3, 16, 4), 0.5)) for i in range(2)]
    return ops.linear, (matrix(5, 3, 24), weights, gate), {}


def written(key: Tensor, value: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, query: Tensor) -> tuple[Tensor, ...]:
    """What write_kv leaves in a cache and in the query, which is as it was afterwards."""
    cache, before = KVCache.new(3, 2, 16, 16, key), query.clone()
    ops.write_kv(cache, key, value, slots, cos, sin, query)
    rotated = query.clone()
    query.copy_(before)
    return cache.keys, cache.values, rotated


def new_keys() -> Call:
    tensors = (some_keys(0, 2), some_keys(1, 2), torch.tensor([40, 3, 17, 16, 0]), matrix(2, 5, 16), matrix(3, 5, 16))
    return written, (*tensors, some_keys(4, 4)), {}


def some_keys(seed: int, heads: int) -> Tensor:
    return cases.random(5, heads, 16, seed=seed)


CALLS: dict[str, Callable[[], Call]] = {
    "token_logprobs": lambda: (
        ops.token_logprobs, (matrix(0), TOKENS), {"temperature": vector(1, 3).abs() + 0.5, "mask": some(3)},
    ),
    "full_kl": lambda: (ops.full_kl, (matrix(0), matrix(1)), {"mask": some(3)}),
    "full_kl js": lambda: (ops.full_kl, (matrix(0), matrix(1)), {"kind": "js"}),
    "kl_estimate": lambda: (ops.kl_estimate, (vector(0), vector(1)), {"kind": "k3+", "mask": some(N)}),
    "kl_estimate, no mask": lambda: (ops.kl_estimate, (vector(0), vector(1)), {"kind": "k2"}),
    "gae": lambda: (
        ops.gae, (matrix(0), matrix(1)),
        {"mask": some(3, N), "scores": vector(2, 3), "bootstrap": vector(3, 3), "gamma": 0.9, "sums": True},
    ),
    "gae of scores": lambda: (
        ops.gae, (None, vector(1)),
        {"scores": vector(2, 4), "logprobs": vector(4), "ref_logprobs": vector(5), "kl_coef": 0.1,
         "cu_seqlens": PACKED},
    ),
    "sequence_sum": lambda: (ops.sequence_sum, (vector(0),), {"mask": some(N), "cu_seqlens": PACKED}),
    "group_advantages": lambda: (ops.group_advantages, (vector(0),), {"mask": some(N), "cu_groups": PACKED}),
    "ppo_loss": lambda: (
        ops.ppo_loss, tuple(0.3 * vector(i) for i in range(6)),
        {"entropy": vector(6).abs(), "entropy_coef": 0.1, "ref_logprobs": vector(7), "kl_coef": 0.1,
         "rollout_logprobs": 0.3 * vector(8), "rollout_cap": 2.0, "mask": some(N),
         "advantage_sums": torch.tensor([N, 1.0, 80.0]).double()},
    ),
    "dpo_loss": lambda: (ops.dpo_loss, tuple(vector(i) for i in range(4)), {"weights": vector(5).abs()}),
    "reward_loss": lambda: (ops.reward_loss, (vector(0), vector(1)), {"margin": vector(2), "center_coef": 0.1}),
    "sample": lambda: (
        ops.sample,
        (matrix(0), torch.tensor([0.1, 0.5, 0.9]).double(), torch.ones(3), torch.tensor([0, 20, 5]).int(),
         torch.tensor([1.0, 0.9, 0.8]), torch.tensor([0.0, 0.1, 0.0])),
        {},
    ),
    "linear_token_logprobs": lambda: (
        ops.linear_token_logprobs, (matrix(0, 3, 24), matrix(1, N, 24), TOKENS), {"bias": vector(2), "mask": some(3)},
    ),
    "linear": lambda: linear("none"),
    "linear silu": lambda: linear("silu"),
    "rms_norm": lambda: (ops.rms_norm, (matrix(0), vector(1), 1e-6), {}),
    "paged_attention": attention,
    "write_kv": new_keys,
}  # fmt: skip


def places(x: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where tensors are."""
    if isinstance(x, Tensor):
        yield path
    elif isinstance(x, dict | list | tuple):
        for key, one in x.items() if isinstance(x, dict) else enumerate(x):
            yield from places(one, (*path, key))


def changed(x: Any, path: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
    """The same with another tensor in one place."""
    if not path:
        return change(x)
    if isinstance(x, dict):
        return {key: changed(one, path[1:], change) if key == path[0] else one for key, one in x.items()}
    parts = [changed(one, path[1:], change) if i == path[0] else one for i, one in enumerate(x)]
    return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)


def moved(x: Tensor) -> Tensor:
    found = cases.unaligned(x)
    assert found.data_ptr() % 16 == x.itemsize % 16
    return found


def results(backend: Backend, call: Any, upstream: int | None) -> list[Tensor]:
    """Of an op, and the gradients of what may have some: those of one result begin where they do not fit."""
    op, arguments, options = call
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.is_floating_point()]
    for x in leaves:
        x.requires_grad_(op not in (ops.sample, ops.gae, ops.linear, ops.rms_norm, ops.paged_attention, written))
        x.grad = None
    found = backend(op, *arguments, **options)
    outputs = [x for x in ([found] if isinstance(found, Tensor) else found) if isinstance(x, Tensor)]
    back = [(x, vector(i, x.numel()).view(x.shape).to(x.dtype)) for i, x in enumerate(outputs) if x.requires_grad]
    if back:
        torch.autograd.backward(
            [x for x, _ in back], [moved(g) if i == upstream else g for i, (_, g) in enumerate(back)]
        )
    found = [x.detach() for x in outputs] + [x.grad for x in leaves if x.grad is not None]
    for x in leaves:
        x.requires_grad_(False)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.case_id)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.seconds(2)
def test_where_a_tensor_begins_changes_no_bit(kernel_backend: Backend, name: str, dtype: torch.dtype) -> None:
    op, arguments, options = CALLS[name]()
    if kernel_backend.name not in op_backends(op):
        pytest.skip("there is no such kernel")
    if kernel_backend.slow and kernel_backend.name == "triton":
        pytest.skip("interpreted, elements are loaded one by one")
    if dtype != torch.float32:
        arguments = narrow(arguments, dtype)
    call = (op, arguments, options)
    want = results(kernel_backend, call, None)
    for place in places(call):
        got = results(kernel_backend, changed(call, place, moved), None)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), place
    for i in (0, 1):
        got = results(kernel_backend, call, i)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), f"gradient {i}"


@pytest.mark.parametrize("name", CALLS)
def test_the_backend_that_is_chosen_computes(
    kernel_backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the reference, whose results are as good and slower."""
    op, arguments, options = CALLS[name]()
    if kernel_backend.name not in op_backends(op):
        pytest.skip("there is no such kernel")

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the reference was asked")

    for function in [each for each in vars(reference) if inspect.isfunction(getattr(reference, each))]:
        monkeypatch.setattr(reference, function, fail)
    results(kernel_backend, (op, arguments, options), None)
    if op not in (written, ops.linear, ops.rms_norm):
        with pytest.raises(AssertionError, match="the reference was asked"):
            results(Backend("reference"), (op, arguments, options), None)


def op_backends(op: Any) -> tuple[str, ...]:
    return ("cpu",) if op in (ops.linear, ops.rms_norm) else ("cpu", "cuda", "triton")


def narrow(x: Any, dtype: torch.dtype) -> Any:
    """Its first tensors of floats in another dtype."""
    for place in places(x):
        x = changed(x, place, lambda y: y.to(dtype) if y.dtype == torch.float32 else y)
    return x
