"""The database and the artifacts, opened and made ready together; what of them has had its time, removed."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from sdfserver.errors import ConfigError
from sdfserver.server.artifacts import ArtifactError, Artifacts, open_artifacts
from sdfserver.server.queue import JobQueue
from sdfserver.server.settings import Settings
from sdfserver.server.store import Store


def open_storage(settings: Settings) -> Store:
    """The store, when everything that the service keeps can be had. Raises ConfigError where it cannot."""
    with _usable(settings):
        artifacts, store = open_artifacts(settings), Store(settings.database)
    prepare_storage(settings, store, artifacts)
    artifacts.close()
    return store


def open_store(settings: Settings) -> Store:
    """The store alone, with its tables made. Raises ConfigError where it cannot be had."""
    store, _versions = migrate_store(settings)
    return store


def migrate_store(settings: Settings) -> tuple[Store, tuple[str | None, str]]:
    """The same, and the versions of its schema before and after."""
    with _usable(settings):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        store = Store(settings.database)
        return store, _make_tables(settings, store, open_artifacts(settings))


def prepare_storage(settings: Settings, store: Store, artifacts: Artifacts) -> None:
    """Make folders and tables where they are missing. Raises ConfigError where they cannot be had, or were lost."""
    with _usable(settings):
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        artifacts.create()
        _make_tables(settings, store, artifacts)


def sweep(settings: Settings, store: Store, queue: JobQueue, artifacts: Artifacts) -> None:
    """Remove jobs whose time has come, and files that no job wants any more."""
    over, forgotten = store.expire(settings.gone_seconds)
    queue.forget(forgotten)
    for job_id in over:
        artifacts.remove(job_id)
    artifacts.sweep(store.kept)


def _make_tables(settings: Settings, store: Store, artifacts: Artifacts) -> tuple[str | None, str]:
    def refuse_orphans() -> None:
        # A database made anew would know of none of these files, and they would be swept.
        if artifacts.holds_jobs():
            raise ConfigError(
                "there are clouds and meshes of jobs, and the database knows of none: restore it from a backup, or "
                f"move the files away ({settings.artifacts_url or artifacts.jobs}) to begin anew"
            )

    versions = store.create_tables(refuse_orphans)
    JobQueue.create_tables(settings.database)
    return versions


@contextmanager
def _usable(settings: Settings) -> Iterator[None]:
    """Turn what goes wrong in here into ConfigError."""
    try:
        yield
    except ArtifactError as error:
        raise ConfigError(f"artifacts_url {settings.artifacts_url!r} cannot be used: {error}") from None
    except OSError as error:
        raise ConfigError(f"data_dir {str(settings.data_dir)!r} cannot be used: {error.strerror}") from None
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        damaged = type(error) is DatabaseError and settings.database_url is None
        remedy = f"; restore {str(settings.database_file)!r} from a backup" if damaged else ""
        raise ConfigError(f"the database cannot be used: {reason}{remedy}") from None
