"""Files of jobs: what no job wants goes, what one may yet want stays."""

import os
from pathlib import Path

import pytest

from sdfserver.server.artifacts import FIT_FILES, POINTS, PREVIEW, Artifacts, Kept


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    artifacts = Artifacts(tmp_path)
    artifacts.create()
    return artifacts


def fitted(artifacts: Artifacts, job_id: str, attempt: int) -> None:
    folder = artifacts.fit(job_id, attempt)
    folder.mkdir(parents=True)
    for name in FIT_FILES:
        folder.joinpath(name).write_text(name)


def test_a_folder_that_no_job_wants_goes_unless_it_is_being_received(artifacts: Artifacts) -> None:
    fitted(artifacts, "wanted", 1)
    fitted(artifacts, "stray", 1)
    with artifacts.receiving("coming", "ply") as stream:
        stream.write(b"half a cloud")
        artifacts.sweep(lambda ids: {"wanted": Kept(ended=False, fitted=None, published=None)})
        assert set(os.listdir(artifacts.jobs)) == {"wanted", "coming"}  # noqa: PTH208
    artifacts.sweep(lambda ids: {})
    assert list(artifacts.jobs.iterdir()) == []


def test_of_a_job_that_has_ended_the_results_stay(artifacts: Artifacts) -> None:
    for attempt in (1, 2, 3):
        fitted(artifacts, "job", attempt)
        artifacts.mesh("job", attempt).mkdir()
    artifacts.upload("job", "ply").write_bytes(b"cloud")
    artifacts.sweep(lambda ids: {"job": Kept(ended=False, fitted=2, published=None)})
    assert len(list(artifacts.jobs.joinpath("job").iterdir())) == 7
    artifacts.sweep(lambda ids: {"job": Kept(ended=True, fitted=2, published=3)})
    assert {path.name for path in artifacts.jobs.joinpath("job").iterdir()} == {"cloud.ply", "fit-2", "mesh-3"}


def test_an_upload_that_fails_leaves_no_folder(artifacts: Artifacts) -> None:
    def cut_off() -> None:
        with artifacts.receiving("job", "ply") as stream:
            stream.write(b"half")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        cut_off()
    assert list(artifacts.jobs.iterdir()) == []


def test_a_folder_is_never_received_into_twice(artifacts: Artifacts) -> None:
    with artifacts.receiving("job", "ply"), pytest.raises(FileExistsError), artifacts.receiving("job", "ply"):
        pass


def test_a_child_has_the_field_after_its_parent_is_gone(artifacts: Artifacts) -> None:
    fitted(artifacts, "parent", 2)
    with artifacts.linking("parent", 2, "child"):
        pass
    artifacts.remove("parent")
    assert {path.name for path in artifacts.fit("child", 0).iterdir()} == set(FIT_FILES)
    assert [path.name for path in artifacts.jobs.joinpath("child").iterdir()] == ["fit-0"]
    with pytest.raises(FileNotFoundError), artifacts.linking("parent", 2, "late"):
        pass
    assert [path.name for path in artifacts.jobs.iterdir()] == ["child"]


def test_a_child_needs_no_preview_but_all_else(artifacts: Artifacts) -> None:
    fitted(artifacts, "parent", 1)
    artifacts.fit("parent", 1).joinpath(PREVIEW).unlink()
    with artifacts.linking("parent", 1, "child"):
        pass
    artifacts.fit("parent", 1).joinpath(POINTS).unlink()
    with pytest.raises(FileNotFoundError), artifacts.linking("parent", 1, "late"):
        pass
    assert not artifacts.jobs.joinpath("late").exists()


def test_a_cloud_is_shared_by_the_jobs_that_use_it(artifacts: Artifacts) -> None:
    with artifacts.receiving("first", "ply") as stream:
        stream.write(b"a cloud")
    with artifacts.copying("first", "ply", "second"):
        artifacts.sweep(lambda ids: {"first": Kept(ended=False, fitted=None, published=None)})
    artifacts.remove("first")
    assert artifacts.upload("second", "ply").read_bytes() == b"a cloud"
    assert len(list(artifacts.jobs.joinpath("second").iterdir())) == 1
    with pytest.raises(FileNotFoundError), artifacts.copying("first", "ply", "third"):
        pass
    assert not artifacts.jobs.joinpath("third").exists()
