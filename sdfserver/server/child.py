"""The process in which a job is computed: spawned by a worker, and the only one that imports torch or reads a cloud.

It talks with its parent over a pipe. In: Work, one task or several fits that go together, or Stop for one of them. Out:
what Told says of each task: progress, and in the end one Outcome. It ends with its parent: nobody would hear it.
"""

import contextlib
import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

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
from sdfserver.progress import Progress
from sdfserver.schemas import JobOptions, MeshOptions
from sdfserver.server.artifacts import CLOUD, FIELD, FIT_REPORT, MESH, PICTURE, POINTS, PREVIEW, REPORT, seal
from sdfserver.server.logs import about, set_up_logging

if TYPE_CHECKING:
    from sdfserver.cloud import PointCloud
    from sdfserver.field import SignedDistanceField
    from sdfserver.fit import FitProgress
    from sdfserver.reconstruct import FieldJob, FittedField

log = logging.getLogger(__name__)
T = TypeVar("T")

READY = "ready"
PROGRESS_SECONDS = 0.1
PREVIEW_SHARES = (0.1, 0.25, 0.5, 0.8)
"""When the surface is shown while it forms, as shares of the fit's steps."""
ROOM_SECONDS = (1.0, 4.0)
"""How long a job waits before it is tried again, and once more, where the device's memory is full."""
DISK_FULL = "the disk filled up while the job ran"
INTERNAL = "the job failed for a reason on the server's side"
NICENESS = 10
"""Behind the API and the worker: they must answer while both cores compute."""


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """Fit a field to the cloud at `cloud`, and leave it in `folder`. `name` is the cloud's for its user."""

    step = "fit"
    cloud: Path
    name: str
    folder: Path
    job_id: str
    request_id: str | None
    options: JobOptions
    max_points: int
    device: str


@dataclass(frozen=True, kw_only=True)
class MeshTask:
    """Mesh the field in `field_folder`, and leave mesh and report in `folder`."""

    step = "mesh"
    needs = (FIELD, CLOUD, FIT_REPORT)
    """Files of `field_folder`."""
    field_folder: Path
    folder: Path
    job_id: str
    request_id: str | None
    options: MeshOptions
    preset: str
    device: str
    max_resolution: int
    """An automatic resolution stays within it; any other has been looked at before."""


@dataclass(frozen=True)
class Work:
    """Tasks to be done at once: a single one, or fits of one preset on one device. `number` tells it from the next."""

    number: int
    tasks: "tuple[FitTask | MeshTask, ...]"


@dataclass(frozen=True)
class Stop:
    """An end to task `index` of a piece of work; one that comes too late does nothing."""

    number: int
    index: int


@dataclass(frozen=True)
class Told:
    """What there is to say of task `index` of a piece of work."""

    number: int
    index: int
    what: "Progress | Previewed | Outcome"


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """There is a preview, the `number`th of its attempt; 0 stands for the points, which are there before."""

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
        shell_world=options.shell,
        surface=options.surface,
        trim_distance_world=options.trim,
        min_component_share=options.min_component,
        target_faces=options.faces,
        sharp=options.sharp,
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
            work = connection.recv()
            if isinstance(work, Work):  # a Stop that came too late is for work that has ended
                _do(work, connection)


class _Inbox:
    """Hears which tasks of a piece of work are to be stopped."""

    def __init__(self, number: int, connection: Connection) -> None:
        self._number, self._connection = number, connection
        self._stopped: set[int] = set()

    def stopped(self, index: int) -> bool:
        while self._connection.poll():
            message = self._connection.recv()
            if isinstance(message, Stop) and message.number == self._number:
                self._stopped.add(message.index)
        return index in self._stopped


class _Reporter:
    """Sends the progress of one task, at a bearable rate, and says when to stop."""

    def __init__(self, work: Work, index: int, connection: Connection, inbox: _Inbox) -> None:
        self._number, self._index, self._connection, self._inbox = work.number, index, connection, inbox
        self._sent_at = 0.0
        self._stage = ""

    def tell(self, what: "Progress | Previewed | Outcome") -> None:
        self._connection.send(Told(self._number, self._index, what))

    def show(self, progress: "Progress") -> None:
        now = time.monotonic()
        if progress.stage != self._stage or now - self._sent_at >= PROGRESS_SECONDS:
            self.tell(progress)
            self._sent_at, self._stage = now, progress.stage

    def previewed(self, number: int) -> None:
        self.tell(Previewed(number=number))

    def should_stop(self) -> bool:
        return self._inbox.stopped(self._index)


