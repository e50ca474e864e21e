"""What a CUDA device wants: steps that it can record, and no more at a time than it has room for."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Item = TypeVar("Item")

log = logging.getLogger(__name__)


class Captured(Generic[T]):
    """`work`, recorded when it is called for the second time on a CUDA device; elsewhere it is called as it is.

    Launching a kernel takes the host longer than most kernels of a fit take the device. A recorded step (a CUDA graph)
    is launched as a whole. What it reads and writes must stay where it is, and it must not wait for the device.

    The first call runs it as it is, too: libraries make their buffers then. Calling gives what the work returned; from
    a recorded one these are always the same tensors, with the values of the latest call.
    """

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self._work, self._device = work, device
        self._ran = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: T

    def __call__(self) -> T:
        """Do the work once more."""
        if self._device.type != "cuda":
            return self._work()
        if not self._ran:
            with _beside(self._device):
                self._given = self._work()
            self._ran = True
            return self._given
        if self._graph is None:
            self._graph = self._recorded()
        self._graph.replay()
        return self._given

    def _recorded(self) -> torch.cuda.CUDAGraph:
        try:
            return self._record()
        except torch.OutOfMemoryError:
            pass
        # While it records, PyTorch gives back nothing of what it keeps: that has to be done before.
        free_device_memory()
        return self._record()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # an old graph that is collected in the middle of a recording spoils it
        try:
            with _beside(self._device):
                # What other threads of the process ask of the device meanwhile is no fault of this one's.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._given = self._work()
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        return graph


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a stream of this thread's own: nothing can be recorded on the one that everything else runs on.

    It is one stream for all work: libraries keep a workspace for each that they have seen.
    """
    streams = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside, current = streams[device], torch.cuda.current_stream(device)
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        yield
    current.wait_stream(beside)


_local = threading.local()


def sums(values: Tensor, owner: Tensor, n: int, *, ascending: bool = False) -> Tensor:
    """The sums (n, c) of values (p, c) by owner (p,), always added in the same order, on whatever device."""
    if values.device.type == "cpu":
        return values.new_zeros((n, values.shape[1])).index_add_(0, owner, values)
    if not ascending:
        owner, order = owner.sort(stable=True)
        values = values[order]
    lengths = torch.bincount(owner, minlength=n)
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, initial=0)


def in_halves(work: Callable[[list[Item]], T], items: list[Item]) -> list[T]:
    """What `work` gives for all items at once, or for parts of them, where all are more than the memory holds.

    Raises torch.OutOfMemoryError where a single one is.
    """
    try:
        return [work(items)]
    except torch.OutOfMemoryError:
        if len(items) < 2:
            raise
    # After the exception is gone, which holds on to what was computed until then.
    free_device_memory()
    log.warning("%d at a time are more than the device's memory holds; %d are tried", len(items), len(items) // 2)
    middle = len(items) // 2
    return [*in_halves(work, items[:middle]), *in_halves(work, items[middle:])]


def free_device_memory() -> None:
    """Give back to a CUDA device what PyTorch keeps of its memory and nobody uses."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def without_trace(error: Exception) -> Exception:
    """The error to be kept: its trace would keep all that was computed where it was raised."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
