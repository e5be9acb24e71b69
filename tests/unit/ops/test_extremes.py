"""Inputs at the end of what there may be, for every op and backend: whole tiles of -inf, sinks above all scores,
advantages that are large and equal, pairs that are far apart, more ranges than are added up at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels import launch_sizes
from rlhf_fast.ops import compiled, lm_head
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_no_worse
from tests.unit.ops.conftest import GPU, Backend
from tests.unit.ops.test_paged_attention import by_definition, problem

TILE = 8192  # columns: the widest that a backend goes over at once; all others divide it
WIDTH = 3 * TILE + 37
TOKEN = {"begin": TILE + 5, "middle": 3 * TILE + 1, "end": 3, "all but one": 2 * TILE - 1}
BANNED = {
    "begin": [slice(0, TILE)],
    "middle": [slice(TILE, 2 * TILE)],
    "end": [slice(2 * TILE, WIDTH)],
    "all but one": [slice(0, TILE), slice(2 * TILE, WIDTH)],
}


def tiles(seed: int = 0) -> Tensor:
    """(4, WIDTH) float64: rows in which whole tiles are -inf."""
    logits = cases.random(len(BANNED), WIDTH, seed=seed, scale=2.0, dtype=torch.float64)
    for row, parts in zip(logits, BANNED.values(), strict=True):
        for part in parts:
            row[part] = -math.inf
    return logits


TOKENS = torch.tensor(list(TOKEN.values()))


def torch_logprobs(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logp = F.log_softmax(z if z.dtype == torch.float64 else z.float(), -1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -math.inf, 0)).sum(-1)
    return logp.gather(-1, tokens[:, None]).squeeze(-1), entropy


def torch_kl(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Where both are banned, nothing."""
    if kind == "reverse_kl":
        return torch_kl(q, p, "kl")
    p, q = (F.log_softmax(x if x.dtype == torch.float64 else x.float(), -1) for x in (p, q))
    banned = p == -math.inf
    p, q = (x.masked_fill(banned, -1e4) for x in (p, q))
    if kind == "kl":
        return (p.exp() * (p - q)).sum(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2


# --- tiles of nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.case_id)
def test_tiles_of_minus_infinity_in_token_logprobs(backend: Backend, dtype: torch.dtype) -> None:
    assert_no_worse(
        lambda z: backend(ops.token_logprobs, z, TOKENS),
        lambda z: torch_logprobs(z, TOKENS),
        [tiles().to(dtype)],
        [[cases.random(4, seed=1), cases.random(4, seed=2)]],
        ["logprobs", "entropy"],
    )


def test_tiles_of_minus_infinity_in_cross_entropy(backend: Backend) -> None:
    assert_no_worse(
        lambda z: backend(ops.cross_entropy, z, TOKENS, z_loss=1e-2),
        lambda z: (-torch_logprobs(z, TOKENS)[0] + 1e-2 * torch.logsumexp(z, -1).square()).mean(),
        [tiles().float()],
        [[torch.tensor(1.3)]],
        ["loss"],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "js"])
def test_tiles_of_minus_infinity_in_full_kl(backend: Backend, kind: str) -> None:
    assert_no_worse(
        lambda p, q: backend(ops.full_kl, p, q, kind=kind),
        lambda p, q: torch_kl(p, q, kind),
        [tiles().float(), tiles(seed=1).float()],
        [[cases.random(4, seed=1)]],
        ["kl"],
    )


def test_tiles_of_minus_infinity_in_sample(kernel_backend: Backend) -> None:
    logits, uniform, ones = tiles().float(), torch.tensor([0.0, 0.4, 0.7, 1 - 1e-12]).double(), torch.ones(4)
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (50, 0.9, 0.01)):
        options = ones, torch.full((4,), top_k).int(), top_p * ones, min_p * ones
        found, wanted = (b(ops.sample, logits, uniform, *options) for b in (kernel_backend, Backend("reference")))
        assert found[0].tolist() == wanted[0].tolist()
        for mine, other in zip(found[1:], wanted[1:], strict=True):
            assert_close(mine, other, 2e-6)


