from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels import launch_sizes
from rlhf_fast.kernels.arguments import Decays, Sequences, TokenRewards
from rlhf_fast.ops import reference
from tests.unit.ops import cases
from tests.unit.ops.compare import assert_close, assert_leaves_inputs_alone, assert_no_worse_than_torch
from tests.unit.ops.conftest import INTERPRETED, Backend

NAMES = ("advantages", "returns")


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Interpreted, a tile of Triton's costs its width in Python, whatever lies in it; and so more cases cross tiles."""
    with launch_sizes.trying("gae", torch.device("cpu"), {"BLOCK": 64} if INTERPRETED else {}):
        yield


def definition(
    rewards: list[float], values: list[float], gamma: float, lam: float, last_value: float = 0.0
) -> list[float]:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, each delta from its own two values: O(n^2), on lists without holes."""
    n = len(rewards)
    following = [*values[1:], last_value]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


def definition_of_rows(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    critic_lam: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition on each row's unmasked tokens alone, put back where they were, zeros elsewhere."""
    both = [torch.zeros_like(rewards), torch.zeros_like(rewards)]
    for b, real in enumerate(mask):
        last = 0.0 if bootstrap is None else float(bootstrap[b])
        for out, decay in zip(both, (lam, lam if critic_lam is None else critic_lam), strict=True):
            row = definition(rewards[b][real].tolist(), values[b][real].tolist(), gamma, decay, last)
            out[b][real] = torch.tensor(row, dtype=rewards.dtype)
    return both[0], torch.where(mask, both[1] + values, 0)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    return cases.random(*shape, dtype=torch.float64), cases.random(*shape, seed=1, dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("critic_lam", [None, 1.0, 0.7])
def test_is_the_definition(gamma: float, lam: float, bootstrapped: bool, critic_lam: float | None) -> None:
    rewards, values = inputs(4, 9)
    bootstrap = cases.random(4, seed=2, dtype=torch.float64) if bootstrapped else None
    got = ops.gae(rewards, values, gamma, lam, cases.holes(), bootstrap=bootstrap, critic_lam=critic_lam)
    want = definition_of_rows(rewards, values, cases.holes(), gamma, lam, bootstrap, critic_lam)
    assert_close(got[0], want[0], 1e-12, "advantages")
    assert_close(got[1], want[1], 1e-12, "returns")


def test_without_a_mask_every_token_counts() -> None:
    rewards, values = inputs(3, 5)
    got = ops.gae(rewards, values)
    want = definition_of_rows(rewards, values, torch.ones(3, 5, dtype=torch.bool), 1.0, 0.95)
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1], 1e-12)


