"""What is held out: whole prompts, by share or by the rows' own split; comparisons, where there is one; or nothing."""

import warnings

import pytest

from rlhf_fast.data.fitting import Fitting
from rlhf_fast.data.pairs import PairGroup, epoch_batches_by_pairs, group_pairs, join, split_pairs
from rlhf_fast.data.records import Comparison
from rlhf_fast.data.splits import other_splits, require_heldout, split_as_labelled, split_heldout
from rlhf_fast.models.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def grouped(prompts: str, splits: list[str] | None = None) -> list[PairGroup]:
    """A comparison for each letter, which is its prompt."""
    labels = splits or [""] * len(prompts)
    rows = [Comparison(p, f"x{i % 7}", f"y{i}", split=s) for i, (p, s) in enumerate(zip(prompts, labels, strict=True))]
    return group_pairs(rows, Fitting(TOKENIZER, 64))


def rejected(groups: list[PairGroup]) -> list[str]:
    return [comparison.rejected for group in groups for comparison in group.comparisons]


def test_nothing_is_held_out_for_a_share_of_0() -> None:
    assert split_heldout([1, 2, 3], 0.0, seed=0) == ([1, 2, 3], [])
    split = split_pairs(grouped("aabb"), 0.0, seed=0, least=2)
    assert (len(split.training), split.heldout, split.by_pairs) == (2, [], False)
    require_heldout([], None)
    with pytest.raises(ValueError, match="patience: 3, but nothing is held out to measure; set heldout above 0, or"):
        require_heldout([], 3)


def test_too_little_to_hold_anything_out_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"heldout: 1 in all, of which 1 are .* give more data, or set heldout: 0"):
        split_heldout([1], 0.5, seed=0)


@pytest.mark.parametrize(("prompts", "least"), [("a" * 20, 1), ("a" * 20, 2), ("ab" * 10, 2)])
def test_of_too_few_prompts_comparisons_are_held_out(prompts: str, least: int) -> None:
    groups = grouped(prompts)
    with pytest.warns(UserWarning, match=r"too few to hold some out: 5 comparisons are held out whose prompts are"):
        split = split_pairs(groups, 0.25, seed=0, least=least)
    assert split.by_pairs and [group.pairs for group in split.heldout] == [1] * 5
    assert sum(group.pairs for group in split.training) == 15 and len(split.training) == len(groups)
    assert sorted(rejected(split.training) + rejected(split.heldout)) == sorted(rejected(groups))


def test_several_prompts_are_held_out_whole_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = split_pairs(grouped("abcd" * 3), 0.25, seed=0, least=2)
    assert [group.pairs for group in split.heldout] == [3, 3] and not split.by_pairs


def test_of_one_prompt_each_comparison_is_of_the_split_that_its_row_names() -> None:
    with pytest.warns(UserWarning, match="1 prompt is too few to hold some out: 3 comparisons"):
        split = split_pairs(grouped("a" * 6, ["train", "test"] * 3), 0.0, seed=0, least=2)
    assert rejected(split.training) == ["y0", "y2", "y4"] and rejected(split.heldout) == ["y1", "y3", "y5"]


def test_any_split_but_train_is_held_out() -> None:
    assert other_splits(["", "train", "eval", "test"]) == {"eval", "test"}
    with pytest.raises(ValueError, match="split: 2 of 2 rows are held out, being of 'test'; at least 1 and not all"):
        split_as_labelled([1, 2], [{"test"}, {"test"}], "rows", least=1)


def test_batches_keep_their_size_however_few_prompts_there_are() -> None:
    groups = grouped("a" * 100 + "b" * 37 + "c" * 5)
    epochs = [epoch_batches_by_pairs(groups, 8, 1, seed) for seed in (0, 1)]
    for batches in epochs:
        sizes = [sum(group.pairs for group in batch) for batch in batches]
        assert all(8 <= size < 16 for size in sizes[:-1]) and sizes[-1] <= 15
        rows = [row for batch in batches for row in rejected(batch)]
        assert sorted(rows) == sorted(rejected(groups))
    assert [rejected(batch) for batch in epochs[0]] != [rejected(batch) for batch in epochs[1]]
    whole = join(groups, "cpu")
    expected = {(whole.examples[c], whole.examples[r]) for c, r in zip(whole.chosen, whole.rejected, strict=True)}
    for batch in epochs[0]:
        pairs = join(batch, "cpu")
        for c, r in zip(pairs.chosen, pairs.rejected, strict=True):
            assert (pairs.examples[c], pairs.examples[r]) in expected


def test_a_prompt_that_fits_into_a_batch_is_left_whole() -> None:
    groups = grouped("aaabbb")
    assert {id(g) for batch in epoch_batches_by_pairs(groups, 3, 1, 0) for g in batch} == {id(g) for g in groups}
