"""The data card of a store as one HTML page: counts, agreement, coverage, and what was dropped and why."""

from __future__ import annotations

from collections import Counter

import sqlalchemy as sa

from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.quality import Quality, dashboard, labels
from rlhf_fast.feedback.store import Store
from rlhf_fast.pages.page import esc, fmt, table_of, whole_page
from rlhf_fast.statistics.intervals import Interval

_HEAD = [
    "",
    "votes",
    "pairs with two votes",
    "raw agreement",
    "Cohen's kappa",
    "Fleiss's kappa",
    "Krippendorff's alpha",
]


def card(store: Store, title: str = "Data card") -> str:
    """The page, in which every text of people and models is escaped."""
    board = dashboard(store)
    states = Counter(label.state for label in labels(store))
    with store.read() as connection:
        wanted = (t.prompt.c.id == t.pair.c.prompt) & (t.pair.c.kind == "normal")
        coverage = connection.execute(
            sa.select(t.prompt.c.category, sa.func.count(), sa.func.sum(t.pair.c.taken))
            .where(wanted)
            .group_by(t.prompt.c.category)
            .order_by(t.prompt.c.category)
        ).all()
        reasons = connection.execute(
            sa.select(t.report.c.pair, t.report.c.kind, t.report.c.reason).order_by(t.report.c.id)
        ).all()
    counts = [
        ["pairs", str(board.pairs)],
        ["pairs with all judgements", str(board.judged)],
        ["votes", f"{board.votes} of {board.wanted}"],
        ["agreed, split, adjudicated", ", ".join(str(states[state]) for state in ("agreed", "split", "adjudicated"))],
        ["taken out by reports", str(board.reported)],
        ["discarded", str(board.discarded)],
    ]
    if board.ceiling:
        reach = f"{fmt(board.ceiling.low, 0, unit='%')} to {fmt(board.ceiling.high, 0, unit='%')}"
        counts.append(["a reward model can reach", reach])
    rows = [_line(one) for one in [board.overall, *board.criteria, *board.categories]]
    people = [
        [esc(f"annotator {one.id}"), str(one.votes), fmt(one.seconds, 1), str(one.flagged)]
        + [_interval(value) for value in (one.left, one.gold, one.consistency)]
        for one in board.people
        if one.votes
    ]
    dropped = [[esc(row.pair), esc(row.kind), esc(row.reason[:300])] for row in reasons]
    parts = [
        f"<h1>{esc(title)}</h1>",
        table_of("Counts", ["", "number"], counts),
        table_of("Agreement", _HEAD, rows),
        table_of(
            "Coverage", ["category", "pairs", "votes"], [[esc(a or "none"), str(b), str(c)] for a, b, c in coverage]
        ),
        table_of("People", ["", "votes", "seconds", "flagged", "left side", "gold", "repeats alike"], people),
        table_of("Skipped, broken and reported", ["pair", "what", "reason"], dropped),
    ]
    return whole_page(esc(title), "\n".join(parts))


def _line(one: Quality) -> list[str]:
    return [
        esc(one.name or "none"),
        str(one.votes),
        str(one.raw.doubles),
        *(_interval(found.interval) for found in (one.raw, one.cohen, one.fleiss, one.alpha)),
    ]


def _interval(value: Interval | None) -> str:
    return "–" if value is None else esc(value)
