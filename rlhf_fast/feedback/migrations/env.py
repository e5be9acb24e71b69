"""Runs the steps on the connection that the store hands in, within its transaction."""

from alembic import context

from rlhf_fast.feedback.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
