"""Who judges what next: places, leases, gold items, repeats, and the answers that come in."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from rlhf_fast.feedback import criteria
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.errors import AlreadyDone, Expired, FeedbackError, NotYours, Removed
from rlhf_fast.feedback.store import (
    MOST_ANSWER,
    MOST_COMMENT,
    Person,
    Plan,
    Store,
    checked_text,
    leases,
    plan_of,
    release,
    setting_of,
)

STRONGEST = 3  # preferences and criteria go from -3 to 3
MOST_SECONDS = 86_400.0
LEAST_PACE = 5  # votes from which a pace is told


@dataclass(frozen=True)
class Task:
    """What one person is shown, in the order shown; never which model wrote what."""

    id: int
    pair: int
    prompt: list[dict[str, Any]]
    category: str
    warning: str
    left: str
    right: str
    kind: str  # for the page's own logic; never shown, or gold would not be silent
    draft: dict[str, Any]
    done: int
    of: int


@dataclass(frozen=True)
class Judgement:
    preference: int  # -3 left much better .. 0 tie .. 3 right much better
    left_ok: bool
    right_ok: bool
    criteria: dict[str, int] = field(default_factory=dict)  # as preference
    comment: str = ""
    better_answer: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"preference": self.preference, **self.criteria}.items():
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) > STRONGEST:
                raise FeedbackError(f"{name[:50]}: {value!r:.50} came; expected a whole number from -3 to 3")
            if len(name) > 100 or len(self.criteria) > 50:
                raise FeedbackError("criteria: too many, or too long a name")
            checked_text(name, "criterion", 100)
        for name in ("left_ok", "right_ok"):
            if not isinstance(getattr(self, name), bool):
                raise FeedbackError(f"{name}: {getattr(self, name)!r:.50} came; expected true or false")
        checked_text(self.comment, "comment", MOST_COMMENT)
        checked_text(self.better_answer, "better answer", MOST_ANSWER)
        if (
            isinstance(self.seconds, bool)
            or not isinstance(self.seconds, int | float)
            or not 0 <= self.seconds < math.inf
        ):
            raise FeedbackError(f"seconds: {self.seconds!r:.50} came; expected a number of at least 0")


def next_task(store: Store, person: Person, now: float | None = None) -> Task | None:
    """The task that the person has open, else a new one; None if nothing is left for this person."""
    now = time.time() if now is None else now
    with store.write(flush=False) as connection:  # a lease that a crash of the machine undoes is given anew
        _present(connection, person)
        plan = plan_of(connection)
        release(connection, _LATE, {"now": now})
        number, had = connection.execute(_NOW, {"person": person.id}).one()
        if number is None:
            number = _allocate(connection, person, plan, had, now)
        return None if number is None else _task(connection, person, plan, number)


def adjudication(store: Store, person: Person, pair: int, now: float | None = None) -> Task:
    """The task by which a senior judges a disputed pair; `submit` takes the answer, and earlier votes stay."""
    if person.role not in ("senior", "owner"):
        raise NotYours("Only seniors decide disputed items.")
    now = time.time() if now is None else now
    with store.write() as connection:
        _present(connection, person)
        plan = plan_of(connection)
        if connection.execute(sa.select(t.pair.c.id).where(t.pair.c.id == pair)).first() is None:
            raise NotYours("There is no such item.")
        swapped = _share(plan.seed, "sides", pair, person.id) < 0.5
        number = _lease(connection, person, pair, "adjudication", swapped, "none", now, plan)
        return _task(connection, person, plan, number)


def save_draft(store: Store, person: Person, task: int, draft: dict[str, Any], now: float | None = None) -> None:
    """Keep what is filled in so far; the lease begins anew, for the person is at work."""
    now = time.time() if now is None else now
    try:
        text = json.dumps(draft, ensure_ascii=False, allow_nan=False) if isinstance(draft, dict) else None
    except (TypeError, ValueError, RecursionError):
        text = None
    if text is None:
        raise FeedbackError("draft: expected an object of plain values")
    checked_text(text, "draft", MOST_ANSWER + 2 * MOST_COMMENT)
    with store.write() as connection:
        row = _own(connection, person, task)
        if row.state != "open":
            raise AlreadyDone("This item is no longer open.")
        until = max(row.until, now + plan_of(connection).lease) if row.until > now else row.until
        connection.execute(t.assignment.update().where(t.assignment.c.id == task).values(draft=draft, until=until))


def submit(store: Store, person: Person, task: int, judgement: Judgement, now: float | None = None) -> int:
    """Keep a judgement; returns the number of the vote. Late is not too late while the pair still has a place.

    The same judgement once more, as after an answer that never came, is the same vote.

    Raises:
        NotYours, AlreadyDone, Expired, FeedbackError: with words for the person; the last names a criterion that is
            not in force.
    """
    now = time.time() if now is None else now
    with store.write() as connection:
        plan = plan_of(connection)
        row = _own(connection, person, task)
        if row.state == "done" and (number := _same(connection, row, judgement)):
            return number
        if row.state not in ("open", "expired"):
            raise AlreadyDone("You have answered this item already. Undo the last answer to change it.")
        criteria.check_answers(judgement.criteria, criteria.in_force(setting_of(connection, "criteria")))
        if row.pair_state != "open" and row.kind != "adjudication":
            raise Expired("This item has been taken out in the meantime. Nothing is asked of you for it.")
        if row.state == "expired" and row.kind == "normal":
            if row.taken >= plan.judgements:
                raise Expired("This item was given to others, as it was open for long. Please take the next one.")
            connection.execute(_TAKE, {"which": row.pair})
        flags = ["fast"] if judgement.seconds < plan.least_seconds else []
        if row.kind in ("gold", "attention") and _sign(_answer(row, judgement)["preference"]) != row.gold:
            flags.append(f"missed {row.kind}")
        seconds = min(float(judgement.seconds), MOST_SECONDS)
        about = {"assignment": task, "pair": row.pair, "person": person.id, "kind": row.kind, "swapped": row.swapped}
        values = {**about, **_answer(row, judgement), "seconds": seconds, "flags": flags, "at": now}
        made = connection.execute(_VOTE, values)
        connection.execute(_DONE, {"which": task})
        assert made.inserted_primary_key is not None
        return int(made.inserted_primary_key[0])


def skip(store: Store, person: Person, task: int, reason: str = "") -> None:
    """Leave a pair to others; the person does not get it again."""
    _leave(store, person, task, "skip", reason)


def broken(store: Store, person: Person, task: int, reason: str) -> None:
    """Say that a pair cannot be judged (garbled, cut off, empty); enough such reports take it out."""
    _leave(store, person, task, "broken", reason)


def report(store: Store, person: Person, task: int, reason: str) -> None:
    """Stop, and report a pair as harmful to look at; enough reports take it out."""
    _leave(store, person, task, "report", reason)


def undo(store: Store, person: Person, now: float | None = None) -> Task | None:
    """Take the person's last judgement back and open its task again, filled in as it was; None if there is none.

    The vote stays in the store, marked as undone.
    """
    now = time.time() if now is None else now
    with store.write() as connection:
        _present(connection, person)
        plan = plan_of(connection)
        mine = (t.vote.c.person == person.id) & t.vote.c.undone.is_(None) & (t.vote.c.kind != "adjudication")
        usable = mine & (t.pair.c.id == t.vote.c.pair) & (t.pair.c.state == "open")
        row = connection.execute(sa.select(t.vote).where(usable).order_by(t.vote.c.id.desc())).first()
        if row is None:
            return None
        sign = -1 if row.swapped else 1
        ok = (row.first_ok, row.second_ok)[:: -1 if row.swapped else 1]
        draft = {
            "preference": sign * row.preference,
            "left_ok": ok[0],
            "right_ok": ok[1],
            "criteria": {name: sign * value for name, value in row.criteria.items()},
            "comment": row.comment,
            "better_answer": row.better_answer,
            "seconds": row.seconds,
        }
        connection.execute(t.vote.update().where(t.vote.c.id == row.id).values(undone=now))
        opened = {"state": "open", "opened": now, "until": now + plan.lease, "draft": draft}
        connection.execute(t.assignment.update().where(t.assignment.c.id == row.assignment).values(opened))
        return _task(connection, person, plan, row.assignment)


def pace(store: Store, person: Person) -> float | None:
    """The median of the seconds that the person's last fifty votes took; None from fewer than five."""
    mine = (t.vote.c.person == person.id) & t.vote.c.undone.is_(None)
    last = sa.select(t.vote.c.seconds).where(mine).order_by(t.vote.c.id.desc()).limit(50)
    with store.read() as connection:
        seconds = list(connection.execute(last).scalars())
    return statistics.median(seconds) if len(seconds) >= LEAST_PACE else None


