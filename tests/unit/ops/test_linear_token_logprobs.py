from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from rlhf_fast import ops
from rlhf_fast.ops import lm_head
from tests.unit.ops import cases
from tests.unit.ops.compare import (
    assert_close,
    assert_leaves_inputs_alone,
    assert_no_worse,
    assert_no_worse_than_torch,
    each_and_all,
    gradient_of,
)
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

NAMES = ("logprobs", "entropy")


def torch_of_today(
    tokens: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, **transform: Any
) -> tuple[Tensor, Tensor]:
    """Logits with bias and an adapter of scaling 0.5, then log_softmax."""
    logits = F.linear(hidden, weight, bias) + 0.5 * F.linear(F.linear(hidden, a), b)
    logp = F.log_softmax(cases.transform(logits, **transform), dim=-1)
    return logp.gather(-1, tokens[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def problem(*rows: int, hidden: int = 16, vocabulary: int = 300, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, weight, bias, and an adapter's a and b, for logits of a few units: the roundings of larger ones in the
    products, whose order is the matrix library's, would drown all others."""
    shapes = (*rows, hidden), (vocabulary, hidden), (vocabulary,), (4, hidden), (vocabulary, 4)
    scales = 1.0, 2 * hidden**-0.5, 1.0, hidden**-0.5, 1.0
    each = enumerate(zip(shapes, scales, strict=True))
    return [cases.random(*shape, seed=i, scale=scale, dtype=dtype) for i, (shape, scale) in each]


def op(backend: Any, tokens: Tensor, **options: Any) -> Any:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return backend(ops.linear_token_logprobs, hidden, weight, tokens, bias, lora=(a, b, 0.5), **options)

    return call


def upstream(*rows: int) -> list[Tensor]:
    return [cases.random(*rows, seed=8), cases.random(*rows, seed=9)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a tiny problem has several in either direction."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(lm_head._BLOCK, device, (4, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.case_id)
@pytest.mark.parametrize("vocabulary", [300, 9000])
def test_values_and_gradients_are_no_worse_than_torch(
    backend: Backend, vocabulary: int, dtype: torch.dtype, small_blocks: None
) -> None:
    tokens = cases.random_tokens(9, vocabulary=vocabulary)
    inputs = problem(9, vocabulary=vocabulary, dtype=dtype)
    exact = [x.double() for x in inputs]
    for used in each_and_all(upstream(9)):
        got, gradients = run(op(backend, tokens), inputs, used)
        # narrow inputs are multiplied in float32, so what they are held against is PyTorch in float32
        stock, stock_gradients = run(lambda *x: torch_of_today(tokens, *x), [x.float() for x in inputs], used)
        truth, true_gradients = run(lambda *x: torch_of_today(tokens, *x), exact, used)
        for name, *three in zip(NAMES, got, stock, truth, strict=True):
            assert three[0].dtype == torch.float32
            assert_no_worse_than_torch(*three, name)
        for i, (mine, other, true) in enumerate(zip(gradients, stock_gradients, true_gradients, strict=True)):
            assert mine.dtype == dtype
            assert_no_worse_than_torch(mine, other.to(dtype), true, f"gradient {i}")


@pytest.mark.parametrize("options", cases.TRANSFORMS, ids=str)
def test_transforms_are_no_worse_than_torch(backend: Backend, options: dict[str, float]) -> None:
    tokens = cases.random_tokens(9, vocabulary=300)
    assert_no_worse(
        op(backend, tokens, **options),
        lambda *x: torch_of_today(tokens, *x, **options),
        problem(9),
        [upstream(9)],
        NAMES,
    )


def test_autocast_changes_nothing() -> None:
    tokens, inputs = cases.random_tokens(5, vocabulary=200), problem(5, vocabulary=200)

    def direct(function: Any, *x: Any, **k: Any) -> Any:
        return function(*x, **k)

    want, want_gradients = run(op(direct, tokens), inputs, upstream(5))
    compiled = torch.compile(op(direct, tokens), fullgraph=True, backend="aot_eager")
    for call in (op(direct, tokens), compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, gradients = run(call, inputs, upstream(5))
        for a, b in zip([*got, *gradients], [*want, *want_gradients], strict=True):
            assert torch.equal(a, b)


def test_is_token_logprobs_of_the_product() -> None:
    hidden, weight, bias = (x.double() for x in (cases.random(4, 6, 8), cases.random(30, 8), cases.random(30)))
    tokens, mask = cases.random_tokens(4, 6, vocabulary=30), cases.holes()[:, :6]
    options: dict[str, Any] = {
        "temperature": torch.tensor([[0.5], [1.0], [2.0], [3.0]]),
        "softcap": 4.0,
        "logit_scale": 0.5,
    }
    got = ops.linear_token_logprobs(hidden, weight, tokens, bias, mask=mask, **options)
    want = ops.token_logprobs(hidden @ weight.T + bias, tokens, mask=mask, **options)
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1], 1e-12)


def test_gradient_checks_in_float64() -> None:
    inputs = [x.requires_grad_() for x in problem(3, hidden=4, vocabulary=6, dtype=torch.float64)]
    tokens, mask = torch.tensor([0, 5, 2]), torch.tensor([True, False, True])

    def call(h: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return ops.linear_token_logprobs(
            h, w, tokens, bias, temperature=0.8, softcap=3.0, mask=mask, lora=(a, b, 2.0)
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)


def test_masked_rows_may_hold_anything_and_add_nothing_to_the_weight(backend: Backend, small_blocks: None) -> None:
    mask = cases.holes()
    hidden, *others = problem(4, 9, hidden=8, vocabulary=30)
    tokens = cases.random_tokens(4, 9, vocabulary=30)
    temperature = cases.random(4, 9).abs() + 0.5
    outputs, (dh, *rest) = run(
        op(backend, torch.where(mask, tokens, 10**6), mask=mask, temperature=torch.where(mask, temperature, 0.0)),
        [cases.poison(hidden, mask, math.nan), *others],
        upstream(4, 9),
    )
    kept, (dh_kept, *rest_kept) = run(
        op(backend, tokens[mask], temperature=temperature[mask]),
        [hidden[mask], *others],
        [u[mask] for u in upstream(4, 9)],
    )
    for got, want in zip(outputs, kept, strict=True):
        assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
        assert_close(got[mask], want, 1e-5)
    assert torch.equal(dh[~mask], torch.zeros_like(dh[~mask]))
    assert_close(dh[mask], dh_kept, 1e-5)
    for got, want in zip(rest, rest_kept, strict=True):
        assert_close(got, want, 1e-5)


def test_blocks_change_no_more_than_roundings(kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, inputs = cases.random_tokens(9, vocabulary=9000), problem(9, vocabulary=9000)
    whole, gradients = run(op(kernel_backend, tokens), inputs, upstream(9))
    monkeypatch.setitem(lm_head._BLOCK, kernel_backend.device.type, (2, 0))
    parts, part_gradients = run(op(kernel_backend, tokens), inputs, upstream(9))
    for a, b in zip([*whole, *gradients], [*parts, *part_gradients], strict=True):
        assert_close(a, b, 1e-5 * (1 + float(b.abs().max())))


def test_same_call_same_bits(kernel_backend: Backend, small_blocks: None) -> None:
    tokens, inputs = cases.random_tokens(9, vocabulary=300), problem(9)
    first, first_gradients = run(op(kernel_backend, tokens), inputs, upstream(9))
    for _ in range(3 if kernel_backend.slow else 100):
        again, gradients = run(op(kernel_backend, tokens), inputs, upstream(9))
        assert all(torch.equal(a, b) for a, b in zip([*first, *first_gradients], [*again, *gradients], strict=True))


def test_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a tenth of N * V elements is ever made, forward or backward, but the gradient of the weight."""
    n, vocabulary = 600, 30_000
    monkeypatch.setitem(lm_head._BLOCK, "cpu", (256, 256 * 4096))
    largest = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (largest.append((out := empty(*a, **k)).numel()), out)[1])
    hidden, weight = cases.random(n, 8).requires_grad_(), cases.random(vocabulary, 8)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        logprobs, _ = ops.linear_token_logprobs(hidden, weight, cases.random_tokens(n, vocabulary=vocabulary))
        logprobs.sum().backward()
    most = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < most <= 4 * n * vocabulary // 10
    assert max(largest) <= n * vocabulary // 10


def test_compiles_as_one_graph_with_changing_shapes() -> None:
    def direct(function: Any, *x: Any, **k: Any) -> Any:
        return function(*x, **k)

    def call(tokens: Tensor, *x: Tensor) -> Any:
        return op(direct, tokens, temperature=0.7)(*x)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        tokens, inputs = cases.random_tokens(n, vocabulary=40), problem(n, vocabulary=40)
        got, gradients = run(lambda *x, t=tokens: compiled(t, *x), inputs, upstream(n))
        want, exact = run(lambda *x, t=tokens: call(t, *x), inputs, upstream(n))
        for a, b in zip([*got, *gradients], [*want, *exact], strict=True):
            assert_close(a, b, 1e-6)


@pytest.mark.seconds(3)
def test_is_registered_as_torch_wants_it() -> None:
    tokens, (hidden, weight, bias, a, b) = cases.random_tokens(3, vocabulary=40), problem(3, vocabulary=40)
    forward = torch.ops.rlhf_fast.linear_token_logprobs_forward.default
    backward = torch.ops.rlhf_fast.linear_token_logprobs_backward.default
    options: list[Any] = [None, 0.7, 5.0, 1.0, torch.tensor([True, False, True]), "cpu"]
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias, a, b)]
    arguments = (leaves[0], leaves[1], tokens, *leaves[2:], 0.5, *options)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(forward, (leaves[0], weight, tokens, None, None, None, 0.0, *options))
    plain = (hidden, weight, tokens, bias, a, b, 0.5, *options[:-1])
    results = forward(*plain, "cpu")
    for needs in ([True] * 5, [True, False, False, True, False], [False, False, True, False, True]):
        torch.library.opcheck(backward, (*upstream(3), *plain, *results, needs, "cpu"))


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2), (1, 2, 3), (1, 2, 4), (0, 3, 4)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(backend: Backend, frozen: tuple[int, ...]) -> None:
    tokens, inputs = cases.random_tokens(5, vocabulary=300), problem(5)
    _, want = run(op(backend, tokens), inputs, upstream(5))
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    torch.autograd.backward(op(backend, tokens)(*leaves), upstream(5))
    for i, leaf in enumerate(leaves):
        assert leaf.grad is None if i in frozen else torch.equal(gradient_of(leaf), want[i])


def test_no_rows_give_no_outputs_and_a_zero_weight_gradient(backend: Backend) -> None:
    weight = cases.random(30, 8).requires_grad_()
    none = torch.empty(0, dtype=torch.int64)
    logprobs, entropy = backend(ops.linear_token_logprobs, torch.empty(0, 8), weight, none)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(gradient_of(weight), torch.zeros_like(weight))


def test_leaves_its_inputs_alone() -> None:
    hidden, weight = cases.random(3, 8).requires_grad_(), cases.random(30, 8).requires_grad_()
    mask = torch.tensor([True, False, True])
    assert_leaves_inputs_alone(
        ops.linear_token_logprobs, hidden, weight, torch.tensor([1, 2, 3]), torch.zeros(30), mask=mask
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(3, 7)}, ValueError, r"hidden: shape \(3, 7\), expected \(\.\.\., 8\) to match weight"),
        ({"weight": torch.zeros(30)}, ValueError, r"weight: shape \(30,\), expected \(V, H\)"),
        ({"weight": torch.zeros(30, 8).long()}, TypeError, "weight: int64, expected float32"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: shape \(8,\), expected \(30,\) like the rows of weight"),
        ({"tokens": torch.tensor([0, 30, 0])}, ValueError, r"tokens: 30 is outside the vocabulary of 30 \(row 1\)"),
        ({"weight": torch.zeros(30, 8, device="meta")}, ValueError, "weight: on meta, expected cpu like hidden"),
        ({"lora": torch.zeros(2, 8)}, TypeError, r"lora: Tensor, expected a tuple \(a \(r, H\), b \(V, r\), scaling\)"),
        (
            {"lora": (torch.zeros(2, 7), torch.zeros(30, 2), 1.0)},
            ValueError,
            r"lora a: shape \(2, 7\), expected \(r, 8\)",
        ),
        (
            {"lora": (torch.zeros(2, 8), torch.zeros(30, 3), 1.0)},
            ValueError,
            r"lora b: shape \(30, 3\), expected \(30, 2",
        ),
        ({"lora": (torch.zeros(2, 8), torch.zeros(30, 2), "big")}, TypeError, "lora scaling: str, expected a number"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(30, 8), "tokens": torch.zeros(3).long(), **change}
    with pytest.raises(error, match=text):
        ops.linear_token_logprobs(**arguments)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_narrow_weight_is_widened_a_tile_at_a_time(rows: int, frozen: bool) -> None:
    """However few rows there are, and so however wide a block of logits is."""
    weight = cases.random(1 << 16, 128, dtype=torch.bfloat16).requires_grad_(not frozen)  # 32 MiB in float32
    hidden = cases.random(rows, 128, dtype=torch.bfloat16).requires_grad_()
    tokens = cases.random_tokens(rows, vocabulary=1 << 16)

    def largest(op: Any) -> int:
        with ops.use_backend("cpu"), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            op(hidden, weight, tokens)[0].sum().backward()
        return max(event.self_cpu_memory_usage for event in record.events())

    own = weight.nbytes + (1 << 20)  # its gradient is as large as itself
    tile = 4 * lm_head._TILE + (1 << 20)
    assert largest(ops.linear_token_logprobs) <= (tile if frozen else max(tile, own))
    if frozen:
        assert largest(lambda *given: (ops.linear_cross_entropy(*given),)) <= tile
