"""Comparisons as token sequences: grouped by prompt, never cut, every pair once and the right way round."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.batches import LONGEST_ROW, pad
from rlhf_fast.data.fitting import Fitting
from rlhf_fast.data.pairs import (
    PairGroup,
    Pairs,
    batches_by_pairs,
    group_pairs,
    join,
    microbatches_of_groups,
    split_pairs,
)
from rlhf_fast.data.records import Comparison
from rlhf_fast.data.tokenize import decode_response, tokenize_prompt
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()

# Few prompts and few replies, so that both come back often; a prompt is a text or the same text as a message.
prompts = st.sampled_from(["a", "b", [{"role": "user", "content": "a"}], [{"role": "system", "content": "b"}]])
replies = st.sampled_from(["x", "yy", "zzz", "long reply", "<eos>"])
comparisons = st.lists(
    st.builds(Comparison, prompt=prompts, chosen=replies, rejected=replies, margin=st.integers(0, 9).map(float)).filter(
        lambda comparison: comparison.chosen != comparison.rejected
    ),
    min_size=1,
    max_size=12,
)

Row = tuple[tuple[int, ...], str, str, float]


def grouped(rows: Sequence[Comparison]) -> list[PairGroup]:
    return group_pairs(rows, Fitting(TOKENIZER, 64))


def as_rows(pairs: Pairs) -> list[Row]:
    """(prompt ids, chosen text, rejected text, margin) of every pair."""

    def text(index: int) -> str:
        return decode_response(TOKENIZER, pairs.examples[index].response)

    rows = []
    for chosen, rejected, margin in zip(
        pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.margins.tolist(), strict=True
    ):
        assert pairs.examples[chosen].prompt == pairs.examples[rejected].prompt
        rows.append((pairs.examples[chosen].prompt, text(chosen), text(rejected), margin))
    return rows


def expected_rows(rows: Sequence[Comparison]) -> list[Row]:
    return [(tokenize_prompt(TOKENIZER, c.prompt), c.chosen, c.rejected, c.margin) for c in rows]


@settings(max_examples=40, deadline=None)
@given(comparisons)
def test_joined_groups_hold_every_comparison_once_and_the_right_way_round(rows: list[Comparison]) -> None:
    pairs = join(grouped(rows), "cpu")
    assert sorted(as_rows(pairs)) == sorted(expected_rows(rows))
    assert (pairs.chosen.dtype, pairs.rejected.dtype, pairs.margins.dtype) == (torch.int64, torch.int64, torch.float32)


@settings(max_examples=40, deadline=None)
@given(comparisons)
def test_groups_are_prompts_in_order_of_first_appearance(rows: list[Comparison]) -> None:
    asked = [tokenize_prompt(TOKENIZER, row.prompt) for row in rows]
    order = list(dict.fromkeys(asked))
    groups = grouped(rows)
    assert len(groups) == len(order)
    for group, prompt in zip(groups, order, strict=True):
        same = [row for row, ids in zip(rows, asked, strict=True) if ids == prompt]
        assert as_rows(join([group], "cpu")) == expected_rows(same)
        assert group.pairs == len(same)


@settings(max_examples=40, deadline=None)
@given(comparisons)
def test_a_response_in_several_comparisons_is_held_once(rows: list[Comparison]) -> None:
    for group in grouped(rows):
        assert len({example.response for example in group.examples}) == len(group.examples)
        assert {*group.chosen, *group.rejected} == set(range(len(group.examples)))
        assert len(group) == sum(len(example) for example in group.examples)


def test_a_text_and_the_same_text_as_a_message_are_one_prompt() -> None:
    """Otherwise one of them could be trained on and the other held out."""
    rows = [Comparison("a", "x", "y"), Comparison([{"role": "user", "content": "a"}], "x", "z")]
    (group,) = grouped(rows)
    assert (group.pairs, len(group.examples)) == (2, 3)


def test_messages_are_the_same_prompt_whatever_the_order_of_their_keys() -> None:
    rows = [
        Comparison([{"role": "user", "content": "a"}], "x", "y"),
        Comparison([{"content": "a", "role": "user"}], "x", "z"),
    ]
    (group,) = grouped(rows)
    assert len(group.examples) == 3


def test_a_comparison_that_is_too_long_is_named() -> None:
    with pytest.raises(ValueError, match=r"^rows\.jsonl line 3: prompt and response have 26 tokens"):
        group_pairs([Comparison("prompt", "x", "y" * 17, name="rows.jsonl line 3")], Fitting(TOKENIZER, 20))


@settings(max_examples=40, deadline=None)
@given(comparisons, st.integers(1, 8))
def test_batches_hold_all_groups_in_order_with_as_few_comparisons_above_the_size_as_can_be(
    rows: list[Comparison], size: int
) -> None:
    groups = grouped(rows)
    batches = batches_by_pairs(groups, size)
    assert [id(group) for batch in batches for group in batch] == [id(group) for group in groups]
    for batch in batches:
        assert sum(group.pairs for group in batch[:-1]) < size  # without its last group it was not yet full
    for batch in batches[:-1]:
        assert sum(group.pairs for group in batch) >= size


@settings(max_examples=40, deadline=None)
@given(comparisons, st.integers(1, 200), st.sampled_from([0, 20, LONGEST_ROW]))
def test_microbatches_hold_every_group_once_and_whole_within_the_budget(
    rows: list[Comparison], budget: int, shared: int
) -> None:
    groups = grouped(rows)
    batches = microbatches_of_groups(groups, budget, shared)
    assert sorted(id(group) for batch in batches for group in batch) == sorted(id(group) for group in groups)
    for batch in batches:
        padded = pad(join(batch, "cpu").examples, longest_shared=shared)
        assert len(batch) == 1 or padded.input_ids.numel() <= budget


def test_a_joined_comparison_keeps_its_confidence_and_its_row() -> None:
    rows = [Comparison("a", "x", "y", confidence=0.6), Comparison("b", "x", "y"), Comparison("a", "x", "z")]
    groups = grouped(rows)
    assert join(groups, "cpu").confidences.tolist() == [pytest.approx(0.6), 1.0, 1.0]
    assert [row for group in groups for row in group.comparisons] == [rows[0], rows[2], rows[1]]


def test_a_prompt_is_held_out_whole_when_one_of_its_comparisons_is_of_another_split_than_train() -> None:
    rows = [
        Comparison(prompt, "x", "y", split=split)
        for prompt, split in zip("abcda", ["", "train", "v1", "v2", "v1"], strict=True)
    ]
    split = split_pairs(grouped(rows), 0.5, seed=0, least=2)
    training, heldout = split.training, split.heldout
    asked = [[group.comparisons[0].prompt for group in part] for part in (training, heldout)]
    assert asked == [["b"], ["a", "c", "d"]]
    unlabelled = grouped(rows[:2])
    assert split_pairs(unlabelled, 0.0, seed=0, least=2).heldout == []


@pytest.mark.parametrize("splits", [["test", "test"], ["train", "train", "test"]])
def test_splits_that_leave_nothing_to_train_on_or_no_interval_are_refused(splits: list[str]) -> None:
    rows = [Comparison(f"p{i}", "x", "y", split=split) for i, split in enumerate(splits)]
    with pytest.raises(ValueError, match=rf"{splits.count('test')} of {len(splits)} prompts are held out, .* 'test'"):
        split_pairs(grouped(rows), 0.5, seed=0, least=2)


def test_no_groups_make_no_batches() -> None:
    assert batches_by_pairs([], 4) == microbatches_of_groups([], 100) == []


def test_answers_that_are_the_same_are_left_out_and_counted() -> None:
    fitting = Fitting(TOKENIZER, 64)
    rows = [Comparison("a", "x", "y"), Comparison("a", "x", "x"), Comparison("b", "z", "z")]
    assert [group.pairs for group in group_pairs(rows, fitting)] == [1]
    assert fitting.summary() == {"rows_identical": 2}
