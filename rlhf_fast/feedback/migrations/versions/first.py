"""The first form of the tables."""

import sqlalchemy as sa
from alembic import op

revision = "first"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "person",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("pseudonym", sa.String(40), nullable=False, unique=True),
        sa.Column("token_hash", sa.String(64), unique=True),
        sa.Column("invited", sa.Float, nullable=False),
        sa.Column("joined", sa.Float),
    )
    op.create_table(
        "prompt",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(64), nullable=False, unique=True),
        sa.Column("messages", sa.JSON, nullable=False),
        sa.Column("category", sa.String(200), nullable=False),
        sa.Column("warning", sa.String(200), nullable=False),
    )
    op.create_table(
        "response",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("prompt", sa.Integer, sa.ForeignKey("prompt.id"), nullable=False, index=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("checkpoint", sa.String(1000), nullable=False),
        sa.Column("seed", sa.Integer),
    )
    op.create_table(
        "pair",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("prompt", sa.Integer, sa.ForeignKey("prompt.id"), nullable=False, index=True),
        sa.Column("first", sa.Integer, sa.ForeignKey("response.id"), nullable=False),
        sa.Column("second", sa.Integer, sa.ForeignKey("response.id"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("gold", sa.Integer),
        sa.Column("priority", sa.Float, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("taken", sa.Integer, nullable=False),
        sa.UniqueConstraint("first", "second"),
    )
    op.create_index("pair_queue", "pair", ["kind", "state", "taken"])
    op.create_table(
        "assignment",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("pair", sa.Integer, sa.ForeignKey("pair.id"), nullable=False),
        sa.Column("person", sa.Integer, sa.ForeignKey("person.id"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("swapped", sa.Boolean, nullable=False),
        sa.Column("arm", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("opened", sa.Float, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.Column("draft", sa.JSON, nullable=False),
        sa.UniqueConstraint("person", "pair", "kind"),
    )
    op.create_index("assignment_leases", "assignment", ["state", "until"])
    op.create_table(
        "vote",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("assignment", sa.Integer, sa.ForeignKey("assignment.id"), nullable=False),
        sa.Column("pair", sa.Integer, sa.ForeignKey("pair.id"), nullable=False, index=True),
        sa.Column("person", sa.Integer, sa.ForeignKey("person.id"), nullable=False, index=True),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("preference", sa.Integer, nullable=False),
        sa.Column("swapped", sa.Boolean, nullable=False),
        sa.Column("first_ok", sa.Boolean, nullable=False),
        sa.Column("second_ok", sa.Boolean, nullable=False),
        sa.Column("criteria", sa.JSON, nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        sa.Column("better_answer", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("flags", sa.JSON, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("undone", sa.Float),
    )
    op.create_table(
        "report",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("pair", sa.Integer, sa.ForeignKey("pair.id"), nullable=False, index=True),
        sa.Column("person", sa.Integer, sa.ForeignKey("person.id"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_table(
        "setting",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
    )