# Choosing a pair -----------------------------------------------------------------------------------------------------


def _allocate(connection: sa.Connection, person: Person, plan: Plan, had: int, now: float) -> int | None:
    """Lease a place to the person; gold items and repeats by a draw that is the same for the same history."""
    draw = _share(plan.seed, "kind", person.id, had)
    if draw < plan.gold_share and (known := _known(connection, person, plan)):
        swapped = _share(plan.seed, "sides", known.id, person.id) < 0.5
        return _lease(connection, person, known.id, known.kind, swapped, "none", now, plan)
    if plan.gold_share <= draw < plan.gold_share + plan.repeat_share and (again := _repeat(connection, person, plan)):
        return _lease(connection, person, again.pair, "repeat", not again.swapped, "none", now, plan)
    arm = "random" if _share(plan.seed, "arm", person.id, had) < plan.random_share else "active"
    pair = _new(connection, person, plan, arm)
    if pair is None:
        return None
    connection.execute(_TAKE, {"which": pair})
    swapped = _share(plan.seed, "sides", pair, person.id) < 0.5
    return _lease(connection, person, pair, "normal", swapped, arm, now, plan)


def _new(connection: sa.Connection, person: Person, plan: Plan, arm: str) -> int | None:
    """A pair with a free place that the person has not had, of the category that is covered least."""
    values = {"person": person.id, "places": plan.judgements}
    for category in connection.execute(_COVERAGE, {"places": plan.judgements}).scalars().all():
        # Begun pairs come first among equals, so that there are items with all their votes early.
        wanted = _BEST if arm == "active" else _ANY
        if among := connection.execute(wanted, {**values, "category": category}).scalars().all():
            return min(among, key=lambda number: _order(plan.seed, number))
    return None


