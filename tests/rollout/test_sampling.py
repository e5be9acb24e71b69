from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from rlhf_fast import ops
from rlhf_fast.rollout.sampling import SamplingParams, sample_tokens, uniforms

LOGITS = [2.0, -1.0, 0.5, 0.4, -math.inf, 1.9, -3.0, 0.0, 0.7, -0.2]
JUST_BELOW_ONE = np.nextafter(1.0, 0.0)


def definition(logits: list[float], params: SamplingParams) -> np.ndarray:
    """The probabilities to sample from, one token at a time, likeliest first."""
    scaled = np.array(logits) / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept = np.zeros_like(probabilities)
    before = 0.0
    for rank, token in enumerate(np.argsort(-probabilities, kind="stable")):
        if (params.top_k == 0 or rank < params.top_k) and (rank == 0 or before < params.top_p):
            kept[token] = probabilities[token]
        before += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n: 0 "),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_p": 0.0}, r"top_p: 0\.0"),
        ({"top_p": 1.5}, r"top_p: 1\.5"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"top_k": -1}, "top_k: -1"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


def test_random_numbers_depend_on_seed_prompt_sample_and_position_only() -> None:
    numbers = uniforms(1, 2, 3, 50)
    assert numbers.dtype == np.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    np.testing.assert_array_equal(numbers, uniforms(1, 2, 3, 50))
    np.testing.assert_array_equal(numbers[:20], uniforms(1, 2, 3, 20))
    others = [uniforms(*key, 50) for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1), (2, 1, 3), (0, 0, 0))]
    rows = np.stack([numbers, *others])
    assert len(np.unique(rows)) == rows.size


def test_random_numbers_are_uniform_over_responses_too() -> None:
    first = np.array([uniforms(0, prompt, sample, 1)[0] for prompt in range(60) for sample in range(50)])
    assert chisquare(np.histogram(first, bins=20, range=(0, 1))[0]).pvalue > 1e-4


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=3),
        SamplingParams(top_k=1),
        SamplingParams(top_k=99),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.01),
        SamplingParams(top_k=5, top_p=0.7, temperature=1.3),
        SamplingParams(top_k=2, top_p=0.99),
    ],
    ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}",
)
def test_tokens_come_as_often_as_they_should(params: SamplingParams) -> None:
    count = 20_000
    numbers = torch.from_numpy(np.random.default_rng(0).random(count))
    tokens, _ = sample_tokens(torch.tensor(LOGITS).expand(count, -1), numbers, params)
    seen = np.bincount(tokens.numpy(), minlength=len(LOGITS))
    expected = definition(LOGITS, params)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(seen[possible], expected[possible] * count).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_takes_the_likeliest_token(dtype: torch.dtype) -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]], dtype=dtype)
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.99, 0.5]).double(), SamplingParams(temperature=0.0))
    assert tokens.tolist() == [0, 9]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits.float(), -1).amax(-1))


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.6), SamplingParams(temperature=0.6, top_k=2)])
def test_the_logprob_is_of_the_whole_distribution_at_the_temperature(params: SamplingParams) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = sample_tokens(logits, torch.from_numpy(np.random.default_rng(0).random(64)), params)
    exact = torch.log_softmax(logits.double() / 0.6, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(logprobs, ops.token_logprobs(logits, tokens, temperature=0.6)[0])  # as training computes them


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
)
def test_whatever_the_random_number_the_token_is_a_possible_one(
    rows: list[list[float]], uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    width = max(map(len, rows))
    logits = torch.tensor([row + [-math.inf] * (width - len(row)) for row in rows])
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    before = logits.clone()
    tokens, logprobs = sample_tokens(logits, torch.full((len(rows),), uniform, dtype=torch.float64), params)
    assert torch.equal(logits, before)
    assert ((tokens >= 0) & (tokens < width)).all()
    assert logprobs.isfinite().all()
    assert (logprobs <= 0).all()
    ranks = (logits > logits.gather(-1, tokens[:, None])).sum(-1)
    if top_k:
        assert (ranks < top_k).all()
    if top_p == 1e-9 or temperature == 0.0:
        assert (ranks == 0).all()


def test_the_whole_range_of_random_numbers_reaches_first_and_last_token() -> None:
    logits = torch.zeros(2, 50_000)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, JUST_BELOW_ONE], dtype=torch.float64), SamplingParams())
    assert tokens.tolist() == [0, 49_999]


def test_a_row_is_sampled_alike_in_any_batch() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(np.random.default_rng(0).random(40))
    params = SamplingParams(top_k=20, top_p=0.8)
    together, _ = sample_tokens(logits, numbers, params)
    alone = [sample_tokens(logits[i : i + 1], numbers[i : i + 1], params)[0].item() for i in range(40)]
    assert together.tolist() == alone
