"""Show a run while it goes on: a progress line, and on a terminal a table that grows by a row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from rlhf_fast.runs.metric_names import words_of

# Columns of the table, of which a run shows those that it has, and their format.
COLUMNS = {
    "loss": ".4f", "heldout_loss": ".4f", "heldout_perplexity": ".2f", "heldout_accuracy": ".3f", "score": ".3f",
    "reward": ".3f", "kl": ".3f", "entropy": ".3f", "finished": ".2f", "response_tokens": ".0f", "clip_fraction": ".3f",
    "grad_norm": ".2f", "lr": ".1e", "seconds_rollout": ".1f", "seconds_scoring": ".1f", "seconds_training": ".1f",
    "decode_roofline": ".0%", "training_utilisation": ".0%", "busy": ".0%",
}  # fmt: skip
OF_STEP, NARROWEST = 6, 9  # characters of the first column, and of the others at least: -123.4560 has as many


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
    """Drop what a terminal would obey from a text."""
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
                self._columns = columns_that_fit([name for name in COLUMNS if name in row], self._bar.ncols or 120)
                self.say("\n".join(heading(self._columns)))
            figures = [format(row[name], COLUMNS[name]) if name in row else "" for name in self._columns]
            self.say(table_line([str(n), *figures], self._columns))

    def say(self, text: str) -> None:
        """A line above the progress line."""
        self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def columns_that_fit(names: list[str], width: int) -> list[str]:
    """The first of the columns that a line of `width` characters holds, with their whole headings."""
    fitting: list[str] = []
    for name in names:
        if len(heading([*fitting, name])[-1]) > width:
            break
        fitting.append(name)
    return fitting


def heading(columns: list[str]) -> list[str]:
    """The lines above a table, one word of each column's name in each; the last words stand in the last line."""
    words = [["step"], *map(words_of, columns)]
    lines = max(map(len, words))
    padded = [[""] * (lines - len(each)) + each for each in words]
    return [table_line(list(cells), columns) for cells in zip(*padded, strict=True)]


def table_line(cells: list[str], columns: list[str]) -> str:
    """Cells on the right of their columns, of which the first is the step's; one that is too long is not cut."""
    widths = [OF_STEP, *(max(NARROWEST, *map(len, words_of(name))) for name in columns)]
    cells = cells + [""] * (len(widths) - len(cells))
    return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