def _known(connection: sa.Connection, person: Person, plan: Plan) -> Any | None:
    """A gold or attention item that the person has not had."""
    had = sa.select(t.assignment.c.pair).where(t.assignment.c.person == person.id, t.assignment.c.state != "expired")
    wanted = (t.pair.c.kind != "normal") & (t.pair.c.state == "open") & t.pair.c.id.not_in(had)
    rows = connection.execute(sa.select(t.pair.c.id, t.pair.c.kind).where(wanted)).all()
    return min(rows, key=lambda row: _share(plan.seed, "gold", person.id, row.id), default=None)


def _repeat(connection: sa.Connection, person: Person, plan: Plan) -> Any | None:
    """The person's oldest vote that is far enough back and has not been asked again."""
    again = t.assignment.alias()
    asked = sa.select(again.c.pair).where(
        again.c.person == person.id, again.c.kind == "repeat", again.c.state != "expired"
    )
    mine = (t.vote.c.person == person.id) & (t.vote.c.kind == "normal") & t.vote.c.undone.is_(None)
    usable = mine & (t.pair.c.id == t.vote.c.pair) & (t.pair.c.state == "open")
    rows = connection.execute(
        sa.select(t.vote.c.pair, t.vote.c.swapped, t.vote.c.id).where(usable).order_by(t.vote.c.id)
    ).all()
    left = {number for (number,) in connection.execute(asked)}
    return next((row for row in rows[: max(0, len(rows) - plan.repeat_after)] if row.pair not in left), None)


