"""Every exception raised on purpose.

    CQEdgeError
    ├── ModelError         a pipeline cannot be loaded, or its UNet cannot be split
    ├── ExportError        a graph cannot become a file
    │   └── ParityError    it became one that computes something else
    ├── BundleError        a bundle's folder, manifest or file is not what it should be
    ├── DeviceError        a device is absent, full, or fails while it is measured
    ├── ScheduleError      steps, noise scheduler and cache schedule do not fit each other
    ├── CalibrationError   the measurements allow no correction or plan
    ├── UsageError         an argument turns out to be wrong after it was parsed
    └── OutputExistsError  the place to write to is taken

Each message is one sentence: what was found, what is allowed, what would work.
"""


class CQEdgeError(Exception):
    """Anything that the caller of cq-edge can cause; catch this one at the top."""


class ModelError(CQEdgeError):
    """A pipeline cannot be loaded, or its UNet cannot be split."""


class ExportError(CQEdgeError):
    """A graph cannot become a file."""


class ParityError(ExportError):
    """An exported graph computes something else than its float module."""


class BundleError(CQEdgeError):
    """A bundle's folder, manifest or file is not what it should be."""


class DeviceError(CQEdgeError):
    """A device is absent, full, or fails while it is measured."""


class ScheduleError(CQEdgeError):
    """Steps, noise scheduler and cache schedule do not fit each other."""


class CalibrationError(CQEdgeError):
    """Measurements are unusable: no correction or plan follows from them."""


class UsageError(CQEdgeError):
    """An argument turns out to be wrong after it was parsed."""


class OutputExistsError(CQEdgeError):
    """The place to write to is taken; nothing was overwritten."""
