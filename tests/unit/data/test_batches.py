"""Padding and micro-batches: every row once, within the budget, response tokens where they belong."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.batches import Example, microbatches, microbatches_of_examples, pad, shape

tokens = st.lists(st.integers(1, 300), max_size=8).map(tuple)
prompts = st.lists(st.integers(1, 300), min_size=1, max_size=8).map(tuple)
examples = st.lists(st.builds(Example, prompt=prompts, response=tokens), min_size=1, max_size=6)
few_prompts = st.sampled_from([(1,), (1, 2), (3, 4, 5)])
families = st.lists(st.builds(Example, prompt=few_prompts, response=tokens), min_size=1, max_size=9)
lengths = st.lists(st.integers(1, 50), max_size=30)


@settings(max_examples=40, deadline=None)
@given(examples)
def test_rows_hold_prompt_then_response_then_zeros(rows: list[Example]) -> None:
    batch = pad(rows)
    width = max(len(row) for row in rows)
    assert batch.input_ids.shape == (len(rows), width)
    assert batch.last.tolist() == [i * width + len(row) - 1 for i, row in enumerate(rows)]
    before = [[i * width + at - 1 for at in range(len(row.prompt), len(row))] for i, row in enumerate(rows)]
    assert batch.predicted_at.tolist() == list(itertools.chain(*before))
    assert batch.positions is batch.mask is None
    for ids, row in zip(batch.input_ids.tolist(), rows, strict=True):
        assert ids == [*row.prompt, *row.response, *[0] * (width - len(row))]


@settings(max_examples=40, deadline=None)
@given(examples)
def test_response_tokens_are_packed_in_order_between_cu_seqlens(rows: list[Example]) -> None:
    batch = pad(rows)
    edges = batch.cu_seqlens.tolist()
    assert len(edges) == len(rows) + 1 and edges[0] == 0 and edges[-1] == len(batch.response_tokens)
    packed = batch.response_tokens.tolist()
    assert [tuple(packed[a:b]) for a, b in itertools.pairwise(edges)] == [row.response for row in rows]
    assert torch.equal(batch.input_ids.flatten()[batch.predicted_at + 1], batch.response_tokens)


@settings(max_examples=80, deadline=None)
@given(families, st.sampled_from([0, 6, 100]))
def test_what_each_token_sees_is_its_own_sequence(rows: list[Example], shared: int) -> None:
    """Whatever shares a row: from each response token back, the tokens in sight are its prompt and what it has said."""
    batch = pad(rows, longest_shared=shared)
    number, width = batch.input_ids.shape
    assert (number, width) == shape(rows, shared)
    positions = torch.arange(width).expand(number, width) if batch.positions is None else batch.positions
    mask = torch.ones(number, 1, width, width, dtype=torch.bool).tril() if batch.mask is None else batch.mask
    assert mask.diagonal(dim1=2, dim2=3).all()  # the padding sees itself: no row of scores is empty
    ids, places, at = batch.input_ids, batch.predicted_at.tolist(), 0
    for example, last in zip(rows, batch.last.tolist(), strict=True):
        whole = [*example.prompt, *example.response]
        for said in range(len(example.response)):
            row, column = divmod(places[at], width)
            seen = mask[row, 0, column]
            assert ids[row][seen].tolist() == whole[: len(example.prompt) + said]
            assert positions[row][seen].tolist() == list(range(len(example.prompt) + said))
            at += 1
        row, column = divmod(last, width)
        assert ids[row][mask[row, 0, column]].tolist() == whole
    assert at == len(places) == len(batch.response_tokens)


@settings(max_examples=40, deadline=None)
@given(families, st.integers(1, 60), st.sampled_from([0, 6, 100]))
def test_microbatches_of_examples_hold_each_once_and_bring_prompts_together(
    rows: list[Example], budget: int, shared: int
) -> None:
    groups = microbatches_of_examples(rows, budget, shared)
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for group in groups:
        number, width = shape([rows[i] for i in group], shared)
        assert number * width <= budget or number == 1
        assert len({len(rows[i]) > shared for i in group}) == 1  # who is too long to share keeps nobody from it
    if shared == 100:
        assert sum(shape([rows[i] for i in group], shared)[0] for group in groups) == len({row.prompt for row in rows})


def test_a_row_is_shared_up_to_the_length_from_which_it_costs_more_than_it_saves() -> None:
    rows = [Example((1,) * 100, (2,) * 400) for _ in range(5)]
    assert shape(rows, 4096) == (3, 900)
    assert [len(group) for group in microbatches_of_examples(rows, 900, 4096)] == [2, 2, 1]
    assert shape(rows, 499) == (5, 500)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="example 1 has an empty prompt"):
        pad([Example((1,), (2,)), Example((), (2,))])


@settings(max_examples=40, deadline=None)
@given(examples)
def test_dtypes_are_those_that_the_ops_expect(rows: list[Example]) -> None:
    batch = pad(rows)
    found = (batch.input_ids, batch.predicted_at, batch.last, batch.response_tokens, batch.cu_seqlens)
    assert [tensor.dtype for tensor in found] == [*[torch.int64] * 4, torch.int32]


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 120))
def test_microbatches_hold_every_row_once(rows: list[int], budget: int) -> None:
    groups = microbatches(rows, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    assert all(groups)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 120))
def test_padded_tokens_stay_within_the_budget_unless_a_row_alone_exceeds_it(rows: list[int], budget: int) -> None:
    for group in microbatches(rows, budget):
        longest = max(rows[row] for row in group)
        assert len(group) * longest <= budget or (len(group) == 1 and longest > budget)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 120))
def test_rows_of_like_length_go_together(rows: list[int], budget: int) -> None:
    """No row is longer than any row of the micro-batch before it, and each holds as many as fit."""
    groups = microbatches(rows, budget)
    for group, following in itertools.pairwise(groups):
        longest = max(rows[row] for row in group)
        assert min(rows[row] for row in group) >= max(rows[row] for row in following)
        assert (len(group) + 1) * longest > budget


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 120))
def test_microbatches_are_the_same_every_time(rows: list[int], budget: int) -> None:
    assert microbatches(rows, budget) == microbatches(list(rows), budget)
