"""The parts that all pages are built of."""

from __future__ import annotations

import re

import pytest

from rlhf_fast.pages.page import bar, duration, fmt, table_of, whisker
from rlhf_fast.statistics.intervals import Interval


@pytest.mark.parametrize(
    "interval, null, drawn, side",
    [
        (Interval(0.6, 0.5, 0.9), 0.5, [50, 40, 60, 50], "even"),  # left end, width, mean, and where no effect is
        (Interval(0.8, 0.6, 0.9), 0.5, [60, 30, 80, 50], "a"),
        (Interval(0.2, 0.1, 0.4), 0.5, [10, 30, 20, 50], "b"),
        (Interval(1.4, 0.5, 2.0), -1.0, [50, 50, 100, 0], "a"),  # what lies outside of the scale stands at its end
    ],
)
def test_an_interval_is_drawn_where_it_lies(interval: Interval, null: float, drawn: list[float], side: str) -> None:
    text = whisker(interval, null, 0.0, 1.0)
    assert [float(x) for x in re.findall(r"--[lwmz]:([\d.]+)%", text)] == drawn
    assert f'class="ci {side}"' in text
    assert whisker(None, null, 0.0, 1.0) == ""
    assert re.findall(r"--m:([\d.]+)%", whisker(Interval(3.0, 3.0, 3.0), 3.0, 3.0, 3.0)) == ["0.0"]  # no width at all


def test_numbers_are_shown_with_their_sign_and_unit_and_never_as_minus_zero() -> None:
    assert fmt(None) == "–" and fmt(0.256) == "0.26" and fmt(0.256, 1, unit="%") == "25.6%"
    assert fmt(-0.001) == "0.00" and fmt(0.001, sign=True) == "0.00"
    assert fmt(-1.5, 1, sign=True) == "−1.5" and fmt(1.5, 1, sign=True) == "+1.5"


def test_durations_are_seconds_then_minutes_then_hours() -> None:
    assert [duration(x) for x in (0.04, 119.4, 119.6, 3725.0, 7199.4, 7200.0)] == [
        "0.0 s", "119.4 s", "2 min 0 s", "62 min 5 s", "119 min 59 s", "2 h 0 min",
    ]  # fmt: skip


def test_a_table_names_its_rows_and_has_a_foot_if_asked() -> None:
    text = table_of("Wins", ["prompt", "n"], [["a", "1"], ["b", "2"]], ["all", "3"])
    assert text.count("<tr>") == 4 and '<th scope="row">b</th><td>2</td>' in text
    assert "<tfoot><tr>" in text and "<tfoot>" not in table_of("Wins", ["prompt"], [["a"]])


def test_a_bar_is_as_long_as_its_share_and_no_longer_than_its_place() -> None:
    drawn = [re.findall(r"--v:([\d.]+)%", bar(share)) for share in (-0.5, 0.0, 0.256, 1.0, 1.5)]
    assert drawn == [["0.0"], ["0.0"], ["25.6"], ["100.0"], ["100.0"]]
