"""One tile of a picture: which there are, its symbols <-> the bytes of its section, its latents and those around it.

A picture is cut into tiles that are coded each by itself. The transforms look a little beyond a tile's edges, so that
no seam shows.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import entropy, prior, runtime
from hourglass.codec.errors import CodeError, ContainerError, CorruptError, HourglassError
from hourglass.codec.prior import FINE, Part, quarters
from hourglass.codec.quantise import Symbols, narrow, widen
from hourglass.codec.watch import hop

_HEAD = struct.Struct("<IB")  # CRC-32 of the symbols, width

_Latent: TypeAlias = NDArray[np.float32] | NDArray[np.int16]
"""In 1/16 symbols."""

_Placed: TypeAlias = tuple["Piece", int, int]
"""A piece, and where in a patch it begins: row and column."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture that is coded by itself: its number in raster order, corner and size in pixels."""

    number: int
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Grid:
    """The tiles of a picture of width x height pixels: as few as sides of at most `side` pixels allow, of equal size;
    `of` says that for a model.

    That is a multiple of 64, up to which the last ones of a row or column may lack something. Two cores then have equal
    work with a picture of two tiles, and no picture ends in slivers.
    """

    width: int
    height: int
    side: int

    @staticmethod
    def of(model: runtime.Model, width: int, height: int) -> Grid:
        """Small pictures are one tile where the model has it so: there a border costs most, and memory is no matter."""
        return Grid(width, height, model.whole if max(width, height) <= model.whole else model.side)

    @property
    def across(self) -> int:
        return -(-self.width // self.side)

    @property
    def down(self) -> int:
        return -(-self.height // self.side)

    @property
    def tile_width(self) -> int:
        return _even(self.width, self.across)

    @property
    def tile_height(self) -> int:
        return _even(self.height, self.down)

    def __len__(self) -> int:
        return self.across * self.down

    def tile(self, row: int, column: int) -> Tile:
        across, down = self.tile_width, self.tile_height
        x, y = column * across, row * down
        return Tile(row * self.across + column, x, y, min(across, self.width - x), min(down, self.height - y))

    def tiles(self, rows: Iterable[int] | None = None, columns: Iterable[int] | None = None) -> list[Tile]:
        """Those of some rows and columns, by default of all, in raster order."""
        places = itertools.product(
            range(self.down) if rows is None else rows, range(self.across) if columns is None else list(columns)
        )
        return [self.tile(row, column) for row, column in places]

    def around(self, tile: Tile) -> list[int]:
        """Numbers of a tile and of its neighbours."""
        row, column = divmod(tile.number, self.across)
        rows, columns = (range(max(at - 1, 0), min(at + 2, n)) for at, n in ((row, self.down), (column, self.across)))
        return [down * self.across + across for down, across in itertools.product(rows, columns)]

    def bands(self, at_once: int) -> list[range]:
        """All rows of tiles, in runs that have `at_once` tiles or more, where there are so many."""
        size = max(1, -(-at_once // self.across))
        return [range(row, min(row + size, self.down)) for row in range(0, self.down, size)]


@dataclass(frozen=True)
class Piece:
    """Rows of a tile's latent (c, h, w), dequantised in 1/16 symbols, and the number of the first among the tile's."""

    latent: _Latent
    width: int
    top: int = 0

    def short(self) -> Piece:
        """The same in half the memory, if int16 can hold it."""
        latent = self.latent.astype(np.int16)
        return Piece(latent, self.width, self.top) if np.array_equal(latent, self.latent) else self

    def bottom(self, count: int) -> Piece:
        """The last `count` rows alone."""
        skipped = self.latent.shape[1] - count
        return Piece(self.latent[:, skipped:].copy(), self.width, skipped)


@hop("synthesis")
def patch(
    model: runtime.Model,
    quality: float,
    grid: Grid,
    tile: Tile,
    pieces: Mapping[int, Piece],
    window: tuple[int, int, int, int] | None = None,
) -> runtime.Patch:
    """The latents of a tile and, where there are some, of its model's `halo` around it, dequantised.

    pieces: by number those of the tile and its neighbours; what is missing is zero. window: first and last row, first
    and last column (exclusive) of those of the tile that are wanted; the patch has what these depend on.
    """
    halo, tall, wide = model.halo, grid.tile_height // runtime.STRIDE, grid.tile_width // runtime.STRIDE
    rows, columns = -(-tile.height // runtime.STRIDE), -(-tile.width // runtime.STRIDE)
    edge = model.edge // runtime.STRIDE
    if tile.y + tile.height == grid.height:  # what the transforms see ends a little behind the picture
        rows += -rows % edge
    if tile.x + tile.width == grid.width:
        columns += -columns % edge
    y0, y1, x0, x1 = window or (0, rows, 0, columns)
    top = max(y0 - model.reach, -halo if tile.y else 0)
    left = max(x0 - model.reach, -halo if tile.x else 0)
    bottom = min(y1 + model.reach, rows + (halo if tile.y + tile.height < grid.height else 0))
    right = min(x1 + model.reach, columns + (halo if tile.x + tile.width < grid.width else 0))
    height, width = bottom - top, right - left
    row, column = divmod(tile.number, grid.across)
    placed: list[_Placed] = []
    for number in grid.around(tile):
        if number in pieces:
            y, x = (number // grid.across - row) * tall - top, (number % grid.across - column) * wide - left
            placed.append((pieces[number], y + pieces[number].top, x))
    unit = model.inverse_gain(quality) * np.float32(1 / FINE)
    core = np.zeros((1, 4 * model.core, height, width), np.float32)
    _dequantise(placed, (0, height, 0, width), 0, unit, core[0])
    keep, others = (y0 - top, y1 - top, x0 - left, x1 - left), max(model.latent.channels - 4 * model.core, 0)
    if model.widths[pieces[tile.number].width] <= model.core:
        return runtime.Patch(core, np.zeros((1, others, 1, 1), np.float32), keep, quality)
    # Of what stands beside the core no position looks at another, but for a post-filter, which sees a ring around.
    rows_seen = max(keep[0] - model.ring, 0), min(keep[1] + model.ring, height)
    columns_seen = max(keep[2] - model.ring, 0), min(keep[3] + model.ring, width)
    size = (rows_seen[1] - rows_seen[0], columns_seen[1] - columns_seen[0]) if model.lone_rest else (height, width)
    rest = np.zeros((1, others, *size), np.float32)
    wanted = rest[0] if model.lone_rest else rest[0][:, slice(*rows_seen), slice(*columns_seen)]
    _dequantise(placed, (*rows_seen, *columns_seen), model.core, unit, wanted)
    return runtime.Patch(core, rest, keep, quality)


def _dequantise(
    placed: list[_Placed],
    window: tuple[int, int, int, int],
    first: int,
    unit: NDArray[np.float32],
    into: NDArray[np.float32],
) -> None:
    """Write what pieces stand for, before synthesis, into zeros (C', h, w): of a window of rows and columns of a patch
    the channels of each quarter from number `first` on, as many as there is room for.

    unit: (C,), what 1/16 symbol of each of the model's channels is worth.
    """
    groups = quarters(into)
    room = groups.shape[1]
    for piece, y, x in placed:
        latent, (_, *place) = _common(piece.latent, y, x, window)
        coded = quarters(latent)[:, first : first + room] if latent.size else latent
        if coded.size:
            groups[:, : coded.shape[1], *place] = coded
    # All at once: products of parts that are two columns wide take as long as of all the rest.
    groups *= unit.reshape(4, -1, 1, 1)[:, first : first + room]


def _common(
    latent: _Latent, y: int, x: int, window: tuple[int, int, int, int]
) -> tuple[_Latent, tuple[slice, slice, slice]]:
    """What of a latent (C, h, w) that begins at y, x lies in a window of rows and columns, and where in that."""
    top, bottom, left, right = window
    part = latent[:, max(top - y, 0) : max(bottom - y, 0), max(left - x, 0) : max(right - x, 0)]
    down, across = max(y - top, 0), max(x - left, 0)
    return part, np.s_[:, down : down + part.shape[1], across : across + part.shape[2]]


def pack_tile(model: runtime.Model, quality: float, symbols: Symbols) -> bytes:
    """Symbols -> the bytes of a section. Raises `CodeError`."""
    encoder = entropy.Encoder(model.tables)
    try:
        for values, part in symbols.parts:
            encoder.put(values, part.tables)
    except ValueError as exc:
        raise CodeError(f"code of model {model.id!r} at quality {quality:g} cannot be coded: {exc}") from exc
    return _HEAD.pack(_crc(symbols), symbols.width) + encoder.finish()


def unpack_tile(model: runtime.Model, quality: float, section: memoryview, tile: Tile) -> Symbols:
    """Inverse of `pack_tile`. Raises `ContainerError`, `CorruptError`."""
    crc, width, decoder = _opened(model, section, tile)
    parts: list[tuple[NDArray[np.int16], Part]] = []

    def decode(part: Part) -> NDArray[np.int16]:
        parts.append((decoder.get(part.tables), part))
        return parts[-1][0]

    tensors, latent = prior.walk(model, quality, tile.width, tile.height, width, decode)
    decoder.finish()
    _check_locations(tensors, tile, CorruptError)
    symbols = Symbols(tensors, width, parts, latent)
    if _crc(symbols) != crc:
        raise CorruptError(f"the decoded symbols of tile {tile.number} do not match their checksum")
    return symbols


def unpack_first(model: runtime.Model, quality: float, section: memoryview, tile: Tile) -> NDArray[np.float32]:
    """The first part of a tile's latent, dequantised, see `prior.first_of_latent`: (C, h, w) float32.

    Its checksum, that of all symbols, is not looked at. Raises `ContainerError`, `CorruptError`.
    """
    _, width, decoder = _opened(model, section, tile)
    values = prior.first_of_latent(
        model, quality, tile.width, tile.height, width, lambda part: decoder.get(part.tables)
    )
    values = widen(values, model.latent.channels)
    values *= model.inverse_gain(quality)[: len(values), None, None]
    return values


def _opened(model: runtime.Model, section: memoryview, tile: Tile) -> tuple[int, int, entropy.Decoder]:
    """CRC-32 of a tile's symbols, index of its width, and the decoder of them."""
    if len(section) < _HEAD.size:
        raise ContainerError(f"code section has {len(section)} bytes; expected {_HEAD.size} or more")
    crc, width = _HEAD.unpack_from(section)
    if width >= len(model.widths):
        raise ContainerError(f"tile {tile.number} has width {width}; model {model.id!r} has {len(model.widths)}")
    return crc, width, entropy.Decoder(section[_HEAD.size :], model.tables)


def walk_tile(
    model: runtime.Model, quality: float, tensors: Mapping[str, NDArray[np.int16]], coded: int, tile: Tile
) -> Symbols:
    """What the prior makes of a tile's symbols that came from outside: of all channels, and how many are coded.

    Raises `CodeError`.
    """
    if coded not in [4 * count for count in model.widths]:
        expected = ", ".join(str(4 * count) for count in model.widths)
        name = model.coded.name if model.coded else model.latent.name
        raise CodeError(f"{name} of tile {tile.number} is {coded}; expected one of {expected}")
    whole = tensors["y"]
    y = narrow(whole, coded // 4)
    if np.count_nonzero(y) != np.count_nonzero(whole):
        raise CodeError(f"tile {tile.number} has {coded} channels that are coded, and symbols in other ones")
    _check_locations(tensors, tile, CodeError)
    rows, columns = (-(-size // model.padding) * model.padding // runtime.STRIDE for size in (tile.height, tile.width))
    padded = np.zeros((len(y), rows, columns), np.int16)
    padded[:, : y.shape[1], : y.shape[2]] = y
    given = {**tensors, "y": padded}
    parts: list[tuple[NDArray[np.int16], Part]] = []

    def take(part: Part) -> NDArray[np.int16]:
        parts.append((part.of(given[part.name]), part))
        return parts[-1][0]

    index = model.widths.index(coded // 4)
    _, latent = prior.walk(model, quality, tile.width, tile.height, index, take)
    return Symbols({**tensors, "y": y}, index, parts, latent)


def _check_locations(tensors: Mapping[str, NDArray[np.int16]], tile: Tile, error: type[HourglassError]) -> None:
    """Raise `error` unless every location is one of a patch of 2x2."""
    if "l" in tensors and ((tensors["l"] < 0) | (tensors["l"] > 3)).any():
        raise error(f"a location of tile {tile.number} is outside 0 to 3")


def conceal(colour: NDArray[np.uint8], alpha: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """`colour` (H, W) or (H, W, 3) with something smooth where `alpha` (H, W) is 0: what lies there cannot be seen.

    Each block of `side` pixels by itself: hidden pixels get the mean of the visible ones near them, from a pyramid of
    means of 2x2.
    """
    out = colour.copy()
    for y, x in itertools.product(range(0, alpha.shape[0], side), range(0, alpha.shape[1], side)):
        visible = alpha[y : y + side, x : x + side] > 0
        if not visible.all():
            block = out[y : y + side, x : x + side]
            smooth = _filled(block.reshape(*visible.shape, -1).astype(np.float32), visible.astype(np.float32))
            block[~visible] = np.rint(smooth).astype(np.uint8).reshape(block.shape)[~visible]
    return out


def _filled(values: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """values (h, w, c) where weight (h, w) is 1; elsewhere the mean of a coarser and coarser neighbourhood."""
    if weight.all() or not weight.any():
        return values
    height, width = weight.shape
    even = ((0, height % 2), (0, width % 2))
    sums = _halved(np.pad(values * weight[..., None], (*even, (0, 0))))
    counts = _halved(np.pad(weight, even)[..., None])
    coarse = np.asarray(sums / np.maximum(counts, 1), np.float32)
    coarse = _filled(coarse, np.asarray(counts[..., 0] > 0, np.float32))
    fine = coarse.repeat(2, 0).repeat(2, 1)[:height, :width]
    return np.where(weight[..., None] > 0, values, fine)


def _halved(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of 2x2 neighbours."""
    halved: NDArray[np.float32] = values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]
    return halved


def _even(size: int, parts: int) -> int:
    """The smallest multiple of 64 of which `parts` make up `size`."""
    return -(-size // (runtime.PADDING * parts)) * runtime.PADDING


def _crc(tile: Symbols) -> int:
    """CRC-32 of all symbols that are coded, tensor by tensor in the order of the model's."""
    crc = 0
    for tensor in tile.tensors.values():
        crc = zlib.crc32(np.ascontiguousarray(tensor, "<i2").data, crc)
    return crc