def _do(work: Work, connection: Connection) -> None:
    """Do the work, and send the outcome of each of its tasks as soon as it is known."""
    from sdfserver.device import free_device_memory

    inbox = _Inbox(work.number, connection)
    reporters = [_Reporter(work, i, connection, inbox) for i in range(len(work.tasks))]
    start = time.monotonic()

    def done() -> Outcome:
        # Its share of what all took: by these seconds it is told how long others will have to wait.
        return Outcome(how="done", seconds=(time.monotonic() - start) / len(work.tasks))

    fits = [(task, reporter) for task, reporter in zip(work.tasks, reporters, strict=True) if isinstance(task, FitTask)]
    try:
        if fits:
            _fit(fits, done)
        for task, reporter in zip(work.tasks, reporters, strict=True):
            if isinstance(task, MeshTask):
                mesh = partial(_mesh, task, reporter)
                reporter.tell(_outcome(task, partial(_when_there_is_room, mesh)) or done())
    finally:
        free_device_memory()


def _outcome(task: FitTask | MeshTask, step: Callable[[], None]) -> Outcome | None:
    """How a task has ended by a `step` that raised; None if the step did not."""
    with about(job=task.job_id, request=task.request_id):
        try:
            step()
        except Exception as error:  # noqa: BLE001 - a job's fault must not end the process
            return _failed(task, error)
    return None


def _failed(task: FitTask | MeshTask, error: Exception) -> Outcome:
    if isinstance(error, Stopped):
        return Outcome(how="stopped")
    if isinstance(error, SdfServerError):
        kind = next((kind for kinds, kind in _PROBLEMS.items() if isinstance(error, kinds)), "internal")
        return Outcome(how="failed", problem=kind, detail=_in_our_words(str(error), task))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Outcome(how="failed", problem="disk-full", detail=DISK_FULL)
    if _out_of_memory(error):
        log.warning("a job needed more memory than there is: %s", str(error).splitlines()[0] if str(error) else "")
        return Outcome(how="failed", problem="memory", detail="the job needed more memory than there is")
    if lost := _lost_device(error):
        # Nothing more can be computed in this process: the job is tried again in a new one.
        log.error("the device is lost, and this process ends: %s", lost)
        os._exit(1)
    log.error("a job failed", exc_info=error)
    return _INTERNAL


_INTERNAL = Outcome(how="failed", problem="internal", detail=INTERNAL)
_PROBLEMS: dict[tuple[type[SdfServerError], ...], str] = {
    (CloudError, MissingDependencyError): "cloud",
    (ConfigError, DeviceError): "options",
    (DivergenceError,): "divergence",
    (ExtractionError,): "no-surface",
    (OutputError,): "disk-full",
}


def _fit(fits: "Sequence[tuple[FitTask, _Reporter]]", done: Callable[[], Outcome]) -> None:
    """Fit fields to the clouds of tasks of one preset, on one device; tells of each how it ended."""
    from sdfserver.reconstruct import fit_fields

    opened: list[_Opened] = []
    for task, reporter in fits:
        outcome = _outcome(task, lambda task=task, reporter=reporter: opened.append(_open(task, reporter)))  # type: ignore[misc]
        if outcome is not None:
            reporter.tell(outcome)
    if not opened:
        return
    first = opened[0].task
    found: Sequence[FittedField | Exception]
    try:
        found = fit_fields([one.job for one in opened], preset=first.options.preset, device=_device_of(first))
    except Exception as error:  # noqa: BLE001 - it is that of all of them
        found = [error for _ in opened]
    for one, fitted in zip(opened, found, strict=True):
        one.reporter.tell(_outcome(one.task, partial(_leave, one, fitted)) or done())


def _device_of(task: FitTask) -> str:
    return task.device if task.options.device == "auto" else task.options.device


def _alone(one: "_Opened") -> "FittedField":
    from sdfserver.reconstruct import fit_fields

    (fitted,) = fit_fields([one.job], preset=one.task.options.preset, device=_device_of(one.task))
    if isinstance(fitted, Exception):
        raise fitted
    return fitted