@cases.property_test
@given(cases.ragged_masks(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_packed_equals_padded_equals_definition(
    ragged: tuple[list[int], Tensor], gamma: float, lam: float, bootstrapped: bool
) -> None:
    lengths, mask = ragged
    rewards, values = inputs(*mask.shape)
    bootstrap = cases.random(len(lengths), seed=2, dtype=torch.float64) if bootstrapped else None
    want = definition_of_rows(rewards, values, mask, gamma, lam, bootstrap)
    padded = ops.gae(rewards, values, gamma, lam, mask, bootstrap=bootstrap)
    packed = ops.gae(
        cases.pack(rewards, lengths), cases.pack(values, lengths), gamma, lam,
        mask=cases.pack(mask, lengths), cu_seqlens=cases.cu_seqlens_of(lengths), bootstrap=bootstrap,
    )  # fmt: skip
    for i in (0, 1):
        assert_close(padded[i], want[i], 1e-12)
        assert torch.equal(packed[i], cases.pack(padded[i], lengths))


@cases.property_test
@given(cases.ragged_masks())
def test_with_gamma_and_lam_1_returns_are_the_reward_to_go(ragged: tuple[list[int], Tensor]) -> None:
    _, mask = ragged
    rewards, values = inputs(*mask.shape)
    _, returns = ops.gae(rewards, values, gamma=1.0, lam=1.0, mask=mask)
    real = torch.where(mask, rewards, 0)
    assert_close(returns, torch.where(mask, real.flip(1).cumsum(1).flip(1), 0), 1e-12)


def test_packed_without_a_mask_and_with_empty_sequences() -> None:
    lengths = [3, 0, 5, 1, 0]
    rewards, values = inputs(9)
    advantages, _ = ops.gae(rewards, values, 0.9, 0.8, cu_seqlens=cases.cu_seqlens_of(lengths))
    start = 0
    for n in lengths:
        want = definition(rewards[start : start + n].tolist(), values[start : start + n].tolist(), 0.9, 0.8)
        assert_close(advantages[start : start + n], torch.tensor(want, dtype=torch.float64), 1e-12)
        start += n


def test_a_hole_costs_no_discount() -> None:
    """A tool's answer between two tokens of the policy: the second is one step away, not four."""
    mask = torch.tensor([[True, False, False, False, True]])
    rewards = torch.tensor([[0.0, 9.0, 9.0, 9.0, 1.0]])
    advantages, _ = ops.gae(rewards, torch.zeros(1, 5), gamma=0.5, lam=1.0, mask=mask)
    assert advantages.tolist() == [[0.5, 0.0, 0.0, 0.0, 1.0]]


# --- the rewards of tokens --------------------------------------------------------------------------------------------


def paid(*shape: int, sequences: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Everything that may pay a token, and a bootstrap."""
    per_token = ("rewards", "values", "logprobs", "ref_logprobs")
    tensors = {name: cases.random(*shape, seed=seed, dtype=dtype) for seed, name in enumerate(per_token)}
    scores, bootstrap = (cases.random(sequences, seed=seed, dtype=dtype) for seed in (4, 5))
    return {**tensors, "scores": scores, "bootstrap": bootstrap, "kl_coef": 0.3, "critic_lam": 1.0}


def test_scores_and_penalties_are_the_rewards_that_one_would_write() -> None:
    mask, every = cases.holes(), paid(4, 9, sequences=4)
    rewards = every["rewards"] - 0.3 * (every["logprobs"] - every["ref_logprobs"])
    for b, real in enumerate(mask):
        if real.any():
            rewards[b, real.nonzero()[-1]] += every["scores"][b]
    options = {"gamma": 0.9, "lam": 0.8, "mask": mask, "bootstrap": every["bootstrap"], "critic_lam": 1.0}
    got, want = ops.gae(**{**every, **options}), ops.gae(rewards, every["values"], **options)
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, 1e-12)


@cases.property_test
@given(cases.ragged_masks(), st.floats(0, 2))
def test_a_sequence_is_paid_its_score_less_the_kl(ragged: tuple[list[int], Tensor], kl_coef: float) -> None:
    """With gamma = lambda = 1 and no values, the advantage of the first token is all that the sequence is paid."""
    _, mask = ragged
    logprobs, ref_logprobs = inputs(*mask.shape)
    scores = cases.random(len(mask), seed=2, dtype=torch.float64)
    advantages, _ = ops.gae(
        None, torch.zeros_like(logprobs), 1.0, 1.0, mask, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
    )  # fmt: skip
    k1 = torch.where(mask, ops.kl_estimate(logprobs, ref_logprobs), 0).sum(1)
    for b, real in enumerate(mask):
        if real.any():
            assert float(advantages[b][real][0]) == pytest.approx(float(scores[b] - kl_coef * k1[b]), abs=1e-12)


# --- every backend ----------------------------------------------------------------------------------------------------

DECAYS = [(1.0, 0.95), (0.99, 0.9), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.case_id)
@pytest.mark.parametrize(("gamma", "lam"), DECAYS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (4, 150)], ids=str)
def test_values_are_no_worse_than_torch(
    backend: Backend, shape: tuple[int, int], gamma: float, lam: float, dtype: torch.dtype
) -> None:
    if INTERPRETED and shape == (4, 150) and dtype != torch.float32:
        pytest.skip("a token takes a while there, and the narrow dtypes are loaded alike at (2, 64)")
    every = paid(*shape, sequences=shape[0], dtype=dtype)
    mask = cases.random(*shape, seed=9) > -0.5
    exact = {key: x.double() if isinstance(x, Tensor) else x for key, x in every.items()}
    parts = [tuple(every)] if INTERPRETED else [("rewards", "values"), tuple(every)]  # a token takes a while there
    for part in parts:
        for real in (None, mask):
            options = {"gamma": gamma, "lam": lam, "mask": real}
            got = backend(ops.gae, **{key: every[key] for key in part}, **options)
            stock = reference.gae(**{key: every[key] for key in part}, **options)
            truth = reference.gae(**{key: exact[key] for key in part}, **options)
            for name, mine, other, true in zip(NAMES, got, stock, truth, strict=True):
                assert mine.dtype == torch.float32
                assert_no_worse_than_torch(mine, other, true, name)


@pytest.mark.parametrize("length", [2500, 131_073])
@pytest.mark.seconds(5)
def test_long_sequences(backend: Backend, length: int) -> None:
    if length > 3000 and backend.name in ("triton", "reference"):
        pytest.skip("a token costs too much there")
    rewards, values = cases.random(2, length), cases.random(2, length, seed=1)

    def loop(rewards: Tensor, values: Tensor) -> Tensor:
        deltas = (rewards + 0.999 * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values).flip(1)
        columns = [torch.zeros_like(rewards[:, 0])]
        for delta in deltas.unbind(1):
            columns.append(delta + 0.999 * 0.99 * columns[-1])
        return torch.stack(columns[:0:-1], 1)

    stock, truth = loop(rewards, values), loop(rewards.double(), values.double())
    advantages, returns = backend(ops.gae, rewards, values, 0.999, 0.99)
    assert_no_worse_than_torch(advantages, stock, truth, "advantages")
    assert_no_worse_than_torch(returns, stock + values, truth + values.double(), "returns")


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_positions_may_hold_anything(backend: Backend, garbage: float) -> None:
    mask, every = cases.holes(), paid(4, 9, sequences=4, dtype=torch.float32)
    spoilt = {
        key: cases.poison(x, mask, garbage) if isinstance(x, Tensor) and x.dim() == 2 else x for key, x in every.items()
    }
    want = backend(ops.gae, **every, mask=mask)
    for mine, other in zip(backend(ops.gae, **spoilt, mask=mask), want, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine[~mask], torch.zeros_like(mine[~mask]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=cases.case_id)
def test_packed_padded_alone_and_permuted_give_the_same_bits(kernel_backend: Backend, dtype: torch.dtype) -> None:
    lengths = [70, 0, 1, 129, 33]
    width, count = 140, len(lengths)
    every = paid(count, width, sequences=count, dtype=torch.float32)
    holes = cases.random(count, width, seed=9) > -0.5
    inside = cases.inside(lengths, width)

    def per_sequence(x: object, order: list[int]) -> Any:
        return x[order] if isinstance(x, Tensor) else x

    def packed(order: list[int]) -> list[Tensor]:
        sizes = [lengths[b] for b in order]
        cut = {
            key: cases.pack(x[order], sizes) if isinstance(x, Tensor) and x.dim() == 2 else per_sequence(x, order)
            for key, x in every.items()
        }
        cu_seqlens = cases.cu_seqlens_of(sizes).to(dtype)
        out = kernel_backend(ops.gae, **cut, mask=cases.pack(holes[order], sizes), cu_seqlens=cu_seqlens, sums=True)
        whole = torch.zeros(2, count, width)
        for i in (0, 1):
            whole[i][order] = whole[i][order].masked_scatter(inside[order], out[i])
        return [*whole, out[2]]

    padded = kernel_backend(ops.gae, **every, mask=holes & inside, sums=True)
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        for mine, want in zip(packed(order)[:2], padded, strict=False):
            assert torch.equal(mine, want)
    assert torch.equal(packed([0, 1, 2, 3, 4])[2], padded[2])
    for b in range(count):
        one = {key: per_sequence(x, [b]) for key, x in every.items()}
        alone = kernel_backend(ops.gae, **one, mask=(holes & inside)[[b]])
        assert torch.equal(alone[0][0], padded[0][b]) and torch.equal(alone[1][0], padded[1][b])


def test_sums_are_those_that_whitening_needs(backend: Backend) -> None:
    every, mask = paid(5, 70, sequences=5, dtype=torch.float32), cases.random(5, 70, seed=9) > -0.5
    advantages, _, sums = backend(ops.gae, **every, mask=mask, sums=True)
    assert sums.dtype == torch.float64
    assert_close(sums, reference.whitening_sums(advantages, mask), 1e-12 * float(sums.abs().max()))
    count, total, squares = sums.tolist()
    chosen = advantages[mask].double()
    assert (squares - total**2 / count) / (count - 1) == pytest.approx(float(chosen.var()), rel=1e-9)


def test_layout_changes_no_bit(kernel_backend: Backend) -> None:
    rewards, values = cases.random(6, 50), cases.random(6, 50, seed=1)
    want = kernel_backend(ops.gae, rewards, values)
    for layout in (cases.transposed, cases.unaligned):
        got = kernel_backend(ops.gae, layout(rewards), layout(values))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_dtypes_may_differ(backend: Backend) -> None:
    rewards, values = cases.random(2, 9, dtype=torch.bfloat16), cases.random(2, 9, seed=1, dtype=torch.float16)
    got, want = backend(ops.gae, rewards, values), reference.gae(rewards.double(), values.double())
    assert_close(got[0], want[0], 1e-5)
    assert ops.gae(rewards, values, scores=torch.ones(2, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.seconds(2)
def test_same_call_same_bits(backend: Backend) -> None:
    every = paid(3, 70, sequences=3, dtype=torch.float32)
    first = backend(ops.gae, **every, sums=True)
    for _ in range(3 if backend.slow else 100):  # an interpreter has no threads that could come in another order
        again = backend(ops.gae, **every, sums=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_number_of_threads_changes_no_bit() -> None:
    every, before, found = paid(300, 900, sequences=300, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(ops.gae(**every, sums=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# --- with the rest of torch -------------------------------------------------------------------------------------------


def test_what_it_returns_are_targets(backend: Backend) -> None:
    rewards, values = cases.random(2, 5).requires_grad_(), cases.random(2, 5, seed=1).requires_grad_()
    assert not any(x.requires_grad for x in backend(ops.gae, rewards, values, sums=True))


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.seconds(4)
def test_compiles_as_one_graph_with_changing_shapes(name: str) -> None:
    with ops.use_backend(name):
        compiled = torch.compile(ops.gae, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (3, 5, 4):
            every = paid(n, 7, sequences=n, dtype=torch.float32)
            got, want = compiled(**every, sums=True), ops.gae(**every, sums=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_packed_compiles_as_one_graph() -> None:
    compiled = torch.compile(ops.gae, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 4], [2, 5, 6]):
        rewards, values = cases.random(sum(lengths)), cases.random(sum(lengths), seed=1)
        got = compiled(rewards, values, cu_seqlens=cases.cu_seqlens_of(lengths))
        want = ops.gae(rewards, values, cu_seqlens=cases.cu_seqlens_of(lengths))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_is_registered_as_torch_wants_it(kernel_backend: Backend) -> None:
    if kernel_backend.name != "cpu":
        pytest.skip("the registration is the same for all")
    op, every = torch.ops.rlhf_fast.gae_forward.default, paid(3, 7, sequences=3, dtype=torch.float32)
    where, values = Sequences(cu_seqlens=None, number=3, length=7), every["values"]
    rewards = TokenRewards(every["rewards"], logprobs=None, ref_logprobs=None, scores=None, kl_coef=0.0)
    decays = Decays(gamma=0.9, lam=0.8, critic_lam=0.8)
    torch.library.opcheck(op, (*where, *rewards, values, None, None, *decays, False, torch.float32, "cpu"))
    policy = {name: every[name] for name in ("logprobs", "ref_logprobs")}
    rewards = TokenRewards(rewards=None, **policy, scores=every["scores"], kl_coef=0.1)
    others, decays = (values, cases.random(3, 7) > 0, every["bootstrap"]), decays._replace(critic_lam=1.0)
    torch.library.opcheck(op, (*where, *rewards, *others, *decays, True, torch.float32, "cpu"))


def test_knows_shapes_without_values() -> None:
    advantages, returns, sums = ops.gae(*(torch.empty(2, 9, device="meta") for _ in range(2)), sums=True)
    assert advantages.shape == returns.shape == (2, 9) and sums.shape == (3,) and sums.is_meta


# --- edges and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_empty_batches_keep_their_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    advantages, returns, sums = backend(ops.gae, torch.ones(shape), torch.zeros(shape), sums=True)
    assert advantages.shape == returns.shape == shape
    assert sums.tolist() == [float(shape == (1, 1))] * 3
    packed = backend(ops.gae, torch.ones(0), torch.ones(0), cu_seqlens=torch.tensor([0], dtype=torch.int32))
    assert packed[0].shape == (0,)


def test_float32_and_narrower_give_float32() -> None:
    for dtype in cases.FLOATS:
        rewards, values = cases.random(2, 6, dtype=dtype), cases.random(2, 6, seed=1, dtype=dtype)
        got = ops.gae(rewards, values)
        want = ops.gae(rewards.double(), values.double())
        assert got[0].dtype == got[1].dtype == torch.float32
        assert_close(got[0], want[0], 1e-5)


def test_padding_changes_no_bit() -> None:
    rewards, values = cases.random(2, 6), cases.random(2, 6, seed=1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    pad = torch.nn.functional.pad
    short = ops.gae(rewards, values, mask=mask)
    long = ops.gae(pad(rewards, (3, 4)), pad(values, (3, 4)), mask=pad(mask, (3, 4)))
    assert torch.equal(long[0][:, 3:9], short[0]) and torch.equal(long[1][:, 3:9], short[1])


def test_leaves_its_inputs_alone() -> None:
    rewards, values = cases.random(4, 9), cases.random(4, 9, seed=1).requires_grad_()
    assert_leaves_inputs_alone(ops.gae, rewards, values, mask=cases.holes(), bootstrap=torch.ones(4))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"values": torch.zeros(6)}, ValueError, r"values: shape \(6,\), expected \(B, T\), or \(N,\) with cu_seq"),
        ({"rewards": torch.zeros(2, 4)}, ValueError, r"rewards: shape \(2, 4\), expected \(2, 3\) like values"),
        ({"logprobs": torch.zeros(2, 3)}, ValueError, "ref_logprobs: None, expected a tensor like the other"),
        ({"kl_coef": 0.1}, ValueError, "logprobs: None, expected a tensor because kl_coef is not 0"),
        ({"rewards": None}, ValueError, "rewards: None, expected a tensor, or scores"),
        ({"scores": torch.ones(3)}, ValueError, r"scores: shape \(3,\), expected \(2,\) like the number of seq"),
        ({"critic_lam": 2.0}, ValueError, "critic_lam: 2.0, expected a number >= 0 and <= 1"),
        ({"values": torch.zeros(2, 3).int()}, TypeError, "values: int32, expected float32"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: float32, expected bool"),
        ({"bootstrap": torch.ones(3)}, ValueError, r"bootstrap: shape \(3,\), expected \(2,\) like the number of seq"),
        ({"gamma": 1.5}, ValueError, "gamma: 1.5, expected a number >= 0 and <= 1"),
        ({"lam": -0.1}, ValueError, "lam: -0.1, expected a number >= 0 and <= 1"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"values: shape \(2, 3\), expected \(N,\) because cu_seq"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ops.gae(**{"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), **change})


@pytest.mark.parametrize(
    ("cu_seqlens", "text"),
    [
        ([0, 2, 5], "cu_seqlens: runs from 0 to 5, expected from 0 to 6 like values"),
        ([1, 6], "cu_seqlens: runs from 1 to 6, expected from 0 to 6 like values"),
        ([0, 4, 2, 6], "cu_seqlens: falls after index 1, expected it never to"),
        ([], r"cu_seqlens: shape \(0,\), expected \(B \+ 1,\)"),
    ],
)
def test_bad_cu_seqlens_are_named(cu_seqlens: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ops.gae(torch.zeros(6), torch.zeros(6), cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))
