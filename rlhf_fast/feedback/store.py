"""A store of human comparisons: people, prompts, responses, pairs and votes, on SQLite or PostgreSQL.

Every write is one transaction, and one write runs at a time: SQLite's BEGIN IMMEDIATE, an advisory lock on PostgreSQL.
So two people never get the last place of a pair, and what was acknowledged survives a kill. It survives a power cut as
well: a write waits for the disk, but only after it has let the next one begin, so that one wait serves many.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.errors import FeedbackError

ROLES = ("owner", "senior", "annotator")
MOST_TEXT = 100_000  # characters of a prompt or a response
MOST_ANSWER = 20_000  # of a better answer, and of a draft as JSON
MOST_COMMENT = 4_000  # of a comment or a reason
MOST_NAME = 200
_MARK = 16  # characters of the hash of an invitation
_LOCK = 7_218_540_361  # the advisory lock of writes on PostgreSQL; any number that others do not use
_ALONE = sa.select(sa.func.pg_advisory_xact_lock(_LOCK), sa.func.set_config("synchronous_commit", "off", True))
_FLUSH = sa.select(sa.func.pg_logical_emit_message(True, "rlhf-fast", ""))  # a commit, which waits for earlier ones too
_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True)
class Person:
    id: int
    name: str
    role: str


@dataclass(frozen=True)
class Plan:
    """How pairs are given out; kept in the store, so that every process reads the same."""

    judgements: int = 3  # a pair
    lease: float = 1800.0  # seconds until an unanswered task goes to another
    gold_share: float = 0.05  # of tasks, as long as the person has gold items left
    repeat_share: float = 0.05  # of tasks that are shown again with sides swapped
    repeat_after: int = 10  # tasks in between
    random_share: float = 0.2  # of tasks whose pair is drawn without regard to priority
    least_seconds: float = 3.0  # a vote given faster is flagged
    reports: int = 1  # that many people's reports take a pair out
    dispute_below: float = 0.67  # a pair of which a smaller share of pairs of votes agrees is disputed
    disputed: str = "senior"  # who decides such a pair; "discard": it is left out of an export
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("judgements", "repeat_after", "reports", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "seed"):
                raise FeedbackError(
                    f"{name}: {value!r} came; expected a whole number of at least {int(name != 'seed')}"
                )
        if self.disputed not in ("senior", "discard"):
            raise FeedbackError(f"disputed: {self.disputed!r} came; expected senior or discard")
        for name in ("gold_share", "repeat_share", "random_share", "dispute_below"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise FeedbackError(f"{name}: {value!r} came; expected a share from 0 to 1")
        if self.gold_share + self.repeat_share >= 1:
            raise FeedbackError("gold_share and repeat_share: together they leave no share for new pairs")
        if not self.random_share:
            raise FeedbackError("random_share: 0 came; keep some (0.2 is usual), or what priority gains cannot be told")
        for name, least in (("lease", 1), ("least_seconds", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                raise FeedbackError(f"{name}: {value!r} came; expected seconds, at least {least}")


class Store:
    """One database of comparisons, made or brought to the present form when it is opened.

    Args:
        url: `sqlite:///folder/votes.db`, a path to a SQLite file, or `postgresql://user@host/name`.
        new: whether a database without a store gets one.
    """

    def __init__(self, url: str | Path, new: bool = True) -> None:
        text = str(url)
        if "://" not in text:
            text = f"sqlite:///{Path(text).absolute()}"
        try:
            parsed = sa.make_url(text)
        except Exception:  # whose words may hold the password
            raise FeedbackError(
                "store: this URL cannot be read; expected such as postgresql://USER@HOST/NAME, with %40 for @ and %2F "
                "for / within a name or password"
            ) from None
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise FeedbackError(f"store: {backend} came; expected sqlite:///FILE or postgresql://...")
        if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise FeedbackError("store: a SQLite database in memory came; expected a file, which survives a kill")
        self.sqlite = backend == "sqlite"
        if self.sqlite:
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        more: dict[str, Any] = {}
        if not self.sqlite:  # of its levels only this one shows to who waited for the lock what was written meanwhile
            more = {"isolation_level": "READ COMMITTED", "connect_args": {"client_encoding": "utf8"}}
            more["pool_pre_ping"] = True
        self.engine = sa.create_engine(parsed, pool_size=10, max_overflow=0, **more)
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _prepare)
            sa.event.listen(self.engine, "begin", _begin)
        self._alone, self._flushing = threading.Lock(), threading.Lock()
        self._committed = self._flushed = 0  # writes of this process
        try:
            self._upgrade(new)
        except sa.exc.OperationalError as error:
            raise FeedbackError(f"store: {parsed.host or parsed.database} cannot be opened: {error.orig}") from None

    @contextlib.contextmanager
    def write(self, flush: bool = True) -> Iterator[sa.Connection]:
        """A transaction that writes, alone; all of it is kept or none.

        When this ends it has outlived the process, and with `flush` the machine too.
        """
        with self._alone:  # in turn: of those who wait for SQLite's own lock each would look again by chance
            with self.engine.connect().execution_options(write=True) as connection, connection.begin():
                if not self.sqlite:
                    connection.execute(_ALONE)
                yield connection
            self._committed += 1
            mine = self._committed
        if flush:
            self._flush(mine)

    def _flush(self, mine: int) -> None:
        """Wait until a commit is on disk. It comes after the lock is given back, so that many share one such wait."""
        if not self.sqlite:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(_FLUSH)
            return
        with self._flushing:
            if self._flushed < mine:
                upto = self._committed
                with open(f"{self.engine.url.database}-wal", "r+b") as log:
                    os.fsync(log.fileno())
                self._flushed = upto

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that reads one state of the store."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    def _upgrade(self, new: bool) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        known = ScriptDirectory.from_config(config)
        with self.write() as connection:
            if (
                not self.sqlite
                and (found := connection.execute(sa.text("SHOW server_encoding")).scalar_one()) != "UTF8"
            ):
                raise FeedbackError(f"store: the database is encoded in {found}; make one with ENCODING 'UTF8'")
            now = MigrationContext.configure(connection).get_current_revision()
            if now is None and not new:
                raise FeedbackError("store: this database holds no votes")
            if now not in {None, *(step.revision for step in known.walk_revisions())}:
                raise FeedbackError(f"store: its form {now!r} is of a later rlhf-fast; install that version to open it")
            if now != known.get_current_head():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")

    # Settings --------------------------------------------------------------------------------------------------------

    def setting(self, name: str, default: Any = None) -> Any:
        with self.read() as connection:
            return setting_of(connection, name, default)

    def settings(self) -> dict[str, Any]:
        """All settings by name."""
        with self.read() as connection:
            return {row.name: row.value for row in connection.execute(_settings)}

    def set_setting(self, name: str, value: Any) -> None:
        with self.write() as connection:
            connection.execute(t.setting.delete().where(t.setting.c.name == name))
            connection.execute(t.setting.insert().values(name=name, value=value))

    @property
    def plan(self) -> Plan:
        with self.read() as connection:
            return plan_of(connection)

    def set_plan(self, plan: Plan) -> None:
        self.set_setting("plan", asdict(plan))

    # People ----------------------------------------------------------------------------------------------------------

    def invite(self, name: str, role: str = "annotator") -> str:
        """Add a person; returns the token of the invitation link, of which only the hash is kept."""
        if role not in ROLES:
            raise FeedbackError(f"role: {role!r} came; expected one of {', '.join(ROLES)}")
        checked_text(name, "name", MOST_NAME)
        if not name.strip():
            raise FeedbackError("name: it is empty; expected what the others call this person")
        token = secrets.token_urlsafe(32)
        with self.write() as connection:
            connection.execute(
                t.person.insert().values(
                    name=name.strip(), role=role, pseudonym=_pseudonym(), token_hash=_hash(token), invited=time.time()
                )
            )
        return token

    def renew(self, person: int) -> str:
        """A new invitation token; the old one no longer opens anything."""
        token = secrets.token_urlsafe(32)
        with self.write() as connection:
            if self._one(connection, person).token_hash is None:
                raise FeedbackError(f"person: {person} has been removed; invite them anew")
            connection.execute(t.person.update().where(t.person.c.id == person).values(token_hash=_hash(token)))
        return token

    def join(self, token: str) -> Person:
        """The person of an invitation, noted as having come.

        Raises:
            FeedbackError: no invitation has this token.
        """
        person = self.person_of(token)
        if person is None:
            raise FeedbackError("This invitation link is not valid (any more). Ask who sent it for a new one.")
        with self.write() as connection:
            first = (t.person.c.id == person.id) & t.person.c.joined.is_(None)
            connection.execute(t.person.update().where(first).values(joined=time.time()))
        return person

    def person_of(self, token: str) -> Person | None:
        with self.read() as connection:
            row = connection.execute(_people.where(t.person.c.token_hash == _hash(token))).first()
        return Person(*row) if row else None

    def person(self, number: int, mark: str) -> Person | None:
        """The person of that number whose invitation is still the one of that mark, as a login cookie names them."""
        with self.read() as connection:
            row = connection.execute(_person, {"which": number, "mark": mark}).first()
        return Person(*row) if row else None

    def people(self) -> list[Person]:
        with self.read() as connection:
            return [Person(*row) for row in connection.execute(_people.order_by(t.person.c.id))]

    def export_person(self, person: int) -> dict[str, Any]:
        """All that is stored of one person, without the hash of the token."""
        with self.read() as connection:
            row = dict(self._one(connection, person)._mapping)
            row.pop("token_hash")
            found: dict[str, Any] = {"person": row}
            for table in (t.assignment, t.vote, t.report):
                rows = connection.execute(sa.select(table).where(table.c.person == person).order_by(table.c.id))
                found[f"{table.name}s"] = [dict(one._mapping) for one in rows]
        return found

    def remove_person(self, person: int, votes: str = "keep") -> None:
        """Take a person out of the store: name, invitation, comments, written answers and drafts are erased.

        Args:
            person: the number of the person.
            votes: `keep` leaves the bare votes under a new pseudonym, `remove` deletes them; their pairs are then
                given out again.
        """
        if votes not in ("keep", "remove"):
            raise FeedbackError(f"votes: {votes!r} came; expected keep or remove")
        with self.write() as connection:
            row = self._one(connection, person)
            if row.role == "owner":
                owners = sa.select(sa.func.count()).where(
                    t.person.c.role == "owner", t.person.c.token_hash.is_not(None)
                )
                if connection.execute(owners).scalar_one() < 2:
                    raise FeedbackError("The last owner cannot be removed; invite another owner first.")
            mine = t.assignment.c.person == person
            gone = mine & (t.assignment.c.state == "open")
            if votes == "remove":
                gone = mine & t.assignment.c.state.in_(("open", "done"))
            release(connection, leases(gone))
            blank = {"name": "removed", "token_hash": None, "joined": None, "pseudonym": _pseudonym()}
            connection.execute(t.person.update().where(t.person.c.id == person).values(blank))
            connection.execute(t.report.update().where(t.report.c.person == person).values(reason=""))
            if votes == "remove":
                connection.execute(t.vote.delete().where(t.vote.c.person == person))
                connection.execute(t.assignment.delete().where(mine))
            else:
                blank_votes = t.vote.update().where(t.vote.c.person == person)
                connection.execute(blank_votes.values(comment="", better_answer=""))
                connection.execute(t.assignment.update().where(mine).values(draft={}))

    def _one(self, connection: sa.Connection, person: int) -> sa.Row[Any]:
        row = connection.execute(sa.select(t.person).where(t.person.c.id == person)).first()
        if row is None:
            raise FeedbackError(f"person: there is none of number {person}")
        return row

    # Items -----------------------------------------------------------------------------------------------------------

    def add_prompt(
        self,
        prompt: str | list[dict[str, Any]],
        responses: Sequence[str | dict[str, Any]],
        category: str = "",
        warning: str = "",
        priority: float = 0.0,
        kind: str = "normal",
        gold: int | None = None,
        flush: bool = True,
    ) -> list[int]:
        """Add a prompt with two or more responses, each pair of which is to be judged; what is there already stays.

        Args:
            prompt: a text or messages.
            responses: texts, or `{"text", "checkpoint", "seed"}`; equal texts count once.
            category: what coverage is balanced over.
            warning: shown before the texts; for what may disturb.
            priority: higher ones are asked first in the active arm.
            kind: `normal`; `gold` or `attention` for two responses whose answer is known.
            gold: that answer: -1 (the first is better), 0 (tie) or 1.
            flush: wait for the disk; False where more is written at once, the last of which waits for all.

        Returns:
            The numbers of its pairs.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        whole = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        checked_text(whole, "prompt", MOST_TEXT)
        checked_text(category, "category", MOST_NAME)
        checked_text(warning, "warning", MOST_NAME)
        if isinstance(priority, bool) or not isinstance(priority, int | float) or not math.isfinite(priority):
            raise FeedbackError(f"priority: {priority!r} came; expected a number")
        if (kind == "normal") != (gold is None) or kind not in ("normal", "gold", "attention"):
            raise FeedbackError(
                "kind and gold: a gold or attention item needs its answer (-1, 0, 1), a normal one has none"
            )
        if gold not in (None, -1, 0, 1):
            raise FeedbackError(f"gold: {gold!r} came; expected -1 (the first is better), 0 or 1")
        given = [one if isinstance(one, dict) else {"text": one} for one in responses]
        for one in given:
            checked_text(one.get("text"), "response", MOST_TEXT)
            checked_text(one.get("checkpoint", ""), "checkpoint", 1000)
        texts = {one["text"]: one for one in given}
        if len(texts) < 2 or (gold is not None and len(texts) != 2):
            raise FeedbackError(
                f"responses: {len(texts)} different came; expected 2{'' if gold is not None else ' or more'}"
            )
        with self.write(flush) as connection:
            key = hashlib.sha256(whole.encode()).hexdigest()
            row = connection.execute(sa.select(t.prompt.c.id).where(t.prompt.c.key == key)).first()
            number = (
                row.id
                if row
                else _insert(connection, t.prompt, key=key, messages=messages, category=category, warning=warning)
            )
            numbers = []
            for text, one in texts.items():
                same = (t.response.c.prompt == number) & (t.response.c.text == text)
                row = connection.execute(sa.select(t.response.c.id).where(same)).first()
                made = {"checkpoint": str(one.get("checkpoint", "")), "seed": one.get("seed")}
                numbers.append(row.id if row else _insert(connection, t.response, prompt=number, text=text, **made))
            pairs = []
            for place, first in enumerate(numbers):
                for second in numbers[place + 1 :]:
                    both = t.pair.c.first.in_((first, second)) & t.pair.c.second.in_((first, second))
                    row = connection.execute(sa.select(t.pair.c.id).where(both)).first()
                    new = {"kind": kind, "gold": gold, "priority": float(priority), "state": "open", "taken": 0}
                    pairs.append(
                        row.id if row else _insert(connection, t.pair, prompt=number, first=first, second=second, **new)
                    )
        return pairs

    def set_priorities(self, priorities: dict[int, float]) -> None:
        """Which pairs the active arm asks first, such as by a reward model's uncertainty."""
        if any(not math.isfinite(value) for value in priorities.values()):
            raise FeedbackError("priority: a number that is not finite came")
        with self.write() as connection:
            for number, value in priorities.items():
                connection.execute(t.pair.update().where(t.pair.c.id == number).values(priority=float(value)))

    def reopen(self, pair: int) -> None:
        """Give a reported or discarded pair out again."""
        with self.write() as connection:
            connection.execute(t.pair.update().where(t.pair.c.id == pair).values(state="open"))

    def discard(self, pairs: Iterable[int]) -> None:
        """Take pairs out of the queue and of exports; their votes stay."""
        with self.write() as connection:
            connection.execute(t.pair.update().where(t.pair.c.id.in_(list(pairs))).values(state="discarded"))

    # Backup ----------------------------------------------------------------------------------------------------------

    def backup(self, target: str | Path) -> None:
        """Copy a SQLite store whole while it is in use."""
        if not self.sqlite:
            raise FeedbackError("backup: this store is on PostgreSQL; run pg_dump --format=custom with its URL")
        target = Path(target)
        if target.exists():
            raise FeedbackError(f"backup: {target} exists; name a new file")
        aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        try:
            with contextlib.closing(sqlite3.connect(str(self.engine.url.database))) as source:
                with contextlib.closing(sqlite3.connect(aside)) as copy:
                    source.backup(copy)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)


