"""Every error that sdfserver raises on purpose.

SdfServerError
+-- CloudError              the cloud cannot be reconstructed: what is wrong and what to do about it
|   +-- CloudFormatError    the file is not a readable cloud
+-- ConfigError             a setting is out of its range
+-- OutputError             a result cannot be written where it was asked for
+-- MissingDependencyError  an optional package or a system library is not installed
+-- FieldFormatError        a saved field cannot be read
+-- DeviceError             the requested device is not there
+-- FitError                the fit failed
|   +-- DivergenceError     it left its bounds and did not recover
|   +-- FitStopped          the caller asked it to stop
+-- ExtractionError         the field has no surface to mesh at this level
"""


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


class FitError(SdfServerError):
    """The fit failed."""


class DivergenceError(FitError):
    """The fit left its bounds and did not recover."""


class FitStopped(FitError):
    """The caller's stop callback asked the fit to stop."""


class ExtractionError(SdfServerError):
    """The field has no surface to mesh at the requested level."""
