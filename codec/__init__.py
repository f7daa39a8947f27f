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

from hourglass.codec import errors, metrics, watch
from hourglass.codec.aim import parse_size
from hourglass.codec.container import FileSource, Header, Section
from hourglass.codec.errors import HourglassError
from hourglass.codec.image import ImageSource, Keep, Metadata, Picture, Pixels
from hourglass.codec.limits import Limits
from hourglass.codec.pipeline import Code, Codec, Distortion, ModelInfo
from hourglass.codec.quantise import Effort
from hourglass.codec.runtime import TensorRule
from hourglass.codec.settings import DEFAULT_QUALITY, SCALES, Region, Settings, View, check_settings

__all__ = [
    "DEFAULT_QUALITY",
    "SCALES",
    "Code",
    "Codec",
    "Distortion",
    "Effort",
    "FileSource",
    "Header",
    "HourglassError",
    "ImageSource",
    "Keep",
    "Limits",
    "Metadata",
    "ModelInfo",
    "Picture",
    "Pixels",
    "Region",
    "Section",
    "Settings",
    "TensorRule",
    "View",
    "check_settings",
    "decode",
    "encode",
    "errors",
    "metrics",
    "parse_size",
    "read_header",
    "watch",
]


@cache
def _default() -> Codec:
    return Codec()


def encode(image: ImageSource, **settings: Unpack[Settings]) -> bytes:
    """A picture (path, image file bytes, PIL image, array) -> the bytes of a .hgc file. See `Codec.encode`."""
    return _default().encode(image, **settings)


def decode(data: FileSource, **view: Unpack[View]) -> Pixels:
    """A .hgc file (bytes or path) -> (H, W, 3) uint8, or what else its picture has. See `Codec.decode`."""
    return _default().decode(data, **view)


def read_header(data: FileSource) -> Header:
    """The header of a .hgc file (bytes or path), without decoding it. See `Codec.read_header`."""
    return _default().read_header(data)
