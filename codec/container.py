"""The .hgc file: magic, version, model id, picture size, quality, sections, checksums. FORMAT.md is its specification.

This module knows bytes and nothing of what the sections mean.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

from hourglass.codec.errors import ContainerError, CorruptError, InvalidArgument, LimitError
from hourglass.codec.limits import Limits
from hourglass.codec.watch import hop

MAGIC = b"\x89HGC"

LONG, SHORT = 1, 2
"""Versions of the format: they differ in the header, which in the second takes 18 bytes less."""

FEW = 8
"""Sections that a file of version 2 has at most."""

CODE = 1
"""Section kind: the entropy-coded code tensors of one tile; one section for each, in the order of the tiles."""

ALPHA = 2
"""The alpha of one tile; one section for each, in the order of the tiles, or none."""

LOSSLESS = 3
"""The whole picture in another codec's lossless format, in place of CODE and ALPHA."""

ICC, EXIF, XMP, IPTC = 128, 129, 130, 131
"""Metadata, deflated."""

ANCILLARY = 128
"""Section kinds from here on may be skipped by a reader that does not know them."""

GREY, RGB = 1, 3
"""Values of the header's `colour`."""

FileSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview"
"""The bytes of a .hgc file, or a path to one."""

_REPEATED = (CODE, ALPHA)
_KNOWN = frozenset({CODE, ALPHA, LOSSLESS})
_HEAD = struct.Struct("<4sBBIIHIB")
# magic, version, colour, width, height, quality * 100, sections, length of the model id
_SECTION = struct.Struct("<BII")  # kind, length, CRC-32
_CRC = struct.Struct("<I")

_FAMILY = "hourglass-"
"""What the ids of most models begin with. In version 2 the length of the rest says so by `_OF_FAMILY`."""

_OF_FAMILY = 128

_LONGEST = 4 + 1 + 1 + 3 * 5 + 1 + 1 + 127 + FEW * (1 + 5 + 4) + 4
"""Bytes of a header of version 2, at most."""


@dataclass(frozen=True)
class Section:
    """One entry of the section table: what it holds, its bytes, their CRC-32."""

    kind: int
    length: int
    crc: int


@dataclass(frozen=True)
class Header:
    """What stands at the front of a .hgc file.

    model: empty when the picture is stored losslessly. colour: GREY or RGB. width, height: pixels. quality: 0 to 100 in
    steps of 0.01. length: bytes of the header itself.
    """

    version: int
    model: str
    colour: int
    width: int
    height: int
    quality: float
    sections: tuple[Section, ...]
    length: int

    @property
    def lossless(self) -> bool:
        """Whether the picture is stored without loss, in another codec's format."""
        return any(section.kind == LOSSLESS for section in self.sections)

    def numbers(self, kind: int) -> list[int]:
        """Places in `sections` of those of one kind, in order."""
        return [number for number, section in enumerate(self.sections) if section.kind == kind]


@dataclass(frozen=True)
class Front:
    """A header without its sections: what is known of a picture before it is coded.

    short: whether a file of few sections has a short header, version 2 of the format.
    """

    model: str
    colour: int
    width: int
    height: int
    quality: float
    short: bool = False

    def is_short(self, count: int) -> bool:
        """Whether a file of so many sections has a short header."""
        return self.short and count <= FEW and len(self.model.removeprefix(_FAMILY)) < _OF_FAMILY

    def pack(self, sections: Sequence[Section]) -> bytes:
        name = self.model.encode("ascii")
        quality = round(self.quality * 100)
        if self.is_short(len(sections)):
            rest = name.removeprefix(_FAMILY.encode())
            data = MAGIC + bytes([SHORT, self.colour]) + b"".join(map(_varint, (self.width, self.height, quality)))
            data += bytes([len(sections), len(rest) | (_OF_FAMILY if rest != name else 0)]) + rest
            data += b"".join(bytes([s.kind]) + _varint(s.length) + _CRC.pack(s.crc) for s in sections)
            return data + _CRC.pack(zlib.crc32(data))
        head = _HEAD.pack(MAGIC, LONG, self.colour, self.width, self.height, quality, len(sections), len(name))
        table = (_SECTION.pack(section.kind, section.length, section.crc) for section in sections)
        data = b"".join([head, name, *table])
        return data + _CRC.pack(zlib.crc32(data))


