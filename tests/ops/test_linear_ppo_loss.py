from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import reference
from tests.ops import cases
from tests.ops.compare import assert_close, assert_leaves_inputs_alone, gradient_of

PER_TOKEN = ("old_logprobs", "advantages", "values", "old_values", "returns", "ref_logprobs")
HEAD: dict[str, Any] = {"temperature": 0.8, "softcap": 5.0, "logit_scale": 0.5}
TERMS: dict[str, Any] = {"entropy_coef": 0.01, "kl_coef": 0.05, "value_coef": 0.5, "dual_clip": 3.0}


def batch(*shape: int, vocabulary: int = 30, width: int = 8, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    per_token = {name: cases.random(*shape, seed=i, scale=0.3, dtype=dtype) for i, name in enumerate(PER_TOKEN)}
    for name in ("old_logprobs", "ref_logprobs"):
        per_token[name] = per_token[name] - math.log(vocabulary)
    return {
        "hidden": cases.random(*shape, width, dtype=dtype),
        "weight": cases.random(vocabulary, width, scale=0.3, dtype=dtype),
        "bias": cases.random(vocabulary, scale=0.3, dtype=dtype),
        "tokens": cases.random_tokens(*shape, vocabulary=vocabulary),
        **per_token,
    }


def in_two_steps(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor, mask: Tensor | None = None, **others: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the logits in between."""
    head = {k: others.pop(k) for k in HEAD if k in others}
    logprobs, entropy = ops.token_logprobs(hidden @ weight.T + bias, tokens, mask=mask, **head)
    return ops.ppo_loss(logprobs, mask=mask, entropy=entropy, **others)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum_mean"])
@pytest.mark.parametrize("terms", [{}, TERMS])
def test_is_ppo_loss_of_the_products_logprobs(aggregation: str, terms: dict[str, Any]) -> None:
    inputs, leaves = batch(4, 9), ("hidden", "weight", "bias", "values")
    for name in leaves:
        inputs[name].requires_grad_()
    options = {"mask": cases.holes(), "aggregation": aggregation, **HEAD, **terms}
    got, stats = ops.linear_ppo_loss(**inputs, **options)
    want, want_stats = in_two_steps(**inputs, **options)
    assert_close(got, want, 1e-12)
    assert stats.keys() == want_stats.keys()
    for name in stats:
        assert_close(stats[name], want_stats[name], 1e-12, name)
    sources = [inputs[name] for name in leaves]
    for name, a, b in zip(leaves, torch.autograd.grad(got, sources), torch.autograd.grad(want, sources), strict=True):
        assert_close(a, b, 1e-12, name)


def test_gradient_checks_in_float64() -> None:
    inputs, leaves = batch(5, vocabulary=4, width=3), ("hidden", "weight", "bias", "values")
    mask = torch.tensor([True, True, False, True, True])

    def op(*own: Tensor) -> Tensor:
        return ops.linear_ppo_loss(**{**inputs, **dict(zip(leaves, own, strict=True))}, mask=mask, **HEAD, **TERMS)[0]

    assert torch.autograd.gradcheck(op, [inputs[name].clone().requires_grad_() for name in leaves])


def test_packed_equals_padded() -> None:
    inputs, lengths = batch(4, 9), [9, 0, 3, 6]
    mask = cases.holes() & cases.inside(lengths, 9)
    heads = {k: inputs.pop(k) for k in ("weight", "bias")}
    options = {**heads, **HEAD, **TERMS, "aggregation": "sequence_mean"}
    padded, _ = ops.linear_ppo_loss(**inputs, mask=mask, **options)
    flat: dict[str, Any] = {k: cases.pack(v, lengths) for k, v in inputs.items()}
    flat |= {"mask": cases.pack(mask, lengths), "cu_seqlens": cases.cu_seqlens_of(lengths)}
    packed, _ = ops.linear_ppo_loss(**flat, **options)
    assert_close(packed, padded, 1e-12)


def test_micro_batches_with_a_common_denominator_add_up() -> None:
    inputs, mask = batch(4, 9), cases.holes()
    heads = {k: inputs.pop(k).requires_grad_() for k in ("weight", "bias")}
    whole, _ = ops.linear_ppo_loss(**inputs, **heads, mask=mask, **TERMS)
    shared = {**heads, **TERMS, "denominator": mask.sum()}
    rows = [slice(b, b + 1) for b in range(4)]
    parts = [ops.linear_ppo_loss(**{k: v[i] for k, v in inputs.items()}, mask=mask[i], **shared)[0] for i in rows]
    assert_close(torch.stack(parts).sum(), whole, 1e-12)
    (want,) = torch.autograd.grad(whole, heads["weight"])
    (got,) = torch.autograd.grad(torch.stack(parts).sum(), heads["weight"])
    assert_close(got, want, 1e-12)


def test_masked_positions_may_hold_anything_and_add_nothing() -> None:
    inputs, mask = batch(4, 9), cases.holes()
    heads = {k: inputs.pop(k) for k in ("weight", "bias")}
    weight = heads["weight"].requires_grad_()
    poisoned: dict[str, Any] = {
        k: cases.poison(v, mask, 10**6 if k == "tokens" else math.nan) for k, v in inputs.items()
    }
    hidden = poisoned["hidden"].requires_grad_()
    got, stats = ops.linear_ppo_loss(**poisoned, **heads, mask=mask, **TERMS)
    want, _ = ops.linear_ppo_loss(**inputs, **heads, mask=mask, **TERMS)
    assert torch.equal(got, want)
    assert all(value.isfinite() for value in stats.values())
    (want_dw,) = torch.autograd.grad(want, weight)
    dw, dh = torch.autograd.grad(got, [weight, hidden])
    assert torch.equal(dw, want_dw)
    assert torch.equal(dh[~mask], torch.zeros_like(dh[~mask]))


def test_nothing_unmasked_gives_zero_with_a_graph() -> None:
    inputs = batch(2, 3)
    inputs["weight"].requires_grad_()
    loss, stats = ops.linear_ppo_loss(**inputs, mask=torch.zeros(2, 3, dtype=torch.bool), **TERMS)
    loss.backward()
    assert loss.item() == 0
    assert all(value.item() == 0 for value in stats.values())
    assert torch.equal(gradient_of(inputs["weight"]), torch.zeros_like(inputs["weight"]))


@pytest.mark.parametrize("dtype", cases.FLOATS)
def test_loss_is_float32_for_narrow_inputs(dtype: torch.dtype) -> None:
    inputs = batch(4, 9, dtype=dtype)
    exact = {k: v if k == "tokens" else v.double() for k, v in inputs.items()}
    loss, stats = ops.linear_ppo_loss(**inputs, **TERMS)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in stats.values())
    assert_close(loss, ops.linear_ppo_loss(**exact, **TERMS)[0], 1e-6)


def test_keywords_are_those_of_its_two_halves() -> None:
    head = list(inspect.signature(ops.linear_token_logprobs).parameters)
    loss = list(inspect.signature(ops.ppo_loss).parameters)
    expected = set(head) | set(loss) - {"logprobs", "entropy"}
    assert set(inspect.signature(ops.linear_ppo_loss).parameters) == expected


def test_leaves_its_inputs_alone() -> None:
    inputs = batch(4, 9)
    inputs["hidden"].requires_grad_()
    assert_leaves_inputs_alone(ops.linear_ppo_loss, **inputs, mask=cases.holes(), **TERMS)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"tokens": torch.full((2, 3), 30)}, ValueError, r"tokens: 30 is outside the vocabulary of 30 \(row \(0,"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs: shape \(2, 4\), expected \(2, 3\)"),
        ({"weight": torch.zeros(30, 7)}, ValueError, r"hidden: shape \(2, 3, 8\), expected \(\.\.\., 7\)"),
        ({"ref_logprobs": None, "kl_coef": 0.1}, ValueError, "ref_logprobs: None, expected a tensor because kl_coef"),
        ({"temperature": 0}, ValueError, "temperature: 0, expected a number > 0"),
        ({"aggregation": "sum"}, ValueError, "aggregation: 'sum', did you mean"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.linear_ppo_loss(**{**batch(2, 3), **change})


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name != "use_backend"])
def test_every_op_has_the_references_signature(name: str) -> None:
    public, plain = (inspect.signature(getattr(module, name)).parameters for module in (ops, reference))
    extra = [p for p in plain if p not in public]
    public = {p: x for p, x in public.items() if p != "inplace_backward"}  # which says how, not what
    assert list(public) == [p for p in plain if p not in extra]
    assert [p.default for p in public.values()] == [plain[p].default for p in public]
    assert all(plain[p].default is not inspect.Parameter.empty for p in extra)
