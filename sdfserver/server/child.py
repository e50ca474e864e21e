"""The process in which a job is computed: spawned by a worker, and the only one that imports torch or reads a cloud.

It talks with its parent over a pipe. In: a task, or STOP. Out: progress, and for each task one Outcome. It ends with
its parent: nobody would hear it.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdfserver.config import PRESETS, MeshConfig
from sdfserver.errors import (
    CloudError,
    ConfigError,
    DeviceError,
    DivergenceError,
    ExtractionError,
    MissingDependencyError,
    OutputError,
    SdfServerError,
    Stopped,
)
from sdfserver.schemas import JobOptions, MeshOptions
from sdfserver.server.artifacts import CLOUD, FIELD, FIT_REPORT, MESH, PICTURE, POINTS, PREVIEW, REPORT, sync
from sdfserver.server.logs import set_up_logging

if TYPE_CHECKING:
    from sdfserver.cloud import PointCloud
    from sdfserver.field import SignedDistanceField
    from sdfserver.fit import FitProgress
    from sdfserver.reconstruct import Progress

log = logging.getLogger(__name__)

STOP = "stop"
READY = "ready"
PROGRESS_SECONDS = 0.1
PREVIEW_SHARES = (0.1, 0.25, 0.5, 0.8)
"""When the surface is shown while it forms, as shares of the fit's steps."""
NICENESS = 10
"""Behind the API and the worker: they must answer while both cores compute."""


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """Fit a field to the cloud at `cloud`, and leave it in `folder`. `name` is the cloud's for its user."""

    cloud: Path
    name: str
    folder: Path
    options: JobOptions
    max_points: int
    device: str


@dataclass(frozen=True, kw_only=True)
class MeshTask:
    """Mesh the field in `field_folder`, and leave mesh and report in `folder`."""

    field_folder: Path
    folder: Path
    options: MeshOptions
    preset: str
    device: str
    max_resolution: int
    """An automatic resolution stays within it; any other has been looked at before."""


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """There is a preview, the `number`th of its attempt."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended. `problem` is a kind of problem of `sdfserver.server.problems`; `detail` is for the user."""

    how: Literal["done", "failed", "stopped"]
    seconds: float = 0.0
    problem: str = ""
    detail: str = ""


def mesh_config(options: MeshOptions, preset: str, max_resolution: int) -> MeshConfig:
    """The mesh settings that `options` ask for, on top of those of the preset. Raises ConfigError."""
    base = PRESETS[preset].mesh
    low, high = base.auto_range
    return replace(
        base,
        resolution=options.resolution or base.resolution,
        auto_range=(min(low, max_resolution), min(high, max_resolution)),
        level_world=options.level,
        trim_distance_world=options.trim,
        min_component_share=options.min_component,
        target_faces=options.faces,
    )


def main(connection: Connection, threads: int) -> None:
    """Serve tasks until the parent is gone. The target of the spawned process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.nice(NICENESS)
    set_up_logging()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Before torch: its threads wait for each other asleep. Spinning, a fit on two threads all but stops as soon as
    # something else wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    import sdfserver.io
    import sdfserver.reconstruct  # noqa: F401 - here, so that the first task need not wait for it

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):
        connection.send(READY)
        while True:
            task = connection.recv()
            if isinstance(task, (FitTask, MeshTask)):  # a STOP that came too late is for a task that has ended
                connection.send(_run(task, _Reporter(connection)))


class _Reporter:
    """Sends progress, at a bearable rate, and hears when to stop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stop = False
        self._sent_at = 0.0
        self._stage = ""

    def show(self, progress: "Progress") -> None:
        now = time.monotonic()
        if progress.stage != self._stage or now - self._sent_at >= PROGRESS_SECONDS:
            self._connection.send(progress)
            self._sent_at, self._stage = now, progress.stage

    def previewed(self, number: int) -> None:
        self._connection.send(Previewed(number=number))

    def should_stop(self) -> bool:
        while not self._stop and self._connection.poll():
            self._stop = self._connection.recv() == STOP
        return self._stop


def _run(task: FitTask | MeshTask, reporter: _Reporter) -> Outcome:
    from sdfserver.device import free_device_memory

    start = time.monotonic()
    try:
        if isinstance(task, FitTask):
            _fit(task, reporter)
        else:
            _mesh(task, reporter)
        sync(task.folder)
    except Stopped:
        return Outcome(how="stopped")
    except SdfServerError as error:
        kind = next((kind for kinds, kind in _PROBLEMS.items() if isinstance(error, kinds)), "internal")
        return Outcome(how="failed", problem=kind, detail=_in_our_words(str(error), task))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Outcome(how="failed", problem="disk-full", detail="the disk filled up while the job ran")
        log.exception("a job failed")
        return _INTERNAL
    except Exception as error:  # a job's fault must not end the process, and is told in the log
        if _out_of_memory(error):
            return Outcome(how="failed", problem="memory", detail="the job needed more memory than there is")
        log.exception("a job failed")
        return _INTERNAL
    finally:
        free_device_memory()
    return Outcome(how="done", seconds=time.monotonic() - start)


