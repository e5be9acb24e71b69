"""Votes of people on items, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

FEW = 100  # items with two votes or more; from fewer, an interval is too wide to act on
MOST_VALUES = 100  # distinct ones: tables of pairs of values have its square as size
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Votes:
    """N votes, at most one for each item and person. Ties and grades are values like any other."""

    items: np.ndarray  # (N,) int
    people: np.ndarray  # (N,) int
    values: np.ndarray  # (N,) int; their order and distance count in the ordinal and the interval alpha alone

    def __post_init__(self) -> None:
        for name in ("items", "people", "values"):
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or not (array.dtype.kind in "iu" or not array.size):
                raise ValueError(f"{name}: {array.dtype} of shape {array.shape} came; expected whole numbers (N,)")
            object.__setattr__(self, name, array.astype(np.int64))
        if not len(self.items) == len(self.people) == len(self.values):
            raise ValueError(
                f"items, people and values: {len(self.items)}, {len(self.people)} and {len(self.values)} came; "
                "expected one of each for every vote"
            )
        both = np.stack([self.items, self.people], axis=1)
        once, counts = np.unique(both, axis=0, return_counts=True)
        if len(once) < len(both):
            item, person = once[counts.argmax()]
            raise ValueError(
                f"votes: person {person} voted {counts.max()} times on item {item}; expected once. Keep the vote that "
                "counts, and give repeats to self_consistency"
            )
        if len(self.levels) > MOST_VALUES:
            raise ValueError(f"values: {len(self.levels)} distinct ones came; expected at most {MOST_VALUES}; bin them")

    @cached_property
    def levels(self) -> np.ndarray:
        """(C,): the distinct values, ascending."""
        return np.unique(self.values)

    @cached_property
    def table(self) -> np.ndarray:
        """(I, C): how many gave each value to each item, in the order of the items' numbers."""
        items, row = np.unique(self.items, return_inverse=True)
        counts = np.zeros((len(items), len(self.levels)))
        np.add.at(counts, (row, np.searchsorted(self.levels, self.values)), 1)
        return counts

    @property
    def doubles(self) -> int:
        """How many items have two votes or more: all that agreement is measured on."""
        return int((self.table.sum(axis=1) > 1).sum())

    @property
    def too_few(self) -> bool:
        return self.doubles < FEW

    def of(self, people: np.ndarray) -> Votes:
        """The votes of some of the people alone."""
        kept = np.isin(self.people, people)
        return Votes(self.items[kept], self.people[kept], self.values[kept])


def pairs_of_people(votes: Votes) -> Pairs:
    """(items, first, second): every pair of votes on an item, as places in `votes`, the lower person first."""
    order = np.lexsort((votes.people, votes.items))
    items = votes.items[order]
    found = []
    for apart in range(1, int(np.unique(items, return_counts=True)[1].max(initial=1))):
        first = np.flatnonzero(items[apart:] == items[:-apart])
        found.append((items[first], order[first], order[first + apart]))
    if not found:
        return (np.zeros(0, np.int64),) * 3
    items, first, second = (np.concatenate(part) for part in zip(*found, strict=True))
    return items, first, second
