"""Comparisons as token sequences, grouped by prompt so that a response in several comparisons is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.batches import Example, shape, shuffled
from rlhf_fast.data.records import Comparison
from rlhf_fast.data.tokenize import tokenize_comparison


@dataclass
class PairGroup:
    """All comparisons of one prompt: its distinct responses, and which was chosen over which."""

    examples: list[Example] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # index into examples, one for each comparison
    rejected: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list, repr=False)  # as they were read

    @property
    def pairs(self) -> int:
        return len(self.chosen)

    def __len__(self) -> int:
        return sum(len(example) for example in self.examples)


@dataclass(frozen=True)
class Pairs:
    """Several groups side by side, their examples numbered through."""

    examples: list[Example]
    chosen: torch.Tensor  # (P,) int64 into examples
    rejected: torch.Tensor  # (P,) int64
    margins: torch.Tensor  # (P,) float32
    confidences: torch.Tensor  # (P,) float32: how probable each comparison's answer is, from 0.5 to 1


def group_pairs(
    comparisons: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, max_length: int, scored: bool = False
) -> list[PairGroup]:
    """Encode comparisons and group them by prompt, in order of first appearance. Prompts are the same when their tokens
    are: a text and that text as a user's message, say. `scored` as in `tokenize_comparison`."""
    groups: dict[tuple[int, ...], PairGroup] = {}
    indices: dict[Example, int] = {}
    for comparison in comparisons:
        examples = tokenize_comparison(comparison, tokenizer, max_length=max_length, scored=scored)
        group = groups.setdefault(examples[0].prompt, PairGroup())
        for example, side in zip(examples, (group.chosen, group.rejected), strict=True):
            if example not in indices:
                indices[example] = len(group.examples)
                group.examples.append(example)
            side.append(indices[example])
        group.margins.append(comparison.margin)
        group.confidences.append(comparison.confidence)
        group.comparisons.append(comparison)
    return list(groups.values())


def split_as_labelled(groups: Sequence[PairGroup]) -> tuple[list[PairGroup], list[PairGroup]]:
    """(training, held-out) prompts as the data's own `split` says; nothing is held out if it says nothing.

    A prompt with any comparison of a split other than "train" is held out with all of them.

    Raises:
        ValueError: nothing is left to train on, or a single prompt is held out, which gives no interval.
    """
    labels = [{c.split for c in group.comparisons} - {"", "train"} for group in groups]
    training = [group for group, named in zip(groups, labels, strict=True) if not named]
    heldout = [group for group, named in zip(groups, labels, strict=True) if named]
    if heldout and (not training or len(heldout) < 2):
        names = ", ".join(map(repr, sorted(set().union(*labels))[:3]))
        raise ValueError(
            f"split: {len(heldout)} of {len(groups)} prompts are held out, being of {names}; at least 2 and not all "
            "can be: every split but 'train' is held out (what only sorts comparisons is their category)"
        )
    return training, heldout


def join(groups: Sequence[PairGroup], device: torch.device | str) -> Pairs:
    """The comparisons of several groups as one set."""
    examples: list[Example] = []
    chosen: list[int] = []
    rejected: list[int] = []
    for group in groups:
        chosen.extend(len(examples) + i for i in group.chosen)
        rejected.extend(len(examples) + i for i in group.rejected)
        examples.extend(group.examples)
    margins = torch.tensor([margin for group in groups for margin in group.margins], device=device)
    confidences = torch.tensor([confidence for group in groups for confidence in group.confidences], device=device)
    sides = torch.tensor(chosen, device=device), torch.tensor(rejected, device=device)
    return Pairs(examples, *sides, margins, confidences)


def batches_by_pairs(groups: Sequence[PairGroup], size: int) -> list[list[PairGroup]]:
    """Consecutive groups gathered until a batch has at least `size` comparisons."""
    batches: list[list[PairGroup]] = []
    count = size
    for group in groups:
        if count >= size:
            batches.append([])
            count = 0
        batches[-1].append(group)
        count += group.pairs
    return batches


def epoch_batches_by_pairs(groups: Sequence[PairGroup], size: int, epochs: int, seed: int) -> list[list[PairGroup]]:
    """Batches of at least `size` comparisons for all epochs, each in an order of its own."""
    return [batch for epoch in range(epochs) for batch in batches_by_pairs(shuffled(groups, seed + epoch), size)]


def microbatches_of_groups(groups: Sequence[PairGroup], max_tokens: int, shared: int = 0) -> list[list[PairGroup]]:
    """Groups that fit into `max_tokens` padded tokens together; none is cut, since its pairs need both sides.

    `shared` as in `pad`; groups with an example longer than that go apart.
    """
    result: list[list[PairGroup]] = []
    rows = longest = 0  # of the last
    before = False
    shapes = [(max(map(len, group.examples)) > shared, *shape(group.examples, shared), group) for group in groups]
    for long, more, width, group in sorted(shapes, key=lambda item: (item[0], item[2]), reverse=True):
        if result and long == before and (rows + more) * longest <= max_tokens:
            result[-1].append(group)
            rows += more
        else:
            result.append([group])
            rows, longest, before = more, width, long
    return result
