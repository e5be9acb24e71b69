"""What the ops, their kernels and autograd hand to each other is told apart by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels.arguments import (
    PPO_PER_TOKEN,
    Decays,
    Denominator,
    GAEInputs,
    PairNumbers,
    PairResults,
    PairTensors,
    PPONumbers,
    PPOResults,
    PPOTensors,
    SampleOptions,
    TokenRewards,
)
from rlhf_fast.ops import _checks, compiled
from rlhf_fast.ops._library import Op
from rlhf_fast.ops._pair_loss import STATS as PAIR_STATS
from rlhf_fast.ops._pair_loss import PairCall
from rlhf_fast.ops.linear_token_logprobs import LinearInputs
from rlhf_fast.ops.options import PairOptions, PPOOptions
from rlhf_fast.ops.ppo_loss import STATS as PPO_STATS
from rlhf_fast.ops.ppo_loss import PPOCall
from tests.unit.ops import cases
from tests.unit.ops.conftest import Backend

# --- gradients --------------------------------------------------------------------------------------------------------


def doubled(backward: Any) -> Op:
    """An op of three inputs with this backward, under a name of its own."""

    def forward(ignored: float, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x + y

    forward.__name__ = f"doubled_{uuid.uuid4().hex}"
    forward.__annotations__ = {"ignored": float, "x": Tensor, "y": Tensor, "return": Tensor}
    return Op(forward, lambda ignored, x, y: torch.empty_like(x), lambda ctx, inputs, output: None, backward)


@pytest.mark.parametrize("way", ["eager", "transformed", "registered"])
def test_gradients_reach_the_inputs_of_their_names_and_no_others(way: str) -> None:
    op = doubled(lambda ctx, upstream: {"y": upstream, "x": 2 * upstream})
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    in_x, in_y = torch.autograd.grad(getattr(op, way)(0.0, x, y).sum(), (x, y))
    assert torch.equal(in_x, torch.full((2,), 2.0)) and torch.equal(in_y, torch.ones(2))
    only_y = doubled(lambda ctx, upstream: {"y": upstream})
    assert torch.autograd.grad(getattr(only_y, way)(0.0, x, y).sum(), x, allow_unused=True) == (None,)


def test_a_gradient_in_what_is_no_input_is_refused() -> None:
    op = doubled(lambda ctx, upstream: {"z": upstream})
    with pytest.raises(TypeError, match=r"doubled_\w+: a gradient in z, expected one in some of ignored, x, y"):
        op(0.0, torch.ones(2, requires_grad=True), torch.ones(2)).sum().backward()


# --- fields -----------------------------------------------------------------------------------------------------------

COMMON = Path(__file__).resolve().parents[3] / "csrc" / "common"


def without_comments(header: str) -> str:
    return re.sub(r"//[^\n]*", "", (COMMON / header).read_text(encoding="utf-8"))


def members(header: str, struct: str) -> list[str]:
    """The names of a struct's fields, in their order; its functions are left out."""
    (body,) = re.findall(rf"struct {struct} {{(.*?)\n}};", without_comments(header), re.DOTALL)
    names: list[str] = []
    for declaration in re.sub(r"\{[^{}]*\}", ";", body).split(";"):
        if "(" not in declaration:
            names += [re.findall(r"\w+", part)[-1] for part in declaration.split(",") if part.strip()]
    return names


def enumerators(header: str, enum: str) -> dict[str, int]:
    """What each name of an enum stands for, as FIRST_SECOND without its k."""
    source = without_comments(header)
    known = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+)", source)}
    (body,) = re.findall(rf"enum {enum} : int {{(.*?)}};", source, re.DOTALL)
    values: dict[str, int] = {}
    for line in filter(None, (part.strip() for part in body.split(","))):
        name, _, value = (part.strip() for part in line.partition("="))
        following = max([-1, *values.values()]) + 1
        known[name] = values[name] = sum(known[term.strip()] for term in value.split("+")) if value else following
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[1:]).upper(): value for name, value in values.items()}


def test_the_header_is_read_as_a_compiler_reads_it() -> None:
    assert members("ppo_loss.h", "Denominator") == ["there", "number"]
    assert members("kl_estimate.h", "KLEstimateKernels") == []
    assert enumerators("pair_loss.h", "PairSum")["PAIR_SUMS"] == 6
    assert enumerators("ppo_loss.h", "PPOSum")["PPOSUMS"] == 34