_people = sa.select(t.person.c.id, t.person.c.name, t.person.c.role)
_person = _people.where(
    t.person.c.id == sa.bindparam("which"), sa.func.substr(t.person.c.token_hash, 1, _MARK) == sa.bindparam("mark")
)
_settings = sa.select(t.setting)
_setting = sa.select(t.setting.c.value).where(t.setting.c.name == sa.bindparam("which"))


def mark_of(token: str) -> str:
    """What tells this invitation of a person from later ones, and opens nothing."""
    return _hash(token)[:_MARK]


def setting_of(connection: sa.Connection, name: str, default: Any = None) -> Any:
    row = connection.execute(_setting, {"which": name}).first()
    return default if row is None else row.value


def plan_of(connection: sa.Connection) -> Plan:
    known = {field.name for field in fields(Plan)}
    return Plan(**{k: v for k, v in (setting_of(connection, "plan") or {}).items() if k in known})


def leases(which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """The statement that finds what `release` gives back."""
    return sa.select(t.assignment.c.id, t.assignment.c.pair, t.assignment.c.kind).where(which)


def release(connection: sa.Connection, found: sa.Select[Any], values: Mapping[str, Any] | None = None) -> None:
    """Give back the places of assignments that are open or done, and mark them as expired."""
    rows = connection.execute(found, values).all()
    for row in rows:
        connection.execute(t.assignment.update().where(t.assignment.c.id == row.id).values(state="expired"))
        if row.kind == "normal":
            connection.execute(t.pair.update().where(t.pair.c.id == row.pair).values(taken=t.pair.c.taken - 1))


def checked_text(value: Any, name: str, most: int) -> str:
    """A text that every database can hold, of at most `most` characters."""
    if not isinstance(value, str):
        raise FeedbackError(f"{name}: {type(value).__name__} came; expected text")
    if len(value) > most:
        raise FeedbackError(f"{name}: {len(value)} characters came; expected at most {most}")
    if "\0" in value:
        raise FeedbackError(f"{name}: it holds a null character, which databases refuse; leave it out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FeedbackError(f"{name}: it holds half a character (a lone surrogate); leave it out") from None
    return value


def _insert(connection: sa.Connection, table: sa.Table, **values: Any) -> int:
    key = connection.execute(table.insert().values(**values)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _pseudonym() -> str:
    return f"annotator-{secrets.token_hex(6)}"


def _prepare(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # the driver opens no transaction by itself
    # NORMAL leaves it to `Store._flush` when the log must be on disk; a kill of the process takes nothing from it.
    for line in ("journal_mode=WAL", "busy_timeout=30000", "foreign_keys=ON", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {line}")


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