def is_file(source: object) -> bool:
    """Whether something, bytes or a path, begins as a .hgc file does. Raises `OSError`."""
    if isinstance(source, (str, os.PathLike)):
        with Path(source).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    return isinstance(source, (bytes, bytearray, memoryview)) and bytes(source[: len(MAGIC)]) == MAGIC


@hop("pack")
def write(front: Front, sections: Sequence[tuple[int, bytes]]) -> bytes:
    """A whole file from its sections, (kind, payload), in the order given."""
    table = [Section(kind, len(data), zlib.crc32(data)) for kind, data in sections]
    return b"".join([front.pack(table), *(data for _, data in sections)])


class Writer:
    """A file written section by section, of which only the table is kept: the header is filled in at the end.

    How long a short header is only its sections tell, so these, which are few, are held until then.

    file: a seekable binary file. count: how many sections there will be.
    """

    def __init__(self, file: BinaryIO, front: Front, count: int) -> None:
        self._file, self._front, self._count = file, front, count
        self._table: list[Section] = []
        self._held: list[bytes] | None = [] if front.is_short(count) else None
        if self._held is None:
            file.seek(len(front.pack([Section(CODE, 0, 0)] * count)))

    @hop("pack")
    def add(self, kind: int, data: bytes) -> None:
        self._table.append(Section(kind, len(data), zlib.crc32(data)))
        if self._held is None:
            self._file.write(data)
        else:
            self._held.append(data)

    def finish(self) -> None:
        if len(self._table) != self._count:
            raise AssertionError(f"{len(self._table)} sections were written; {self._count} were announced")
        self._file.seek(0)
        self._file.write(self._front.pack(self._table))
        self._file.writelines(self._held or [])


@dataclass
class Reader:
    """A file's header, and its sections one by one as they are asked for.

    Raises `ContainerError` (no .hgc file, unknown version), `CorruptError` (truncated, checksum), `LimitError` and
    `OSError`.
    """

    source: FileSource
    limits: Limits = field(default_factory=Limits)

    @hop("unpack")
    def __post_init__(self) -> None:
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        if isinstance(self.source, (str, os.PathLike)):
            self._file = Path(self.source).open("rb")  # noqa: SIM115  # closed by `close`
            if not self._file.seekable():
                with self._file as pipe:
                    self._file = _held(pipe, self.limits.file_bytes)
            self.size = self._file.seek(0, io.SEEK_END)
        elif isinstance(self.source, (bytes, bytearray, memoryview)):
            view = memoryview(self.source)
            self._view = view.cast("B") if view.contiguous else memoryview(bytes(view))
            self.size = len(self._view)
        else:
            raise InvalidArgument(
                f"data is a {type(self.source).__name__}; expected the bytes of a .hgc file or a path"
            )
        try:
            self.limits.check_bytes(self.size)
            self.header = _parse(self._read, self.limits)
        except BaseException:
            self.close()
            raise
        self._begins = list(accumulate((s.length for s in self.header.sections), initial=self.header.length))

    def check_length(self) -> None:
        """Raise `CorruptError` when bytes are missing or left over."""
        expected = self._begins[-1]
        if self.size != expected:
            what = "it was cut short" if self.size < expected else "something was appended"
            raise CorruptError(f"file has {self.size} bytes, its header says {expected}; {what}")

    @hop("unpack")
    def payload(self, number: int) -> memoryview:
        """The bytes of a section, checked. Raises `CorruptError`."""
        section = self.header.sections[number]
        payload = self._read(self._begins[number], section.length)
        if len(payload) < section.length:
            raise CorruptError(f"file ends after {self.size} bytes, inside section {number}; it was cut short")
        _check(payload, section.crc, f"section {number} of kind {section.kind}")
        return payload

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, begin: int, length: int) -> memoryview:
        if self._file is None:
            return self._view[begin : begin + length]
        with self._lock:
            self._file.seek(begin)
            # `read` allocates all that it is asked for, before it knows that there is less.
            return memoryview(self._file.read(max(min(length, self.size - begin), 0)))


