"""Who judges what: no pair is ever over- or under-judged, whatever people do and in whatever order."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

sa = pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")


from rlhf_fast.feedback import assignment as a  # noqa: E402
from rlhf_fast.feedback import tables as t  # noqa: E402
from rlhf_fast.feedback.errors import AlreadyDone, Expired, FeedbackError, NotYours  # noqa: E402
from rlhf_fast.feedback.store import Person, Plan, Store  # noqa: E402

GOOD = a.Judgement(1, True, False, {"honesty": -1}, seconds=9.0)


def place(folder: Path) -> str:
    """The URL of the store of a test; tests/scenarios/feedback/test_postgres.py puts another in its place."""
    return f"sqlite:///{folder}/votes.db"


def store_of(folder: Path, prompts: int, people: int, plan: Plan) -> tuple[Store, list[Person]]:
    store = Store(place(folder))
    store.set_plan(plan)
    for number in range(prompts):
        store.add_prompt(f"question {number}", ["one", "two"], category=f"category {number % 2}")
    return store, [store.join(store.invite(f"person {number}")) for number in range(people)]


def plain(**values: object) -> Plan:
    return Plan(**{"gold_share": 0.0, "repeat_share": 0.0, **values})  # type: ignore[arg-type]


class Work(RuleBasedStateMachine):
    """Three people, four pairs, two judgements each; the clock goes on as the test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store, self.people = store_of(Path(self.folder.name), 4, 3, plain(judgements=2, lease=10.0))
        self.now = 1000.0
        self.seen: dict[int, int] = {}  # person: the task shown last

    who = st.integers(0, 2)

    @rule(who=who)
    def take(self, who: int) -> None:
        task = a.next_task(self.store, self.people[who], self.now)
        if task:
            self.seen[who] = task.id

    @rule(who=who)
    def answer(self, who: int) -> None:
        with contextlib.suppress(AlreadyDone, Expired, NotYours):
            a.submit(self.store, self.people[who], self.seen.get(who, 999), GOOD, self.now)

    @rule(who=who)
    def leave(self, who: int) -> None:
        with contextlib.suppress(AlreadyDone, NotYours):
            a.skip(self.store, self.people[who], self.seen.get(who, 999))

    @rule(who=who)
    def take_back(self, who: int) -> None:
        task = a.undo(self.store, self.people[who], self.now)
        if task:
            assert task.draft["preference"] == 1 and task.draft["criteria"] == {"honesty": -1}
            self.seen[who] = task.id

    @rule()
    def wait(self) -> None:
        self.now += 11.0

    @invariant()
    def places_are_those_in_use(self) -> None:
        with self.store.read() as connection:
            taken = {row.id: row.taken for row in connection.execute(sa.select(t.pair.c.id, t.pair.c.taken))}
            held = sa.select(t.assignment.c.pair).where(t.assignment.c.state.in_(("open", "done")))
            places = Counter(row.pair for row in connection.execute(held))
            votes = connection.execute(sa.select(t.vote.c.pair, t.vote.c.person).where(t.vote.c.undone.is_(None))).all()
        assert {pair: places[pair] for pair in taken} == taken
        assert max(taken.values()) <= 2
        assert max(Counter(votes).values(), default=0) <= 1  # nobody twice on the same

    def teardown(self) -> None:
        """Under-judged is what nobody who could judge it is offered: let two newcomers finish."""
        self.now += 11.0
        for number in range(2):
            person = self.store.join(self.store.invite(f"newcomer {number}"))
            while task := a.next_task(self.store, person, self.now):
                a.submit(self.store, person, task.id, GOOD, self.now)
        with self.store.read() as connection:
            votes = connection.execute(sa.select(t.vote.c.pair).where(t.vote.c.undone.is_(None)))
            assert Counter(row.pair for row in votes) == {1: 2, 2: 2, 3: 2, 4: 2}
        self.store.close()
        self.folder.cleanup()


TestWork = Work.TestCase
TestWork.settings = settings(
    max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def test_two_people_at_once_never_get_the_same_last_place(tmp_path: Path) -> None:
    store, people = store_of(tmp_path, 5, 6, plain(judgements=2))
    failed: list[BaseException] = []

    def work(person: Person) -> None:
        try:
            own = Store(place(tmp_path))  # as a process of its own has: only the database keeps them apart
            while task := a.next_task(own, person):
                a.submit(own, person, task.id, GOOD)
            own.close()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(person,)) for person in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with store.read() as connection:
        assert Counter(connection.execute(sa.select(t.vote.c.pair)).scalars()) == dict.fromkeys(range(1, 6), 2)


