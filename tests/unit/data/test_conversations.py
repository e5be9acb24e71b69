"""Batches of conversations: every learned token where it belongs, every row within its budget."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.conversations import Tokenized, batch_of, best_fit, microbatches_of_conversations

tokens = st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=8)
conversations = st.lists(
    st.tuples(st.integers(0, 300), tokens, st.integers(0, 300)).map(
        lambda parts: Tokenized(
            (parts[0], *(i for i, _ in parts[1]), parts[2]), (False, *(learned for _, learned in parts[1]), True)
        )
    ),
    min_size=1,
    max_size=6,
)
lengths = st.lists(st.integers(1, 50), max_size=30)


@settings(max_examples=60, deadline=None)
@given(conversations, st.booleans())
def test_a_batch_holds_each_conversation_once_and_knows_what_is_learned(rows: list[Tokenized], packed: bool) -> None:
    batch = batch_of(rows, packed=packed)
    widths = list(map(len, rows))
    assert batch.input_ids.shape == ((1, sum(widths)) if packed else (len(rows), max(widths)))
    assert batch.segments == (tuple(widths) if packed else None) and batch.mask is None
    ids, edges = batch.input_ids.flatten().tolist(), batch.cu_seqlens.tolist()
    for row, end, (a, b) in zip(rows, batch.last.tolist(), itertools.pairwise(edges), strict=True):
        start = end + 1 - len(row)
        assert tuple(ids[start : end + 1]) == row.input_ids
        learned = [i for i, yes in enumerate(row.loss_mask) if yes]
        assert batch.predicted_at[a:b].tolist() == [start + i - 1 for i in learned]
        assert batch.response_tokens[a:b].tolist() == [row.input_ids[i] for i in learned]
        assert not packed or batch.positions[0, start : end + 1].tolist() == list(range(len(row)))  # type: ignore[index]
    assert edges[-1] == len(batch.predicted_at) == sum(row.learned for row in rows)
    assert packed or batch.positions is None
    assert sum(map(bool, ids)) == sum(map(bool, itertools.chain(*(row.input_ids for row in rows))))  # the rest pads


@pytest.mark.parametrize("mask", [(), (True, True), (False, True, True)])
def test_a_mask_that_does_not_fit_is_refused(mask: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match="loss_mask: "):
        Tokenized((1, 2), mask)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 120), st.sampled_from([0, 20, 50]))
def test_microbatches_hold_each_conversation_once_within_the_budget(rows: list[int], budget: int, longest: int) -> None:
    groups = microbatches_of_conversations(rows, budget, longest)
    assert sorted(i for group, _ in groups for i in group) == list(range(len(rows)))
    for group, packed in groups:
        widths = [rows[i] for i in group]
        assert len(group) == 1 or (sum(widths) if packed else len(group) * max(widths)) <= budget
        assert max(widths) <= longest or not packed


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 120))
def test_no_two_packed_rows_would_fit_into_one(rows: list[int], room: int) -> None:
    groups = best_fit(dict(enumerate(rows)), room)
    sums = sorted(sum(rows[i] for i in group) for group in groups)
    assert all(a + b > room for a, b in itertools.pairwise(sums))