def _held(pipe: BinaryIO, most: int) -> io.BytesIO:
    """What comes out of a pipe, or the first bytes of it where there are more than `most`."""
    held = io.BytesIO()
    while held.tell() <= most and (part := pipe.read(1 << 20)):
        held.write(part)
    return held


def read_header(data: FileSource, limits: Limits | None = None) -> Header:
    """Parse and check the header; the sections themselves may be missing or damaged. Raises as `Reader`."""
    with Reader(data, limits or Limits()) as reader:
        return reader.header


def read(data: FileSource, limits: Limits | None = None) -> tuple[Header, list[memoryview]]:
    """Parse a whole file: its header, and the payload of each section with every length and checksum verified.

    Raises as `Reader`, and `CorruptError` when bytes are missing, left over or changed.
    """
    with Reader(data, limits or Limits()) as reader:
        reader.check_length()
        return reader.header, [reader.payload(number) for number in range(len(reader.header.sections))]


def deflate(data: bytes) -> bytes:
    """What the sections of metadata hold: the length as 4 bytes, then a zlib stream."""
    return _CRC.pack(len(data)) + zlib.compress(data, 9)


def inflate(payload: memoryview, most: int) -> bytes:
    """Inverse of `deflate`, to at most `most` bytes. Raises `CorruptError`, `LimitError`."""
    if len(payload) < _CRC.size:
        raise CorruptError(f"metadata section has {len(payload)} bytes; expected {_CRC.size} or more")
    (length,) = _CRC.unpack_from(payload)
    if length > most:
        raise LimitError(f"metadata has {length} bytes; there is room for {most} (Limits.metadata_bytes)")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(payload[_CRC.size :], length + 1)
    except zlib.error as exc:
        raise CorruptError(f"metadata cannot be inflated: {exc}") from exc
    if len(data) != length or not stream.eof or stream.unused_data:
        raise CorruptError(f"metadata inflates to {len(data)} bytes or more; its section says {length}")
    return data


def _parse(read: Callable[[int, int], memoryview], limits: Limits) -> Header:
    data = read(0, _HEAD.size)
    magic = bytes(data[: len(MAGIC)])
    if magic != MAGIC[: len(magic)] or not magic:
        raise ContainerError(f"not a .hgc file: it begins with {magic!r}, expected {MAGIC!r}")
    version = data[len(MAGIC)] if len(data) > len(MAGIC) else LONG
    if version not in (LONG, SHORT):
        raise ContainerError(
            f"file has format version {version}; this release reads versions {LONG} and {SHORT}; upgrade it"
        )
    if version == SHORT:
        return _parse_short(bytes(read(0, _LONGEST)), limits)
    if len(data) < _HEAD.size:
        raise CorruptError(f"file ends after {len(data)} bytes, inside its header; it was cut short")
    _, _, colour, width, height, quality, count, name_length = _HEAD.unpack(data)
    _check_count(count, limits)
    table = _HEAD.size + name_length
    end = table + count * _SECTION.size
    data = read(0, end + _CRC.size)
    if len(data) < end + _CRC.size:
        raise CorruptError(f"file ends after {len(data)} bytes, inside its header; it was cut short")
    _check(data[:end], _CRC.unpack_from(data, end)[0], "header")
    name = bytes(data[_HEAD.size : table]).decode("latin-1")
    sections = tuple(Section(*entry) for entry in _SECTION.iter_unpack(data[table:end]))
    return _sound(Header(LONG, name, colour, width, height, quality / 100, sections, end + _CRC.size), limits)


