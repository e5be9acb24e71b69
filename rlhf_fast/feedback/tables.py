"""The tables of a store of human comparisons. `migrations/` makes them; a test holds that both say the same.

Preferences and criteria are kept in the pair's own order (negative: the first response is better) beside `swapped`,
whether the first one was shown on the right. Times are seconds since 1970.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()

person = Table(
    "person",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("role", String(20), nullable=False),  # owner, senior, annotator
    Column("pseudonym", String(40), nullable=False, unique=True),  # all that leaves the store in exports
    Column("token_hash", String(64), unique=True),  # of the invitation; null when it no longer holds
    Column("invited", Float, nullable=False),
    Column("joined", Float),
)
prompt = Table(
    "prompt",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),  # hash of the messages, by which splits go
    Column("messages", JSON, nullable=False),
    Column("category", String(200), nullable=False),
    Column("warning", String(200), nullable=False),
)
response = Table(
    "response",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt", ForeignKey("prompt.id"), nullable=False, index=True),
    Column("text", Text, nullable=False),
    Column("checkpoint", String(1000), nullable=False),
    Column("seed", Integer),
)
pair = Table(
    "pair",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt", ForeignKey("prompt.id"), nullable=False, index=True),
    Column("first", ForeignKey("response.id"), nullable=False),
    Column("second", ForeignKey("response.id"), nullable=False),
    Column("kind", String(20), nullable=False),  # normal, gold, attention
    Column("gold", Integer),  # the known answer: -1, 0, 1
    Column("priority", Float, nullable=False),
    Column("state", String(20), nullable=False),  # open, reported, discarded
    Column("taken", Integer, nullable=False),  # open leases and counting votes of kind normal
    UniqueConstraint("first", "second"),
    Index("pair_queue", "kind", "state", "taken"),
)
assignment = Table(
    "assignment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("pair", ForeignKey("pair.id"), nullable=False),
    Column("person", ForeignKey("person.id"), nullable=False),
    Column("kind", String(20), nullable=False),  # normal, gold, attention, repeat, adjudication
    Column("swapped", Boolean, nullable=False),
    Column("arm", String(20), nullable=False),  # active, random, none or imported: what chose the pair
    Column("state", String(20), nullable=False),  # open, done, skipped, broken, expired
    Column("opened", Float, nullable=False),
    Column("until", Float, nullable=False),
    Column("draft", JSON, nullable=False),
    UniqueConstraint("person", "pair", "kind"),
    Index("assignment_leases", "state", "until"),
)
vote = Table(
    "vote",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment", ForeignKey("assignment.id"), nullable=False),
    Column("pair", ForeignKey("pair.id"), nullable=False, index=True),
    Column("person", ForeignKey("person.id"), nullable=False, index=True),
    Column("kind", String(20), nullable=False),
    Column("preference", Integer, nullable=False),  # -3 first much better .. 3 second much better
    Column("swapped", Boolean, nullable=False),
    Column("first_ok", Boolean, nullable=False),
    Column("second_ok", Boolean, nullable=False),
    Column("criteria", JSON, nullable=False),
    Column("comment", Text, nullable=False),
    Column("better_answer", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("flags", JSON, nullable=False),
    Column("at", Float, nullable=False),
    Column("undone", Float),  # votes are marked, never deleted by an undo
    Index(
        "vote_that_counts",
        "assignment",
        unique=True,
        sqlite_where=text("undone IS NULL"),
        postgresql_where=text("undone IS NULL"),
    ),
)
report = Table(
    "report",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("pair", ForeignKey("pair.id"), nullable=False, index=True),
    Column("person", ForeignKey("person.id"), nullable=False),
    Column("kind", String(20), nullable=False),  # skip, broken, report
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)
setting = Table(
    "setting",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("value", JSON, nullable=False),
)
