"""What a person sees of a run while it goes on: a progress line, and on a terminal a table that grows by a row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

# Columns of the table, of which a run shows those that it has, and their format.
COLUMNS = {
    "loss": ".4f", "heldout_loss": ".4f", "heldout_perplexity": ".2f", "heldout_accuracy": ".3f", "score": ".3f",
    "reward": ".3f", "kl": ".3f", "entropy": ".3f", "finished": ".2f", "response_tokens": ".0f", "clip_fraction": ".3f",
    "grad_norm": ".2f", "lr": ".1e", "seconds_rollout": ".1f", "seconds_scoring": ".1f", "seconds_training": ".1f",
    "decode_roofline": ".0%", "training_utilisation": ".0%", "busy": ".0%",
}  # fmt: skip
SHORT = {"heldout": "held", "response": "resp", "seconds": "s", "fraction": "frac", "utilisation": "util"}
WIDTH = 10


def progress_bar(total: int, what: str, unit: str, done: int = 0) -> tqdm[Any]:
    """A progress line with rate and time left on stderr; in a log file it is renewed every 30 seconds only."""
    seconds = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=done, desc=what, unit=unit, mininterval=seconds, maxinterval=seconds, dynamic_ncols=True
    )


def bar_updater(bar: tqdm[Any]) -> Callable[[int, int], None]:
    """A `progress(done, total)` callback that moves `bar`."""

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return update


def printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Terminal:
    """Shows the steps of a run while it is the context."""

    def __init__(self, phase: str, steps: int, done: int) -> None:
        self._bar = progress_bar(steps, phase, "step", done)
        self._columns: list[str] = []

    def step(self, n: int, row: dict[str, float], in_table: bool) -> None:
        """Show a step's metrics: `in_table` as a row that stays, if there is somebody to look."""
        shown = [name for name in ("loss", "score", "kl") if name in row][:2]
        self._bar.set_postfix({name: f"{row[name]:.3f}" for name in shown}, refresh=False)
        self._bar.update()
        if in_table and sys.stderr.isatty():
            if not self._columns:
                self._columns = [name for name in COLUMNS if name in row][: (self._bar.ncols or 120) // WIDTH - 1]
                self.say(table_line(["step", *map(_short, self._columns)]))
            self.say(table_line([str(n), *(format(row[name], COLUMNS[name]) for name in self._columns)]))

    def say(self, text: str) -> None:
        """A line above the progress line."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def table_line(cells: list[str]) -> str:
    return " ".join(cell[: WIDTH - 1].rjust(WIDTH - 1) for cell in cells)


def _short(name: str) -> str:
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name.replace("_", " ")
