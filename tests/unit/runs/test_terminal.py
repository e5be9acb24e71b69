"""The table of a run: whole headings above figures that stand under them, however wide the terminal is."""

from __future__ import annotations

import pytest

from rlhf_fast.runs.metric_names import WORDS
from rlhf_fast.runs.terminal import COLUMNS, columns_that_fit, heading, table_line

VALUES = [0.0, -1.5, 12.25, -123.456]


@pytest.mark.parametrize("width", [20, 80, 120, 200])
def test_no_heading_is_cut_and_no_line_is_too_wide(width: int) -> None:
    columns = columns_that_fit(list(COLUMNS), width)
    lines = heading(columns)
    assert all(len(line) <= width for line in lines)
    shown = " ".join(lines).split()
    for name in columns:
        for word in name.split("_"):
            assert WORDS.get(word, word) in shown, f"{name} is cut"
    assert len(columns) >= {20: 1, 80: 7, 120: 11, 200: len(COLUMNS)}[width]


@pytest.mark.parametrize("value", VALUES)
def test_figures_end_where_their_headings_do(value: float) -> None:
    columns = list(COLUMNS)
    cells = ["7", *(format(value, COLUMNS[name]) for name in columns)]
    line, last = table_line(cells, columns), heading(columns)[-1]
    ends = [i for i in range(len(last)) if last[i] != " " and (i + 1 == len(last) or last[i + 1] == " ")]
    for end, cell in zip(ends, cells, strict=True):
        assert line[: end + 1].endswith(cell)


def test_a_figure_that_is_too_long_is_not_cut() -> None:
    assert "-123456789.0000" in table_line(["1", "-123456789.0000"], ["loss"])


def test_columns_are_left_out_from_the_end() -> None:
    names = list(COLUMNS)
    assert columns_that_fit(names, 80) == names[: len(columns_that_fit(names, 80))]
    assert columns_that_fit(names, 3) == []
