"""What a CUDA device wants: steps that it can record, and no more at a time than it has room for."""

import gc
import logging
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Item = TypeVar("Item")

log = logging.getLogger(__name__)


class Captured(Generic[T]):
    """`work`, recorded when it is called for the second time on a CUDA device; elsewhere it is called as it is.

    Launching a kernel takes the host longer than most kernels of a fit take the device. A recorded step (a CUDA graph)
    is launched as a whole. What it reads and writes must stay where it is, and it must not wait for the device.

    The first call runs it as it is, too: libraries and an optimiser make their buffers then. Calling gives what the
    work returned; from a recorded one these are always the same tensors, with the values of the latest call.
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
            self._ran, self._given = True, self._beside(self._work)
            return self._given
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            self._given = self._beside(partial(self._record, self._graph))
        self._graph.replay()
        return self._given

    def _beside(self, work: Callable[[], T]) -> T:
        """Nothing can be recorded on the stream that everything else runs on."""
        current, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            given = work()
        current.wait_stream(beside)
        return given

    def _record(self, graph: torch.cuda.CUDAGraph) -> T:
        # What other threads of the process ask of the device meanwhile is no fault of this one's.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            return self._work()
        finally:
            graph.capture_end()


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
    """Give back to the device what PyTorch keeps of its memory and nobody uses."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
