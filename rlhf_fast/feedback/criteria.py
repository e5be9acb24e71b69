"""What responses are compared by besides the overall preference: four criteria by default, own ones from YAML.

An answer is a whole number around 0: negative for the left response. A scale of five labels goes from -2 to 2, one of
four has no middle and goes -2, -1, 1, 2; so that an answer turns its sign where the sides are swapped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.feedback.errors import FeedbackError

MOST_BYTES = 100_000  # of a file of criteria
MOST = 20  # criteria
MOST_LABELS = 7


@dataclass(frozen=True)
class Criterion:
    name: str  # as it stands in exports
    title: str
    description: str = ""
    examples: tuple[str, ...] = ()
    scale: tuple[str, ...] = ()  # labels from the left response to the right one; none: left, same, right

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,49}", self.name):
            raise FeedbackError(f"criteria: name {self.name!r:.60} came; expected small letters, digits and _")
        for key in ("title", "description"):
            if not isinstance(getattr(self, key), str):
                raise FeedbackError(f"criteria: {key} of {self.name} should be text")
        for key in ("examples", "scale"):
            texts = getattr(self, key)
            if not isinstance(texts, tuple) or not all(isinstance(one, str) and one.strip() for one in texts):
                raise FeedbackError(f"criteria: {key} of {self.name} should be a list of texts")
        if self.scale and not 2 <= len(self.scale) <= MOST_LABELS:
            raise FeedbackError(
                f"criteria: scale of {self.name} has {len(self.scale)} labels; expected 2 to {MOST_LABELS}, or none"
            )
        if len(set(self.scale)) < len(self.scale):
            raise FeedbackError(f"criteria: scale of {self.name} has a label twice")

    @property
    def values(self) -> list[int]:
        """The answers that the labels stand for, in their order."""
        count = len(self.scale) or 3
        return [value for value in range(-(count // 2), count // 2 + 1) if value or count % 2]


DEFAULT = (
    Criterion("helpfulness", "Helpfulness", "Does what was asked, completely, at a fitting length."),
    Criterion("harmlessness", "Harmlessness", "Does no harm, and declines only what should be declined."),
    Criterion("honesty", "Honesty", "Says what is true, and says where it is not sure."),
    Criterion("style_fit", "Style fit", "Tone, form and language fit the request."),
)


def read_criteria(path: str | Path) -> tuple[Criterion, ...]:
    """Criteria of a YAML file: a list of `{name, title, description, examples, scale}`, of which the name is needed.

    Raises:
        FeedbackError: the file, and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"{path}: cannot be read: {error}") from error
    if len(text.encode()) > MOST_BYTES:
        raise FeedbackError(f"{path}: over {MOST_BYTES} bytes; expected a short list of criteria")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise FeedbackError(f"{path}: it has an alias (*name); write the value out")
        rows: Any = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise FeedbackError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(rows, list) or not 0 < len(rows) <= MOST:
        raise FeedbackError(f"{path}: expected a list of 1 to {MOST} criteria")
    found = []
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "name" not in row:
            raise FeedbackError(f"{path}: criterion {place} should be an object with a name")
        unknown = [str(key) for key in row if key not in ("name", "title", "description", "examples", "scale")]
        if unknown:
            raise FeedbackError(f"{path}: criterion {place} has an unknown key {unknown[0]!r:.60}")
        values = {"title": str(row["name"]).replace("_", " ").capitalize(), **row}
        try:
            found.append(_of(values))
        except FeedbackError as error:
            raise FeedbackError(f"{path}: {error}") from None
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise FeedbackError(f"{path}: {name} is named twice")
    return tuple(found)


def in_force(setting: Any) -> tuple[Criterion, ...]:
    """The criteria of a store, of its setting `criteria`."""
    return tuple(_of(row) for row in setting) if setting else DEFAULT


def check_answers(answers: Mapping[str, int], asked: Sequence[Criterion]) -> None:
    """Refuse answers to what is not asked (any more), or that are not on its scale.

    Raises:
        FeedbackError: the criterion by name, with words for the annotator.
    """
    scales = {one.name: one.values for one in asked}
    for name, value in answers.items():
        if name not in scales:
            raise FeedbackError(
                f"The criterion {name!r:.60} is not asked (any more); asked are {', '.join(scales)}. "
                "What you filled in is kept: go back, look at the item and save it again."
            )
        if value not in scales[name]:
            values = ", ".join(map(str, scales[name]))
            raise FeedbackError(f"The criterion {name!r:.60}: {value} came; its scale has {values}.")


def _of(row: Mapping[str, Any]) -> Criterion:
    lists = {key: tuple(row[key]) for key in ("examples", "scale") if isinstance(row.get(key), list)}
    return Criterion(**{**row, **lists})
