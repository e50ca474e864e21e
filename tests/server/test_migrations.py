"""The schema, version by version: from nothing, from the version before, from before versions; by several at once."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from server.helpers import postgres
from sqlalchemy.engine import Engine

from sdfserver.errors import ConfigError
from sdfserver.schemas import JobKind
from sdfserver.server import migrations
from sdfserver.server.migrations import FIRST, HEAD, migrate, version_of
from sdfserver.server.settings import Settings
from sdfserver.server.store import NewJob, Store, metadata, new_id


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield Settings(data_dir=tmp_path).database
    else:
        with postgres() as found:
            yield Settings(database_url=found).database


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """The store's engine for it."""
    store = Store(url)
    yield store.engine
    store.close()


def at_version(engine: Engine, version: str, *, written_down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring an empty database to an earlier version, as a server of that version did, with a job and a worker."""
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "HEAD", version)
        migrate(engine)
    now = {"progress": 0.5, "losses": "{}", "attempt": 1, "deaths": 0, "seconds": "{}", "event": 1, "created_at": 1.0}
    row = now | {
        "id": "j1", "owner": "", "kind": "reconstruction", "name": "a.ply", "format": "ply", "options": "{}",
        "preset": "draft", "resolution": 256, "priority": 5, "state": "running", "worker": "w1",
    }  # fmt: skip
    names = ", ".join(row)
    with engine.begin() as connection:
        places = ", ".join(f":{name}" for name in row)
        connection.execute(sa.text(f"INSERT INTO jobs ({names}) VALUES ({places})"), row)  # noqa: S608 - our own names
        connection.execute(
            sa.text(
                "INSERT INTO workers (id, host, pid, started, device, beat_at, retired)"
                " VALUES ('w1', 'h', 7, 9, 'cpu', 1.0, false)"
            )
        )
        if not written_down:
            connection.execute(sa.text("DROP TABLE alembic_version"))


def differences(engine: Engine) -> list[object]:
    """Between the database and what the store takes its tables to be."""
    with engine.connect() as connection:
        ours = set(metadata.tables)
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, _: kind != "table" or name in ours}
        )
        return list(compare_metadata(context, metadata))


def test_the_last_version_is_the_last_file_and_the_stores_tables(engine: Engine) -> None:
    assert migrate(engine) == (None, HEAD)
    assert migrate(engine) == (HEAD, HEAD)
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_heads() == [HEAD]
    assert scripts.get_base() == FIRST
    assert differences(engine) == []


@pytest.mark.parametrize(
    ("version", "written_down"),
    [(FIRST, True), (FIRST, False), ("0002", True)],
    ids=["the first", "from before versions", "the one before"],
)
def test_what_was_there_at_an_earlier_version_is_there_at_the_last(
    engine: Engine, version: str, written_down: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_version(engine, version, written_down=written_down, monkeypatch=monkeypatch)
    assert migrate(engine) == (version, HEAD)
    assert differences(engine) == []
    store = Store(engine.url.render_as_string(hide_password=False))
    row = store.job("j1")
    assert row is not None
    assert (row.name, row.progress, row.request_id, row.traceparent) == ("a.ply", 0.5, None, None)
    (worker,) = store.workers()
    assert (worker.id, worker.figures) == ("w1", None)
    # And it works: a new job comes after the old one.
    new = NewJob(
        id=new_id(), owner="", kind=JobKind.RECONSTRUCTION, name="b.ply", format="ply", options={}, preset="draft",
        resolution=256, priority=5,
    )  # fmt: skip
    made, _ = store.create_job(new, lambda *_: None, max_queue=9, max_jobs=9)
    assert made.seq > row.seq
    assert store.totals() == {("jobs_submitted", "kind=reconstruction,preset=draft"): 1.0}
    store.close()


@pytest.mark.parametrize("from_first", [True, False])
def test_several_may_do_it_at_once(url: str, engine: Engine, from_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if from_first:
        at_version(engine, FIRST, written_down=False, monkeypatch=monkeypatch)
    stores, errors = [Store(url) for _ in range(6)], []
    together = threading.Barrier(len(stores))

    def start(store: Store) -> None:
        together.wait()
        try:
            store.create_tables()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told below
            errors.append(error)

    threads = [threading.Thread(target=start, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.close()
    assert errors == []
    with engine.connect() as connection:
        assert version_of(connection) == HEAD
    assert differences(engine) == []


def test_a_database_of_a_later_version_is_refused_and_left_as_it_is(engine: Engine) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=f"at version 9999, of a later sdfserver; this one knows {HEAD}"):
        migrate(engine)
    with engine.connect() as connection:
        assert version_of(connection) == "9999"


def test_a_version_that_fails_leaves_the_one_before(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    at_version(engine, FIRST, written_down=True, monkeypatch=monkeypatch)
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE workers ADD COLUMN figures TEXT"))  # in the way of the second one
    with pytest.raises(sa.exc.DBAPIError):
        migrate(engine)
    with engine.connect() as connection:
        assert version_of(connection) == FIRST
        assert "totals" not in sa.inspect(connection).get_table_names()
