from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.ops.compare import outputs_and_gradients as run


def definition(logits: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log p[token] and -sum p log p, one row and one word at a time."""
    logprobs, entropies = [], []
    for z, token in zip(logits.double().numpy(), tokens.tolist(), strict=True):
        top = z.max()
        log_sum = top + math.log(sum(math.exp(x - top) for x in z))
        logprobs.append(z[token] - log_sum)
        entropies.append(-sum(math.exp(x - log_sum) * (x - log_sum) for x in z if x > -math.inf))
    return np.array(logprobs), np.array(entropies)


def torch_of_today(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What people write: log_softmax, gather, and an entropy that skips words of probability 0."""
    logp = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
    return logp.gather(-1, tokens[:, None]).squeeze(-1), entropy


@pytest.mark.parametrize("case", cases.LOGITS)
def test_is_the_definition_in_float64(case: cases.Case) -> None:
    logits, tokens = case()
    logprobs, entropy = ops.token_logprobs(logits, tokens)
    true_logprobs, true_entropy = definition(logits, tokens)
    assert logprobs.dtype == entropy.dtype == torch.float64
    np.testing.assert_allclose(logprobs.numpy(), true_logprobs, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(entropy.numpy(), true_entropy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("case", "dtype"), cases.LOGITS_AND_DTYPES)
def test_values_and_gradients_are_no_worse_than_torch(case: cases.Case, dtype: torch.dtype) -> None:
    exact, tokens = case()
    logits = exact.to(dtype)
    n = logits.shape[0]
    upstream = (cases.random(n, seed=1), cases.random(n, seed=2))
    for used in (upstream, (upstream[0], None), (None, upstream[1])):
        got, gradients = run(lambda z: ops.token_logprobs(z, tokens), [logits], used)
        stock, stock_gradients = run(lambda z: torch_of_today(z, tokens), [logits], used)
        truth, true_gradients = run(lambda z: torch_of_today(z, tokens), [logits.double()], used)
        assert got[0].dtype == got[1].dtype == torch.float32
        assert gradients[0].dtype == dtype
        assert not gradients[0].isnan().any()
        assert_no_worse_than_torch(got[0], stock[0], truth[0], "logprobs")
        assert_no_worse_than_torch(got[1], stock[1], truth[1], "entropy")
        assert_no_worse_than_torch(gradients[0], stock_gradients[0], true_gradients[0], "gradient")


def test_entropy_gradient_is_p_times_expected_minus_own_logit() -> None:
    logits, tokens = cases.some_minus_infinity()
    _, (gradient,) = run(lambda z: ops.token_logprobs(z, tokens), [logits], (None, torch.ones(6)))
    p = logits.softmax(-1)
    z = torch.where(p == 0, 0, logits)
    assert_close(gradient, p * ((p * z).sum(-1, keepdim=True) - z), 1e-12)


def test_gradient_checks_in_float64() -> None:
    logits = cases.random(2, 3, 5, dtype=torch.float64).requires_grad_()
    tokens = cases.random_tokens(2, 3, vocabulary=5)
    temperature = torch.tensor([[0.5], [2.0]])
    assert torch.autograd.gradcheck(lambda z: ops.token_logprobs(z, tokens, temperature, 3.0, 0.7), [logits])


def test_logits_are_scaled_then_capped_then_cooled() -> None:
    logits, tokens = cases.plain()
    z = 2.0 * np.tanh(0.3 * logits.numpy() / 2.0) / 0.7
    logprobs, entropy = ops.token_logprobs(logits, tokens, temperature=0.7, softcap=2.0, logit_scale=0.3)
    true_logprobs, true_entropy = definition(torch.from_numpy(z), tokens)
    np.testing.assert_allclose(logprobs.numpy(), true_logprobs, rtol=1e-12)
    np.testing.assert_allclose(entropy.numpy(), true_entropy, rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (3,), (1,), ()])
def test_temperature_may_differ_per_row(shape: tuple[int, ...]) -> None:
    logits, tokens = cases.random(4, 3, 20), cases.random_tokens(4, 3, vocabulary=20)
    temperature = cases.random(*shape).abs() + 0.1
    got = ops.token_logprobs(logits, tokens, temperature=temperature)
    each = temperature.expand(4, 3)
    for b in range(4):
        for t in range(3):
            alone = ops.token_logprobs(logits[b, t], tokens[b, t], temperature=float(each[b, t]))
            assert_close(got[0][b, t], alone[0], 1e-6)
            assert_close(got[1][b, t], alone[1], 1e-6)


def test_no_gradient_flows_to_the_temperature() -> None:
    temperature = torch.tensor(0.5, requires_grad=True)
    logprobs, _ = ops.token_logprobs(cases.random(3, 9).requires_grad_(), torch.zeros(3).long(), temperature)
    logprobs.sum().backward()
    assert temperature.grad is None


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_masked_rows_may_hold_anything_and_give_zeros(garbage: float) -> None:
    mask = cases.holes()
    clean, tokens = cases.random(4, 9, 11), cases.random_tokens(4, 9, vocabulary=11)
    temperature = torch.where(mask, 0.7, 0.0)
    upstream = (cases.random(4, 9, seed=1), cases.random(4, 9, seed=2))

    with torch.autograd.detect_anomaly():  # nor is a nan made on the way and dropped later
        outputs, gradients = run(
            lambda z: ops.token_logprobs(z, torch.where(mask, tokens, -100), temperature, mask=mask),
            [cases.poison(clean, mask, garbage)],
            upstream,
        )
    expected, expected_gradients = run(lambda z: ops.token_logprobs(z, tokens, 0.7), [clean], upstream)
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, torch.where(mask, want, 0))
    assert torch.equal(gradients[0], torch.where(mask[..., None], expected_gradients[0], 0))


