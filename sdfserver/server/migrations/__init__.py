"""The schema of the database, version by version, for Alembic; `migrate` brings a database to the last one.

A version is a file in `versions`, never changed once it was released. What the tables are now is in `store`; a test
holds the two against each other.
"""

from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from sdfserver.errors import ConfigError

FIRST, HEAD = "0001", "0003"
"""The version of databases from before there were versions, and the last one."""
LOCK = 7345293
"""Of PostgreSQL's advisory locks the one for changing the schema."""
IDLE_SECONDS = 120
"""How long a change of the schema may rest before PostgreSQL ends it."""


def version_of(connection: Connection) -> str | None:
    """The version that the database is at; None where there is nothing yet. Databases of old have none written down."""
    tables = set(sa.inspect(connection).get_table_names())
    if "alembic_version" in tables:
        found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        if found is not None:
            return str(found)
    return FIRST if "jobs" in tables else None


def migrate(engine: Engine, when_new: Callable[[], None] = lambda: None) -> tuple[str | None, str]:
    """Bring the database to the last version; several processes may do so at once. The versions before and after.

    `when_new` is called before anything is made where there is nothing yet, and may raise: then nothing is. Raises
    ConfigError where the database is of a later version than this one knows.
    """
    with engine.connect() as connection:
        before = version_of(connection)
    if before == HEAD:  # nearly always: then nobody waits for anybody, and Alembic need not be loaded
        return before, HEAD
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # Longer than other transactions may: where the cores are short, loading Alembic takes its time.
            connection.execute(sa.text(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"))
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        return _migrate(connection, when_new), HEAD


def _migrate(connection: Connection, when_new: Callable[[], None]) -> str | None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", "sdfserver:server/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    before = version_of(connection)
    if before is None:
        when_new()
    try:
        if before is not None:
            ScriptDirectory.from_config(config).get_revision(before)
            command.stamp(config, before)
        command.upgrade(config, HEAD)
    except CommandError:
        raise ConfigError(
            f"the database is at version {before}, of a later sdfserver; this one knows {HEAD}: install that one, "
            "or give another database"
        ) from None
    return before