_INTERNAL = Outcome(how="failed", problem="internal", detail="the job failed for a reason on the server's side")
_PROBLEMS: dict[tuple[type[SdfServerError], ...], str] = {
    (CloudError, MissingDependencyError): "cloud",
    (ConfigError, DeviceError): "options",
    (DivergenceError,): "divergence",
    (ExtractionError,): "no-surface",
    (OutputError,): "disk-full",
}


def _fit(task: FitTask, reporter: _Reporter) -> None:
    import numpy as np

    from sdfserver.io import read_cloud
    from sdfserver.normals import prepare
    from sdfserver.reconstruct import FIT_STAGES, Clock, Progress, fit_field, report_json

    reporter.show(Progress(stage="prepare", fraction=0.0))
    options = task.options
    given = read_cloud(task.cloud)
    if len(given.points) > task.max_points:
        raise CloudError(f"{task.name} has {len(given.points):,} points; this server takes {task.max_points:,}")
    cloud, strays, outliers = prepare(
        given,
        remove_strays_and_outliers=options.remove_outliers,
        estimate=options.normals == "estimate",
        viewpoint=None if options.viewpoint is None else np.array(options.viewpoint),
    )
    forming = Forming(task.folder, reporter.previewed)
    fitted = fit_field(
        cloud,
        preset=options.preset,
        device=task.device if options.device == "auto" else options.device,
        seed=options.seed,
        clock=Clock(reporter.show, FIT_STAGES),
        on_cloud=forming.begin,
        on_field=forming.show,
        should_stop=reporter.should_stop,
    )
    about = fitted.report["cloud"]
    about["outliers_removed"], about["strays_dropped"] = outliers, about["strays_dropped"] + strays
    fitted.field.save(task.folder / FIELD)
    _save_cloud(fitted.cloud, task.folder / CLOUD)
    (task.folder / FIT_REPORT).write_bytes(report_json(fitted.report))


class Forming:
    """Leaves in `folder` what can be looked at while a field forms, and tells how often its surface has been shown."""

    def __init__(self, folder: Path, tell: Callable[[int], None]) -> None:
        self._folder, self._tell = folder, tell
        self._points: PointCloud | None = None
        self._shown = self._due = 0

    def begin(self, cloud: "PointCloud") -> None:
        """Show some of the points."""
        from sdfserver.io import write_ply
        from sdfserver.preview import some_points

        self._points = some_points(cloud)
        write_ply(self._folder / POINTS, self._points.points, normals=self._points.normals)

    def show(self, progress: "FitProgress", field: "SignedDistanceField") -> None:
        """Show the surface, if it is time to."""
        from sdfserver.io import write_mesh
        from sdfserver.preview import coarse_surface

        due = sum(progress.step >= share * progress.steps for share in PREVIEW_SHARES)
        if due == self._due or self._points is None:
            return
        self._due = due
        with contextlib.suppress(ExtractionError):  # nothing to be seen yet
            write_mesh(coarse_surface(field, self._points.points), self._folder / PREVIEW)
            self._shown += 1
            self._tell(self._shown)


def _mesh(task: MeshTask, reporter: _Reporter) -> None:
    from sdfserver.field import SignedDistanceField
    from sdfserver.io import read_cloud, write_mesh
    from sdfserver.preview import write_picture, write_surface
    from sdfserver.reconstruct import MESH_STAGES, Clock, choose_device, join_reports, mesh_field, report_json

    field = SignedDistanceField.load(task.field_folder / FIELD, device=choose_device(task.device))
    cloud = read_cloud(task.field_folder / CLOUD)
    meshed = mesh_field(
        field,
        cloud,
        mesh_config(task.options, task.preset, task.max_resolution),
        clock=Clock(reporter.show, MESH_STAGES),
        should_stop=reporter.should_stop,
    )
    write_mesh(meshed.mesh, task.folder / MESH)
    write_surface(meshed.mesh, cloud, task.folder / PREVIEW)
    write_picture(meshed.mesh, task.folder / PICTURE)
    fit_report = json.loads((task.field_folder / FIT_REPORT).read_bytes())
    (task.folder / REPORT).write_bytes(report_json(join_reports(fit_report, meshed.report)))


def _save_cloud(cloud: "PointCloud", path: Path) -> None:
    import numpy as np

    if cloud.normals is None:
        raise ValueError("a cloud that has been fitted has normals")
    np.savez(path, points=cloud.points, normals=cloud.normals)


def _in_our_words(message: str, task: FitTask | MeshTask) -> str:
    """The message, with the interface's option for the command's, and the user's name for the cloud instead of ours."""
    message = message.replace("--normals estimate", "normals=estimate")
    if isinstance(task, FitTask):
        message = message.replace(str(task.cloud), task.name).replace(task.cloud.name, task.name)
    return message.replace(str(task.folder), "the job's folder")


def _out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
