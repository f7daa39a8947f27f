"""Large AVIF files, as a grid of cells: cell for cell by Pillow's encoder, put together here.

An encoder of AV1 takes some 40 bytes a pixel, so a picture is one AV1 frame only where it is small. A larger one is
several, side by side, of about a megapixel each, which a derived item of the type "grid" puts together (ISO/IEC
23008-12, 6.6.2.3; the boxes are those of ISO/IEC 14496-12). Memory then does not grow with the picture's height, and
cells are encoded on several cores. No pixel depends on a cell beside its own.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import watch
from hourglass.codec.errors import InvalidArgument
from hourglass.codec.metadata import Metadata
from hourglass.codec.reader import pillow_of
from hourglass.codec.runtime import usable_cores

OPTIONS: dict[str, Any] = {"quality": 95, "subsampling": "4:4:4", "speed": 8}
"""How Pillow writes AVIF. Speed 8 takes half the time of 6, and files are as small."""
GREY = {"subsampling": "4:0:0"}
"""The same for a picture without colours."""

WHOLE = 5 << 20
"""Pixels up to which a picture is one frame."""

_WIDTH, _HEIGHT, _STEP = 2048, 512, 64
"""Of a cell in pixels: at most, and what it is a multiple of (ISO/IEC 23000-22, 7.3.11.4.2)."""

_AT_ONCE = 4
"""Cells that are encoded at the same time, at most."""

_GRID, _ALPHA_GRID, _EXIF, _XMP, _FIRST = 1, 2, 3, 4, 5
"""Numbers of the items; cells follow."""

_ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0"


class GridWriter:
    """Write a picture from its top row down as an AVIF file, to a file that need not be seekable.

    What describes the cells stands behind them, and when it is written they are no longer in memory.
    """

    def __init__(self, file: IO[bytes], width: int, height: int, grey: bool, metadata: Metadata, alpha: bool) -> None:
        self._file, self._width, self._height, self._grey, self._alpha = file, width, height, grey, alpha
        self._metadata = metadata
        self._cell = _size(width, _WIDTH), _size(height, _HEIGHT)
        self._across, self._down = -(-width // self._cell[0]), -(-height // self._cell[1])
        self._buffer = np.empty((self._cell[1], width, (1 if grey else 3) + alpha), np.uint8)
        self._filled = self._rows = self._position = 0
        self._properties: list[list[bytes]] = []  # of a cell's colours, and of its alpha
        self._places: list[list[tuple[int, int]]] = [[], []]  # of their cells in the file: offset, length

    def write(self, colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> None:
        """Write the next rows: (rows, W, 3) or, grey, (rows, W) uint8, and (rows, W) alpha where there is one."""
        channels = self._buffer.shape[2] - self._alpha
        colour, done = colour.reshape(-1, self._width, channels), 0
        while done < len(colour):
            count = min(len(colour) - done, len(self._buffer) - self._filled)
            into = self._buffer[self._filled : self._filled + count]
            into[..., :channels] = colour[done : done + count]
            if alpha is not None:
                into[..., -1] = alpha[done : done + count]
            self._filled, self._rows, done = self._filled + count, self._rows + count, done + count
            if self._filled == len(self._buffer) or self._rows == self._height:
                self._write_cells()

    def close(self) -> None:
        """Write what stands behind the cells, when all rows are there."""
        grid = struct.pack(">BBBBLL", 0, 1, self._down - 1, self._across - 1, self._width, self._height)
        contents = {_GRID: grid}
        if self._alpha:
            contents[_ALPHA_GRID] = grid
        if self._metadata.exif:
            contents[_EXIF] = bytes(4) + self._metadata.exif  # its TIFF header is 0 bytes on
        if self._metadata.xmp:
            contents[_XMP] = self._metadata.xmp
        places = {number: self._put(content) for number, content in contents.items()}
        places |= enumerate([*self._places[0], *self._places[1]], _FIRST)
        self._file.write(self._meta(places))

    def _write_cells(self) -> None:
        """Encode the row of cells in the buffer; what is missing right of it and below repeats the picture's edge."""
        watch.check()
        self._buffer[self._filled :] = self._buffer[self._filled - 1]
        self._filled = 0
        cells = [self._buffer[:, at : at + self._cell[0]] for at in range(0, self._width, self._cell[0])]
        missing = self._cell[0] - cells[-1].shape[1]
        cells[-1] = np.pad(cells[-1], ((0, 0), (0, missing), (0, 0)), "edge")
        with ThreadPoolExecutor(min(_AT_ONCE, usable_cores())) as pool:
            for encoded in pool.map(self._encode, cells):
                for places, data in zip(self._places, encoded, strict=False):
                    self._add(places, data)

    def _encode(self, cell: NDArray[np.uint8]) -> list[bytes]:
        """A cell (h, w, C) as AVIF files, one of its colours and one of its alpha."""
        colour = np.ascontiguousarray(cell[..., : cell.shape[2] - self._alpha])
        layers = [colour[..., 0] if self._grey else colour]
        if self._alpha:
            layers.append(np.ascontiguousarray(cell[..., -1]))
        files = []
        for number, layer in enumerate(layers):
            options = OPTIONS | (GREY if layer.ndim == 2 else {}) | {"max_threads": 1}
            if not number and self._metadata.icc:
                options["icc_profile"] = self._metadata.icc
            out = io.BytesIO()
            try:
                pillow_of(layer, None).save(out, "AVIF", **options)
            except (OSError, ValueError, MemoryError) as exc:
                size = f"{self._width}x{self._height}"
                raise InvalidArgument(f"a picture of {size} pixels cannot be written as AVIF: {exc}") from exc
            files.append(out.getvalue())
        return files

    def _add(self, places: list[tuple[int, int]], file: bytes) -> None:
        """Take the frame out of a cell's file, and from the first one what describes all of them."""
        found = {kind: content for kind, _, content in _boxes(file)}
        if not self._position:
            self._position = self._file.write(_box(b"ftyp", found[b"ftyp"]))
        if not places:
            inner = {kind: content for kind, _, content in _boxes(found[b"meta"][4:])}
            (described,) = (content for kind, _, content in _boxes(inner[b"iprp"]) if kind == b"ipco")
            self._properties.append([box for _, box, _ in _boxes(described)])
        places.append(self._put(found[b"mdat"]))

    def _put(self, content: bytes) -> tuple[int, int]:
        """Write a box of data; the place of its content in the file."""
        place = self._position + 8, len(content)
        self._position += self._file.write(_box(b"mdat", content))
        return place

    def _meta(self, places: dict[int, tuple[int, int]]) -> bytes:
        """The box that says what all items are and where."""
        count = self._across * self._down
        cells = {_GRID: range(_FIRST, _FIRST + count), _ALPHA_GRID: range(_FIRST + count, _FIRST + 2 * count)}
        kinds = {_GRID: b"grid", _ALPHA_GRID: b"grid", _EXIF: b"Exif", _XMP: b"mime"}
        entries, references = [], []
        for number in places:
            kind, flags = kinds.get(number, b"av01"), int(number >= _FIRST)  # cells by themselves are not shown
            behind = b"application/rdf+xml\0" if number == _XMP else b""
            entries.append(_box(b"infe", struct.pack(">LHH", 2 << 24 | flags, number, 0), kind, b"\0", behind))
            if number in cells:
                references.append(_reference(b"dimg", number, cells[number]))
            if number in (_EXIF, _XMP):
                references.append(_reference(b"cdsc", number, [_GRID]))
            if number == _ALPHA_GRID:
                references.append(_reference(b"auxl", number, [_GRID]))
        locations = b"".join(struct.pack(">HHHQL", number, 0, 1, *place) for number, place in places.items())
        head = struct.pack(">L4s12xx", 0, b"pict")
        return _box(
            b"meta",
            bytes(4),
            _box(b"hdlr", bytes(4), head),
            _box(b"pitm", bytes(4), struct.pack(">H", _GRID)),
            _box(b"iloc", bytes(4), struct.pack(">HH", 0x8400, len(places)), locations),
            _box(b"iinf", bytes(4), struct.pack(">H", len(entries)), *entries),
            _box(b"iref", bytes(4), *references),
            self._item_properties(cells),
        )

    def _item_properties(self, cells: dict[int, range]) -> bytes:
        """What describes cells and grids: a grid has its cells' properties but for their size and coding."""
        size = _box(b"ispe", bytes(4), struct.pack(">LL", self._width, self._height))
        properties: list[bytes] = []
        associations = []

        def associate(number: int, own: list[bytes]) -> None:
            indices = []
            for box in own:
                if box not in properties:
                    properties.append(box)
                indices.append(properties.index(box) + 1 | (0x80 if box[4:8] == b"av1C" else 0))  # essential
            associations.append(struct.pack(">HB", number, len(indices)) + bytes(indices))

        for (grid, numbers), described in zip(cells.items(), self._properties, strict=False):
            role = [_box(b"auxC", bytes(4), _ALPHA)] if grid == _ALPHA_GRID else []
            shared = [box for box in described if box[4:8] not in (b"ispe", b"av1C")]
            associate(grid, [size, *shared, *role])
            for number in numbers:
                associate(number, [*described, *role])
        associations.sort()
        table = struct.pack(">L", len(associations)) + b"".join(associations)
        return _box(b"iprp", _box(b"ipco", *properties), _box(b"ipma", bytes(4), table))


def _size(whole: int, most: int) -> int:
    """Side of cells of which equally many cover a side of the picture, none without need."""
    part = -(-whole // -(-whole // most))
    return -(-part // _STEP) * _STEP


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, all and content of each box, one behind the other."""
    at = 0
    while at < len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        yield kind, data[at : at + length], data[at + 8 : at + length]
        at += length


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">L4s", 8 + len(content), kind) + content


def _reference(kind: bytes, source: int, targets: range | list[int]) -> bytes:
    return _box(kind, struct.pack(f">HH{len(targets)}H", source, len(targets), *targets))