def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    store_of(tmp_path, 60, 1, plain(judgements=1))
    program = (
        "import sys; from rlhf_fast.feedback import assignment as a; from rlhf_fast.feedback.store import Store\n"
        f"s = Store({place(tmp_path)!r}); p = s.people()[0]\n"
        "while task := a.next_task(s, p): print(a.submit(s, p, task.id, a.Judgement(0, True, True)), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(5)]
        process.kill()
        said += [int(line) for line in process.stdout if line.endswith("\n")]
    with Store(place(tmp_path)).read() as connection:
        assert set(said) <= set(connection.execute(sa.select(t.vote.c.id)).scalars())


def test_the_same_task_comes_back_with_its_draft(tmp_path: Path) -> None:
    store, (person,) = store_of(tmp_path, 2, 1, plain())
    task = a.next_task(store, person, 0.0)
    assert task is not None
    a.save_draft(store, person, task.id, {"comment": "half"}, 1.0)
    again = a.next_task(store, person, 2.0)
    assert again is not None and (again.id, again.draft, again.left) == (task.id, {"comment": "half"}, task.left)


def test_sides_are_turned_back_in_the_vote(tmp_path: Path) -> None:
    store, people = store_of(tmp_path, 1, 8, plain(judgements=8))
    for person in people:
        task = a.next_task(store, person)
        assert task is not None
        better_left = task.left == "one"  # everybody prefers "one", and finds it alone acceptable
        a.submit(store, person, task.id, a.Judgement(-2 if better_left else 2, better_left, not better_left))
    with store.read() as connection:
        votes = connection.execute(sa.select(t.vote)).all()
    assert {(vote.preference, vote.first_ok, vote.second_ok) for vote in votes} == {(-2, True, False)}
    assert {vote.swapped for vote in votes} == {True, False}


def test_gold_and_repeats_come_in_between_and_take_no_place(tmp_path: Path) -> None:
    store, (person,) = store_of(tmp_path, 30, 1, Plan(judgements=1, gold_share=0.2, repeat_share=0.2, repeat_after=3))
    store.add_prompt("known", ["good", "bad"], kind="gold", gold=-1)
    while task := a.next_task(store, person):
        a.submit(store, person, task.id, a.Judgement(0, True, True, seconds=1.0))
    with store.read() as connection:
        votes = connection.execute(sa.select(t.vote).order_by(t.vote.c.id)).all()
        assert connection.execute(sa.select(sa.func.sum(t.pair.c.taken))).scalar_one() == 30
    kinds = Counter(vote.kind for vote in votes)
    assert kinds["normal"] == 30 and kinds["gold"] == 1 and kinds["repeat"] >= 2
    (gold,) = (vote for vote in votes if vote.kind == "gold")
    assert gold.flags == ["fast", "missed gold"]
    sides = {vote.pair: vote.swapped for vote in votes if vote.kind == "normal"}
    assert all(vote.swapped != sides[vote.pair] for vote in votes if vote.kind == "repeat")


def test_priority_goes_first_and_a_random_arm_is_recorded(tmp_path: Path) -> None:
    store, (person,) = store_of(tmp_path, 0, 1, plain(judgements=1, random_share=0.3))
    pairs = [store.add_prompt(f"q{n}", ["one", "two"], priority=float(n))[0] for n in range(30)]
    order = []
    while task := a.next_task(store, person):
        order.append(task.pair)
        a.submit(store, person, task.id, GOOD)
    with store.read() as connection:
        arms = dict(connection.execute(sa.select(t.assignment.c.pair, t.assignment.c.arm)).all())
    active = [pair for pair in order if arms[pair] == "active"]
    assert sorted(order) == pairs and active == sorted(active, reverse=True)
    assert 3 <= sum(arm == "random" for arm in arms.values()) <= 18


def test_categories_are_covered_alike(tmp_path: Path) -> None:
    store, (person,) = store_of(tmp_path, 20, 1, plain(judgements=1))
    seen: Counter[str] = Counter()
    for _ in range(10):
        task = a.next_task(store, person)
        assert task is not None
        seen[task.category] += 1
        a.submit(store, person, task.id, GOOD)
    assert seen == {"category 0": 5, "category 1": 5}


def test_what_is_not_one_s_own_is_refused_in_words(tmp_path: Path) -> None:
    store, (one, other) = store_of(tmp_path, 1, 2, plain(judgements=1, lease=5.0))
    task = a.next_task(store, one, 0.0)
    assert task is not None and a.next_task(store, other, 1.0) is None
    for number in (task.id, 10**30, -1):
        with pytest.raises(NotYours, match="not one of yours"):
            a.submit(store, other, number, GOOD, 1.0)
    late = a.next_task(store, other, 6.0)
    assert late is not None
    with pytest.raises(Expired, match="given to others"):
        a.submit(store, one, task.id, GOOD, 7.0)
    number = a.submit(store, other, late.id, GOOD, 7.0)
    assert a.submit(store, other, late.id, dataclasses.replace(GOOD, seconds=12.0), 8.0) == number  # sent again
    with store.read() as connection:
        assert connection.execute(sa.select(t.vote.c.id, t.vote.c.seconds)).all() == [(number, 9.0)]
    changes: list[dict[str, Any]] = [{"preference": 0}, {"right_ok": True}, {"criteria": {}}, {"comment": "!"}]
    for change in changes:
        with pytest.raises(AlreadyDone, match="answered this item already"):
            a.submit(store, other, late.id, dataclasses.replace(GOOD, **change), 9.0)
    with pytest.raises(NotYours, match="Only seniors"):
        a.adjudication(store, one, 1)


def test_a_broken_item_is_taken_out_with_its_reason(tmp_path: Path) -> None:
    store, (person,) = store_of(tmp_path, 1, 1, plain())
    task = a.next_task(store, person)
    assert task is not None
    with pytest.raises(FeedbackError, match="few words"):
        a.broken(store, person, task.id, " ")
    a.broken(store, person, task.id, "cut off")
    assert a.next_task(store, person) is None
    store.reopen(1)
    newcomer = store.join(store.invite("newcomer"))
    assert a.next_task(store, newcomer) is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"preference": 4}, "-3 to 3"),
        ({"preference": True}, "-3 to 3"),
        ({"criteria": {"a": 1.5}}, "a: 1.5 came"),
        ({"left_ok": 1}, "left_ok"),
        ({"comment": "x" * 4001}, "at most 4000"),
        ({"comment": "\0"}, "null character"),
        ({"better_answer": "\ud800"}, "half a character"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_a_judgement_that_cannot_be_right_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(FeedbackError, match=words):
        a.Judgement(**{"preference": 0, "left_ok": True, "right_ok": True, **values})  # type: ignore[arg-type]
