"""The service's files in a store of objects: a real S3, which checks who asks, and a folder by the same code."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from s3 import S3

from sdfserver.errors import ConfigError
from sdfserver.server import objects
from sdfserver.server.artifacts import FIT_FILES, POINTS, PREVIEW, ArtifactError, Kept, open_artifacts
from sdfserver.server.objects import ObjectArtifacts
from sdfserver.server.settings import load_settings

MESH_BYTES = bytes(range(256)) * 100_000  # more than one part, and more than one upload part


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/a store"
    s3: S3 = request.getfixturevalue("s3")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket()}/some/prefix"


def opened(url: str, root: Path) -> ObjectArtifacts:
    artifacts = ObjectArtifacts(url, root)
    artifacts.create()
    return artifacts


@pytest.fixture
def here(url: str, tmp_path: Path) -> Iterator[ObjectArtifacts]:
    artifacts = opened(url, tmp_path / "here")
    yield artifacts
    artifacts.close()


@pytest.fixture
def there(url: str, tmp_path: Path) -> Iterator[ObjectArtifacts]:
    """The same store, on another host."""
    artifacts = opened(url, tmp_path / "there")
    yield artifacts
    artifacts.close()


def uploaded(artifacts: ObjectArtifacts, job_id: str, data: bytes = b"a cloud") -> None:
    with artifacts.receiving(job_id, "ply") as stream:
        stream.write(data)
        stream.finish()


def fitted(artifacts: ObjectArtifacts, job_id: str, attempt: int) -> None:
    folder = artifacts.fit(job_id, attempt)
    folder.mkdir(parents=True)
    for name in FIT_FILES:
        folder.joinpath(name).write_text(name)
    artifacts.keep(folder, "Ente \u00e4")


def read(artifacts: ObjectArtifacts, path: Path) -> bytes | None:
    found = artifacts.find(path)
    return None if found is None else b"".join(found.read(0, found.size))


def test_what_one_host_takes_another_works_on(here: ObjectArtifacts, there: ObjectArtifacts) -> None:
    data = os.urandom(20_000_000)
    with here.receiving("job", "ply") as stream:
        for start in range(0, len(data), 2**20):
            stream.write(data[start : start + 2**20])
        assert there.find(there.upload("job", "ply")) is None
        stream.finish()
    there.fetch(there.upload("job", "ply"))
    assert there.upload("job", "ply").read_bytes() == data
    there.leave("job")
    assert list(there.jobs.iterdir()) == []
    fitted(there, "job", 2)
    assert read(here, here.fit("job", 2) / POINTS) == POINTS.encode()
    with here.at_hand(here.fit("job", 2) / POINTS) as path:
        assert path.read_text() == POINTS
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        here.fetch(here.upload("nobody", "ply"))


def test_any_part_of_a_file_can_be_had(here: ObjectArtifacts) -> None:
    folder = here.mesh("job", 1)
    folder.mkdir(parents=True)
    folder.joinpath("mesh.ply").write_bytes(MESH_BYTES)
    here.keep(folder, "mesh")
    found = here.find(folder / "mesh.ply")
    assert found is not None
    assert found.size == len(MESH_BYTES)
    assert max(len(part) for part in found.read(0, found.size)) <= objects.PART_BYTES
    for start, stop in ((0, 1), (objects.PART_BYTES - 1, objects.PART_BYTES + 1), (25_599_990, 25_600_000)):
        assert b"".join(found.read(start, stop)) == MESH_BYTES[start:stop]


def test_an_upload_that_fails_leaves_nothing(here: ObjectArtifacts) -> None:
    def cut_off(data: bytes, *, finish: bool) -> None:
        with here.receiving("job", "ply") as stream:
            stream.write(data)
            if finish:
                stream.finish()
            raise ConnectionError

    for data in (b"half", bytes(20_000_000)):
        for finish in (False, True):
            with pytest.raises(ConnectionError):
                cut_off(data, finish=finish)
            assert here.find(here.upload("job", "ply")) is None


def test_a_child_has_the_field_after_its_parent_is_gone(here: ObjectArtifacts, there: ObjectArtifacts) -> None:
    fitted(here, "parent", 2)
    with there.linking("parent", 2, "child"):
        pass
    here.remove("parent")
    for name in FIT_FILES:
        assert read(here, here.fit("child", 0) / name) == name.encode()
        assert read(here, here.fit("parent", 2) / name) is None
    with pytest.raises(FileNotFoundError), there.linking("parent", 2, "late"):
        pass
    assert there.find(there.fit("late", 0) / POINTS) is None


def test_a_cloud_is_copied_for_a_job_that_uses_it_too(here: ObjectArtifacts) -> None:
    uploaded(here, "first")
    with here.copying("first", "ply", "second"):
        pass
    here.remove("first")
    assert read(here, here.upload("second", "ply")) == b"a cloud"
    with pytest.raises(FileNotFoundError), here.copying("first", "ply", "third"):
        pass


def test_a_sweep_removes_what_no_job_wants(
    here: ObjectArtifacts, there: ObjectArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in ("wanted", "stray", "ended"):
        uploaded(here, job_id)
        for attempt in (1, 2):
            fitted(here, job_id, attempt)
    kept = {
        "wanted": Kept(ended=False, fitted=None, published=None),
        "ended": Kept(ended=True, fitted=2, published=None),
    }

    def files() -> dict[str, tuple[bool, ...]]:
        return {
            job_id: tuple(there.find(path) is not None for path in paths)
            for job_id in ("wanted", "stray", "ended")
            for paths in [[there.upload(job_id, "ply"), *(there.fit(job_id, attempt) / PREVIEW for attempt in (1, 2))]]
        }

    there.sweep(lambda ids: kept)
    assert set(files().values()) == {(True, True, True)}, "what is young may be about to be wanted"
    monkeypatch.setattr(objects, "STRAY_SECONDS", -60.0)
    there.sweep(lambda ids: kept)
    assert set(files().values()) == {(True, True, True)}, "listing everything is not for every sweep"
    monkeypatch.setattr(there, "_next_sweep", 0.0)
    there.sweep(lambda ids: {job_id: kept[job_id] for job_id in ids if job_id in kept})
    assert files() == {"wanted": (True, True, True), "stray": (False, False, False), "ended": (True, False, True)}


def test_what_is_shown_is_there_before_it_is_said(here: ObjectArtifacts, there: ObjectArtifacts) -> None:
    folder = here.fit("job", 1)
    folder.mkdir(parents=True)
    shown = threading.Event()
    found: list[bytes | None] = []

    def on_shown() -> None:
        found.append(read(there, there.fit("job", 1) / PREVIEW))
        shown.set()

    folder.joinpath(PREVIEW).write_text("a surface")
    here.show(folder, (PREVIEW,), on_shown)
    assert shown.wait(30)
    here.discard(folder)
    assert found == [b"a surface"]
    assert not folder.exists()
    assert there.find(there.fit("job", 1) / PREVIEW) is None


def test_what_a_process_worked_on_goes_after_its_end(url: str, tmp_path: Path) -> None:
    dead, alive = opened(url, tmp_path / "here"), opened(url, tmp_path / "here")
    for artifacts in (dead, alive):
        artifacts.mesh("job", 1).mkdir(parents=True)
    assert dead._lock is not None
    os.close(dead._lock)  # as its end does, however it comes
    opened(url, tmp_path / "here").close()
    assert not dead.jobs.exists()
    assert alive.mesh("job", 1).exists()
    alive.close()
    assert not alive.jobs.exists()


# What only S3 has


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_link_is_good_for_whoever_has_it(here: ObjectArtifacts) -> None:
    fitted(here, "job", 1)
    found = here.find(here.fit("job", 1) / "fit.json")
    assert found is not None
    assert found.link is not None
    link = found.link(60.0)
    answer = httpx.get(link)
    assert answer.status_code == 200
    assert answer.text == "fit.json"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''Ente%20%C3%A4.json"
    assert httpx.get(link.replace("fit.json", "cloud.npz")).status_code == 403
    assert httpx.get(link[:-1] + ("0" if link[-1] != "0" else "1")).status_code == 403


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_wrong_secret_is_refused(
    url: str, here: ObjectArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(here, "job")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a guess")
    wrong = ObjectArtifacts(url, tmp_path / "wrong")
    with pytest.raises(ArtifactError, match="refuses: SignatureDoesNotMatch"):
        wrong.create()
    with pytest.raises(ArtifactError, match="refuses: SignatureDoesNotMatch"):
        uploaded(wrong, "other")
    with pytest.raises(ArtifactError, match="refuses"):
        wrong.find(wrong.upload("job", "ply"))
    wrong.remove("job")
    assert read(here, here.upload("job", "ply")) == b"a cloud"
    assert here.find(here.upload("other", "ply")) is None


@pytest.mark.parametrize("url", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_told_from_a_file_that_is_not(
    url: str, tmp_path: Path, here: ObjectArtifacts
) -> None:
    nowhere = ObjectArtifacts("s3://no-such-bucket", tmp_path)
    with pytest.raises(ArtifactError, match="NoSuchBucket"):
        nowhere.create()
    with pytest.raises(ArtifactError, match="NoSuchBucket"):
        uploaded(nowhere, "job")


def test_a_store_that_is_not_there_is_an_error_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with pytest.raises(ArtifactError, match="does not answer"):
        ObjectArtifacts("s3://bucket", tmp_path).create()


@pytest.mark.parametrize("url", ["http://somewhere", "s3://", "file://relative", "gs://bucket", "bucket"])
def test_other_urls_are_no_stores(url: str) -> None:
    with pytest.raises(ConfigError, match=r"artifacts_url is .*s3://BUCKET or file:///FOLDER"):
        load_settings(artifacts_url=url)


def test_the_settings_say_where(tmp_path: Path) -> None:
    inside = open_artifacts(load_settings(data_dir=tmp_path))
    elsewhere = open_artifacts(load_settings(data_dir=tmp_path, artifacts_url=f"file://{tmp_path}/store"))
    assert (type(inside).__name__, type(elsewhere).__name__) == ("Artifacts", "ObjectArtifacts")
