"""Pictures too large to hold in memory: read and written by rows, or by parts of rows.

Read by parts, whatever the width: binary PPM and PGM of 8 bits, and TIFF of 8 bits that is not compressed. Read by rows
with the extra `large` (libvips): PNG that is not interlaced, JPEG that is not progressive, and compressed TIFF of 8
bits, grey or RGB. What needs the whole picture (an orientation to apply, alpha, a palette, 16 bits, frames) is not:
`open_strips` returns None for it, and `image.load` reads it whole.
Written by parts: PPM, PGM and TIFF; by rows: PNG and AVIF.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import avif, vips
from hourglass.codec.errors import ImageError, InvalidArgument, LossWarning
from hourglass.codec.formats import FORMATS, STRIP_WRITABLE, check_format
from hourglass.codec.limits import Limits
from hourglass.codec.metadata import KINDS, PNG_MAGIC, TIFF_MAGIC, Keep, Metadata, tiff_pages
from hourglass.codec.reader import Reader, kept, pillow_errors

if TYPE_CHECKING:
    from PIL import Image

_PNM = re.compile(rb"P([56])((?:\s+|#[^\r\n]*[\r\n])+)(\d{1,9})((?:\s+|#[^\r\n]*[\r\n])+)(\d{1,9})"
                  rb"((?:\s+|#[^\r\n]*[\r\n])+)255\s")  # fmt: skip
_CHUNK = 1 << 20


class Strips:
    """A picture read from its top row down, or, where `by_parts`, also by parts. A context manager; closing it closes
    the file.
    """

    def __init__(
        self,
        width: int,
        height: int,
        grey: bool,
        fetch: Callable[[int, int], NDArray[np.uint8]],
        close: Callable[[], None],
        metadata: Metadata | None = None,
        losses: tuple[str, ...] = (),
        part: Callable[[int, int, int, int], NDArray[np.uint8]] | None = None,
    ) -> None:
        self.width, self.height, self.grey = width, height, grey
        self.metadata, self.losses = metadata or Metadata(), losses
        self._fetch, self._close, self._next, self._part = fetch, close, 0, part

    def read(self, rows: int) -> NDArray[np.uint8]:
        """The next `rows` rows, fewer at the end and none behind it: (rows, W, 3) or, grey, (rows, W) uint8.

        Raises `ImageError` for a file that is damaged or cut short, `InvalidArgument` for no rows.
        """
        if rows < 1:
            raise InvalidArgument(f"rows is {rows}; expected at least 1")
        count = min(rows, self.height - self._next)
        shape = (count, self.width) if self.grey else (count, self.width, 3)
        if count == 0:
            return np.empty(shape, np.uint8)
        part = self._fetch(self._next, count).reshape(shape)
        self._next += count
        return part

    @property
    def by_parts(self) -> bool:
        """Whether `part` reads this file."""
        return self._part is not None

    def part(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """A rectangle: (height, width, 3) or, grey, (height, width) uint8; where `read` stands does not matter.

        Raises `ImageError` for a file that is cut short, `InvalidArgument` for what is not within the picture and for
        a file that is read by rows only.
        """
        if self._part is None:
            raise InvalidArgument("this file is read by rows only; only PPM and uncompressed TIFF are read by parts")
        if min(x, y) < 0 or min(width, height) < 1 or x + width > self.width or y + height > self.height:
            raise InvalidArgument(f"part is {width}x{height} at {x},{y}; the picture has {self.width}x{self.height}")
        return self._part(x, y, width, height).reshape((height, width) if self.grey else (height, width, 3))

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_strips(path: str | os.PathLike[str], limits: Limits | None = None, *, keep: Keep = "all") -> Strips | None:
    """Open a picture file for reading by rows; None when it must be read whole (or libvips is not installed).

    `keep` is as in `image.load`: "none" converts to sRGB. Of `limits` the side and the metadata are checked, not the
    pixels. Raises `LimitError`, `ImageError` for a file that is damaged so that its header shows it, and `OSError`.
    """
    limits = limits or Limits()
    name = os.fspath(path)
    file = Path(path).open("rb")  # noqa: SIM115 - the strips close it
    try:
        head = file.read(4096)
        opened = _open_pnm(file, head, name, limits)
        if opened is not None:
            return opened
        opened = _open_other(file, head, name, limits, keep)
    except BaseException:
        file.close()
        raise
    if opened is None or not opened.by_parts:  # libvips has opened it by itself
        file.close()
    return opened


def _check_side(width: int, height: int, limits: Limits) -> None:
    Limits(pixels=width * height, side=limits.side).check_size(width, height)


def _open_pnm(file: IO[bytes], head: bytes, name: str, limits: Limits) -> Strips | None:
    found = _PNM.match(head)
    if found is None:
        return None
    grey, width, height = found[1] == b"5", int(found[3]), int(found[5])
    if not width or not height:
        raise ImageError(f"{name} is {width}x{height} pixels; expected at least 1x1")
    _check_side(width, height, limits)
    line = width if grey else 3 * width
    held = file.seek(0, os.SEEK_END) - found.end()
    if held < line * height:
        raise ImageError(f"{name} is cut short: {held} of {line * height} bytes of pixels")
    part = _parts(file, name, lambda y: found.end() + y * line, line // width)
    return Strips(width, height, grey, lambda y, count: part(0, y, width, count), file.close, part=part)


def _parts(
    file: IO[bytes], name: str, start: Callable[[int], int], samples: int
) -> Callable[[int, int, int, int], NDArray[np.uint8]]:
    """Reads a rectangle (x, y, width, height) of uncompressed samples. start: of a row, the place of its first byte."""

    def part(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        # Not a memory map: the pages that it has touched would count as this process's memory.
        out = np.empty((height, width * samples), np.uint8)
        for number, row in enumerate(out):
            file.seek(start(y + number) + x * samples)
            if file.readinto(row.data) != row.size:  # type: ignore[attr-defined]
                raise ImageError(f"{name} is cut short")
        return out

    return part


def _open_other(file: IO[bytes], head: bytes, name: str, limits: Limits, keep: Keep) -> Strips | None:
    """Of a TIFF that is not compressed the samples are read as they lie; of all others libvips makes rows."""
    reader = Reader(name, limits, keep, keep == "none", None)
    with pillow_errors(name):
        opened = _header(file, head, reader)
        if opened is None or not _by_rows(opened, reader):
            return None
        width, height = opened.size
        _check_side(width, height, limits)
        metadata, orientation = reader.metadata(opened)
        if orientation != 1:
            return None
        reader.check_gamut()
        grey = opened.mode == "L"
        transform, icc = reader.transform(metadata.icc, opened.mode)
        start = _tiff_rows(opened, file)
    beside = kept(metadata, icc, keep), tuple(reader.losses)

    def converted(part: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return part if transform is None else _through(transform, part, grey)

    if start is not None:
        samples = 1 if grey else 3
        raw = _parts(file, name, start, samples)

        def part(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            return converted(raw(x, y, width, height).reshape(height, width, samples))

        return Strips(width, height, grey, lambda y, count: part(0, y, width, count), file.close, *beside, part)
    rows = vips.open_rows(name, name, (width, height), 1 if grey else 3)
    if rows is None:
        return None
    return Strips(width, height, grey, lambda y, count: converted(rows(y, count)), lambda: None, *beside)


def _tiff_rows(opened: Any, file: IO[bytes]) -> Callable[[int], int] | None:
    """Where each row of a TIFF begins in its file; None for one that is compressed, tiled, cut short or no TIFF."""
    tags = getattr(opened, "tag_v2", None)
    if tags is None or tags.get(259, 1) != 1 or tags.get(266, 1) != 1 or 273 not in tags:
        return None
    (width, height), samples = opened.size, len(opened.getbands())
    line, rows = width * samples, min(tags.get(278, height), height)
    strips = np.array(tags[273], np.int64).reshape(-1)
    if rows < 1 or len(strips) != -(-height // rows) or strips.min() < 0:
        return None
    last = height - rows * (len(strips) - 1)
    if max(int(strips[:-1].max(initial=0)) + rows * line, int(strips[-1]) + last * line) > file.seek(0, os.SEEK_END):
        return None
    return lambda y: int(strips[y // rows]) + y % rows * line


def _through(transform: Callable[[Image.Image], Image.Image], part: NDArray[np.uint8], grey: bool) -> NDArray[np.uint8]:
    """(H, W, C) through a colour transform."""
    from PIL import Image

    pixels = np.asarray(transform(Image.fromarray(part[:, :, 0] if grey else part)))
    return np.ascontiguousarray(pixels[:, :, 1]) if grey else pixels


def _header(file: IO[bytes], head: bytes, reader: Reader) -> Any:
    """The picture with its header read, as Pillow has it; None for a format that is not read by rows.

    Not by `Image.open`, which refuses pictures of this size.
    """
    from PIL import JpegImagePlugin, PngImagePlugin, TiffImagePlugin

    file.seek(0)
    if head.startswith(PNG_MAGIC):
        reader.read_png_chunks(file, checked=False)
        file.seek(0)
        return PngImagePlugin.PngImageFile(file)
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)
    if head[:4] in TIFF_MAGIC:
        if tiff_pages(file) > 1:
            return None
        file.seek(0)
        return TiffImagePlugin.TiffImageFile(file)
    return None


def _by_rows(opened: Any, reader: Reader) -> bool:
    """Whether nothing about the picture needs all of it at once."""
    if opened.mode not in ("L", "RGB") or opened.has_transparency_data:
        return False
    if opened.format == "PNG":
        header = reader.png[b"IHDR"]
        return header[8] == 8 and header[9] in (0, 2) and not header[12] and not {b"tRNS", b"acTL"} & {*reader.png}
    if opened.format == "JPEG":
        return "progressive" not in opened.info
    tags = opened.tag_v2
    return (
        set(tags.get(258, (1,))) == {8}
        and tags.get(262) == (1 if opened.mode == "L" else 2)  # black is zero, or RGB
        and 338 not in tags  # further samples
        and tags.get(284, 1) == 1
        and set(tags.get(339, (1,))) == {1}
        and tags.get(274, 1) == 1
        and tags.get(259, 1) in (1, 5, 8, 32773, 32946)
    )


class StripWriter:
    """Write a picture file from its top row down, to a file that need not be seekable, or where `by_parts` in any
    order to one that is. A context manager.
    """

    def __init__(
        self,
        file: IO[bytes],
        format: str,
        width: int,
        height: int,
        grey: bool,
        metadata: Metadata | None = None,
        alpha: bool = False,
    ) -> None:
        """Write what stands before the pixels. The file stays open.

        PNG and AVIF take ICC, EXIF and XMP, TIFF takes ICC, XMP and IPTC, PPM nothing: a `LossWarning` says what is
        dropped. alpha: whether `write` gets it too; AVIF alone takes it.

        Raises `InvalidArgument` for another format or a size that it cannot hold.
        """
        check_format(format, width, height, STRIP_WRITABLE)
        if alpha and format != "AVIF":
            raise InvalidArgument(f"{format} written by strips holds no alpha; only AVIF does")
        self._file, self._format, self._grey = file, format, grey
        self._size, self._next, self._filled = (width, height), 0, 0
        metadata = metadata or Metadata()
        holds = FORMATS[format].by_rows or frozenset()
        for kind, label in KINDS.items():
            if getattr(metadata, kind) and kind not in holds:
                loss = f"{format} written by strips holds no {label}; {len(getattr(metadata, kind))} bytes are dropped"
                warnings.warn(loss, LossWarning, stacklevel=2)
        if format == "PPM":
            file.write(b"P%d\n%d %d\n255\n" % (5 if grey else 6, width, height))
        elif format == "PNG":
            self._start_png(metadata)
        elif format == "AVIF":
            self._grid = avif.GridWriter(file, width, height, grey, metadata, alpha)
        else:
            file.write(_tiff_header(width, height, 1 if grey else 3, metadata))
        self._start = file.tell() if self.by_parts and file.seekable() else 0

    @property
    def by_parts(self) -> bool:
        """Whether `put` writes this format."""
        return FORMATS[self._format].by_parts

    def put(self, x: int, y: int, part: NDArray[np.uint8]) -> None:
        """Write a rectangle (h, w, 3) or, grey, (h, w) uint8 with its corner at x, y; each pixel once.

        Raises `InvalidArgument` for one that does not lie in the picture, and for a format that is written by rows.
        """
        (width, height), samples = self._size, 1 if self._grey else 3
        shape = part.shape if self._grey else part.shape[:2]
        expected = part.dtype == np.uint8 and part.shape[2:] == (() if self._grey else (3,)) and len(shape) == 2
        if not expected or min(x, y) < 0 or x + shape[1] > width or y + shape[0] > height or not self.by_parts:
            kind = "" if self.by_parts else f"; {self._format} is written by rows"
            raise InvalidArgument(
                f"part is an array {part.shape} {part.dtype} at {x},{y}; expected uint8 within {width}x{height} "
                f"pixels of {samples} samples{kind}"
            )
        for number, row in enumerate(np.ascontiguousarray(part)):
            self._file.seek(self._start + ((y + number) * width + x) * samples)
            self._file.write(row.data.cast("B"))
        self._filled += shape[0] * shape[1]

    def write(self, rows: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> None:
        """Write the next rows: (rows, W, 3) or, grey, (rows, W) uint8, and their alpha (rows, W), if there is any.

        Raises `InvalidArgument` for other shapes.
        """
        width, height = self._size
        shape = (width,) if self._grey else (width, 3)
        if rows.dtype != np.uint8 or rows.shape[1:] != shape or len(rows) > height - self._next:
            raise InvalidArgument(
                f"rows are an array {rows.shape} {rows.dtype}; "
                f"expected at most {height - self._next} rows of {shape} uint8"
            )
        self._next += len(rows)
        self._filled += len(rows) * width
        if self._format == "PNG":
            self._write_png(rows)
        elif self._format == "AVIF":
            self._grid.write(rows, alpha)
        elif len(rows):
            self._file.write(np.ascontiguousarray(rows).data.cast("B"))

    def close(self) -> None:
        """Write what stands behind the pixels. Raises `InvalidArgument` when rows are missing."""
        width, height = self._size
        if self._filled != width * height:
            raise InvalidArgument(f"{self._filled // width} of {height} rows were written")
        if self._format == "PNG":
            self._chunk(b"IDAT", self._deflate.flush())
            self._chunk(b"IEND", b"")
        elif self._format == "AVIF":
            self._grid.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _start_png(self, metadata: Metadata) -> None:
        self._deflate = zlib.compressobj(3)
        self._above = np.zeros(self._size[0] * (1 if self._grey else 3), np.uint8)
        self._file.write(PNG_MAGIC)
        self._chunk(b"IHDR", struct.pack(">LLBBBBB", *self._size, 8, 0 if self._grey else 2, 0, 0, 0))
        if metadata.icc:
            self._chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(metadata.icc))
        if metadata.exif:
            self._chunk(b"eXIf", metadata.exif)
        if metadata.xmp:
            self._chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)

    def _write_png(self, rows: NDArray[np.uint8]) -> None:
        line = self._above.size
        step = max(1, _CHUNK // line)
        for y in range(0, len(rows), step):
            part = rows[y : y + step].reshape(-1, line)
            filtered = np.empty((len(part), line + 1), np.uint8)
            filtered[:, 0] = 2  # Up: quick, and good on photographs
            np.subtract(part[0], self._above, out=filtered[0, 1:])
            np.subtract(part[1:], part[:-1], out=filtered[1:, 1:])
            self._above = part[-1].copy()
            packed = self._deflate.compress(filtered.data.cast("B"))
            if packed:
                self._chunk(b"IDAT", packed)

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self._file.write(struct.pack(">L", len(content)) + kind)
        self._file.write(content)
        self._file.write(struct.pack(">L", zlib.crc32(content, zlib.crc32(kind))))


def _tiff_header(width: int, height: int, samples: int, metadata: Metadata) -> bytes:
    """All of an uncompressed TIFF that stands before its pixels: they follow as strips, one behind another.

    A BigTIFF where the file is larger than 4 GB.
    """
    line = width * samples
    rows = max(1, min(height, (1 << 18) // line))
    strips = -(-height // rows)
    big = line * height + strips * 8 + metadata.size > (1 << 32) - (1 << 16)
    word, number = (16, "Q") if big else (4, "L")
    sizes = [line * rows] * (strips - 1) + [line * (height - rows * (strips - 1))]
    entries: list[tuple[int, int, int, bytes]] = []  # tag, type, count, content

    def add(tag: int, kind: int, *values: int) -> None:
        code = {3: "H", 4: "L", 16: "Q"}[kind]
        entries.append((tag, kind, len(values), struct.pack(f"<{len(values)}{code}", *values)))

    add(256, 4, width)
    add(257, 4, height)
    add(258, 3, *[8] * samples)
    add(259, 3, 1)  # not compressed
    add(262, 3, 1 if samples == 1 else 2)  # black is zero, or RGB
    add(273, word, *[0] * strips)  # where the strips are: filled in below
    add(277, 3, samples)
    add(278, 4, rows)
    add(279, word, *sizes)
    add(284, 3, 1)
    for tag, kind, content in ((700, 1, metadata.xmp), (33723, 7, metadata.iptc), (34675, 7, metadata.icc)):
        if content:
            entries.append((tag, kind, len(content), content))
    start, item, inline = (16, 20, 8) if big else (8, 12, 4)
    behind = start + (8 if big else 2) + item * len(entries) + (8 if big else 4)
    pixels = behind + sum(len(e[3]) + len(e[3]) % 2 for e in entries if len(e[3]) > inline)
    offsets = pixels + np.concatenate(([0], np.cumsum(sizes[:-1], dtype=np.int64)))
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries))
    if not big:
        head = struct.pack("<2sHLH", b"II", 42, 8, len(entries))
    body = b""
    for tag, kind, count, content in entries:
        if tag == 273:
            content = offsets.astype(f"<u{8 if big else 4}").tobytes()
        head += struct.pack(f"<HH{number}", tag, kind, count)
        if len(content) <= inline:
            head += content.ljust(inline, b"\0")
        else:
            head += struct.pack(f"<{number}", behind + len(body))
            body += content + bytes(len(content) % 2)
    return head + bytes(8 if big else 4) + body
