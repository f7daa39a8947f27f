"""The .hgc file: magic, version, model id, picture size, quality, sections, checksums. FORMAT.md is its specification.

This module knows bytes and nothing of what the sections mean.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from hourglass.codec.errors import ContainerError, CorruptError
from hourglass.codec.limits import Limits

MAGIC = b"\x89HGC"
VERSION = 0

CODE = 1
"""Section kind: the entropy-coded code tensors of one tile; one section for each, in the order of the tiles."""

ANCILLARY = 128
"""Section kinds from here on may be skipped by a reader that does not know them."""

_KNOWN = frozenset({CODE})
_HEAD = struct.Struct("<4sBHIIHB")  # magic, version, sections, width, height, quality * 100, length of model id
_SECTION = struct.Struct("<BII")  # kind, length, CRC-32
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Section:
    """One entry of the section table: what it holds, its bytes, their CRC-32."""

    kind: int
    length: int
    crc: int


@dataclass(frozen=True)
class Header:
    """What stands at the front of a .hgc file.

    width, height: pixels. quality: 0 to 100 in steps of 0.01. length: bytes of the header itself.
    """

    version: int
    model: str
    width: int
    height: int
    quality: float
    sections: tuple[Section, ...]
    length: int


def write(model: str, width: int, height: int, quality: float, sections: Sequence[tuple[int, bytes]]) -> bytes:
    """A whole file from its sections, (kind, payload), in the order given."""
    name = model.encode("ascii")
    parts = [_HEAD.pack(MAGIC, VERSION, len(sections), width, height, round(quality * 100), len(name)), name]
    parts += [_SECTION.pack(kind, len(data), zlib.crc32(data)) for kind, data in sections]
    head = b"".join(parts)
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *(data for _, data in sections)])


def read_header(data: bytes | memoryview, limits: Limits | None = None) -> Header:
    """Parse and check the header; the sections themselves may be missing or damaged.

    Raises `ContainerError` (no .hgc file, unknown version), `CorruptError` (truncated, checksum) and `LimitError`.
    """
    limits = limits or Limits()
    magic = bytes(data[: len(MAGIC)])
    if magic != MAGIC[: len(magic)] or not magic:
        raise ContainerError(f"not a .hgc file: it begins with {magic!r}, expected {MAGIC!r}")
    if len(data) < _HEAD.size:
        raise CorruptError(f"file ends after {len(data)} bytes, inside its header; it was cut short")
    _, version, count, width, height, quality, name_length = _HEAD.unpack_from(data)
    if version != VERSION:
        raise ContainerError(f"file has format version {version}; this release reads version {VERSION}; upgrade it")
    table = _HEAD.size + name_length
    end = table + count * _SECTION.size
    if len(data) < end + _CRC.size:
        raise CorruptError(f"file ends after {len(data)} bytes, inside its header; it was cut short")
    _check(bytes(data[:end]), _CRC.unpack_from(data, end)[0], "header")
    name = bytes(data[_HEAD.size : table])
    if not name or not all(33 <= byte < 127 for byte in name):
        raise ContainerError(f"model id is {name!r}; expected visible ASCII characters")
    if not width or not height or quality > 10_000:
        raise ContainerError(f"header says {width}x{height} pixels at quality {quality / 100}; no encoder writes that")
    limits.check_size(width, height)
    sections = tuple(Section(*_SECTION.unpack_from(data, table + i * _SECTION.size)) for i in range(count))
    kinds = [section.kind for section in sections]
    unknown = [kind for kind in kinds if kind < ANCILLARY and kind not in _KNOWN]
    others = [kind for kind in kinds if kind != CODE]
    if unknown or len(set(others)) < len(others) or CODE not in kinds:
        found = ", ".join(map(str, sorted(set(kinds)))) or "none"
        raise ContainerError(
            f"file has sections of kinds {found}; expected kind {CODE}, none other that is unknown or twice"
        )
    return Header(version, name.decode("ascii"), width, height, quality / 100, sections, end + _CRC.size)


def read(data: bytes | memoryview, limits: Limits | None = None) -> tuple[Header, list[memoryview]]:
    """Parse a whole file: its header, and the payload of each section with every length and checksum verified.

    Raises what `read_header` raises, and `CorruptError` when bytes are missing, left over or changed.
    """
    limits = limits or Limits()
    limits.check_bytes(len(data))
    header = read_header(data, limits)
    expected = header.length + sum(section.length for section in header.sections)
    if len(data) != expected:
        what = "it was cut short" if len(data) < expected else "something was appended"
        raise CorruptError(f"file has {len(data)} bytes, its header says {expected}; {what}")
    view, begin, payloads = memoryview(data), header.length, []
    for number, section in enumerate(header.sections):
        payload = view[begin : begin + section.length]
        begin += section.length
        _check(payload, section.crc, f"section {number} of kind {section.kind}")
        payloads.append(payload)
    return header, payloads


def _check(data: bytes | memoryview, crc: int, what: str) -> None:
    actual = zlib.crc32(data)
    if actual != crc:
        raise CorruptError(f"{what} is damaged: its CRC-32 is {actual:08x}, the file says {crc:08x}")