@pytest.mark.parametrize("name", BANNED)
def test_tiles_of_minus_infinity_behind_a_head(
    kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A bias that bans tiles for all rows; in blocks of columns as wide as a tile, and of whole rows."""
    bias = cases.random(WIDTH, seed=5)
    for part in BANNED[name]:
        bias[part] = -math.inf
    hidden, weight = cases.random(2, 4, seed=3), cases.random(WIDTH, 4, seed=4)
    tokens = torch.full((2,), TOKEN[name])

    def plain(h: Tensor) -> tuple[Tensor, Tensor]:
        return torch_logprobs(h @ weight.to(h.dtype).T + bias.to(h.dtype), tokens)

    monkeypatch.setattr(lm_head, "_BLOCK", dict.fromkeys(("cpu", "cuda"), (1024, 2 * TILE)))
    assert_no_worse(
        lambda h: kernel_backend(ops.linear_token_logprobs, h, weight, tokens, bias=bias),
        plain, [hidden], [[cases.random(2, seed=1), cases.random(2, seed=2)]], ["logprobs", "entropy"],
    )  # fmt: skip
    assert_no_worse(
        lambda h: kernel_backend(ops.linear_cross_entropy, h, weight, tokens, bias=bias),
        lambda h: -plain(h)[0].mean(), [hidden], [[torch.tensor(1.3)]], ["loss"],
    )  # fmt: skip
    old, advantages = cases.random(2, seed=6, scale=0.1) - 10, cases.random(2, seed=7)

    def ppo(h: Tensor) -> Tensor:
        logprobs, entropy = plain(h)
        ratio = (logprobs - old).exp()
        return (-(ratio * advantages).minimum(ratio.clamp(0.8, 1.2) * advantages) - 0.1 * entropy).mean()

    assert_no_worse(
        lambda h: kernel_backend(
            ops.linear_ppo_loss, h, weight, tokens, old, advantages, bias=bias, entropy_coef=0.1
        )[0],
        ppo, [hidden], [[torch.tensor(1.3)]], ["loss"],
    )  # fmt: skip
    reference_sums = cases.random(2, seed=8) - 10
    assert_no_worse(
        lambda h: kernel_backend(
            ops.linear_dpo_loss, h, weight, tokens, *reference_sums.split(1), bias=bias,
            cu_seqlens=torch.tensor([0, 1, 2]),
        )[0],
        lambda h: -F.logsigmoid(0.1 * (plain(h)[0] - reference_sums).diff().neg()).mean(),
        [hidden], [[torch.tensor(1.3)]], ["loss"],
    )  # fmt: skip


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"window": 5}], ids=str)
def test_a_sink_above_every_score_leaves_as_little_as_it_should(backend: Backend, options: dict[str, Any]) -> None:
    """Relatively: next to nothing is an answer, too. And below every score it takes nothing."""
    p = problem([40, 3, 17], [2, 1, 1], dim=16)
    sinks = torch.tensor([9.0, 30.0, 80.0, -300.0])
    got = backend(ops.paged_attention, p.query, p.cache, p.batch, sinks=sinks, **options).double()
    truth = by_definition(p, {**options, "sinks": sinks})  # (N, heads, dim)
    size = truth.abs().amax(-1)
    assert (size[:, 0] > 10 * size[:, 1]).all() and (size[:, 1] > 1e15 * size[:, 2]).all()
    assert ((got - truth).abs().amax(-1) <= 2e-5 * size).all()


# --- whitening --------------------------------------------------------------------------------------------------------

LARGE = [333333.34, -1e6 / 3, 16777217.0, 3e12 / 7]


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("count", [2, 7, 1000, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_equal_elements_are_apart_by_nothing(value: float, count: int, dtype: torch.dtype) -> None:
    x = torch.full((count,), value, dtype=dtype)
    mask = torch.arange(count) % 3 != 1
    assert torch.equal(ops.whiten(x), torch.zeros_like(x))
    assert torch.equal(ops.whiten(x, mask), torch.zeros_like(x))
    assert torch.equal(ops.whiten(x, mask, shift_mean=False), torch.where(mask, x, 0))
    x[0] += 8 * value * torch.finfo(dtype).eps  # and those that are nearly so by as much as they are
    assert_close(ops.whiten(x), ops.whiten(x.double() - float(x[1])), 1e-4)


@pytest.mark.parametrize("value", LARGE)
def test_large_equal_advantages_move_nothing(backend: Backend, value: float) -> None:
    """In groups, and whitened by the sums that the loss is given."""
    rewards = torch.full((5, 7), value)
    for kind in ("grpo", "dr_grpo", "rloo"):
        found = backend(ops.group_advantages, rewards, kind=kind)
        assert torch.equal(found, torch.zeros(5, 7)), kind
    n = 35
    sums = torch.tensor([n, n * float(rewards[0, 0]), n * float(rewards[0, 0]) ** 2], dtype=torch.float64)
    logprobs = cases.random(n).requires_grad_()
    loss, _ = backend(ops.ppo_loss, logprobs, cases.random(n, seed=1), rewards.flatten(), advantage_sums=sums)
    loss.backward()
    assert float(loss.detach()) == 0.0 and logprobs.grad is not None and not logprobs.grad.any()


# --- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [15.0, 19.5, 20.5, 25.0, 40.0, 80.0, -25.0, -80.0])
@pytest.mark.parametrize("op", [ops.dpo_loss, ops.reward_loss], ids=lambda op: op.__name__)
def test_the_loss_of_a_pair_that_is_far_apart_keeps_its_digits(backend: Backend, op: Any, apart: float) -> None:
    """softplus(-x) is e^-x where x is large, and its gradient as well."""
    x = torch.tensor([apart]).requires_grad_()
    others = [torch.zeros(1)] * (3 if op is ops.dpo_loss else 1)
    loss, _ = backend(op, x, *others, **({"beta": 1.0} if op is ops.dpo_loss else {}))
    loss.backward()
    assert x.grad is not None
    assert float(loss.detach()) == pytest.approx(max(-apart, 0) + math.log1p(math.exp(-abs(apart))), rel=1e-5, abs=0)
    assert float(x.grad) == pytest.approx(-1 / (1 + math.exp(apart)), rel=1e-5, abs=0)


# --- many ranges ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranges(kernel_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """(more ranges of ppo_loss than are added up at a time, tokens of one). Interpreted, both are made small."""
    if kernel_backend.name != "triton" or GPU:
        yield 259, compiled.PPOLoss(kernel_backend.name).range_size(kernel_backend.device)
        return
    from rlhf_fast.kernels import ppo_loss

    monkeypatch.setattr(ppo_loss, "FINISH", 8)
    with launch_sizes.trying("ppo_loss", kernel_backend.device, {"RANGE": 16}):
        yield 19, 16


@pytest.mark.seconds(2)
def test_a_loss_is_the_sum_of_more_ranges_than_are_added_up_at_a_time(
    kernel_backend: Backend, ranges: tuple[int, int]
) -> None:
    """In each range stands one token that counts, all of different weight."""
    count, size = ranges
    there = torch.arange(count) * size + torch.arange(count) % 5
    n = count * size - size // 2 + 3
    mask = torch.zeros(n, dtype=torch.bool).index_fill(0, there, True)
    advantages = torch.zeros(n).index_copy(0, there, 1.0 + torch.arange(count) / 7)
    logprobs = 0.01 * torch.arange(n).remainder(97) / 97
    loss, stats = kernel_backend(ops.ppo_loss, logprobs, torch.zeros(n), advantages, mask=mask)
    ratio = logprobs[there].double().exp()
    assert float(loss.detach()) == pytest.approx(float(-(ratio * advantages[there]).mean()), rel=1e-6)
    assert float(stats["approx_kl"]) == pytest.approx(float(-ratio.log().mean()), rel=1e-5)


@pytest.mark.seconds(3)
def test_as_many_sequences_as_one_likes(kernel_backend: Backend) -> None:
    if kernel_backend.slow and kernel_backend.name == "triton":
        pytest.skip("a sequence is a program there, and takes a while")
    sequences = 259
    lengths = [(i * 7) % 4 for i in range(sequences - 1)] + [3]  # some empty
    cu, n = cases.cu_seqlens_of(lengths), sum(lengths)
    x, values = cases.random(n, seed=1), cases.random(n, seed=2)

    def both(op: Any, *inputs: Tensor, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        exact = [y.double() for y in inputs]
        found, true = kernel_backend(op, *inputs, **options), Backend("reference")(op, *exact, **options)
        one = isinstance(found, Tensor)
        yield from zip([found] if one else found, [true] if one else true, strict=True)

    for got, want in (
        *both(ops.sequence_sum, x, cu_seqlens=cu),
        *both(ops.gae, x, values, cu_seqlens=cu, gamma=0.9, lam=0.8, sums=True),
        *both(ops.group_advantages, x, cu_groups=cu),
    ):
        assert want.shape == got.shape and bool(want.isfinite().all())
        assert_close(got, want, 1e-5 * (1 + float(want.abs().max())))
    chosen, rejected = cases.random(sequences, seed=3), cases.random(sequences, seed=4)
    got = kernel_backend(ops.reward_loss, chosen, rejected)[0]
    assert float(got) == pytest.approx(float(-F.logsigmoid((chosen - rejected).double()).mean()), rel=1e-5)
