from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops.sample import Samples
from tests.unit.ops.conftest import Backend

LOGITS = [2.0, -1.0, 0.5, 0.4, -math.inf, 1.9, -3.0, 0.0, 0.7, -0.2]
JUST_BELOW_ONE = np.nextafter(1.0, 0.0)
Cuts = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
CUTS: list[Cuts] = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (3.0, 0, 1.0, 0.0),
    (1.0, 3, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 99, 1.0, 0.0),
    (1.0, 0, 0.6, 0.0),
    (1.0, 0, 0.01, 0.0),
    (1.3, 5, 0.7, 0.0),
    (1.0, 2, 0.99, 0.0),
    (1.0, 0, 1.0, 0.3),
    (2.0, 6, 0.8, 0.4),
]


def draw(backend: Backend, logits: Tensor, uniform: Tensor, cuts: Cuts) -> Samples:
    """With the same settings for every row."""
    rows = len(logits)
    temperature, top_k, top_p, min_p = cuts
    return Samples(
        *backend(
            ops.sample, logits, uniform, torch.full((rows,), temperature),
            torch.full((rows,), top_k, dtype=torch.int32), torch.full((rows,), top_p), torch.full((rows,), min_p),
        )
    )  # fmt: skip


def definition(logits: list[float], cuts: Cuts) -> np.ndarray:
    """The probabilities to sample from, one token at a time, likeliest first."""
    temperature, top_k, top_p, min_p = cuts
    scaled = np.array(logits) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    ranked = np.argsort(-probabilities, kind="stable")
    if top_k:
        probabilities[ranked[top_k:]] = 0.0
    probabilities /= probabilities.sum()
    kept = np.zeros_like(probabilities)
    before = 0.0
    for rank, token in enumerate(ranked):
        if (rank == 0 or before < top_p) and probabilities[token] >= min_p * probabilities[ranked[0]]:
            kept[token] = probabilities[token]
        before += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_tokens_come_as_often_as_they_should(backend: Backend, cuts: Cuts) -> None:
    count = 5 if backend.slow else 20_000
    numbers = torch.from_numpy(np.random.default_rng(0).random(count))
    tokens = draw(backend, torch.tensor(LOGITS).expand(count, -1), numbers, cuts).tokens
    if backend.slow:  # too few to count
        wanted = definition(LOGITS, cuts).cumsum()
        assert tokens.tolist() == [int(np.searchsorted(wanted, u, side="right")) for u in numbers.numpy()]
        return
    seen = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    expected = definition(LOGITS, cuts)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    if possible.sum() > 1:
        stats = pytest.importorskip("scipy.stats")
        assert stats.chisquare(seen[possible], expected[possible] * count).pvalue > 1e-4


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_known_of_the_distribution_is_right(backend: Backend, dtype: torch.dtype, cuts: Cuts) -> None:
    if backend.slow and dtype != torch.float32 and cuts != CUTS[0]:
        pytest.skip("a row takes a while there, and the narrow dtypes are loaded alike with nothing cut")
    rows = 3 if backend.slow else 64
    logits = (3 * torch.randn(rows, 700, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[:, 5] = -math.inf
    numbers = torch.from_numpy(np.random.default_rng(0).random(rows))
    found = draw(backend, logits, numbers, cuts)
    exact = torch.log_softmax(logits.double() / cuts[0], dim=-1)
    kept = np.stack([definition(row.tolist(), cuts) for row in logits.double()]) > 0
    whole = exact.exp()
    torch.testing.assert_close(
        found.logprobs.double(), exact.gather(-1, found.tokens[:, None]).squeeze(-1), rtol=1e-6, atol=2e-6
    )
    torch.testing.assert_close(found.kept.double(), (whole * torch.from_numpy(kept)).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), -(whole * exact.clamp(min=-1e9)).sum(-1), rtol=1e-6, atol=2e-6)
    assert all(kept[row, token] for row, token in enumerate(found.tokens.tolist()))


@pytest.mark.parametrize(
    "cuts", [(1.0, 1000, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (0.5, 3000, 0.7, 0.0), (3.0, 4000, 0.9, 0.2)], ids=str
)
def test_of_equals_at_the_edge_the_first_are_kept(backend: Backend, cuts: Cuts) -> None:
    """Of few values in a row of many: cuts go through the middle of equals, and those lie in all parts of the row."""
    numbers = np.random.default_rng(1).choice([-2.0, -0.5, 0.25, 1.0, 1.5], (2, 5000), p=[0.3, 0.3, 0.2, 0.1, 0.1])
    logits = torch.from_numpy(np.repeat(numbers, 2, axis=0)).float()
    found = draw(backend, logits, torch.tensor([0.0, JUST_BELOW_ONE] * 2).double(), cuts)
    for row, (tokens, kept) in enumerate(zip(found.tokens.view(2, 2), found.kept.view(2, 2), strict=True)):
        there = np.flatnonzero(definition(numbers[row].tolist(), cuts))
        assert tokens.tolist() == [there[0], there[-1]]
        whole = np.exp(numbers[row] / cuts[0])
        np.testing.assert_allclose(kept.numpy(), whole[there].sum() / whole.sum(), rtol=1e-6, atol=1e-6)


INF = math.inf
JUST_ABOVE_A_HALF = float(np.nextafter(np.float32(0.5), np.float32(1.0)))
EDGES: list[tuple[list[float], Cuts, list[int]]] = [
    (4 * [0.0], (1.0, 0, 0.5, 0.0), [0, 1]),  # two reach a half, and a third would be too many
    (4 * [0.0], (1.0, 0, JUST_ABOVE_A_HALF, 0.0), [0, 1, 2]),
    (4 * [0.0], (1.0, 0, 0.25, 0.0), [0]),
    (4 * [7.5], (0.3, 0, 0.75, 0.0), [0, 1, 2]),
    (4 * [0.0], (1.0, 0, 1.0, 0.0), [0, 1, 2, 3]),
    (8 * [0.0], (1.0, 0, 0.5, 0.0), [0, 1, 2, 3]),
    ([-INF, 0.0, -INF, 0.0, 0.0, 0.0], (1.0, 0, 0.5, 0.0), [1, 3]),
    ([0.0, 0.0, 2.0, 2.0, 2.0, 2.0], (1e-3, 0, 0.5, 0.0), [2, 3]),  # what is nothing beside them
    (4 * [0.0], (1.0, 2, 1.0, 0.0), [0, 1]),
    (4 * [0.0], (1.0, 4, 1.0, 0.0), [0, 1, 2, 3]),
    ([0.0, 1.0, 0.0, 1.0], (1.0, 3, 1.0, 0.0), [0, 1, 3]),
    (4 * [0.0], (1.0, 2, 0.5, 0.0), [0]),  # a half of what top_k has left
    (8 * [0.0], (1.0, 4, 0.5, 0.0), [0, 1]),
    ([0.0, -1.0, -1.0], (1.0, 0, 0.7, math.exp(-1) * (1 - 1e-5)), [0, 1]),  # min_p of the likeliest, not of all
    ([0.0, -1.0, -1.0], (1.0, 0, 1.0, math.exp(-1) * (1 - 1e-5)), [0, 1, 2]),
    ([0.0, -1.0, -1.0], (1.0, 0, 1.0, math.exp(-1) * (1 + 1e-5)), [0]),
    ([0.0, -1.0, -1.0], (2.0, 0, 1.0, math.exp(-0.5) * (1 - 1e-5)), [0, 1, 2]),  # of what the temperature gives
    ([0.0, -1.0, -1.0], (2.0, 0, 1.0, math.exp(-0.5) * (1 + 1e-5)), [0]),
    ([0.0, 0.0, -1.0], (1.0, 0, 1.0, float(np.nextafter(np.float32(1.0), np.float32(0.0)))), [0, 1]),
    ([0.0, -14.0], (1.0, 0, 1.0, 0.0), [0, 1]),  # 1.0 is not nearly all
    ([0.0, -30.0, -30.5], (1.0, 3, 1.0, 1e-14), [0, 1, 2]),
]


@pytest.mark.parametrize("width", [None, 3000], ids=["alone", "in a row of many"])
@pytest.mark.parametrize(("logits", "cuts", "there"), EDGES, ids=str)
def test_at_an_edge_as_many_are_kept_as_are_needed_and_no_more(
    backend: Backend, logits: list[float], cuts: Cuts, there: list[int], width: int | None
) -> None:
    if width is not None:  # far apart, with banned tokens between
        places = [round((i + 0.5) * width / len(logits)) for i in range(len(logits))]
        row = torch.full((width,), -INF).index_copy(0, torch.tensor(places), torch.tensor(logits))
        there = [places[i] for i in there]
    else:
        row = torch.tensor(logits)
    weights = torch.exp((row.double() - row.max()) / cuts[0])
    kept = weights[there]
    middles = (kept.cumsum(0) - kept / 2) / kept.sum()
    numbers = torch.cat([torch.tensor([0.0]).double(), middles, torch.tensor([JUST_BELOW_ONE])])
    found = draw(backend, row.expand(len(numbers), -1).contiguous(), numbers, cuts)
    assert found.tokens.tolist() == [there[0], *there, there[-1]]
    torch.testing.assert_close(
        found.kept.double(), (kept.sum() / weights.sum()).expand(len(numbers)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_likeliest_token(backend: Backend, dtype: torch.dtype) -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1], [0.0, 1.0, 1.0] + 7 * [0.5]], dtype=dtype)
    found = draw(backend, logits, torch.tensor([0.99, 0.5, 0.99]).double(), (0.0, 0, 1.0, 0.0))
    assert found.tokens.tolist() == [0, 9, 1], "of equals the first"
    torch.testing.assert_close(found.logprobs, torch.log_softmax(logits.float(), -1).amax(-1))
    torch.testing.assert_close(found.kept, found.logprobs.exp())


def test_temperature_zero_tells_the_likeliest_from_one_whose_weight_rounds_to_the_same(backend: Backend) -> None:
    logits = torch.tensor([[0.0, 1e-9, -1.0], [-1e-9, -1.0, 0.0]])
    assert draw(backend, logits, torch.tensor([0.5, 0.5]).double(), (0.0, 0, 1.0, 0.0)).tokens.tolist() == [1, 2]


def test_a_row_that_is_no_distribution_is_told_and_harms_no_other(backend: Backend) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    want = draw(backend, logits, torch.full((6,), 0.3).double(), CUTS[0])
    logits[1, 7], logits[2, 7], logits[3] = math.nan, math.inf, -math.inf
    found = draw(backend, logits, torch.full((6,), 0.3).double(), CUTS[0])
    assert found.tokens.tolist() == [*want.tokens.tolist()[:1], -1, -1, -1, *want.tokens.tolist()[4:]]
    assert found.logprobs.isnan().tolist() == [False, True, True, True, False, False]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-math.inf, -80.0, -1.0, 0.0, 0.1, 3.0, 80.0]), min_size=1, max_size=12).filter(
            lambda row: max(row) > -math.inf
        ),
        min_size=1,
        max_size=3,
    ),
    uniform=st.sampled_from([0.0, 5e-324, 0.5, JUST_BELOW_ONE]) | st.floats(0, JUST_BELOW_ONE),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.3, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.5]),
)
def test_whatever_the_random_number_the_token_is_a_possible_one(
    rows: list[list[float]], uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows])
    before = logits.clone()
    numbers = torch.full((len(rows),), uniform, dtype=torch.float64)
    tokens, logprobs, kept, entropy = draw(Backend("cpu"), logits, numbers, (temperature, top_k, top_p, min_p))
    assert torch.equal(logits, before)
    assert ((tokens >= 0) & (tokens < width)).all()
    assert logprobs.isfinite().all()
    assert (logprobs <= 0).all() and (entropy > -1e-5).all() and (kept > 0).all() and (kept < 1 + 1e-6).all()
    ranks = (logits > logits.gather(-1, tokens[:, None])).sum(-1)
    if top_k:
        assert (ranks < top_k).all()
    if top_p == 1e-9 or temperature == 0.0:
        assert (ranks == 0).all()


