"""Every error that sdfserver raises on purpose.

SdfServerError
+-- CloudError              the cloud cannot be reconstructed: what is wrong and what to do about it
|   +-- CloudFormatError    the file is not a readable cloud
+-- ConfigError             a setting is out of its range
+-- OutputError             a result cannot be written where it was asked for
+-- MissingDependencyError  an optional package or a system library is not installed
+-- FieldFormatError        a saved field cannot be read
+-- DeviceError             the requested device is not there
+-- DivergenceError         the fit left its bounds and did not recover
+-- ExtractionError         the field cannot be meshed
|   +-- NoSurfaceError      it has no surface at this level
+-- CommandError            another program, run beside sdfserver to compare, failed
+-- Stopped                 the caller asked for an end before there was a result
+-- ServiceError            a server did not do what was asked of it; `.problem` says why, where it said so
    +-- ConnectionFailed    no answer, however often it was asked
    +-- ApiError            it refused: a key, an option, a cloud
    |   +-- NotFoundError   there is no such job, or no more
    |   +-- BusyError       its queue is full or it is not ready; later it may be
    +-- JobFailed           the job ended without a mesh
    +-- JobCancelled        the job was cancelled
    +-- JobTimeout          the caller's patience ended before the job, which goes on
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdfserver.schemas import Problem

DEBUG = "SDFSERVER_DEBUG"
"""Set in the environment, it lets tracebacks and third-party warnings through."""


class SdfServerError(Exception):
    """The root of the tree; its message is one line, fit for a user."""


class CloudError(SdfServerError):
    """The point cloud cannot be reconstructed as it is."""


class CloudFormatError(CloudError):
    """The file is not a point cloud in a format that can be read."""


class ConfigError(SdfServerError, ValueError):
    """A setting is out of its range."""


class OutputError(SdfServerError):
    """A result cannot be written where it was asked for."""


class MissingDependencyError(SdfServerError):
    """An optional package, or a system library that it needs, is not installed."""


class FieldFormatError(SdfServerError):
    """A saved field cannot be read."""


class DeviceError(SdfServerError):
    """The requested device is not available."""


class DivergenceError(SdfServerError):
    """The fit left its bounds and did not recover."""


class ExtractionError(SdfServerError):
    """The field cannot be meshed."""


class NoSurfaceError(ExtractionError):
    """The field has no surface at the requested level; `what` of it runs from `lowest` to `highest`."""

    def __init__(self, level: float, lowest: float, highest: float, what: str = "its values on the grid run") -> None:
        run = f"{what} from {lowest:.4g} to {highest:.4g}"
        super().__init__(f"the field has no surface at level {level:.4g}: {run}")
        self.level, self.lowest, self.highest, self.what = level, lowest, highest, what

    def scaled(self, factor: float) -> "NoSurfaceError":
        """The same in another unit."""
        return NoSurfaceError(self.level * factor, self.lowest * factor, self.highest * factor, self.what)


class CommandError(SdfServerError):
    """Another program, run beside sdfserver to compare them, failed."""


class Stopped(SdfServerError):  # noqa: N818 - what the caller wished for, not a fault
    """The caller's stop callback asked for an end."""


class ServiceError(SdfServerError):
    """A server did not do what was asked of it; `problem` is what it said, or None where it said nothing."""

    def __init__(self, message: str, problem: "Problem | None" = None) -> None:
        super().__init__(message)
        self.problem = problem


class ConnectionFailed(ServiceError):  # noqa: N818 - reads as what happened
    """The server could not be reached, or the connection broke again and again."""


class ApiError(ServiceError):
    """The server refused; `problem.status` is the HTTP status."""


class NotFoundError(ApiError):
    """There is no such job on the server, or not any more."""


class BusyError(ApiError):
    """The server takes nothing now: its queue or the key's quota is full, or it is starting or stopping."""


class JobFailed(ServiceError):  # noqa: N818
    """The job ended without a mesh."""


class JobCancelled(ServiceError):  # noqa: N818
    """The job was cancelled before it had a mesh."""


class JobTimeout(ServiceError):  # noqa: N818
    """The job had not ended in the time given to wait for it; it goes on."""