@pytest.mark.parametrize(
    ("ours", "header", "struct", "not_passed"),
    [
        (PPOTensors, "ppo_loss.h", "PPOInputs", ("dtype", "count")),
        (PPONumbers, "ppo_loss.h", "PPOOptions", ()),
        (PPOResults, "ppo_loss.h", "PPOResults", ()),
        (PairTensors, "pair_loss.h", "PairInputs", ("dtype", "count")),
        (PairNumbers, "pair_loss.h", "PairOptions", ()),
        (PairResults, "pair_loss.h", "PairResults", ()),
        (TokenRewards, "gae.h", "TokenRewards", ()),
        (SampleOptions, "sample.h", "SampleInputs", ("logits", "dtype", "rows", "columns", "row_stride")),
    ],
)
def test_fields_are_those_of_the_struct_in_c_and_in_its_order(
    ours: Any, header: str, struct: str, not_passed: tuple[str, ...]
) -> None:
    assert list(ours._fields) == [name for name in members(header, struct) if name not in not_passed]


def test_gae_has_the_fields_of_its_struct_in_c() -> None:
    flat = [*GAEInputs._fields[:-1], *Decays._fields]
    assert flat == [name for name in members("gae.h", "GAEInputs") if name != "dtype"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_offsets_in_triton_are_those_in_c() -> None:
    from rlhf_fast.kernels import pair_loss as pairs_in_triton
    from rlhf_fast.kernels import ppo_loss as in_triton

    sums = enumerators("ppo_loss.h", "PPOSum")
    assert sums.pop("PPOSUMS") == in_triton.SUMS <= in_triton.SUMS_READ.value
    assert offsets(in_triton, "SUM_") == sums
    names = {"POLICY": "policy_loss", "CLIPPED": "clip_fraction"}
    stats = offsets(in_triton, "STAT_")
    assert stats == {name: PPO_STATS.index(names.get(name, name.lower())) for name in stats} and len(stats) == 8
    of_pairs = ("LOSS", *(name.upper() for name in PAIR_STATS), "INVERSE")
    assert offsets(pairs_in_triton, "STAT_") == {name: at for at, name in enumerate(of_pairs)}


def offsets(module: Any, prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): x.value for name, x in vars(module).items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    "numbers",
    [
        PPOOptions().numbers(),
        PPOOptions(dual_clip=3.0, value_clip=None, kl="k1+").numbers(),
        PPOOptions(objective="cispo", kl="k2").numbers(),
        PPOOptions(objective="sapo", tau_neg=3.0).numbers(),
        PairOptions().numbers(),
        PairOptions(loss="robust", label_smoothing=0.25, center_coef=0.5).numbers(),
        PairOptions(loss="kto").numbers(),
    ],
)
def test_numbers_come_back_from_the_boundary_of_torch_library(numbers: Any) -> None:
    packed = numbers.pack()
    assert all(type(x) is float for x in packed)
    back = type(numbers).unpack(packed)
    assert back == numbers and [type(x) for x in back] == [type(x) for x in numbers]


@pytest.mark.parametrize(
    ("op", "parts"),
    [
        ("ppo_loss_forward", (PPOTensors, Denominator, PPOCall)),
        ("linear_ppo_loss_forward", (LinearInputs, PPOTensors, Denominator, PPOCall)),
        ("pair_loss_forward", (PairTensors, Denominator, PairCall)),
    ],
)
def test_a_registered_op_has_the_fields_of_its_tuples_as_its_arguments(op: str, parts: tuple[Any, ...]) -> None:
    schema = getattr(torch.ops.rlhf_fast, op).default._schema
    names = [field for part in parts for field in part._fields]
    assert [x.name for x in schema.arguments][: len(names)] == names


# --- options ----------------------------------------------------------------------------------------------------------

# Field -> a value (with what else it needs to matter) that changes the result, and a value that is refused.
PPO_FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "clip_low": ({"clip_low": 0.01}, -0.1),
    "clip_high": ({"clip_high": 0.01}, -0.1),
    "dual_clip": ({"dual_clip": 1.05}, 1.0),
    "value_clip": ({"value_clip": 0.01}, -0.1),
    "value_coef": ({"value_coef": 0.5}, -0.1),
    "entropy_coef": ({"entropy_coef": 0.3}, math.nan),
    "kl_coef": ({"kl_coef": 0.3}, -0.1),
    "kl": ({"kl_coef": 0.1, "kl": "k1"}, "k4"),
    "aggregation": ({"aggregation": "sequence_mean"}, "mean"),
    "objective": ({"objective": "cispo"}, "clips"),
    "ratio": ({"ratio": "sequence"}, "word"),
    "tau_pos": ({"objective": "sapo", "tau_pos": 3.0}, 0.0),
    "tau_neg": ({"objective": "sapo", "tau_neg": 3.0}, -1.0),
    "rollout_cap": ({"rollout_cap": 0.5}, 0.0),
}
PAIR_FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "loss": ({"loss": "hinge"}, "hinges"),
    "beta": ({"beta": 0.3}, 0.0),
    "label_smoothing": ({"label_smoothing": 0.2}, 0.6),
    "center_coef": ({"center_coef": 0.2}, -0.1),
}


