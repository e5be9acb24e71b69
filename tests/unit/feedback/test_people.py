"""What the dashboard says of people: made up annotators with a known lean are told from those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from rlhf_fast.feedback import assignment as a
from rlhf_fast.feedback import exchange, people, quality
from rlhf_fast.feedback.store import Plan, Store

NAMES = [(1, "fair"), (2, "fair too"), (3, "left"), (4, "long"), (5, "tired"), (6, "hasty")]


def made_up() -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Votes of six people on 120 pairs, and by how much the second response is longer."""
    generator = np.random.default_rng(0)
    votes, longer = [], {}
    for pair in range(120):
        truth, longer[pair] = (int(generator.choice([-1, 1])) for _ in range(2))
        for number, name in NAMES:
            swapped, said, seconds = bool(generator.random() < 0.5), truth, float(generator.uniform(20, 40))
            errs = generator.random() < 0.1
            if name == "left":
                said = 1 if swapped else -1
            elif name == "long" and generator.random() < 0.7:
                said = longer[pair]
            elif name == "tired":
                errs = generator.random() < pair / 120
            elif name == "hasty":
                errs = generator.random() < 0.4
                seconds = 2.0 if errs else 30.0
            said = -said if errs and name != "left" else said
            common = {"pair": pair, "person": number, "kind": "normal", "preference": 2 * said, "swapped": swapped}
            votes.append({**common, "seconds": seconds, "flags": [], "gold": None, "at": float(pair)})
    return votes, longer


@pytest.fixture(scope="module")
def found() -> dict[str, people.PersonQuality]:
    return {one.name: one for one in people.people_of(NAMES, *made_up())}


def test_each_lean_is_found_where_it_is_and_nowhere_else(found: dict[str, people.PersonQuality]) -> None:
    for name, one in found.items():
        assert one.left and one.length and one.speed and one.drift.change and one.agreement.interval
        assert (one.left.low > 0.5) == (name == "left"), name
        assert (one.length.low > 0.5) == (name == "long"), name
        assert (one.speed.low > 0.3) == (name == "hasty"), name
        assert (one.drift.change.high < -0.1) == (name == "tired"), name
        assert one.votes == one.agreement.doubles == 120 and not one.agreement.too_few
        assert one.gold is None and one.consistency is None


def test_the_pair_that_agrees_least_comes_first_with_who_said_what() -> None:
    votes, _ = made_up()
    pairs = people.pairs_of(dict(NAMES), votes)
    shares = [pair.raw.interval.mean for pair in pairs if pair.raw.interval]
    assert len(pairs) == 15 and shares == sorted(shares)
    two = next(pair for pair in pairs if (pair.one, pair.other) == ("fair", "hasty"))
    one, other = ({v["pair"]: v["preference"] // 2 for v in votes if v["person"] == number} for number in (1, 6))
    counted = [[sum(one[p] == x and other[p] == y for p in one) for y in (-1, 1)] for x in (-1, 1)]
    assert two.confusion.values == [-1, 1] and two.confusion.counts.tolist() == counted


def test_few_votes_tell_nothing_of_a_person() -> None:
    votes, longer = made_up()
    few = [{**vote, "seconds": 0.0} for vote in votes if vote["pair"] < 9]
    one = people.people_of(NAMES, few, longer)[0]
    assert one.agreement.too_few and one.speed is None and one.drift.change is not None
    one = people.people_of(NAMES, few[: 7 * len(NAMES)], longer)[0]
    assert one.length is None and one.drift.change is None
    (nobody,) = people.people_of([(9, "nobody")], [], {})
    assert nobody.votes == 0 and nobody.left is None and nobody.agreement.interval is None
    assert people.pairs_of({}, []) == []


def test_the_criterion_that_needs_work_and_its_answers_in_the_export(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.set_plan(Plan(judgements=2, gold_share=0.0, repeat_share=0.0))
    scale = ["a", "b", "c", "d", "e"]
    store.set_setting("criteria", [{"name": "tone", "title": "", "scale": scale}, {"name": "truth", "title": ""}])
    assert quality.dashboard(store).needs is None
    for i in range(9):
        store.add_prompt(f"q{i}", ["good", "bad"])
    for number in range(2):
        person = store.join(store.invite(f"p{number}"))
        while task := a.next_task(store, person):
            side = -1 if task.left == "good" else 1
            answers = {"tone": 2 * side if number else -side, "truth": side}
            a.submit(store, person, task.id, a.Judgement(side, True, False, answers, seconds=9.0))
    board = quality.dashboard(store)
    assert board.needs and board.needs.name == "tone" and board.needs.raw.too_few and board.needs_clearly
    assert [one.name for one in board.annotators] == ["p0", "p1"] and len(board.pairs_of_people) == 1
    assert len(quality.disputed(store, 1.0, "tone")) == 9 and not quality.disputed(store, 1.0, "truth")
    row = exchange.comparisons(store)[0]
    assert row["chosen"] == "good" and row["provenance"]["criteria"] == {"tone": 0.5, "truth": 1.0}
    assert sorted(vote["criteria"]["tone"] for vote in row["provenance"]["votes"]) == [-1, 2]