def _parse_short(data: bytes, limits: Limits) -> Header:
    """data: what a file of version 2 begins with, as much as a header may take."""
    place = len(MAGIC) + 1

    def take(count: int) -> bytes:
        nonlocal place
        place += count
        if place > len(data):
            raise CorruptError(f"file ends after {len(data)} bytes, inside its header; it was cut short")
        return data[place - count : place]

    def varint() -> int:
        value = 0
        for shift in range(0, 35, 7):
            (byte,) = take(1)
            value |= (byte & 127) << shift
            if byte < 128 and value < 1 << 32 and (byte or not shift):
                return value
            if byte < 128:
                break
        raise CorruptError(f"header is damaged: no encoder writes the number that ends at byte {place}")

    colour = take(1)[0]
    width, height, quality = varint(), varint(), varint()
    count, length = take(2)
    if count > FEW:
        raise CorruptError(f"header is damaged: it says {count} sections; in version {SHORT} there are {FEW} at most")
    name = take(length & ~_OF_FAMILY).decode("latin-1")
    if length & _OF_FAMILY:
        name = _FAMILY + name
    elif name.startswith(_FAMILY):
        raise CorruptError(f"header is damaged: it says model {name!r} in a way that no encoder writes")
    sections = tuple(Section(take(1)[0], varint(), *_CRC.unpack(take(_CRC.size))) for _ in range(count))
    end = place
    _check(data[:end], _CRC.unpack(take(_CRC.size))[0], "header")
    _check_count(count, limits)
    return _sound(Header(SHORT, name, colour, width, height, quality / 100, sections, place), limits)


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.sections:
        raise LimitError(f"file has {count} sections; the limit is {limits.sections} (Limits.sections)")


def _sound(header: Header, limits: Limits) -> Header:
    """A header whose checksum is right, if it makes sense."""
    if not all("!" <= letter <= "~" for letter in header.model):
        raise ContainerError(f"model id is {header.model!r}; expected visible ASCII characters")
    if not header.width or not header.height or header.quality > 100 or header.colour not in (GREY, RGB):
        raise ContainerError(
            f"header says {header.width}x{header.height} pixels of colour {header.colour} at quality {header.quality}; "
            "no encoder writes that"
        )
    limits.check_side(header.width, header.height)
    _check_kinds(Counter(section.kind for section in header.sections), bool(header.model))
    return header


def _varint(value: int) -> bytes:
    """7 bits a byte, the lowest first; all bytes but the last have the highest bit set."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _check_kinds(kinds: Counter[int], has_model: bool) -> None:
    """A file has tiles of one model, or one picture without loss; and each other thing once at most."""
    unknown = [kind for kind in kinds if kind < ANCILLARY and kind not in _KNOWN]
    twice = [kind for kind, count in kinds.items() if count > 1 and kind not in _REPEATED]
    coded = has_model and kinds[CODE] and kinds[ALPHA] in (0, kinds[CODE]) and not kinds[LOSSLESS]
    lossless = not has_model and kinds[LOSSLESS] and not kinds[CODE] and not kinds[ALPHA]
    if unknown or twice or not (coded or lossless):
        found = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "none"
        raise ContainerError(
            f"file {'with' if has_model else 'without'} a model has sections of kinds {found}; expected {CODE} for "
            f"each tile, with or without as many {ALPHA}, or one {LOSSLESS} and no model, and no other kind that is "
            "unknown or twice"
        )


def _check(data: bytes | memoryview, crc: int, what: str) -> None:
    actual = zlib.crc32(data)
    if actual != crc:
        raise CorruptError(f"{what} is damaged: its CRC-32 is {actual:08x}, the file says {crc:08x}")