def ppo_result(backend: Backend, **options: Any) -> list[Tensor]:
    names = [*PPO_PER_TOKEN]
    x = {name: cases.random(4, 9, seed=i, scale=0.4, dtype=torch.float32) for i, name in enumerate(names)}
    own = [x[name].requires_grad_() for name in ("logprobs", "values", "entropy")]
    loss, stats = backend(ops.ppo_loss, **x, mask=cases.holes(), **options)
    return [loss.detach(), *stats.values(), *torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)]


def pair_result(backend: Backend, **options: Any) -> list[Tensor]:
    both = {name: cases.random(9, seed=i, dtype=torch.float32) for i, name in enumerate(("chosen", "rejected"))}
    own = [x.requires_grad_() for x in both.values()]
    if "center_coef" in options:
        loss, _ = backend(ops.reward_loss, **both, **options)
    else:
        refs = {f"ref_{name}": cases.random(9, seed=i, dtype=torch.float32) for i, name in enumerate(both, 5)}
        loss, _ = backend(ops.dpo_loss, **both, **refs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, own)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("field", [x.name for x in dataclasses.fields(PPOOptions)])
def test_every_option_of_ppo_changes_the_result_or_is_refused(backend: Backend, field: str) -> None:
    changed, refused = PPO_FIELDS[field]
    without = {name: value for name, value in changed.items() if name != field}
    assert not same(ppo_result(backend, **changed), ppo_result(backend, **without))
    with pytest.raises(ValueError, match=rf"^{field}: "):
        ppo_result(backend, **{field: refused})
    with pytest.raises(ValueError, match=rf"^{field}: "):
        PPOOptions(**{field: refused})


@pytest.mark.parametrize("field", [x.name for x in dataclasses.fields(PairOptions)])
def test_every_option_of_pairs_changes_the_result_or_is_refused(backend: Backend, field: str) -> None:
    changed, refused = PAIR_FIELDS[field]
    standing = {"center_coef": 0.0} if field == "center_coef" else {}
    assert not same(pair_result(backend, **changed), pair_result(backend, **standing))
    with pytest.raises(ValueError, match=rf"^{field}: "):
        pair_result(backend, **{field: refused})


def test_options_and_tensors_do_not_change() -> None:
    for x in (PPOOptions(), PairOptions()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            x.label = 1  # type: ignore[union-attr]
    with pytest.raises(AttributeError):
        Denominator().number = 2.0  # type: ignore[misc]


def test_tensors_that_are_alike_are_told_at_once_and_others_by_name() -> None:
    x = torch.zeros(2, 3)
    assert _checks.are_alike([x, None, x.clone()], (2, 3))
    for other in (x[:1], x.long(), x.to("meta"), [0.0]):
        for order in ([x, other], [other, x]):
            assert not _checks.are_alike(order, (2, 3))
    with pytest.raises(TypeError, match="old_logprobs: list, expected a tensor of float32"):
        ops.ppo_loss(x, [0.0], x)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("calls", "kernels"),
    [
        (compiled.TokenLogprobs, "token_logprobs"),
        (compiled.FullKL, "full_kl"),
        (compiled.KLEstimate, "kl_estimate"),
        (compiled.GAE, "gae"),
        (compiled.PPOLoss, "ppo_loss"),
        (compiled.PairLoss, "pair_loss"),
        (compiled.SequenceSum, "sequence_sum"),
        (compiled.GroupAdvantages, "group_advantages"),
        (compiled.PagedAttention, "paged_attention"),
        (compiled.Sample, "sample"),
    ],
)
def test_kernels_of_every_backend_take_the_same_arguments_by_name(calls: type, kernels: str) -> None:
    """An op calls either by keyword."""
    in_triton = importlib.import_module(f"rlhf_fast.kernels.{kernels}")
    own = {name: f for name, f in vars(calls).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert "forward" in own
    for name, function in own.items():
        _, *parameters = inspect.signature(function).parameters
        assert parameters == list(inspect.signature(getattr(in_triton, name)).parameters), name
