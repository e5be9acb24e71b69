"""Comparisons as token sequences, grouped by prompt so that a response in several comparisons is read once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rlhf_fast.data.batches import Example, shape, shuffled
from rlhf_fast.data.fitting import Fitting
from rlhf_fast.data.records import Comparison
from rlhf_fast.data.splits import other_splits, split_as_labelled, split_heldout


@dataclass
class PairGroup:
    """Comparisons of one prompt, all of them: its distinct responses, and which was chosen over which."""

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

    def sides(self) -> Iterator[tuple[tuple[int, ...], Example, Example]]:
        """Yield (prompt, chosen, rejected) of each comparison."""
        for chosen, rejected in zip(self.chosen, self.rejected, strict=True):
            yield self.examples[chosen].prompt, self.examples[chosen], self.examples[rejected]

    def part(self, which: Sequence[int]) -> PairGroup:
        """Select some of the group's comparisons, by their numbers."""
        part = PairGroup()
        numbers: dict[int, int] = {}  # of the examples, there and here
        for i in which:
            for side, of in ((part.chosen, self.chosen[i]), (part.rejected, self.rejected[i])):
                if of not in numbers:
                    numbers[of] = len(part.examples)
                    part.examples.append(self.examples[of])
                side.append(numbers[of])
            part.margins.append(self.margins[i])
            part.confidences.append(self.confidences[i])
            part.comparisons.append(self.comparisons[i])
        return part


@dataclass(frozen=True)
class Pairs:
    """Pairs of several groups together, as numbers into one list of their examples."""

    examples: list[Example]
    chosen: torch.Tensor  # (P,) int64 into examples
    rejected: torch.Tensor  # (P,) int64
    margins: torch.Tensor  # (P,) float32
    confidences: torch.Tensor  # (P,) float32: how probable each comparison's answer is, from 0.5 to 1


def group_pairs(comparisons: Sequence[Comparison], fitting: Fitting, scored: bool = False) -> list[PairGroup]:
    """Encode comparisons and group them by prompt, in order of first appearance. Prompts are the same when their tokens
    are: a text and that text as a user's message, say. Answers that are the same teach nothing, and are left out.
    `scored` as in `tokenize_comparison`."""
    groups: dict[tuple[int, ...], PairGroup] = {}
    indices: dict[Example, int] = {}
    for comparison in comparisons:
        fitted = fitting.comparison(comparison, scored)
        if fitted is None:
            continue
        comparison, examples = fitted
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


@dataclass(frozen=True)
class Split:
    """Split of comparisons: those to train on, and those held out to measure on."""

    training: list[PairGroup]
    heldout: list[PairGroup]
    by_pairs: bool = False  # held out are comparisons of prompts that are trained on, each a group of its own


def split_pairs(groups: Sequence[PairGroup], share: float, seed: int, least: int) -> Split:
    """Whole prompts are held out, at least `least` of them: those with any comparison of another split than train, or
    without splits a share of all; 0: none.

    Where there are too few prompts for that, comparisons are held out instead, with a warning.

    Raises:
        ValueError: there is too little to train on or to hold out.
    """
    others = [other_splits([c.split for c in group.comparisons]) for group in groups]
    pairs = [(group, i) for group in groups for i in range(group.pairs)]
    if any(others):
        of_pairs = [other_splits([group.comparisons[i].split]) for group, i in pairs]
        if all(others) and not all(of_pairs):  # each prompt is in both
            return _by_pairs(groups, *split_as_labelled(pairs, of_pairs, "comparisons", least))
        return Split(*split_as_labelled(groups, others, "prompts", least))
    if share and len(groups) <= least < len(pairs):
        return _by_pairs(groups, *split_heldout(pairs, share, seed, least))
    return Split(*split_heldout(groups, share, seed, least))


def _by_pairs(
    groups: Sequence[PairGroup], training: list[tuple[PairGroup, int]], heldout: list[tuple[PairGroup, int]]
) -> Split:
    warnings.warn(
        f"{len(groups)} {'prompt is' if len(groups) == 1 else 'prompts are'} too few to hold some out: {len(heldout)} "
        "comparisons are held out whose prompts are trained on, so how well it does on other prompts is not measured",
        stacklevel=4,
    )
    kept = {(id(group), i) for group, i in training}
    parts = [group.part([i for i in range(group.pairs) if (id(group), i) in kept]) for group in groups]
    return Split([part for part in parts if part.pairs], [group.part([i]) for group, i in heldout], by_pairs=True)


def join(groups: Sequence[PairGroup], device: torch.device | str) -> Pairs:
    """Join the comparisons of several groups."""
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
    """Batches of at least `size` comparisons for all epochs, each in an order of its own. A prompt that has more is
    cut, anew each epoch, so that a batch has less than twice as many."""
    return [
        batch
        for epoch in range(epochs)
        for batch in batches_by_pairs(shuffled(_cut(groups, size, seed + epoch), seed + epoch), size)
    ]


def _cut(groups: Sequence[PairGroup], size: int, seed: int) -> list[PairGroup]:
    parts: list[PairGroup] = []
    for group in groups:
        if group.pairs <= size:
            parts.append(group)
        else:
            order = shuffled(range(group.pairs), seed)
            parts += [group.part(order[start : start + size]) for start in range(0, group.pairs, size)]
    return parts


def microbatches_of_groups(
    groups: Sequence[PairGroup], max_tokens: int, longest_shared: int = 0
) -> list[list[PairGroup]]:
    """Groups that fit into `max_tokens` padded tokens together; none is cut, since its pairs need both sides.

    `longest_shared` as in `pad`; groups with an example longer than that go apart.
    """
    result: list[list[PairGroup]] = []
    rows = longest = 0  # of the last
    before = False
    shapes = [
        (max(map(len, group.examples)) > longest_shared, *shape(group.examples, longest_shared), group)
        for group in groups
    ]
    for long, more, width, group in sorted(shapes, key=lambda item: (item[0], item[2]), reverse=True):
        if result and long == before and (rows + more) * longest <= max_tokens:
            result[-1].append(group)
            rows += more
        else:
            result.append([group])
            rows, longest, before = more, width, long
    return result