def _lease(
    connection: sa.Connection, person: Person, pair: int, kind: str, swapped: bool, arm: str, now: float, plan: Plan
) -> int:
    """A new assignment, or the one of the same kind that had expired, whose draft is still there."""
    row = connection.execute(_SAME, {"person": person.id, "pair": pair, "kind": kind}).first()
    times = {"opened": now, "until": now + plan.lease}
    if row is not None:
        if row.state not in ("expired", "open"):
            raise AlreadyDone("You have decided this item already.")
        values = {"state": "open", **times} if kind == "adjudication" else {"state": "open", "arm": arm, **times}
        connection.execute(t.assignment.update().where(t.assignment.c.id == row.id).values(values))
        return int(row.id)
    new = {"pair": pair, "person": person.id, "kind": kind, "swapped": swapped, "arm": arm}
    made = connection.execute(_ASSIGNMENT, {**new, "state": "open", "draft": {}, **times})
    assert made.inserted_primary_key is not None
    return int(made.inserted_primary_key[0])


def _task(connection: sa.Connection, person: Person, plan: Plan, number: int) -> Task:
    row = connection.execute(_SHOWN, {"which": number, "person": person.id, "places": plan.judgements}).one()
    sides = (row.first_text, row.second_text)[:: -1 if row.swapped else 1]
    return Task(
        id=row.id, pair=row.pair, prompt=row.messages, category=row.category, warning=row.warning,
        left=sides[0], right=sides[1], kind=row.kind, draft=row.draft, done=row.done, of=row.done + row.left + 1,
    )  # fmt: skip


def _present(connection: sa.Connection, person: Person) -> None:
    """Asked within the transaction that writes: a person may be removed in the midst of a request."""
    if connection.execute(_PRESENT, {"person": person.id}).first() is None:
        raise Removed("You are no longer among those who judge here. Ask who invited you.")


def _own(connection: sa.Connection, person: Person, task: int) -> sa.Row[Any]:
    """The assignment of that number, of a person who is still among the people."""
    row = None
    if isinstance(task, int) and 0 < task < 2**31:  # what the column can hold
        row = connection.execute(_OWN, {"task": task, "person": person.id}).first()
    if row is None:
        _present(connection, person)
        raise NotYours("This item is not one of yours.")
    return row


def _answer(row: Any, judgement: Judgement) -> dict[str, Any]:
    """A judgement in the pair's own order, as a vote keeps it."""
    sign = -1 if row.swapped else 1
    ok = (judgement.left_ok, judgement.right_ok)[::sign]
    return {
        "preference": sign * judgement.preference,
        "first_ok": ok[0],
        "second_ok": ok[1],
        "criteria": {name: sign * value for name, value in judgement.criteria.items()},
        "comment": judgement.comment,
        "better_answer": judgement.better_answer,
    }


def _same(connection: sa.Connection, row: Any, judgement: Judgement) -> int | None:
    """The vote that says the same as the judgement; the time it took may differ, for a browser counts on."""
    counts = (t.vote.c.assignment == row.id) & t.vote.c.undone.is_(None)
    vote = connection.execute(sa.select(t.vote).where(counts)).one()
    said = _answer(row, judgement)
    return int(vote.id) if {name: getattr(vote, name) for name in said} == said else None


