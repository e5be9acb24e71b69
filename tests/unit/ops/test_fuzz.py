"""Random calls. Of every compiled entry with arguments of which some do not fit: each is answered or refused by name,
and no memory but the tensors' own is written (here their surroundings are watched; `make asan` watches every byte). Of
every op with random dtypes, layouts, shapes, masks and values, NaN and inf among them: each result is right against the
reference in float64, or refused by name.

RLHF_FAST_FUZZ_CALLS: how many calls in all; `make asan` makes 10,000.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import compiled
from rlhf_fast.ops.linear import Weight
from rlhf_fast.ops.paged_attention import KVCache, PagedBatch
from tests.unit.ops.compare import assert_close
from tests.unit.ops.entries import ENTRIES, Maker, sequences

pytestmark = pytest.mark.skipif(compiled.cpu is None, reason="rlhf_fast._C was not built")

CALLS = int(os.environ.get("RLHF_FAST_FUZZ_CALLS", "600"))
SANITIZED = "RLHF_FAST_TEST_MODULE" in os.environ  # every byte is watched
GUARD = 64  # elements on either side of a tensor
seeds = st.integers(0, 2**32 - 1)


def fuzz(share: int) -> Any:
    """So many of all calls that `share` tests have as many each."""
    return settings(
        max_examples=max(CALLS // share, 1), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


# --- entries ----------------------------------------------------------------------------------------------------------

REFUSALS = (TypeError, ValueError)


def spoiled(x: Any, rng: random.Random, alone: bool) -> Any:
    """Another argument in place of x. ``alone``: the only one (messages about others would print a freed tensor, which
    torch does not survive)."""
    if isinstance(x, bool):
        return not x
    if isinstance(x, int):
        return rng.choice((-1, 0, 1, x - 1, x + 1, 2 * x, 16 * x + 3, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 62)))
    if isinstance(x, float):
        return rng.choice((math.nan, math.inf, -1.0, 0.0, 1e38))
    if not isinstance(x, Tensor):
        return rng.choice((torch.zeros(3), torch.zeros(3, dtype=torch.int64), [1.0], "text", 3))
    if x.device.type == "meta":
        return None
    freed = x.clone()
    changes: list[Callable[[], Any]] = [
        lambda: x.to(rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64,
                                 torch.bool, torch.int8, torch.complex64))),
        lambda: x.reshape(-1)[: x.numel() // 2].clone(),
        lambda: x.reshape(-1)[:-1].clone(),
        lambda: x.new_empty(0),
        lambda: x.new_empty(()),
        lambda: torch.stack([x, x], -1)[..., 0],
        lambda: x.mT if x.dim() >= 2 else x,
        lambda: x.reshape(-1)[:1].expand(x.numel()),
        lambda: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:],
        lambda: torch.cat([x, x]) if x.dim() else x,
        lambda: x.to("meta"),
        lambda: (freed.untyped_storage().resize_(0), freed)[1] if alone else None,
        lambda: x.tolist(),
        lambda: x.numpy() if x.dtype != torch.bfloat16 else None,
        lambda: None,
    ]  # fmt: skip
    if x.dtype in (torch.int32, torch.int64):  # what kernels may follow
        changes += 6 * [lambda: x + rng.choice((-1, 1, 7, 1 << 20, -(1 << 30)))]
        changes += 3 * [lambda: -x, lambda: x.flip(-1) if x.dim() else x]
    elif x.is_floating_point():
        changes += [lambda: torch.full_like(x, rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0)))]
    return rng.choice(changes)()


def leaves(x: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if not isinstance(x, (tuple, list)):
        return [path]
    return [found for i, one in enumerate(x) for found in leaves(one, (*path, i))]


def replaced(x: Any, path: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(x)
    parts = list(x)
    parts[path[0]] = replaced(parts[path[0]], path[1:], change)
    return parts if isinstance(x, list) else tuple(parts)


class Surroundings:
    """Tensors moved to memory whose other elements are watched. Sanitized, an allocation of its own is watched."""

    def __init__(self) -> None:
        self.watched: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)([self(one) for one in x])
        if not isinstance(x, Tensor) or SANITIZED or x.device.type != "cpu":
            return x
        size = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
        if x.numel() and x.data_ptr() == 0:
            return x  # its memory was freed
        around = torch.full(((2 * GUARD + size) * x.itemsize,), 0x5A, dtype=torch.uint8).view(x.dtype)
        moved = around.as_strided(x.shape, x.stride(), GUARD)
        if 0 not in x.stride():
            moved.copy_(x)
        elif x.numel():
            around[GUARD : GUARD + size] = x.as_strided((size,), (1,))
        raw, inside = around.view(torch.uint8), slice(GUARD * x.itemsize, (GUARD + size) * x.itemsize)
        self.watched += [
            (raw[: inside.start], raw[: inside.start].clone()),
            (raw[inside.stop :], raw[inside.stop :].clone()),
        ]
        return moved

    def check(self) -> None:
        for now, before in self.watched:
            assert torch.equal(now, before), "written beside a tensor"


def test_no_entry_is_left_out() -> None:
    assert set(ENTRIES) == {
        name for name in dir(compiled.cpu) if callable(getattr(compiled.cpu, name)) and name[0] != "_"
    }


@pytest.mark.parametrize("entry", ENTRIES)
@fuzz(2 * len(ENTRIES))
@given(seed=seeds, spoils=st.integers(0, 3))
def test_entries(entry: str, seed: int, spoils: int) -> None:
    maker = Maker(seed)
    arguments = ENTRIES[entry](maker)
    places = leaves(arguments[:-1])  # not where it runs
    for _ in range(spoils):
        place = maker.rng.choice(places)
        try:
            arguments = replaced(arguments, place, lambda x: spoiled(x, maker.rng, spoils == 1))
        except (IndexError, TypeError, RuntimeError, ValueError):
            return  # torch itself does not make such a tensor, or what was here is gone
    around = Surroundings()
    moved = around(arguments)
    try:
        getattr(compiled.cpu, entry)(*moved)
    except REFUSALS as refusal:
        assert spoils, f"refused what fits: {refusal}"
        assert str(refusal)
    around.check()


# --- ops --------------------------------------------------------------------------------------------------------------


class Call:
    """Arguments of an op, each in a random layout and, where an op takes several, dtypes of their own."""

    def __init__(self, seed: int) -> None:
        self.make = Maker(seed)
        self.rng = self.make.rng
        self.mixed = self.rng.random() < 0.4
        self.shape = self.rng.choice(((self.make.size(),), (self.make.size(3), self.make.size(4)), ()))

    def dtype(self) -> torch.dtype:
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        return self.rng.choice(dtypes) if self.mixed else self.make.dtype

    def floats(self, *shape: int, dtype: torch.dtype | None = None, banned: float = 0.1) -> Tensor:
        """Numbers near 0; some tensors with a NaN or an infinity."""
        x = 3 * torch.randn(shape, generator=self.make.generator)
        if self.rng.random() < banned and x.numel():
            x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice((math.nan, math.inf, -math.inf))
        return self.laid_out(x.to(dtype or self.dtype()))

    def laid_out(self, x: Tensor) -> Tensor:
        """Equal to x, in another layout."""
        layout = self.rng.randrange(6)
        if layout == 0 and x.dim() >= 2:
            return x.mT.contiguous().mT
        if layout == 1 and x.dim() >= 1:
            return torch.stack([x, x], -1)[..., 0]
        if layout == 2:
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if layout == 3 and x.dim() >= 1 and x.shape[0] > 0:
            x = x[:1].expand(x.shape)
        return x

    def maybe(self, x: Tensor) -> Tensor | None:
        return x if self.rng.random() < 0.5 else None

    def tokens(self, columns: int, *shape: int) -> Tensor:
        return self.laid_out(self.make.whole(columns, *shape, dtype=self.rng.choice((torch.int32, torch.int64))))

    def mask(self, *shape: int) -> Tensor | None:
        mask = self.make.mask(*shape)
        return None if mask is None else self.laid_out(mask)

    def transform(self) -> dict[str, Any]:
        given_temperatures = torch.rand(self.shape, generator=self.make.generator) + 0.3
        return {
            "temperature": self.rng.choice((1.0, 0.7, given_temperatures)),
            "softcap": self.rng.choice((None, 5.0)),
            "logit_scale": self.rng.choice((1.0, 0.5)),
        }

    def head(self) -> tuple[Tensor, Tensor, dict[str, Any], int]:
        h, v, r = self.make.size(20, 1), self.make.columns(), self.make.size(3, 1)
        lora = (self.floats(r, h, banned=0), self.floats(v, r, banned=0), 0.5) if self.rng.random() < 0.4 else None
        bias = self.maybe(self.floats(v, banned=0))
        return self.floats(*self.shape, h), self.floats(v, h, banned=0), {"bias": bias, "lora": lora}, v

    def sequences(self) -> tuple[tuple[int, ...], dict[str, Tensor], int]:
        """A shape, cu_seqlens if that is packed, and how many sequences there are."""
        (cu, count, length), _, tokens = sequences(self.make)
        return (
            ((count, length), {}, count)
            if cu is None
            else ((tokens,), {"cu_seqlens": torch.stack([cu, cu], -1)[..., 0]}, count)
        )


def token_logprobs(c: Call) -> Any:
    v = c.make.columns()
    options = {**c.transform(), "mask": c.mask(*c.shape)}
    return ops.token_logprobs, (c.floats(*c.shape, v), c.tokens(v, *c.shape)), options


def cross_entropy(c: Call) -> Any:
    v = c.make.columns()
    more = {"label_smoothing": c.rng.choice((0.0, 0.1)), "z_loss": c.rng.choice((0.0, 1e-2)), "mask": c.mask(*c.shape)}
    return ops.cross_entropy, (c.floats(*c.shape, v), c.tokens(v, *c.shape)), more


def full_kl(c: Call) -> Any:
    v, kind = c.make.columns(), c.rng.choice(("kl", "reverse_kl", "js"))
    logits = c.floats(*c.shape, v, banned=0), c.floats(*c.shape, v, banned=0)
    return ops.full_kl, logits, {**c.transform(), "kind": kind, "mask": c.mask(*c.shape)}


def linear_token_logprobs(c: Call) -> Any:
    hidden, weight, options, v = c.head()
    return (
        ops.linear_token_logprobs,
        (hidden, weight, c.tokens(v, *c.shape)),
        {**options, **c.transform(), "mask": c.mask(*c.shape)},
    )


def linear_cross_entropy(c: Call) -> Any:
    hidden, weight, options, v = c.head()
    more = {"label_smoothing": c.rng.choice((0.0, 0.1)), "z_loss": c.rng.choice((0.0, 1e-2)), "mask": c.mask(*c.shape)}
    return ops.linear_cross_entropy, (hidden, weight, c.tokens(v, *c.shape)), {**options, **more}


def linear_ppo_loss(c: Call) -> Any:
    c.shape = (c.make.size(8),)
    hidden, weight, options, v = c.head()
    n = c.shape
    more = {"mask": c.mask(*n), "entropy_coef": c.rng.choice((0.0, 0.1))}
    return (
        ops.linear_ppo_loss,
        (hidden, weight, c.tokens(v, *n), c.floats(*n, banned=0), c.floats(*n)),
        {**options, **more},
    )


def linear_dpo_loss(c: Call) -> Any:
    pairs, length = c.make.size(3), c.make.size(4, 1)
    c.shape = (2 * pairs, length)
    hidden, weight, options, v = c.head()
    ref = c.floats(pairs, banned=0), c.floats(pairs, banned=0)
    return ops.linear_dpo_loss, (hidden, weight, c.tokens(v, *c.shape), *ref), {**options, "mask": c.mask(*c.shape)}


def kl_estimate(c: Call) -> Any:
    kind = c.rng.choice(("k1", "k2", "k3", "k1+", "k3+"))
    return ops.kl_estimate, (c.floats(*c.shape), c.floats(*c.shape)), {"kind": kind, "mask": c.mask(*c.shape)}


def gae(c: Call) -> Any:
    shape, where, count = c.sequences()
    paid = {"rewards": c.floats(*shape), "scores": c.maybe(c.floats(count)), "bootstrap": c.maybe(c.floats(count))}
    return ops.gae, (paid.pop("rewards"), c.floats(*shape)), {**paid, **where, "mask": c.mask(*shape), "gamma": 0.9}


def ppo_loss(c: Call) -> Any:
    shape, where, _ = c.sequences()
    values = [c.floats(*shape, banned=0) for _ in range(3)] if c.rng.random() < 0.5 else [None, None, None]
    options = {
        "mask": c.mask(*shape),
        "aggregation": c.rng.choice(("token_mean", "sequence_mean", "sequence_sum_mean")),
    }
    tensors = c.floats(*shape, banned=0), c.floats(*shape, banned=0), c.floats(*shape, banned=0)
    return ops.ppo_loss, (*tensors, *values), {**where, **options, "ratio": c.rng.choice(("token", "sequence"))}


def dpo_loss(c: Call) -> Any:
    n = c.make.size(20)
    loss = c.rng.choice(("sigmoid", "robust", "hinge", "ipo", "kto"))
    return (
        ops.dpo_loss,
        tuple(c.floats(n) for _ in range(4)),
        {"loss": loss, "weights": c.maybe(c.floats(n, banned=0).abs())},
    )


def reward_loss(c: Call) -> Any:
    n = c.make.size(20)
    return ops.reward_loss, (c.floats(n), c.floats(n)), {"margin": c.maybe(c.floats(n, banned=0)), "center_coef": 0.1}


def sequence_sum(c: Call) -> Any:
    shape, where, _ = c.sequences()
    return ops.sequence_sum, (c.floats(*shape),), {**where, "mask": c.mask(*shape)}


def group_advantages(c: Call) -> Any:
    shape, where, _ = c.sequences()
    groups = {"cu_groups": where["cu_seqlens"]} if where else {}
    kind = c.rng.choice(("grpo", "dr_grpo", "rloo"))
    return ops.group_advantages, (c.floats(*shape, banned=0),), {**groups, "kind": kind, "mask": c.mask(*shape)}


def linear(c: Call) -> Any:
    m, k, n, r = c.make.size(8), c.make.size(40), c.make.size(9), c.make.size(3)
    gate = c.rng.choice(("none", "silu", "gelu_tanh"))

    def weight() -> Weight:
        lora = (c.floats(r, k), c.floats(n, r), 0.5) if c.rng.random() < 0.4 else None
        return Weight(c.floats(n, k), c.maybe(c.floats(n)), lora)

    return ops.linear, (c.floats(m, k), [weight() for _ in range(2 if gate != "none" else c.make.size(3, 1))], gate), {}


def rms_norm(c: Call) -> Any:
    h = c.make.columns()
    return ops.rms_norm, (c.floats(*c.shape, h), c.floats(h), 1e-6), {"offset": c.rng.choice((0.0, 1.0))}


def paged_attention(c: Call) -> Any:
    m = c.make
    kv_heads, dim, block_size, blocks = m.size(2, 1), m.size(33, 1), c.rng.choice((16, 32)), m.size(5, 1)
    counts = [m.size(5) for _ in range(m.size(3, 1))]
    contexts = torch.tensor([n + m.size(2 * block_size - n) for n in counts], dtype=torch.int32)
    like = torch.empty(0, dtype=m.dtype)
    cache = KVCache.new(blocks, kv_heads, dim, block_size, like)
    keys, values = cache.keys, cache.values
    keys[:, :, :dim], values[..., :dim] = torch.randn_like(keys[:, :, :dim]), torch.randn_like(values[..., :dim])
    cu = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    batch = PagedBatch.of(m.whole(blocks, len(counts), 2, dtype=torch.int32), cu, contexts)
    query = c.floats(
        sum(counts), kv_heads * m.size(3, 1), dim, dtype=c.rng.choice((m.dtype, m.dtype, c.dtype())), banned=0
    )
    return ops.paged_attention, (query, cache, batch), {"softcap": c.rng.choice((0.0, 5.0)), "window": m.size(20)}


OPS = (
    token_logprobs, cross_entropy, full_kl, linear_token_logprobs, linear_cross_entropy, linear_ppo_loss,
    linear_dpo_loss, kl_estimate, gae, ppo_loss, dpo_loss, reward_loss, sequence_sum, group_advantages, linear,
    rms_norm, paged_attention,
)  # fmt: skip
# Statistics that jump: a rounding moves a token from one side of an edge to the other.
JUMP = {
    "clip_fraction",
    "dual_clip_fraction",
    "value_clip_fraction",
    "rollout_clip_fraction",
    "ratio_p05",
    "ratio_p95",
    "accuracy",
}


def flat_results(x: Any) -> dict[str, Tensor]:
    if isinstance(x, Tensor):
        return {"result": x}
    if isinstance(x, dict):
        return {key: y for key, y in x.items() if key not in JUMP}
    return {f"{i}, {key}": y for i, one in enumerate(x) for key, y in flat_results(one).items()}


def widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: widened(y) for key, y in x.items()}
    if isinstance(x, (tuple, list)):
        parts = [widened(y) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.__name__)
@fuzz(2 * len(OPS))
@given(seed=seeds)
def test_ops(case: Callable[[Call], Any], seed: int) -> None:
    call = Call(seed)
    op, arguments, options = case(call)
    try:
        got = op(*arguments, **options)
    except REFUSALS as refusal:
        assert ": " in str(refusal), f"no name in {refusal}"
        assert call.mixed or "inf" in str(refusal) or "nan" in str(refusal), f"refused what fits: {refusal}"
        return
    with ops.use_backend("reference"):
        same = op(*arguments, **options)
        truth = op(*widened(arguments), **widened(options))
    if case is linear:
        for mine, other, true, size in zip(got, same, truth, magnitudes(*widened(arguments)), strict=True):
            assert_right_sums(mine, other, true, size, gated=arguments[2] != "none")
        return
    products = case in (linear_token_logprobs, linear_cross_entropy, linear_ppo_loss, linear_dpo_loss)
    has_statistics = isinstance(got, tuple) and isinstance(got[-1], dict)
    finite = not has_statistics or bool(truth[0].isfinite())
    results = zip(flat_results(got).items(), flat_results(same).values(), flat_results(truth).values(), strict=True)
    for (name, mine), other, true in results:
        if finite or name.startswith("0, "):  # statistics of a loss that is no number may be any
            assert_right(mine, other, true, 1e-5 if products or has_statistics else 1e-6, name)


def assert_right(mine: Tensor, other: Tensor, true: Tensor, slack: float, name: str) -> None:
    """No worse than the reference in the same dtype, but for some roundings of numbers up to some tens, and one of a
    narrow result: what an adapter's first factor gives is rounded on the way."""
    assert mine.dtype == other.dtype, name
    true = torch.where(true.abs() > torch.finfo(mine.dtype).max, true.sign() * torch.inf, true)  # out of its range
    true = torch.where(mine.isinf() & (mine == other), mine, true)  # and so was something on the way to it
    both = true.isfinite() & other.isfinite()
    errors, sizes = (other.double() - true).abs()[both], true.abs()[true.isfinite()]
    worst, largest = (float(x.max()) if x.numel() else 0.0 for x in (errors, sizes))
    assert_close(mine, true, 1.5 * worst + max(slack, torch.finfo(mine.dtype).eps / 2) * (1 + largest), name)


