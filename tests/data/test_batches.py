"""Padding and micro-batches: every row once, within the budget, response tokens where they belong."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.batches import Example, microbatches, pad

tokens = st.lists(st.integers(1, 300), max_size=8).map(tuple)
examples = st.lists(st.builds(Example, prompt=tokens, response=tokens), min_size=1, max_size=6)
lengths = st.lists(st.integers(1, 50), max_size=30)


@settings(max_examples=40, deadline=None)
@given(examples)
def test_rows_hold_prompt_then_response_then_zeros(rows: list[Example]) -> None:
    batch = pad(rows)
    width = max(len(row) for row in rows)
    assert batch.input_ids.shape == batch.response_mask.shape == (len(rows), width)
    assert batch.lengths.tolist() == [len(row) for row in rows]
    for ids, mask, row in zip(batch.input_ids.tolist(), batch.response_mask.tolist(), rows, strict=True):
        padding = [0] * (width - len(row))
        assert ids == [*row.prompt, *row.response, *padding]
        assert mask == [False] * len(row.prompt) + [True] * len(row.response) + [False] * len(padding)


@settings(max_examples=40, deadline=None)
@given(examples)
def test_response_tokens_are_packed_in_order_between_cu_seqlens(rows: list[Example]) -> None:
    batch = pad(rows)
    edges = batch.cu_seqlens.tolist()
    assert len(edges) == len(rows) + 1 and edges[0] == 0 and edges[-1] == len(batch.response_tokens)
    packed = batch.response_tokens.tolist()
    assert [tuple(packed[a:b]) for a, b in itertools.pairwise(edges)] == [row.response for row in rows]
    assert torch.equal(batch.input_ids[batch.response_mask], batch.response_tokens)


@settings(max_examples=40, deadline=None)
@given(examples)
def test_dtypes_are_those_that_the_ops_expect(rows: list[Example]) -> None:
    batch = pad(rows)
    found = (batch.input_ids, batch.lengths, batch.response_mask, batch.response_tokens, batch.cu_seqlens)
    assert [tensor.dtype for tensor in found] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int32]


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