@pytest.mark.parametrize("layout", [cases.transposed, cases.unaligned])
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64])
def test_strides_and_token_dtype_do_not_matter(layout: Callable[[Tensor], Tensor], token_dtype: torch.dtype) -> None:
    logits, tokens = cases.random(7, 123), cases.random_tokens(7, vocabulary=123)
    got = ops.token_logprobs(layout(logits), tokens.to(token_dtype))
    want = ops.token_logprobs(logits, tokens)
    assert_close(got[0], want[0], 2e-6)
    assert_close(got[1], want[1], 2e-6)


def test_leading_dimensions_are_free() -> None:
    logits, tokens = cases.random(2, 3, 4, 10), cases.random_tokens(2, 3, 4, vocabulary=10)
    whole = ops.token_logprobs(logits, tokens)[0]
    assert whole.shape == (2, 3, 4)
    assert_close(ops.token_logprobs(logits[1, 2, 3], tokens[1, 2, 3])[0], whole[1, 2, 3], 1e-6)


def test_same_call_same_bits() -> None:
    logits, tokens = cases.random(3, 500), cases.random_tokens(3, vocabulary=500)
    first = ops.token_logprobs(logits, tokens)
    for _ in range(100):
        again = ops.token_logprobs(logits, tokens)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, tokens = cases.random(6, 1000), cases.random_tokens(6, vocabulary=1000)
    whole = ops.token_logprobs(logits, tokens)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = ops.token_logprobs(logits[order], tokens[order])
    alone = ops.token_logprobs(logits[2:3], tokens[2:3])
    for i in (0, 1):
        assert torch.equal(permuted[i], whole[i][order])
        assert torch.equal(alone[i], whole[i][2:3])


def test_backward_can_run_twice() -> None:
    logits = cases.random(3, 50).requires_grad_()
    logprobs, entropy = ops.token_logprobs(logits, torch.tensor([1, 2, 3]))
    total = (logprobs * entropy).sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, second)


def test_compiles_as_one_graph_with_changing_shapes() -> None:
    compiled = torch.compile(ops.token_logprobs, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, temperature in ((3, 0.7), (5, 0.9)):
        logits, tokens = cases.random(n, 40), cases.random_tokens(n, vocabulary=40)
        got, want = compiled(logits, tokens, temperature), ops.token_logprobs(logits, tokens, temperature)
        assert_close(got[0], want[0], 1e-6)
        assert_close(got[1], want[1], 1e-6)


def test_leaves_its_inputs_alone() -> None:
    mask = torch.tensor([True, False, True])
    logits = cases.random(3, 50).requires_grad_()
    assert_leaves_inputs_alone(ops.token_logprobs, logits, torch.tensor([1, 2, 3]), torch.ones(3), 5.0, 2.0, mask=mask)


def test_token_outside_the_vocabulary_is_named() -> None:
    tokens = torch.zeros(20, dtype=torch.int64)
    tokens[17] = 151936
    with pytest.raises(ValueError, match=r"^tokens: 151936 is outside the vocabulary of 151936 \(row 17\)$"):
        ops.token_logprobs(torch.zeros(1, 1).expand(20, 151936), tokens)
    with pytest.raises(ValueError, match=r"^tokens: -1 is outside the vocabulary of 5 \(row \(1, 2\)\)$"):
        ops.token_logprobs(torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, -1]]))


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
