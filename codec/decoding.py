"""From a file to pixels: a band of tiles at a time, of a region only what it needs, and what is left of a damaged
file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, lossless, runtime
from hourglass.codec.bands import WINDOW
from hourglass.codec.container import Header, Reader
from hourglass.codec.crew import Crew, Submit, done
from hourglass.codec.errors import ContainerError, CorruptError
from hourglass.codec.image import Metadata, Picture
from hourglass.codec.quantise import Symbols
from hourglass.codec.settings import Region
from hourglass.codec.tiles import Grid, Piece, Tile, patch, unpack_first, unpack_tile

_WIDE = 32
"""Tiles across from which on memory counts for more than a per cent of time."""

_FEW = 16
"""Tiles across, at least, that are synthesised at a time: what lies above those to come need not be held meanwhile."""

_Found: TypeAlias = dict[int, "Future[Piece | None]"]
"""By number of tile the work that decodes it; None comes of what is damaged."""

KINDS = {"icc": container.ICC, "exif": container.EXIF, "xmp": container.XMP, "iptc": container.IPTC}
"""Field of `Metadata` -> kind of section."""


@dataclass
class _Stage:
    """Tiles of one band: which are decoded, and which then have all that their pixels depend on.

    region: of the picture, what `out` becomes. behind: rows and columns of tiles that are not needed any more as they
    are, once this is made. last: of its band. under_way: all of its work.
    """

    decoded: list[Tile]
    made: list[Tile]
    region: Region
    out: NDArray[np.uint8]
    behind: list[tuple[range, range]]
    last: bool
    under_way: list[Future[Any]] = field(default_factory=list)


class Decoding:
    """A file of the learned codec on its way to pixels.

    crew: works on the tiles. at_once: tiles in a band, at least. salvage: what is damaged is no error but an entry
    of `holes`, one sentence each.

    Raises `ContainerError`, in construction and whenever a section is used.
    """

    def __init__(
        self, reader: Reader, model: runtime.Model, crew: Crew, *, at_once: int = 1, salvage: bool = False
    ) -> None:
        header = reader.header
        self.grid = Grid.of(model, header.width, header.height)
        self.quality, self.grey = header.quality, header.colour == container.GREY
        self.holes: list[str] = []
        self.model, self._reader, self.crew = model, reader, crew
        self._at_once, self._salvage = at_once, salvage
        self._codes, self._alphas = header.numbers(container.CODE), header.numbers(container.ALPHA)
        if len(self._codes) != len(self.grid):
            raise ContainerError(
                f"file has {len(self._codes)} tiles; model {model.id!r} has {len(self.grid)} "
                f"for a picture of {header.width}x{header.height} pixels"
            )
        if model.colours == 1 and not self.grey:
            raise ContainerError(f"file is of a picture with colours; model {model.id!r} has grey ones only")
        reader.limits.check_tiles(len(self.grid))

    def symbols(self, tile: Tile, own: runtime.Model) -> Symbols:
        """What a tile's section holds."""
        return unpack_tile(own, self.quality, self._reader.payload(self._codes[tile.number]), tile)

    def first(self, tile: Tile, own: runtime.Model) -> NDArray[np.float32]:
        """What a tile's section begins with, see `unpack_first`."""
        return unpack_first(own, self.quality, self._reader.payload(self._codes[tile.number]), tile)

    def picture(self, region: Region, scale: int) -> Picture:
        """A region of the picture, divided by `scale`, with alpha and metadata."""
        # What is quickly checked comes first: damage is found at once.
        metadata = metadata_of(self._reader, self.holes if self._salvage else None)
        colour, alpha = self._colour(region, scale), self._alpha(region, scale)
        return Picture(colour, alpha, metadata, tuple(self.holes))

    @property
    def band_bytes(self) -> int:
        """What `strips` holds at a time of the whole picture, of pixels and latents, at most."""
        grid = self.grid
        size = self._rows_of_tiles(grid.across)
        rows = min(size * grid.tile_height, grid.height)
        pixels = rows * grid.width * (1 if self.grey else 3)
        if grid.down <= size:
            return pixels
        positions = size * grid.tile_height * grid.width // runtime.STRIDE**2
        if grid.across < _WIDE:  # the next band is begun before this one is gone
            pixels *= 2
        return pixels + positions * self.model.latent.channels * np.dtype(np.int16).itemsize

    def strips(self, region: Region, scale: int) -> Iterator[NDArray[np.uint8]]:
        """The colours of a region, divided by `scale`, from top to bottom, a band of tiles at a time."""
        found: _Found = {}
        begun: deque[_Stage] = deque()
        self.crew.model.expect_synthesis(scale)
        # The threads wait for each other, and for what becomes of a band, only while there is no next stage.
        ahead = 0 if self.crew.threads == 1 else 1
        with self.crew.at_work() as submit:
            for stage in self._stages(region, scale):
                if begun and begun[-1].last and self.grid.across >= _WIDE:  # no two bands of a wide picture are held
                    yield from self._finish(begun.popleft(), found)
                self._begin(submit, stage, scale, found)
                begun.append(stage)
                del stage
                if len(begun) > ahead:
                    yield from self._finish(begun.popleft(), found)
            while begun:
                yield from self._finish(begun.popleft(), found)

    def _rows_of_tiles(self, across: int) -> int:
        """How many make up a band that is `across` tiles wide."""
        return max(1, -(-self._at_once // across))

    def _stages(self, region: Region, scale: int) -> Iterator[_Stage]:
        x, y, width, height = region
        grid, margin = self.grid, self.model.reach * runtime.STRIDE
        wanted = _stretch(y, height, 0, grid.tile_height, grid.height)
        needed = _stretch(y, height, margin, grid.tile_height, grid.height)
        columns = _stretch(x, width, 0, grid.tile_width, grid.width)
        more_columns = _stretch(x, width, margin, grid.tile_width, grid.width)
        size = self._rows_of_tiles(len(more_columns))
        # A band is made from left to right. Above and left of where that stands no latents are held; of the next band,
        # which the filters look at, the first row of tiles is.
        few = max(_FEW, 2 * self._at_once) if size == 1 else len(columns)
        done = needed.start  # rows of tiles above here are decoded
        for first in wanted[::size]:
            rows = range(first, min(first + size, wanted.stop))
            upto = min(rows.stop + 1, needed.stop)
            begin, end = max(y, rows.start * grid.tile_height), min(y + height, rows.stop * grid.tile_height)
            band = (x, begin, width, end - begin)
            left, top, right, bottom = scaled(band, scale)
            out = np.empty((bottom - top, right - left, *(() if self.grey else (3,))), np.uint8)
            upon = more_columns.start
            for at in columns[::few]:
                part = range(at, min(at + few, columns.stop))
                decoded = range(upon, min(part.stop + 1, more_columns.stop))
                upon = decoded.stop
                last = part.stop == columns.stop
                behind = [(rows, range(max(part.start - 1, 0), part.stop - 1))]
                if last:
                    behind.append((rows, range(columns.stop - 1, more_columns.stop)))
                tiles = grid.tiles(range(done, upto), decoded)
                yield _Stage(tiles, grid.tiles(rows, part), band, out, behind, last)
            done = upto
            del out  # whoever is given it may let it go

    def parts(self, region: Region, scale: int) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
        """`strips` of windows of the region's columns, each with its place x, y among what the region becomes."""
        left = scaled(region, scale)[0]
        x, y, width, height = region
        step = WINDOW * self.grid.tile_width
        for begin in range(x // step * step, x + width, step):
            x0, x1 = max(x, begin), min(x + width, begin + step)
            down = 0
            for strip in self.strips((x0, y, x1 - x0, height), scale):
                yield x0 // scale - left, down, strip
                down += len(strip)
                del strip

    def _colour(self, region: Region, scale: int) -> NDArray[np.uint8]:
        left, top, right, bottom = scaled(region, scale)
        shape = (bottom - top, right - left)
        out = np.empty(shape if self.grey else (*shape, 3), np.uint8)
        for x, y, part in self.parts(region, scale):
            out[y : y + part.shape[0], x : x + part.shape[1]] = part
        return out

    def _begin(self, submit: Submit, stage: _Stage, scale: int, found: _Found) -> None:
        """Submit all work of a stage."""
        grid, (left, top, _, _) = self.grid, scaled(stage.region, scale)

        def synthesise(tile: Tile, own: runtime.Model) -> None:
            around = {number: found[number].result() for number in grid.around(tile) if number in found}
            pieces = {number: piece for number, piece in around.items() if piece}
            x, y, width, height = _common(stage.region, tile)
            x0, y0, x1, y1 = scaled((x, y, width, height), scale)
            into = stage.out[y0 - top : y1 - top, x0 - left : x1 - left]
            if tile.number not in pieces:
                into[:] = _hole(into)
                return
            # Only the positions that the region depends on.
            rows = (y - tile.y) // runtime.STRIDE, -(-(y + height - tile.y) // runtime.STRIDE)
            columns = (x - tile.x) // runtime.STRIDE, -(-(x + width - tile.x) // runtime.STRIDE)
            pixels = own.synthesise(patch(own, self.quality, grid, tile, pieces, (*rows, *columns)), scale)
            y0 -= (tile.y + rows[0] * runtime.STRIDE) // scale
            x0 -= (tile.x + columns[0] * runtime.STRIDE) // scale
            into[:] = as_colour(pixels[y0 : y0 + into.shape[0], x0 : x0 + into.shape[1]], self.grey)

        for tile in stage.decoded:
            found[tile.number] = submit(tile, self._piece)
            stage.under_way.append(found[tile.number])
        stage.under_way += [submit(tile, synthesise) for tile in stage.made]

    def _finish(self, stage: _Stage, found: _Found) -> Iterator[NDArray[np.uint8]]:
        """Wait for a stage, and give its band if that is whole."""
        for future in stage.under_way:
            future.result()
        for rows, columns in stage.behind:
            self._forget(found, rows, columns)
        if stage.last:
            yield stage.out

    def _piece(self, tile: Tile, own: runtime.Model) -> Piece | None:
        """None for a tile that is damaged, when salvaging."""
        try:
            symbols = self.symbols(tile, own)
        except ContainerError as exc:
            self._lose(f"tile {tile.number}", tile, exc)
            return None
        piece = Piece(symbols.latent, symbols.width)
        return piece.short() if self.grid.across >= _WIDE else piece

    def _lose(self, what: str, tile: Tile, error: ContainerError) -> None:
        if not self._salvage:
            raise error
        self.holes.append(f"{what}, {tile.width}x{tile.height} pixels at {tile.x},{tile.y}, is lost: {error}")

    def _forget(self, found: _Found, rows: range, columns: range) -> None:
        """Drop what the rows of tiles behind `rows` do not need of some columns: all but the lower edge of the last."""
        for tile in self.grid.tiles(range(max(rows.start - 1, 0), rows.stop - 1), columns):
            found.pop(tile.number, None)
        for tile in self.grid.tiles([rows.stop - 1], columns):
            if tile.number in found and (piece := found[tile.number].result()):
                found[tile.number] = done(piece.bottom(self.model.halo))

    def _alpha(self, region: Region, scale: int) -> NDArray[np.uint8] | None:
        if not self._alphas:
            return None
        x, y, width, height = region
        grid = self.grid
        rows, columns = (
            _stretch(y, height, 0, grid.tile_height, grid.height),
            _stretch(x, width, 0, grid.tile_width, grid.width),
        )
        left, top, right, bottom = scaled(region, scale)
        out = np.empty((bottom - top, right - left), np.uint8)

        def fill(tile: Tile, _: runtime.Model) -> None:
            try:
                alpha = lossless.unpack(self._reader.payload(self._alphas[tile.number]), tile.width, tile.height, 1)
                if alpha.ndim != 2:
                    raise CorruptError(f"the alpha of tile {tile.number} has an alpha itself")
            except CorruptError as exc:
                self._lose(f"the alpha of tile {tile.number}", tile, exc)
                alpha = np.full((tile.height, tile.width), 255, np.uint8)
            x0, y0, x1, y1 = scaled(_common(region, tile), scale)
            small = runtime.reduced(alpha, scale)[y0 - tile.y // scale : y1 - tile.y // scale]
            out[y0 - top : y1 - top, x0 - left : x1 - left] = small[:, x0 - tile.x // scale : x1 - tile.x // scale]

        self.crew.each(grid.tiles(rows, columns), fill)
        return out


def unstored(reader: Reader, region: Region, scale: int) -> Picture:
    """A region of a picture that is stored losslessly, divided by `scale`. Raises `CorruptError`, `LimitError`."""
    header, metadata = reader.header, metadata_of(reader)
    reader.limits.check_size(header.width, header.height)
    (number,) = header.numbers(container.LOSSLESS)
    pixels = lossless.unpack(reader.payload(number), header.width, header.height, header.colour)
    left, top, right, bottom = scaled(region, scale)
    x, y, width, height = region
    small = runtime.reduced(pixels, scale)
    pixels = small[top:bottom, left:right] if scale > 1 else pixels[y : y + height, x : x + width]
    opaque = pixels.ndim == 2 or pixels.shape[2] == 3
    colour = pixels if opaque else pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]
    alpha = None if opaque else np.ascontiguousarray(pixels[..., -1])
    return Picture(np.ascontiguousarray(colour), alpha, metadata)


def metadata_of(reader: Reader, holes: list[str] | None = None) -> Metadata:
    """A file's metadata. holes: where to say what is damaged; None makes that an error.

    Raises `CorruptError`, `LimitError`.
    """
    found: dict[str, Any] = {}
    room = reader.limits.metadata_bytes
    for name, kind in KINDS.items():
        for number in reader.header.numbers(kind):
            try:
                found[name] = container.inflate(reader.payload(number), room)
            except CorruptError as exc:
                if holes is None:
                    raise
                holes.append(f"{name} metadata is lost: {exc}")
            else:
                room -= len(found[name])
    return Metadata(**found)


def whole(header: Header) -> Region:
    """The region that is all of a picture."""
    return 0, 0, header.width, header.height


def scaled(region: Region, scale: int) -> tuple[int, int, int, int]:
    """First and last (exclusive) column and row of a region in a picture that is divided by `scale`: x, y, x, y."""
    x, y, width, height = region
    return x // scale, y // scale, -(-(x + width) // scale), -(-(y + height) // scale)


def as_colour(pixels: NDArray[np.uint8], grey: bool) -> NDArray[np.uint8]:
    """(h, w, 3) as it is, or (h, w): the one channel, or the mean of the three."""
    if not grey:
        return pixels
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    return np.asarray((pixels.sum(2, dtype=np.uint16) + 1) // 3, np.uint8)


def _common(region: Region, tile: Tile) -> Region:
    """The part of a region that lies in a tile."""
    x, y, width, height = region
    x0, y0 = max(x, tile.x), max(y, tile.y)
    return x0, y0, min(x + width, tile.x + tile.width) - x0, min(y + height, tile.y + tile.height) - y0


def _stretch(begin: int, size: int, margin: int, side: int, end: int) -> range:
    """Rows (or columns) of tiles that a stretch of pixels and a margin around it lie in."""
    return range(max(begin - margin, 0) // side, -(-min(begin + size + margin, end) // side))


def _hole(like: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A chequer of two greys, in place of what is lost."""
    rows, columns = np.ogrid[: like.shape[0], : like.shape[1]]
    chequer = np.where((rows // 8 + columns // 8) % 2, 96, 160).astype(np.uint8)
    return chequer if like.ndim == 2 else chequer[..., None]
