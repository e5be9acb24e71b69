from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse, each_and_all
from tests.unit.ops.compare import outputs_and_gradients as run
from tests.unit.ops.conftest import Backend

NAMES = ("logprobs", "entropy")
FORWARD = "rlhf_fast::token_logprobs_forward"


def definition(logits: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log p[token] and -sum p log p, one row and one word at a time."""
    logprobs, entropies = [], []
    for z, token in zip(logits.double().numpy(), tokens.tolist(), strict=True):
        top = z.max()
        log_sum = top + math.log(sum(math.exp(x - top) for x in z))
        logprobs.append(z[token] - log_sum)
        entropies.append(-sum(math.exp(x - log_sum) * (x - log_sum) for x in z if x > -math.inf))
    return np.array(logprobs), np.array(entropies)


def torch_of_today(logits: Tensor, tokens: Tensor, **transform: Any) -> tuple[Tensor, Tensor]:
    """What people write: log_softmax, gather, and an entropy that skips words of probability 0."""
    z = cases.transform(logits if logits.dtype == torch.float64 else logits.float(), **transform)
    logp = F.log_softmax(z, dim=-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
    return logp.gather(-1, tokens.long()[..., None]).squeeze(-1), entropy


def upstream(*rows: int) -> list[Tensor]:
    return [cases.random(*rows, seed=1), cases.random(*rows, seed=2)]


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LOGITS, ids=cases.case_id)
def test_is_the_definition_in_float64(case: cases.Case) -> None:
    logits, tokens = case()
    logprobs, entropy = ops.token_logprobs(logits, tokens)
    true_logprobs, true_entropy = definition(logits, tokens)
    assert logprobs.dtype == entropy.dtype == torch.float64
    np.testing.assert_allclose(logprobs.numpy(), true_logprobs, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(entropy.numpy(), true_entropy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "dtype"), cases.logits_and_dtypes(), ids=cases.case_id)
def test_values_and_gradients_are_no_worse_than_torch(backend: Backend, case: cases.Case, dtype: torch.dtype) -> None:
    exact, tokens = case()
    logits = exact.to(dtype)
    assert_no_worse(
        lambda z: backend(ops.token_logprobs, z, tokens),
        lambda z: torch_of_today(z, tokens),
        [logits],
        each_and_all(upstream(logits.shape[0])),
        NAMES,
    )


@pytest.mark.parametrize("options", cases.TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("case", [cases.plain, cases.some_minus_infinity, cases.extreme], ids=cases.case_id)
def test_transforms_are_no_worse_than_torch(
    backend: Backend, case: cases.Case, dtype: torch.dtype, options: dict[str, float]
) -> None:
    logits, tokens = case()
    assert_no_worse(
        lambda z: backend(ops.token_logprobs, z, tokens, **options),
        lambda z: torch_of_today(z, tokens, **options),
        [logits.to(dtype)],
        [upstream(logits.shape[0])],
        NAMES,
    )


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (3,), (1,), ()])
def test_temperature_may_differ_per_row(backend: Backend, shape: tuple[int, ...]) -> None:
    logits, tokens = cases.random(4, 3, 20), cases.random_tokens(4, 3, vocabulary=20)
    temperature = cases.random(*shape).abs() + 0.1
    assert_no_worse(
        lambda z: backend(ops.token_logprobs, z, tokens, temperature=temperature),
        lambda z: torch_of_today(z, tokens, temperature=temperature.expand(4, 3)),
        [logits],
        [upstream(4, 3)],
        NAMES,
    )


def test_entropy_gradient_is_p_times_expected_minus_own_logit() -> None:
    logits, tokens = cases.some_minus_infinity()
    _, (gradient,) = run(lambda z: ops.token_logprobs(z, tokens), [logits], (None, torch.ones(6)))
    p = logits.softmax(-1)
    z = torch.where(p == 0, 0, logits)
    assert_close(gradient, p * ((p * z).sum(-1, keepdim=True) - z), 1e-12)


def test_words_of_probability_zero_get_no_gradient(backend: Backend) -> None:
    logits, tokens = cases.some_minus_infinity()
    _, (gradient,) = run(lambda z: backend(ops.token_logprobs, z, tokens), [logits.float()], upstream(6))
    banned = logits.isinf() & (torch.arange(400) != tokens[:, None])
    assert torch.equal(gradient[banned], torch.zeros_like(gradient[banned]))


def test_gradient_checks_in_float64() -> None:
    logits = cases.random(2, 3, 5, dtype=torch.float64).requires_grad_()
    tokens = cases.random_tokens(2, 3, vocabulary=5)
    temperature = torch.tensor([[0.5], [2.0]])
    assert torch.autograd.gradcheck(lambda z: ops.token_logprobs(z, tokens, temperature, 3.0, 0.7), [logits])


def test_no_gradient_flows_to_the_temperature(backend: Backend) -> None:
    temperature = torch.tensor(0.5, requires_grad=True)
    logprobs, _ = backend(ops.token_logprobs, cases.random(3, 9).requires_grad_(), torch.zeros(3).long(), temperature)
    logprobs.sum().backward()
    assert temperature.grad is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_distribution_gives_nan_and_spoils_no_other_row(backend: Backend, broken: float) -> None:
    logits, tokens = cases.random(3, 700), torch.tensor([1, 2, 3])
    logits[0, 400] = broken
    logits[2] = -math.inf
    outputs, (gradient,) = run(lambda z: backend(ops.token_logprobs, z, tokens), [logits], upstream(3))
    for out in (*outputs, gradient):
        assert out[0].isnan().all() and out[2].isnan().all() and out[1].isfinite().all()


@given(st.data())
@cases.property_test
def test_any_mask_and_shape_is_what_the_reference_says(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 300))
    seed = data.draw(st.integers(0, 1000))
    logits = cases.random(rows, columns, seed=seed, scale=data.draw(st.sampled_from([0.1, 3.0, 40.0])))
    tokens = cases.random_tokens(rows, vocabulary=columns, seed=seed)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=torch.bool)
    given_upstream = upstream(rows)
    got, gradients = run(lambda z: ops.token_logprobs(z, tokens, mask=mask), [logits], given_upstream)
    with ops.use_backend("reference"):
        exact, exact_gradients = run(
            lambda z: ops.token_logprobs(z, tokens, mask=mask), [logits.double()], given_upstream
        )
    for mine, true in zip([*got, *gradients], [*exact, *exact_gradients], strict=True):
        assert_close(mine, true, 3e-6 * (1 + float(true.abs().max() if true.numel() else 0)))


# --- any layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_masked_rows_may_hold_anything_and_give_zeros(backend: Backend, garbage: float) -> None:
    mask = cases.holes()
    clean, tokens = cases.random(4, 9, 11), cases.random_tokens(4, 9, vocabulary=11)
    temperature = torch.where(mask, 0.7, 0.0)

    def masked(z: Tensor) -> Any:
        return backend(ops.token_logprobs, z, torch.where(mask, tokens, -100), temperature, mask=mask)

    with torch.autograd.detect_anomaly():  # nor is a nan made on the way and dropped later
        outputs, gradients = run(masked, [cases.poison(clean, mask, garbage)], upstream(4, 9))
    expected, expected_gradients = run(
        lambda z: backend(ops.token_logprobs, z, tokens, torch.full((4, 9), 0.7)), [clean], upstream(4, 9)
    )
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, torch.where(mask, want, 0))
    assert torch.equal(gradients[0], torch.where(mask[..., None], expected_gradients[0], 0))


@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=cases.case_id)
@pytest.mark.parametrize(
    "layout", [cases.transposed, cases.unaligned, cases.without_the_last_position], ids=cases.case_id
)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
def test_layout_and_token_dtype_change_no_bit(
    kernel_backend: Backend, layout: Callable[[Tensor], Tensor], token_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    logits, tokens = cases.random(3, 4, 123, dtype=dtype), cases.random_tokens(3, 4, vocabulary=123)
    plain, (plain_gradient,) = run(lambda z: kernel_backend(ops.token_logprobs, z, tokens), [logits], upstream(3, 4))
    got, (gradient,) = run(
        lambda z: kernel_backend(ops.token_logprobs, layout(z), tokens.to(token_dtype)), [logits], upstream(3, 4)
    )
    for a, b in zip([*got, gradient], [*plain, plain_gradient], strict=True):
        assert torch.equal(a, b)


def test_the_same_row_many_times_over_needs_no_memory(backend: Backend) -> None:
    logits = cases.random(1, 200).expand(5, 200)
    logprobs, entropy = backend(ops.token_logprobs, logits, torch.full((5,), 7))
    assert len({*logprobs.tolist()}) == len({*entropy.tolist()}) == 1


def test_leading_dimensions_are_free(backend: Backend) -> None:
    logits, tokens = cases.random(2, 3, 4, 10), cases.random_tokens(2, 3, 4, vocabulary=10)
    whole = backend(ops.token_logprobs, logits, tokens)[0]
    assert whole.shape == (2, 3, 4)
    moved = logits.permute(1, 2, 0, 3)
    assert_close(backend(ops.token_logprobs, moved, tokens.permute(1, 2, 0))[0], whole.permute(1, 2, 0), 1e-6)
    assert_close(backend(ops.token_logprobs, logits[1, 2, 3], tokens[1, 2, 3])[0], whole[1, 2, 3], 1e-6)


def test_rows_further_apart_than_32_bits_reach(kernel_backend: Backend) -> None:
    """Three rows 2^31 + 32 elements apart, in memory of which only they are ever touched."""
    if kernel_backend.device.type != "cpu":
        pytest.skip("memory of a device is there or not")
    apart = 2**31 + 32
    logits = torch.empty(1, dtype=torch.bfloat16).set_(
        torch.UntypedStorage(2 * (2 * apart + 200)), 0, (3, 200), (apart, 1)
    )
    logits.copy_(cases.random(3, 200))
    tokens = torch.tensor([3, 50, 199])
    got, want = (kernel_backend(ops.token_logprobs, z, tokens) for z in (logits, logits.contiguous()))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_more_rows_than_a_grid_has_in_its_second_dimension(kernel_backend: Backend) -> None:
    if kernel_backend.slow:
        pytest.skip("would take minutes without a device")
    logits, tokens = cases.random(70_001, 8), cases.random_tokens(70_001, vocabulary=8)
    got = kernel_backend(ops.token_logprobs, logits, tokens)
    want = torch_of_today(logits, tokens)
    assert_close(got[0], want[0], 1e-5)
    assert_close(got[1], want[1], 1e-5)


def test_no_rows_are_fine(backend: Backend) -> None:
    logits = torch.empty(0, 50, requires_grad=True)
    logprobs, entropy = backend(ops.token_logprobs, logits, torch.empty(0, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,) and logits.grad is not None and logits.grad.shape == (0, 50)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.seconds(2)
def test_same_call_same_bits(backend: Backend) -> None:
    logits, tokens = cases.random(3, 500), cases.random_tokens(3, vocabulary=500)
    first = None
    for _ in range(3 if backend.slow else 100):
        outputs, gradients = run(lambda z: backend(ops.token_logprobs, z, tokens), [logits], upstream(3))
        again = [*outputs, *gradients]
        first = first or again
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
def test_a_row_does_not_depend_on_its_batch(kernel_backend: Backend, dtype: torch.dtype) -> None:
    logits, tokens = cases.random(6, 9001, dtype=dtype), cases.random_tokens(6, vocabulary=9001)
    order = torch.tensor([3, 0, 5, 1, 4, 2])

    def bits(rows: Tensor) -> list[Tensor]:
        outputs, gradients = run(
            lambda z: kernel_backend(ops.token_logprobs, z, tokens[rows]),
            [logits[rows]],
            [u[rows] for u in upstream(6)],
        )
        return [*outputs, *gradients]

    whole, permuted, alone = bits(torch.arange(6)), bits(order), bits(torch.tensor([2]))
    for a, b, c in zip(whole, permuted, alone, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[2:3], c)


def test_the_number_of_threads_changes_no_bit() -> None:
    logits, tokens = cases.random(300, 3001), cases.random_tokens(300, vocabulary=3001)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs, gradients = run(lambda z: ops.token_logprobs(z, tokens), [logits], upstream(300))
            found.append([*outputs, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- with autograd, torch.compile and the rest of torch ---------------------------------------------------------------


def test_backward_can_run_twice(backend: Backend) -> None:
    logits = cases.random(3, 50).requires_grad_()
    logprobs, entropy = backend(ops.token_logprobs, logits, torch.tensor([1, 2, 3]))
    total = (logprobs * entropy).sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, second)


def test_leaves_its_inputs_alone(backend: Backend) -> None:
    mask = torch.tensor([True, False, True])
    logits = cases.random(3, 50).requires_grad_()
    assert_leaves_inputs_alone(
        lambda *x, **k: backend(ops.token_logprobs, *x, **k),
        logits, torch.tensor([1, 2, 3]), torch.ones(3), 5.0, 2.0, mask=mask,
    )  # fmt: skip


def test_a_gradient_of_the_gradient_is_refused_where_it_does_not_exist(kernel_backend: Backend) -> None:
    logits = cases.random(2, 9).requires_grad_()
    logprobs, _ = kernel_backend(ops.token_logprobs, logits, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"token_logprobs_backward: has no gradient; with ops.use_backend\('reference"
    ):
        gradient.sum().backward()


def test_the_gradient_may_be_written_over_the_logits(kernel_backend: Backend) -> None:
    start, tokens = cases.random(4, 300).requires_grad_(), torch.tensor([1, 2, 3, 299])
    want = run(lambda z: kernel_backend(ops.token_logprobs, z * 2, tokens), [start.detach()], upstream(4))[1]
    logits = (start * 2).to(kernel_backend.device)
    address, version = logits.data_ptr(), logits._version
    outputs = kernel_backend(ops.token_logprobs, logits, tokens, inplace_backward=True)
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    torch.autograd.backward(outputs, upstream(4))
    assert seen == [address] and logits._version > version
    assert torch.equal(start.grad, want[0])
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        torch.autograd.backward(outputs, upstream(4))


def test_a_leaf_is_not_overwritten_with_its_own_gradient() -> None:
    with pytest.raises(ValueError, match="inplace_backward: logits are a leaf that requires a gradient"):
        ops.token_logprobs(cases.random(2, 5).requires_grad_(), torch.tensor([1, 2]), inplace_backward=True)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.seconds(4)
def test_compiles_as_one_graph_with_changing_shapes(name: str) -> None:
    with ops.use_backend(name):
        compiled = torch.compile(ops.token_logprobs, fullgraph=True, dynamic=True, backend="aot_eager")
        for n, temperature in ((3, 0.7), (5, 0.9), (4, torch.tensor([0.5, 1.0, 2.0, 3.0]))):
            logits, options = cases.random(n, 40), (cases.random_tokens(n, vocabulary=40), temperature)
            got, gradient = run(lambda z, o=options: compiled(z, *o), [logits], upstream(n))
            want, exact = run(lambda z, o=options: ops.token_logprobs(z, *o), [logits], upstream(n))
            for a, b in zip([*got, *gradient], [*want, *exact], strict=True):
                assert_close(a, b, 1e-6)


@pytest.mark.seconds(6)
def test_inductor_calls_the_kernel_itself() -> None:
    compiled = torch.compile(lambda z, t: ops.token_logprobs(z * 2, t, 0.7)[0].sum(), fullgraph=True, dynamic=True)
    for n in (3, 5):
        logits, tokens = cases.random(n, 40).requires_grad_(), cases.random_tokens(n, vocabulary=40)
        (got,) = torch.autograd.grad(compiled(logits, tokens), logits)
        (want,) = torch.autograd.grad(ops.token_logprobs(logits * 2, tokens, 0.7)[0].sum(), logits)
        assert torch.equal(got, want)


def test_is_registered_as_torch_wants_it(kernel_backend: Backend) -> None:
    if kernel_backend.name != "cpu":
        pytest.skip("the registration is the same for all")
    logits, tokens = cases.random(2, 3, 40), cases.random_tokens(2, 3, vocabulary=40)
    options: list[Any] = [None, 0.7, 5.0, 1.0, None, False, "cpu"]
    forward, backward = torch.ops.rlhf_fast.token_logprobs_forward, torch.ops.rlhf_fast.token_logprobs_backward
    for z in (logits, logits.mT.contiguous().mT):
        torch.library.opcheck(forward.default, (z.detach().requires_grad_(), tokens, *options))
    per_row = (torch.rand(2, 3) + 0.5, 1.0, None, 2.0, torch.rand(2, 3) > 0.5, False, "cpu")
    torch.library.opcheck(forward.default, (logits.detach().requires_grad_(), tokens, *per_row))
    results = forward(logits, tokens, *options)
    arguments = (*upstream(2, 3), logits, tokens, *options[:5], *results, "cpu")
    torch.library.opcheck(backward.default, arguments)
    torch.library.opcheck(backward.default, (None, *arguments[1:]))


def test_autocast_changes_nothing() -> None:
    logits, tokens = cases.random(3, 40), cases.random_tokens(3, vocabulary=40)
    want = ops.token_logprobs(logits, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for op in (ops.token_logprobs, torch.compile(ops.token_logprobs, fullgraph=True, backend="aot_eager")):
            got = op(logits, tokens)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_knows_shapes_without_values() -> None:
    logprobs, entropy = ops.token_logprobs(torch.empty(2, 3, 9, device="meta"), torch.empty(2, 3, device="meta").long())
    assert logprobs.shape == entropy.shape == (2, 3) and logprobs.is_meta
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 9))
        logprobs, _ = ops.token_logprobs(fake, mode.from_tensor(torch.zeros(4).long()))
        assert logprobs.shape == (4,) and isinstance(logprobs, torch._subclasses.FakeTensor)


def test_functorch_can_take_its_gradient_but_not_batch_it() -> None:
    logits, tokens = cases.random(3, 9), torch.tensor([1, 2, 3])
    got = torch.func.grad(lambda z: ops.token_logprobs(z, tokens)[0].sum())(logits)
    assert_close(got, run(lambda z: ops.token_logprobs(z, tokens), [logits], (torch.ones(3), None))[1][0], 1e-6)
    with pytest.raises(RuntimeError, match=r"token_logprobs_forward: torch.func.vmap is not supported; pass the whole"):
        torch.func.vmap(lambda z, t: ops.token_logprobs(z, t)[0])(logits, tokens)


def test_other_modes_see_the_op() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Names():
        ops.token_logprobs(cases.random(2, 5), torch.tensor([1, 2]))
    assert FORWARD in seen


# --- bad input --------------------------------------------------------------------------------------------------------


def test_token_outside_the_vocabulary_is_named(backend: Backend) -> None:
    if backend.device.type != "cpu":
        pytest.skip("looking would wait for the device")
    tokens = torch.zeros(20, dtype=torch.int64)
    tokens[17] = 151936
    with pytest.raises(ValueError, match=r"^tokens: 151936 is outside the vocabulary of 151936 \(row 17\)$"):
        backend(ops.token_logprobs, torch.zeros(1, 1).expand(20, 151936), tokens)
    with pytest.raises(ValueError, match=r"^tokens: -1 is outside the vocabulary of 5 \(row \(1, 2\)\)$"):
        backend(ops.token_logprobs, torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, -1]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "logits: int32, expected float32 or"),
        ({"logits": [1.0]}, TypeError, "logits: list, expected a tensor"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits: an empty vocabulary"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: shape \(\), expected \(..., V\)"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens: float32, expected int64 or int32"),
        ({"tokens": torch.zeros(4).long()}, ValueError, r"tokens: shape \(4,\), expected \(3,\) like the rows of"),
        ({"tokens": torch.zeros(3, device="meta").long()}, ValueError, "tokens: on meta, expected cpu like logits"),
        ({"mask": torch.ones(3)}, TypeError, "mask: float32, expected bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask: shape \(2,\), expected \(3,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: 0.0, expected a number > 0"),
        ({"temperature": math.nan}, ValueError, "temperature: nan"),
        ({"temperature": "hot"}, TypeError, "temperature: str, expected a number"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, ValueError, r"temperature: -1 \(row 1\), expected > 0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: shape \(2,\), expected it to broadcast to \(3,\)"),
        ({"softcap": 0.0}, ValueError, "softcap: 0.0, expected a number > 0"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale: -1.0, expected a number > 0"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "tokens": torch.zeros(3, dtype=torch.int64), **change}
    with pytest.raises(error, match=text):
        ops.token_logprobs(**arguments)
