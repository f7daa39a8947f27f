"""Hourglass: a learned image codec. Pictures to small .hgc files and back, without PyTorch.

    from hourglass import codec

    data = codec.encode("photo.jpg", quality=50)    # bytes of a .hgc file
    pixels = codec.decode(data)                     # (H, W, 3) uint8

For many pictures build one `Codec` and call its methods of the same names.
"""

from __future__ import annotations

from functools import cache
from typing import Unpack

if __name__ != "hourglass.codec":
    # From the root of a checkout `import codec` finds this folder too, and would make a twin of every class.
    raise ImportError("import hourglass.codec, not codec")

from hourglass.codec import errors, metrics
from hourglass.codec.container import Header, Section
from hourglass.codec.errors import HourglassError
from hourglass.codec.image import ImageSource, Pixels
from hourglass.codec.limits import Limits
from hourglass.codec.pipeline import (
    DEFAULT_QUALITY,
    Code,
    Codec,
    Distortion,
    FileSource,
    ModelInfo,
    Settings,
    check_settings,
    parse_size,
)
from hourglass.codec.quantise import Effort
from hourglass.codec.runtime import TensorRule

__all__ = [
    "DEFAULT_QUALITY",
    "Code",
    "Codec",
    "Distortion",
    "Effort",
    "FileSource",
    "Header",
    "HourglassError",
    "ImageSource",
    "Limits",
    "ModelInfo",
    "Pixels",
    "Section",
    "Settings",
    "TensorRule",
    "check_settings",
    "decode",
    "encode",
    "errors",
    "metrics",
    "parse_size",
    "read_header",
]


@cache
def _default() -> Codec:
    return Codec()


def encode(image: ImageSource, **settings: Unpack[Settings]) -> bytes:
    """A picture (path, image file bytes, PIL image, array) -> the bytes of a .hgc file. See `Codec.encode`."""
    return _default().encode(image, **settings)


def decode(data: FileSource) -> Pixels:
    """A .hgc file (bytes or path) -> (H, W, 3) uint8. See `Codec.decode`."""
    return _default().decode(data)


def read_header(data: FileSource) -> Header:
    """The header of a .hgc file (bytes or path), without decoding it. See `Codec.read_header`."""
    return _default().read_header(data)
