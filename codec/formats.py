"""What each format of the pictures that are written can hold."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from hourglass.codec.errors import InvalidArgument

_JPEG_SEGMENT = 65535 - 2
_WORD = (1 << 31) - 1


@dataclass(frozen=True)
class Format:
    """A format of picture files. All hold 8-bit grey and RGB; none is written with deeper samples.

    suffixes: of its files. holds: "alpha" and the kinds of metadata (fields of `Metadata`). by_rows: the kinds of
    metadata when it is written some rows at a time, None where it cannot be. by_parts: whether parts of rows can be
    written too, in any order. side: width and height at most, pixels. room: bytes of a kind of metadata at most. most:
    width times height at most, or None. reason: why no more than that.
    """

    suffixes: tuple[str, ...]
    holds: frozenset[str]
    side: int
    by_rows: frozenset[str] | None = None
    by_parts: bool = False
    room: dict[str, int] = field(default_factory=dict)
    most: int | None = None
    reason: str = ""


FORMATS = {
    "PNG": Format(
        (".png",),
        frozenset({"alpha", "icc", "exif", "xmp"}),
        _WORD,
        by_rows=frozenset({"icc", "exif", "xmp"}),
        room={"icc": 1 << 20},  # Pillow reads no more
    ),
    "JPEG": Format(
        (".jpg", ".jpeg"),
        frozenset({"icc", "exif", "xmp", "iptc"}),
        65500,
        room={"exif": _JPEG_SEGMENT - 6, "xmp": _JPEG_SEGMENT - 29, "iptc": _JPEG_SEGMENT - 28, "icc": 255 * 65519},
    ),
    "WEBP": Format(
        (".webp",),
        frozenset({"alpha", "icc", "exif", "xmp"}),
        16383,
        most=12_200_000,  # its encoder takes some 24 bytes a pixel
        reason="whose encoder would take more memory than 350 MB and twice the picture",
    ),
    "AVIF": Format(
        (".avif",),
        frozenset({"alpha", "icc", "exif", "xmp"}),
        1 << 15,
        by_rows=frozenset({"icc", "exif", "xmp"}),
        most=1 << 28,
        reason="of which most readers take no more",  # by the defaults of libavif
    ),
    "TIFF": Format(
        (".tif", ".tiff"),
        frozenset({"alpha", "icc", "exif", "xmp", "iptc"}),
        _WORD,
        by_rows=frozenset({"icc", "xmp", "iptc"}),
        by_parts=True,
    ),
    "PPM": Format((".ppm", ".pgm"), frozenset(), _WORD, by_rows=frozenset(), by_parts=True),
    "BMP": Format((".bmp",), frozenset(), _WORD),
}
"""By Pillow's name."""

WRITABLE = {suffix: name for name, format in FORMATS.items() for suffix in format.suffixes}
"""File name suffix -> Pillow format, for pictures written. A grey picture is a PGM whatever the suffix."""

STRIP_WRITABLE = frozenset(name for name, format in FORMATS.items() if format.by_rows is not None)
"""Those that `StripWriter` writes."""


def check_format(format: str, width: int, height: int, among: Collection[str] = tuple(FORMATS)) -> None:
    """Raise `InvalidArgument` for a format that is none of `among`, or that holds no picture of this size."""
    if format not in among:
        raise InvalidArgument(f"format is {format!r}; expected one of {', '.join(sorted(among))}")
    side, most = FORMATS[format].side, FORMATS[format].most
    if most is not None and width * height > most:
        others = " or ".join(
            name for name, other in FORMATS.items() if name != format and max(width, height) <= other.side
            and width * height <= (other.most or width * height)
        )  # fmt: skip
        raise InvalidArgument(
            f"a picture of {width}x{height} = {width * height} pixels is not written as {format}, "
            f"{FORMATS[format].reason}; the limit is {most}; choose {others}"
        )
    if not (1 <= width <= side and 1 <= height <= side):
        raise InvalidArgument(
            f"a picture of {width}x{height} pixels cannot be written as {format}, which has 1 to {side} a side; "
            "PNG, TIFF and PPM hold larger ones"
        )
