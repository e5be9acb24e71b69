"""At most one vote of an assignment counts, held by the database itself."""

import sqlalchemy as sa
from alembic import op

revision = "one_vote_counts"
down_revision = "first"


def upgrade() -> None:
    counts = sa.text("undone IS NULL")
    op.create_index(
        "vote_that_counts", "vote", ["assignment"], unique=True, sqlite_where=counts, postgresql_where=counts
    )