def magnitudes(x: Tensor, weights: list[Weight], gate: str) -> list[Tensor]:
    """For each result of linear, the sum of the absolute values that are added up for it; gated, the product of two:
    neither gate is larger than its argument."""
    sizes = []
    for weight, bias, lora in weights:
        size = x.abs() @ weight.abs().T + (0 if bias is None else bias.abs())
        if lora is not None:
            a, b, scaling = lora
            size = size + abs(scaling) * (x.abs() @ a.abs().T) @ b.abs().T
        sizes.append(size)
    return sizes if gate == "none" else [sizes[0] * sizes[1]]


def assert_right_sums(mine: Tensor, other: Tensor, true: Tensor, size: Tensor, gated: bool) -> None:
    """Each element within the roundings of its own sums, which may cancel to far less than their terms: eight of
    float32, or two of a narrower dtype (an adapter's first factor, the result). Infinity times a gate near 0 may be
    either infinity or no number, as that gate is rounded."""
    assert mine.dtype == other.dtype and mine.shape == true.shape == size.shape
    true = torch.where(true.abs() > torch.finfo(mine.dtype).max, true.sign() * torch.inf, true)
    left = mine.isinf() & (mine == other)
    if gated:
        left |= ~true.isfinite() & ~mine.isfinite()
    true = torch.where(left, mine.double(), true)
    eps = max(torch.finfo(mine.dtype).eps, 8 * torch.finfo(torch.float32).eps / 2)
    finite = true.isfinite() & mine.isfinite()
    assert_close(torch.where(finite, (mine.double() - true) / (eps * (1e-6 + size)), mine.double()),
                 torch.where(finite, 0.0, true), 1.0, "roundings")  # fmt: skip