def _when_there_is_room(work: Callable[[], T], *, at_once: bool = True) -> T:
    """What `work` gives, after a while if the device's memory is full: another process may have it."""
    import torch

    from sdfserver.device import free_device_memory

    for seconds in (0.0, *ROOM_SECONDS) if at_once else ROOM_SECONDS:
        if seconds:
            free_device_memory()
            time.sleep(seconds)
        try:
            return work()
        except torch.OutOfMemoryError as error:
            log.warning("the device's memory is full: %s", str(error).splitlines()[0])
    return work()


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A task whose cloud has been read; strays and outliers that were removed from it by then."""

    task: FitTask
    reporter: _Reporter
    job: "FieldJob"
    strays: int
    outliers: int


def _open(task: FitTask, reporter: _Reporter) -> _Opened:
    import numpy as np

    from sdfserver.io import read_cloud
    from sdfserver.normals import prepare
    from sdfserver.reconstruct import FIT_STAGES, Clock, FieldJob

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
    job = FieldJob(
        cloud=cloud,
        seed=options.seed,
        clock=Clock(reporter.show, FIT_STAGES),
        on_cloud=forming.begin,
        on_field=forming.show,
        should_stop=reporter.should_stop,
    )
    return _Opened(task=task, reporter=reporter, job=job, strays=strays, outliers=outliers)


def _leave(one: _Opened, fitted: "FittedField | Exception") -> None:
    """Leave what was fitted in the task's folder; raises what was not."""
    import torch

    from sdfserver.reconstruct import report_json

    if isinstance(fitted, torch.OutOfMemoryError):
        fitted = _when_there_is_room(partial(_alone, one), at_once=False)
    if isinstance(fitted, Exception):
        raise fitted
    about, folder = fitted.report["cloud"], one.task.folder
    about["outliers_removed"], about["strays_dropped"] = one.outliers, about["strays_dropped"] + one.strays
    fitted.report["warnings"] = [_in_our_words(warning, one.task) for warning in fitted.report["warnings"]]
    fitted.field.save(folder / FIELD)
    _save_cloud(fitted.cloud, folder / CLOUD)
    (folder / FIT_REPORT).write_bytes(report_json(fitted.report))
    seal(folder)


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
        some = self._points
        write_ply(self._folder / POINTS, some.points, normals=some.normals, colors=some.colors)
        self._tell(0)

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
    meshed.report["warnings"] = [_in_our_words(warning, task) for warning in meshed.report["warnings"]]
    (task.folder / REPORT).write_bytes(report_json(join_reports(fit_report, meshed.report)))
    seal(task.folder)


def _save_cloud(cloud: "PointCloud", path: Path) -> None:
    import numpy as np

    if cloud.normals is None:
        raise ValueError("a cloud that has been fitted has normals")
    colors = {} if cloud.colors is None else {"colors": cloud.colors}
    np.savez(path, allow_pickle=False, points=cloud.points, normals=cloud.normals, **colors)


_OPTIONS = {
    "--normals estimate": "normals=estimate",
    "--remove-outliers": "remove_outliers=true",
    "--surface open": "surface=open",
    "--surface": "surface",
    "--resolution": "resolution",
    "--faces": "faces",
}
"""The command's options, and what they are called here."""


def _in_our_words(message: str, task: FitTask | MeshTask) -> str:
    """The message, with the interface's option for the command's, and the user's name for the cloud instead of ours."""
    for command, ours in _OPTIONS.items():
        message = message.replace(command, ours)
    if isinstance(task, FitTask):
        message = message.replace(str(task.cloud), task.name).replace(task.cloud.name, task.name)
    return message.replace(str(task.folder), "the job's folder")


def _out_of_memory(error: Exception) -> bool:
    import torch

    # A thread is what the system refuses first, for its stack.
    said = "not enough memory", "can't start new thread"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said)


def _lost_device(error: Exception) -> str:
    """What CUDA says where the device, or this process's hold on it, is gone for good; else nothing.

    After such an error every later call fails as well: a launch that failed, a reset, a fallen-off bus.
    """
    import torch

    fatal = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
    return str(error).splitlines()[0] if fatal and not _out_of_memory(error) else ""


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
