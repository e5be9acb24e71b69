"""People who judge at once while the server is killed: a small run of `bench.annotators`, and what it notices."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from bench import annotators
from bench.annotators import Load
from rlhf_fast.feedback import assignment as a
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.store import Plan, Store


def test_a_server_that_is_killed_loses_nothing_and_stores_nothing_twice(tmp_path: Path) -> None:
    load = Load(annotators=8, judgements=120, kills=1, think=0.0)
    run, wrong = annotators.measured(tmp_path, "", load)
    assert wrong == [] and len(run.acknowledged) >= 120
    assert run.down > 0 and run.sent_again > 0
    found = annotators.record(run, "SQLite", (0.0, 0.0))
    assert found["rate"] > found["rate_with_restarts"] > 0 and "judgements/s" in annotators.told(found)


def test_the_check_notices_each_fault(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.set_plan(Plan(judgements=2, gold_share=0.0, repeat_share=0.0))
    for number in range(3):
        store.add_prompt(f"q{number}", ["one", "two"])
    acknowledged = {}
    for name in ("Ann", "Bob"):
        person = store.join(store.invite(name))
        while task := a.next_task(store, person):
            a.submit(store, person, task.id, a.Judgement(-1, True, True))
            acknowledged[task.id] = person.id, -1
    assert annotators.faults(store, acknowledged) == []
    assert "another vote" in annotators.faults(store, {**acknowledged, 1: (1, 3)})[0]
    assert "task 99: acknowledged, and not in the store" in annotators.faults(store, {**acknowledged, 99: (1, 1)})
    assert "never acknowledged" in annotators.faults(store, {k: v for k, v in acknowledged.items() if k != 2})[0]
    with store.write() as connection:
        connection.execute(t.vote.update().where(t.vote.c.id == 1).values(person=2))
    wrong = annotators.faults(store, acknowledged)
    assert any("judged 2 times" in one for one in wrong) and any("another vote" in one for one in wrong)
    with store.write() as connection:
        connection.execute(t.vote.update().where(t.vote.c.id == 1).values(undone=1.0))
    wrong = annotators.faults(store, acknowledged)
    assert any("not in the store" in one for one in wrong) and any("1 judgements" in one for one in wrong)
    with store.write() as connection:
        connection.exec_driver_sql("DROP INDEX vote_that_counts")
        connection.execute(t.vote.update().where(t.vote.c.id == 1).values(undone=None, person=1))
        row = connection.execute(t.vote.select().where(t.vote.c.id == 1)).one()._asdict()
        connection.execute(t.vote.insert().values({**row, "id": 50}))
    wrong = annotators.faults(store, acknowledged)
    assert any("task 1: 2 votes" in one for one in wrong) and any("3 judgements" in one for one in wrong)
