"""A picture with its metadata, and what is read of them from bytes: EXIF and XMP orientation, a PNG's chunks."""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import IO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import ImageError, InvalidArgument
from hourglass.codec.limits import Limits

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W) grey, (H, W, 2) grey and alpha, (H, W, 3) RGB or (H, W, 4) RGBA; uint8, alpha not premultiplied."""

Keep: TypeAlias = Literal["all", "icc", "none"]
"""Metadata kept: all, the ICC profile only, or none (then the pixels are converted to sRGB)."""

KINDS = {"icc": "ICC profile", "exif": "EXIF", "xmp": "XMP", "iptc": "IPTC"}
"""Field of `Metadata` -> what messages call it."""
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_KEPT = (b"acTL", b"tRNS", b"gAMA", b"cHRM", b"cICP", b"sRGB", b"iCCP", b"eXIf")
_SRGB_CHROMATICITIES = np.array([31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000])
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)(\d+)")
_ORIENTATION = 0x0112
_XMP_KEY = b"XML:com.adobe.xmp\0"


@dataclass(frozen=True)
class Metadata:
    """What a picture has beside its pixels, b"" where there is none."""

    icc: bytes = b""
    """ICC profile that the pixels are in; without one they are sRGB."""
    exif: bytes = b""
    """TIFF structure without the "Exif\\0\\0" prefix; orientation is 1."""
    xmp: bytes = b""
    """XMP packet; tiff:Orientation is 1."""
    iptc: bytes = b""
    """IPTC-IIM records: what Photoshop's resource 0x0404 holds."""

    @property
    def size(self) -> int:
        """Bytes of all kinds together."""
        return len(self.icc) + len(self.exif) + len(self.xmp) + len(self.iptc)


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels with their meaning."""

    colour: NDArray[np.uint8]
    """(H, W, 3) RGB or (H, W) grey, C-contiguous."""
    alpha: NDArray[np.uint8] | None = None
    """(H, W), not premultiplied; None when there is none or all is 255."""
    metadata: Metadata = field(default_factory=Metadata)
    losses: tuple[str, ...] = ()
    """One sentence for each thing that the source held and this does not."""

    def __post_init__(self) -> None:
        shape = self.colour.shape
        if self.colour.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)) or 0 in shape:
            raise InvalidArgument(
                f"colour is an array {shape} {self.colour.dtype}; expected (H, W, 3) or (H, W) uint8, not empty"
            )
        if self.alpha is not None and (self.alpha.dtype != np.uint8 or self.alpha.shape != shape[:2]):
            raise InvalidArgument(
                f"alpha is an array {self.alpha.shape} {self.alpha.dtype}; expected {shape[:2]} uint8, as its colour"
            )

    @property
    def pixels(self) -> Pixels:
        """Colour and alpha as one array."""
        return self.colour if self.alpha is None else np.dstack((self.colour, self.alpha))

    @property
    def width(self) -> int:
        return int(self.colour.shape[1])

    @property
    def height(self) -> int:
        return int(self.colour.shape[0])

    @property
    def grey(self) -> bool:
        return self.colour.ndim == 2


def reset_exif(exif: bytes) -> tuple[int, bytes]:
    """(orientation, 0 for none; EXIF with it set to 1). Raises `ValueError` or `struct.error` for broken EXIF."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        raise ValueError("no TIFF header")
    (start,) = struct.unpack_from(order + "L", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    out, orientation = bytearray(exif), 0
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, _ = struct.unpack_from(order + "HHL", exif, at)
        if tag == _ORIENTATION:
            (value,) = struct.unpack_from(order + ("L" if kind == 4 else "H"), exif, at + 8)
            orientation = orientation or value
            struct.pack_into(order + "HHLHH", out, at, tag, 3, 1, 1, 0)
    return orientation, bytes(out)


def drop_orientation(exif: bytes) -> bytes:
    """EXIF as `reset_exif` leaves it, without its orientation tag; nothing else moves."""
    order = "<" if exif[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "L", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    end = start + 2 + 12 * count
    entries = [exif[at : at + 12] for at in range(start + 2, end, 12)]
    left = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] != _ORIENTATION]
    table = struct.pack(order + "H", len(left)) + b"".join(left) + exif[end : end + 4]
    return exif[:start] + table.ljust(end + 4 - start, b"\0") + exif[end + 4 :]


