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
+-- ExtractionError         the field has no surface to mesh at this level
+-- Stopped                 the caller asked for an end before there was a result
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


class DivergenceError(SdfServerError):
    """The fit left its bounds and did not recover."""


class ExtractionError(SdfServerError):
    """The field has no surface to mesh at the requested level."""


class Stopped(SdfServerError):  # noqa: N818 - what the caller wished for, not a fault
    """The caller's stop callback asked for an end."""
