"""Every error that hourglass raises on purpose.

    HourglassError                    the root: catch this to catch them all
    ├── DataError                     the bytes are at fault
    │   ├── ImageError                not a picture that can be read
    │   ├── ContainerError            not a readable .hgc file: magic, version, structure
    │   │   └── CorruptError          a .hgc file whose checksum or length says that it was damaged
    │   └── CodeError                 a code tensor that does not fit its model or its picture size
    ├── InvalidArgument               the caller is at fault: a value outside what is documented
    ├── LimitError                    the input is larger than the limits in force
    ├── ModelError                    a model's own files are missing, damaged or inconsistent
    │   └── UnknownModelError         no model of that id is installed
    ├── Cancelled                     the work was stopped because nobody waits for it any more
    └── RemoteError                   a server could not answer: away, too slow, or broken

    LossWarning                       a warning: part of what a picture held is not kept

A message says what failed, the value got, the value expected, and what to do. Errors of other libraries are turned
into these where they first reach our code; the original stays attached as the cause.
"""

from __future__ import annotations

__all__ = [
    "Cancelled",
    "CodeError",
    "ContainerError",
    "CorruptError",
    "DataError",
    "HourglassError",
    "ImageError",
    "InvalidArgument",
    "LimitError",
    "LossWarning",
    "ModelError",
    "RemoteError",
    "UnknownModelError",
]


class HourglassError(Exception):
    """Root of all errors of this package."""


class DataError(HourglassError):
    """The bytes given are at fault."""


class ImageError(DataError):
    """The bytes are no picture that can be read."""


class ContainerError(DataError):
    """The bytes are no .hgc file that can be read: wrong magic, unknown version, impossible structure."""


class CorruptError(ContainerError):
    """A .hgc file was damaged: a checksum does not match, or bytes are missing or left over."""


class CodeError(DataError):
    """A code tensor has the wrong shape, type or values for its model and picture size."""


class InvalidArgument(HourglassError, ValueError):
    """A value that the caller chose is outside what is documented."""


class LimitError(HourglassError):
    """The input is larger than the limits in force."""


class ModelError(HourglassError):
    """The files of a model are missing, damaged or inconsistent with its manifest."""


class UnknownModelError(ModelError):
    """No model of the id asked for is installed."""


class Cancelled(HourglassError):
    """The event of `watch.watching` was set before the work was done."""


class RemoteError(HourglassError):
    """The server could not answer: it is away, it took too long, or it broke."""


class LossWarning(UserWarning):
    """Part of what the picture held (depth, transparency, frames, profile) is not kept."""