def reset_xmp(xmp: bytes) -> tuple[int, bytes]:
    """(orientation, 0 for none; XMP with it set to 1)."""
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[2]) if found else 0, _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def tiff_pages(file: IO[bytes]) -> int:
    """Number of pages of a TIFF, up to where the chain of its directories breaks or returns. Pillow, which parses
    each and looks it up in a list, takes the square of it."""
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:1] == b"I" else ">", b"+" in head[:4]
    (place, entries, item) = ("Q", "Q", 20) if big else ("L", "H", 12)
    seen: set[int] = set()
    try:
        (start,) = struct.unpack_from(order + place, head, 8 if big else 4)
        while start and start not in seen:
            seen.add(start)
            file.seek(start)
            (count,) = struct.unpack(order + entries, file.read(struct.calcsize(order + entries)))
            file.seek(count * item, os.SEEK_CUR)
            (start,) = struct.unpack(order + place, file.read(struct.calcsize(order + place)))
    except (struct.error, OSError, OverflowError, ValueError):
        pass
    return len(seen)


def png_chunks(file: IO[bytes], name: str, limits: Limits, *, checked: bool = True) -> dict[bytes, bytes]:
    """Chunks of a PNG that say what its pixels mean, with IHDR; the checksums that Pillow leaves out are checked."""
    found: dict[bytes, bytes] = {}
    file.seek(len(PNG_MAGIC))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">L4s", head)
        if kind == b"IHDR" or (checked and kind in (b"PLTE", b"IDAT", b"fdAT")):
            check, left = zlib.crc32(kind), length
            while left and (part := file.read(min(left, 1 << 18))):
                check, left = zlib.crc32(part, check), left - len(part)
                if kind == b"IHDR":
                    found[kind] = part
            if left or file.read(4) != struct.pack(">L", check):
                raise ImageError(f"{name} is damaged: checksum of its {kind.decode()} chunk, or the file is cut short")
        elif kind == b"iTXt" and length > len(_XMP_KEY) and b"xmp" not in found:
            start = file.read(len(_XMP_KEY))
            left = length - len(start)
            if start == _XMP_KEY:
                limits.check_metadata(left)
                found[b"xmp"], left = _itxt(file.read(left), limits), 0
            file.seek(left + 4, os.SEEK_CUR)
        elif kind in _PNG_KEPT and kind not in found:
            limits.check_metadata(length)
            found[kind] = file.read(length)
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)
        if kind == b"IEND":
            break
    if len(found.get(b"IHDR", b"")) != 13:
        raise ImageError(f"{name} cannot be decoded as a picture: PNG without header")
    return found


def _itxt(rest: bytes, limits: Limits) -> bytes:
    """The text of an iTXt chunk, from behind its key; b"" where it is broken. Raises `LimitError`."""
    parts = rest[2:].split(b"\0", 2)  # language, translated key, text
    text = parts[2] if len(parts) == 3 else b""
    if rest[:1] != b"\1":
        return text
    try:
        text = zlib.decompressobj().decompress(text, limits.metadata_bytes + 1)
    except zlib.error:
        return b""
    limits.check_metadata(len(text))
    return text


def raw_profile(text: object) -> bytes:
    """What ImageMagick's text chunk "Raw profile type ..." holds: name, length and hexadecimal lines; b"" for none."""
    if not isinstance(text, str):
        return b""
    try:
        return bytes.fromhex("".join(text.split("\n")[3:]))
    except ValueError:
        return b""


def png_gamut(png: dict[bytes, bytes]) -> str:
    """What a PNG without profile says of its colours that is not sRGB, "" for nothing."""
    if b"iCCP" in png or b"sRGB" in png:
        return ""
    other = []
    gamma, space, code = (png.get(kind, b"") for kind in (b"gAMA", b"cHRM", b"cICP"))
    if len(gamma) == 4 and abs(struct.unpack(">L", gamma)[0] - 45455) > 1000:
        other.append(f"gamma {struct.unpack('>L', gamma)[0] / 100000:g}")
    if len(space) == 32 and np.abs(np.frombuffer(space, ">u4").astype(int) - _SRGB_CHROMATICITIES).max() > 300:
        other.append("chromaticities")
    if len(code) == 4 and code[:2] != b"\x01\x0d":
        other.append(f"colour code {code[0]}/{code[1]}")
    return " and ".join(other)


def colour_key(png: dict[bytes, bytes], mode: str) -> NDArray[np.uint16] | None:
    """The colour that a PNG's tRNS chunk makes transparent, as Pillow scales its samples; None for none."""
    key = png.get(b"tRNS")
    if key is None or mode == "P":
        return None
    depth, kind = png[b"IHDR"][8:10]
    channels = {0: 1, 2: 3}.get(kind, 0)
    if not channels or len(key) < 2 * channels:
        return None
    values = np.frombuffer(key, ">u2", channels).astype(np.uint32) & ((1 << depth) - 1)
    if depth < 8:
        values = values * 255 // ((1 << depth) - 1)
    elif depth == 16 and kind == 2:
        values >>= 8  # all that Pillow keeps
    return values.astype(np.uint16)
