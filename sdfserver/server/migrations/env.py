"""What Alembic runs: always within a transaction that somebody else has begun, and ends."""

from alembic import context

from sdfserver.server.store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
