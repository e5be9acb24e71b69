from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels.arguments import PairTensors, PPOTensors, SampleOptions
from rlhf_fast.ops import lm_head, reference
from rlhf_fast.ops.linear_token_logprobs import LinearInputs
from rlhf_fast.ops.options import PairOptions, PPOOptions
from rlhf_fast.ops.ppo_loss import PPOCall
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch, gradient_of
from tests.unit.ops.conftest import Backend

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


# --- gradients in the forward sweep -----------------------------------------------------------------------------------

OWN = ("hidden", "weight", "bias", "a", "b", "values")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {**HEAD, **TERMS, "aggregation": "sequence_mean"},
    {"objective": "cispo", "rollout_cap": 1.2, "advantage_sums": torch.tensor([36.0, 3.0, 50.0], dtype=torch.float64)},
    {"value_clip": None, "kl_coef": 0.1, "kl": "k2", "denominator": 7, "aggregation": "sequence_sum_mean"},
    {"objective": "sapo"},  # of a steeper gate the slope magnifies what logprobs lack in float32, in torch alike
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(lm_head._WHOLE_ROWS, device, (7 * 30, 1))  # seven rows of thirty words


def with_adapter(inputs: dict[str, Any]) -> dict[str, Any]:
    dtype = inputs["weight"].dtype
    return {**inputs, "a": cases.random(3, 8, seed=40, dtype=dtype), "b": cases.random(30, 3, seed=41, dtype=dtype)}


