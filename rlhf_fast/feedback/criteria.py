"""What responses are compared by besides the overall preference: four criteria by default, own ones from YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.feedback.errors import FeedbackError

MOST_BYTES = 100_000  # of a file of criteria
MOST = 20  # criteria


@dataclass(frozen=True)
class Criterion:
    name: str  # as it stands in exports
    title: str
    description: str = ""
    examples: tuple[str, ...] = ()
    scale: int = 3  # from -scale (left) to scale (right)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,49}", self.name):
            raise FeedbackError(f"criteria: name {self.name!r:.60} came; expected small letters, digits and _")
        for key in ("title", "description"):
            if not isinstance(getattr(self, key), str):
                raise FeedbackError(f"criteria: {key} of {self.name} should be text")
        if not isinstance(self.examples, tuple) or not all(isinstance(one, str) for one in self.examples):
            raise FeedbackError(f"criteria: examples of {self.name} should be a list of texts")
        if isinstance(self.scale, bool) or self.scale not in (1, 2, 3):
            raise FeedbackError(f"criteria: scale {self.scale!r:.20} of {self.name} came; expected 1, 2 or 3")


DEFAULT = (
    Criterion("helpfulness", "Helpfulness", "Does what was asked, completely, at a fitting length."),
    Criterion("harmlessness", "Harmlessness", "Does no harm, and declines only what should be declined."),
    Criterion("honesty", "Honesty", "Says what is true, and says where it is not sure."),
    Criterion("style_fit", "Style fit", "Tone, form and language fit the request."),
)


def read_criteria(path: str | Path) -> tuple[Criterion, ...]:
    """Criteria of a YAML file: a list of `{name, title, description, examples, scale}`.

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
        if isinstance(values.get("examples"), list):
            values["examples"] = tuple(values["examples"])
        try:
            found.append(Criterion(**values))
        except FeedbackError as error:
            raise FeedbackError(f"{path}: {error}") from None
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise FeedbackError(f"{path}: {name} is named twice")
    return tuple(found)