def _leave(store: Store, person: Person, task: int, kind: str, reason: str) -> None:
    checked_text(reason, "reason", MOST_COMMENT)
    if kind != "skip" and not reason.strip():
        raise FeedbackError("Please say in a few words what is wrong with this item.")
    with store.write() as connection:
        row = _own(connection, person, task)
        if row.state not in ("open", "expired"):
            raise AlreadyDone("You have answered this item already. Undo the last answer to change it.")
        if row.state == "open":
            release(connection, leases(t.assignment.c.id == task))
        state = "skipped" if kind == "skip" else "broken"
        connection.execute(t.assignment.update().where(t.assignment.c.id == task).values(state=state))
        about = {"pair": row.pair, "person": person.id}
        connection.execute(t.report.insert().values(**about, kind=kind, reason=reason, at=time.time()))
        wanted = (t.report.c.pair == row.pair) & (t.report.c.kind != "skip")
        people = connection.execute(sa.select(sa.func.count(sa.distinct(t.report.c.person))).where(wanted)).scalar_one()
        if kind != "skip" and people >= plan_of(connection).reports:
            connection.execute(t.pair.update().where(t.pair.c.id == row.pair).values(state="reported"))


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _share(*what: Any) -> float:
    """A number from 0 to 1 that is the same for the same values on every machine."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big") / 2**64


@functools.lru_cache(maxsize=1 << 17)
def _order(seed: int, pair: int) -> float:
    return _share(seed, "order", pair)


# Statements ----------------------------------------------------------------------------------------------------------
# Made once: SQLAlchemy takes longer to put one together than a database to answer it.

_which: sa.BindParameter[int] = sa.bindparam("which")
_mine = t.assignment.c.person == sa.bindparam("person")
_LATE = leases((t.assignment.c.state == "open") & (t.assignment.c.until <= sa.bindparam("now")))
_open = (
    sa.select(t.assignment.c.id)
    .where(_mine, t.assignment.c.state == "open", t.assignment.c.kind != "adjudication")
    .where(t.pair.c.id == t.assignment.c.pair, t.pair.c.state == "open")
    .order_by(t.assignment.c.opened.desc(), t.assignment.c.id.desc())
    .limit(1)
)
_PRESENT = sa.select(t.person.c.id).where(t.person.c.id == sa.bindparam("person"), t.person.c.token_hash.is_not(None))
_OWN = sa.select(t.assignment, t.pair.c.state.label("pair_state"), t.pair.c.taken, t.pair.c.gold).where(
    _mine,
    t.assignment.c.id == sa.bindparam("task"),
    t.pair.c.id == t.assignment.c.pair,
    t.person.c.id == t.assignment.c.person,
    t.person.c.token_hash.is_not(None),
)
_SAME = sa.select(t.assignment.c.id, t.assignment.c.state).where(
    _mine, t.assignment.c.pair == sa.bindparam("pair"), t.assignment.c.kind == sa.bindparam("kind")
)
_had = sa.select(sa.func.count()).where(_mine, t.assignment.c.kind != "adjudication")
_NOW = sa.select(_open.scalar_subquery(), _had.scalar_subquery())  # what the person has open, and the number had

_open_places = sa.and_(t.pair.c.kind == "normal", t.pair.c.state == "open", t.pair.c.taken < sa.bindparam("places"))
_free = sa.and_(  # and the person has not had the pair, or had it and let it expire
    _open_places,
    t.pair.c.id.not_in(sa.select(t.assignment.c.pair).where(_mine, t.assignment.c.state != "expired")),
)
_COVERAGE = (  # categories with free places, the least covered first
    sa.select(t.prompt.c.category)
    .where(t.prompt.c.id == t.pair.c.prompt, t.pair.c.kind == "normal")
    .group_by(t.prompt.c.category)
    .having(sa.func.sum(sa.case((_open_places, 1), else_=0)) > 0)
    .order_by(sa.func.sum(t.pair.c.taken) * 1.0 / sa.func.count(), t.prompt.c.category)
)
_of_category = sa.and_(_free, t.prompt.c.id == t.pair.c.prompt, t.prompt.c.category == sa.bindparam("category"))
_ANY = sa.select(t.pair.c.id).where(_of_category)
_ranked = sa.select(
    t.pair.c.id, sa.func.rank().over(order_by=(t.pair.c.priority.desc(), t.pair.c.taken.desc())).label("place")
).where(_of_category).subquery()  # fmt: skip
_BEST = sa.select(_ranked.c.id).where(_ranked.c.place == 1)

_first, _second = t.response.alias(), t.response.alias()
_done = sa.select(sa.func.count()).where(_mine, t.assignment.c.state == "done")
_left = sa.select(sa.func.count()).select_from(t.pair).where(_free)
_SHOWN = (
    sa.select(t.assignment, t.prompt.c.messages, t.prompt.c.category, t.prompt.c.warning)
    .add_columns(_first.c.text.label("first_text"), _second.c.text.label("second_text"))
    .add_columns(
        _done.correlate(None).scalar_subquery().label("done"), _left.correlate(None).scalar_subquery().label("left")
    )
    .where(t.assignment.c.id == _which, t.pair.c.id == t.assignment.c.pair, t.prompt.c.id == t.pair.c.prompt)
    .where(_first.c.id == t.pair.c.first, _second.c.id == t.pair.c.second)
)
_TAKE = t.pair.update().where(t.pair.c.id == _which).values(taken=t.pair.c.taken + 1)
_DONE = t.assignment.update().where(t.assignment.c.id == _which).values(state="done")
_ASSIGNMENT, _VOTE = t.assignment.insert(), t.vote.insert()