def everything(
    backend: Backend, inputs: dict[str, Any], frozen: tuple[str, ...] = (), upstream: float = 1.5, **options: Any
) -> dict[str, Tensor]:
    """The loss, the statistics and the gradients by name."""
    wanted = [name for name in OWN if name in inputs and name not in frozen]
    x = {k: v.detach().clone().requires_grad_(k in wanted) for k, v in inputs.items()}
    leaves = [x[name] for name in wanted]
    if "a" in x:
        x["lora"] = (x.pop("a"), x.pop("b"), 0.5)
    if "rollout_cap" in options:
        x["rollout_logprobs"] = x["ref_logprobs"]
    loss, stats = backend(ops.linear_ppo_loss, **x, **options)
    assert not any(value.requires_grad for value in stats.values())
    gradients = torch.autograd.grad(loss * upstream, leaves)
    return {"loss": loss.detach(), **stats, **{f"in {k}": g for k, g in zip(wanted, gradients, strict=True)}}


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "defaults")
@pytest.mark.seconds(2)
def test_the_sweep_is_no_worse_than_torch(
    kernel_backend: Backend, small_blocks: None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    inputs = with_adapter(batch(4, 9, dtype=dtype))
    exact = {k: v if k == "tokens" else v.double() for k, v in inputs.items()}
    for mask in (None, cases.holes()):
        mine = everything(kernel_backend, inputs, mask=mask, **options)
        stock = everything(Backend("reference"), inputs, mask=mask, **options)
        truth = everything(Backend("reference"), exact, mask=mask, **options)
        assert list(mine) == list(stock)
        for name in mine:
            assert mine[name].dtype == stock[name].dtype
            if name.startswith("in "):
                assert_no_worse_than_torch(mine[name], stock[name], truth[name], name)
            else:
                error = abs(float(stock[name]) - float(truth[name]))
                assert_close(mine[name], truth[name], 1.5 * error + 2e-6 * max(1.0, abs(float(truth[name]))), name)


@pytest.mark.parametrize("term", ["policy", "value", "entropy", "kl"])
@pytest.mark.parametrize("where", ["reference", "cpu in two steps", "cpu swept"])
def test_each_term_alone_has_its_own_gradient(term: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the others: all other weights are 0, so none of them can stand in for it. By hand in float64."""
    monkeypatch.setitem(lm_head._WHOLE_ROWS, "cpu", (7 * 30, 1 if where == "cpu swept" else 64))
    given = batch(4, 9, dtype=torch.float32)
    given["advantages"] = given["advantages"] * (term == "policy")
    weights = {"value_coef": 0.7 * (term == "value"), "entropy_coef": 0.3 * (term == "entropy")}
    weights["kl_coef"] = 0.2 * (term == "kl")
    own = ["hidden", "weight", "bias", *(["values"] if term == "value" else [])]
    x = {name: value.double() if name != "tokens" else value for name, value in given.items()}
    for name in own:
        x[name].requires_grad_()
    logprobs = torch.log_softmax(x["hidden"] @ x["weight"].T + x["bias"], -1)
    own_logprobs = logprobs.gather(-1, x["tokens"].long()[..., None]).squeeze(-1)
    apart = x["ref_logprobs"] - own_logprobs
    losses = {
        "policy": -(own_logprobs - x["old_logprobs"]).exp() * x["advantages"],
        "value": 0.7 * 0.5 * (x["values"] - x["returns"]).square(),
        "entropy": 0.3 * (logprobs.exp() * logprobs).sum(-1),
        "kl": 0.2 * (apart.exp() - apart - 1),
    }
    expected = torch.autograd.grad(losses[term].mean(), [x[name] for name in own], allow_unused=True)
    frozen = tuple(name for name in OWN if name not in own)
    options: dict[str, Any] = {**weights, "value_clip": None, "clip_low": math.inf, "clip_high": math.inf}
    got = everything(Backend(where.split()[0]), given, frozen, 1.0, **options)
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for name, gradient in zip(own, expected, strict=True):
        want = torch.zeros_like(x[name]) if gradient is None else gradient
        assert_close(got[f"in {name}"], want, 1e-6, name)


def test_the_sweep_is_the_two_steps(kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """... and blocks change no more than roundings."""
    inputs, options = with_adapter(batch(4, 9, dtype=torch.float32)), {"mask": cases.holes(), **HEAD, **TERMS}
    swept = everything(kernel_backend, inputs, **options)
    monkeypatch.setitem(lm_head._WHOLE_ROWS, kernel_backend.device.type, (7 * 30, 1))
    in_parts = everything(kernel_backend, inputs, **options)
    monkeypatch.setitem(lm_head._WHOLE_ROWS, kernel_backend.device.type, (7 * 30, 64))
    in_two_steps = everything(kernel_backend, inputs, **options)
    for name in swept:
        assert_close(in_parts[name], swept[name], 1e-5, name)
        assert_close(in_two_steps[name], swept[name], 1e-5, name)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_rows_may_hold_anything_in_the_sweep(
    kernel_backend: Backend, small_blocks: None, garbage: float
) -> None:
    inputs, mask = batch(4, 9, dtype=torch.float32), cases.holes()
    heads = {k: inputs.pop(k) for k in ("weight", "bias")}
    poisoned = {k: cases.poison(v, mask, 10**6 if k == "tokens" else garbage) for k, v in inputs.items()}
    got = everything(kernel_backend, {**poisoned, **heads}, mask=mask, **TERMS)
    want = everything(kernel_backend, {**inputs, **heads}, mask=mask, **TERMS)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    for name in ("in hidden", "in values"):
        assert not got[name][~mask].any()


def test_masked_rows_cost_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    fill = lm_head.Head.fill

    def counting(head: lm_head.Head, block: lm_head.Block) -> None:
        rows.append(block.logits.shape[0])
        fill(head, block)

    monkeypatch.setattr(lm_head.Head, "fill", counting)
    everything(Backend("cpu"), batch(4, 9, dtype=torch.float32), mask=cases.holes())
    assert sum(rows) == int(cases.holes().sum())


@pytest.mark.parametrize(
    "frozen", [("weight", "bias"), ("hidden", "values", "bias"), ("weight", "bias", "values", "a")]
)
def test_what_is_frozen_changes_no_other_gradient(kernel_backend: Backend, frozen: tuple[str, ...]) -> None:
    inputs = with_adapter(batch(4, 9, dtype=torch.float32))
    want, got = everything(kernel_backend, inputs, **TERMS), everything(kernel_backend, inputs, frozen, **TERMS)
    assert {f"in {name}" for name in frozen} == want.keys() - got.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_nothing_unmasked_gives_zeros_in_the_sweep(kernel_backend: Backend) -> None:
    inputs = with_adapter(batch(2, 3, dtype=torch.float32))
    found = everything(kernel_backend, inputs, mask=torch.zeros(2, 3, dtype=torch.bool), **TERMS)
    for name, x in found.items():
        assert not x.any(), name


@pytest.mark.seconds(2)
def test_same_call_same_bits(kernel_backend: Backend, small_blocks: None) -> None:
    inputs, options = batch(4, 9, dtype=torch.float32), {"mask": cases.holes(), **TERMS}
    first = everything(kernel_backend, inputs, **options)
    for _ in range(3 if kernel_backend.slow else 50):
        again = everything(kernel_backend, inputs, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    """What may be asked for again is not multiplied in place."""
    inputs = batch(4, 9, dtype=torch.float32)
    weight = inputs["weight"].requires_grad_()
    loss, _ = ops.linear_ppo_loss(**inputs)
    (twice,) = torch.autograd.grad(2 * loss, weight, retain_graph=True)
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(twice, 2 * once) and torch.equal(gradient_of(weight), twice)


def test_the_gradient_is_handed_over_without_a_copy() -> None:
    inputs = batch(4, 9, dtype=torch.float32)
    weight = inputs["weight"].requires_grad_()
    loss, _ = ops.linear_ppo_loss(**inputs)
    kept = [x for x in loss.grad_fn.saved_tensors if x is not None and x.shape == weight.shape]  # type: ignore[union-attr]
    addresses = {x.data_ptr() for x in kept}
    del kept
    (3 * loss).backward()
    assert gradient_of(weight).data_ptr() in addresses


def test_a_gradient_of_the_gradient_is_refused(kernel_backend: Backend) -> None:
    inputs = batch(2, 3, dtype=torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    loss, _ = kernel_backend(ops.linear_ppo_loss, **inputs)
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.autograd.grad(torch.autograd.grad(loss, hidden, create_graph=True)[0].sum(), hidden)


def test_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_head._WHOLE_ROWS, "cpu", (5 * 30, 1))
    sizes: list[int] = []

    def watched(empty: Any) -> Any:
        def call(*size: Any, **options: Any) -> Tensor:
            sizes.append((out := empty(*size, **options)).numel())
            return out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    everything(Backend("cpu"), batch(4, 9, dtype=torch.float32))
    assert sizes and max(sizes) <= max(30 * 8, 5 * 30)  # the weight, five rows of logits


@pytest.mark.seconds(4)
def test_compiles_with_changing_shapes() -> None:
    compiled = torch.compile(ops.linear_ppo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        inputs = batch(n, 7, dtype=torch.float32)
        own = [inputs[name].requires_grad_() for name in ("hidden", "weight", "values")]
        got, stats = compiled(**inputs, **TERMS)
        want, exact = ops.linear_ppo_loss(**inputs, **TERMS)
        assert torch.equal(got, want) and torch.equal(stats["kl"], exact["kl"])
        for a, b in zip(torch.autograd.grad(got, own), torch.autograd.grad(want, own), strict=True):
            assert torch.equal(a, b)


def test_is_registered_as_torch_wants_it() -> None:
    x = batch(3, 7, dtype=torch.float32)
    for name in ("hidden", "weight", "bias", "values"):
        x[name].requires_grad_()
    layer = LinearInputs(
        **{name: x.pop(name) for name in ("hidden", "weight", "bias", "tokens")}, a=None, b=None, scaling=0.0,
        temperatures=None, temperature=0.8, softcap=5.0, logit_scale=0.5,
    )  # fmt: skip
    tensors = PPOTensors(
        **x, logprobs=None, entropy=None, rollout_logprobs=None, mask=cases.random(3, 7, seed=20) > -0.5, weights=None,
        log_ratios=None, advantage_sums=None,
    )  # fmt: skip
    numbers = PPOOptions(dual_clip=3.0, value_coef=0.5, entropy_coef=0.01, kl_coef=0.05).numbers().pack()
    call = PPOCall(True, numbers, [True, True, True, False, False, True], torch.float32, "cpu")
    arguments = (*layer, *tensors, None, 0.0, *call, False)
    torch.library.opcheck(torch.ops.rlhf_fast.linear_ppo_loss_forward.default, arguments)


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


COMPOSED = ("linear_ppo_loss", "linear_dpo_loss")  # of two ops, whatever the backend
TOGETHER: dict[str, tuple[Any, ...]] = {  # what the reference takes in place of single arguments
    "ppo_loss": (PPOTensors, PPOOptions), "dpo_loss": (PairTensors, PairOptions),
    "reward_loss": (PairTensors, PairOptions), "sample": (SampleOptions,),
}  # fmt: skip
OTHER_NAMES = {"reward_loss": {"margin": "margins"}}


@pytest.mark.parametrize("name", [name for name in ops.__all__ if name not in ("use_backend", *COMPOSED)])
def test_every_op_has_the_references_arguments(name: str) -> None:
    public, plain = (dict(inspect.signature(getattr(module, name)).parameters) for module in (ops, reference))
    public.pop("inplace_backward", None)  # which says how, not what
    together = [field for kind in TOGETHER.get(name, ()) for field in inspect.signature(kind).parameters]
    for argument in list(public):
        if OTHER_NAMES.get(name, {}).get(argument, argument) in together:
            public.pop(argument)
    plain = {p: x for p, x in plain.items() if not together or p not in ("tensors", "options")}
    extra = [p for p in plain if p not in public]
    assert list(public) == [p for p in plain if p not in extra]
    if not together:
        assert [p.default for p in public.values()] == [plain[p].default for p in public]
    assert all(plain[p].default is not inspect.Parameter.empty for p in extra)


@pytest.mark.parametrize(("name", "options"), [("ppo_loss", PPOOptions), ("linear_ppo_loss", PPOOptions)])
def test_the_options_defaults_are_the_ops(name: str, options: Any) -> None:
    public = inspect.signature(getattr(ops, name)).parameters
    for field, x in inspect.signature(options).parameters.items():
        assert public[field].default == x.default, field
