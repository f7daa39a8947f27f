"""The pixels that are analysed together: bands of tiles of a picture, in memory or from a file, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.strips import Strips
from hourglass.codec.tiles import Grid, Tile

WINDOW = 64
"""Tiles across that are worked on at a time where a file can be read or written by parts of rows."""

_ROWS = 64
"""Rows of pixels that a file is asked for at a time."""


@dataclass(frozen=True)
class Band:
    """Tiles that are worked on together, in raster order.

    pixels: (h, w, 3) or (h, w) uint8, what the tiles and the filters around them look at. x, y: where that begins in
    the picture.
    """

    tiles: list[Tile]
    x: int
    y: int
    pixels: NDArray[np.uint8]


def of_picture(colour: NDArray[np.uint8], grid: Grid, rows: list[range]) -> Iterator[Band]:
    """Bands of a picture in memory. rows: of tiles, for each band."""
    return (Band(grid.tiles(part), 0, 0, colour) for part in rows)


def of_strips(strips: Strips, grid: Grid, rows: list[range], halo: int) -> Iterator[Band]:
    """Bands of a picture from a file; the pixels of one are gone when the next is asked for.

    halo: pixels around its tiles that a band has, where there are some.
    """
    return _by_parts(strips, grid, rows, halo) if strips.by_parts else _by_rows(strips, grid, rows, halo)


def _by_parts(strips: Strips, grid: Grid, rows: list[range], halo: int) -> Iterator[Band]:
    for down in rows:
        # Several rows of tiles are in raster order only when each is whole.
        step = WINDOW if len(down) == 1 else grid.across
        top, bottom = _stretch(down, grid.tile_height, halo, grid.height)
        for first in range(0, grid.across, step):
            across = range(first, min(first + step, grid.across))
            left, right = _stretch(across, grid.tile_width, halo, grid.width)
            yield Band(grid.tiles(down, across), left, top, strips.part(left, top, right - left, bottom - top))


def _by_rows(strips: Strips, grid: Grid, rows: list[range], halo: int) -> Iterator[Band]:
    """Rows are read straight to where they stay: of a wide picture nothing is held twice."""
    most = max(bottom - top for top, bottom in (_stretch(part, grid.tile_height, halo, grid.height) for part in rows))
    held = np.empty((most, grid.width) if strips.grey else (most, grid.width, 3), np.uint8)
    begin = end = 0  # rows of the picture that are held
    for part in rows:
        top, bottom = _stretch(part, grid.tile_height, halo, grid.height)
        held[: end - top] = held[top - begin : end - begin]
        begin = top
        while end < bottom:
            read = strips.read(min(_ROWS, bottom - end))
            held[end - begin : end - begin + len(read)] = read
            end += len(read)
        yield Band(grid.tiles(part), 0, top, held[: bottom - top])


def _stretch(part: range, side: int, halo: int, end: int) -> tuple[int, int]:
    """First and last (exclusive) row or column of pixels of a stretch of tiles with what lies around it."""
    return max(part.start * side - halo, 0), min(part.stop * side + halo, end)