def test_the_whole_range_of_random_numbers_reaches_first_and_last_token(backend: Backend) -> None:
    ends = torch.tensor([0.0, JUST_BELOW_ONE], dtype=torch.float64)
    assert draw(backend, torch.zeros(2, 50_000), ends, CUTS[0]).tokens.tolist() == [0, 49_999]


@pytest.mark.parametrize("cuts", [CUTS[0], (1.0, 20, 0.8, 0.01)], ids=str)
def test_a_row_is_sampled_alike_in_any_batch(kernel_backend: Backend, cuts: Cuts) -> None:
    rows = 3 if kernel_backend.slow else 40
    logits = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(np.random.default_rng(0).random(rows))
    together = draw(kernel_backend, logits, numbers, cuts)
    for i in range(rows):
        alone = draw(kernel_backend, logits[i : i + 1], numbers[i : i + 1], cuts)
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: shape \(2, 0\), expected \(B, V\)"),
        ({"top_p": torch.ones(3)}, ValueError, r"top_p: shape \(3,\), expected \(2,\)"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, TypeError, "logits: int64, expected float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "logits": torch.zeros(2, 5), "uniform": torch.zeros(2).double(), "temperature": torch.ones(2),
        "top_k": torch.zeros(2, dtype=torch.int32), "top_p": torch.ones(2), "min_p": torch.zeros(2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.sample(**given | change)
