"""The code as a description of its picture: pooled statistics of the latent, for search and comparison.

A part of the latent is enough for that: of a hyperprior model what its prior decodes first, each channel at one
position in four. So a file needs neither the other steps nor the synthesis.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import prior
from hourglass.codec.quantise import narrow
from hourglass.codec.runtime import STRIDE, Hyperprior, Model
from hourglass.codec.settings import DEFAULT_QUALITY
from hourglass.codec.tiles import Grid, Tile

LAYOUT, CELLS = 32, 4
"""Channels, the strongest, whose layout over CELLS x CELLS cells of the picture counts."""

_FLOOR = 0.05
"""Deviation, in units of the latent, below which a channel is as good as silent."""


def length(model: Model) -> int:
    """D, the number of features of a model."""
    return min(LAYOUT, _channels(model)) * CELLS**2 + _channels(model)


def sampled(model: Model, latent: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of a tile's latent (C, h, w) what the first part of a file of the default quality has, but for the rounding of
    what its prior expects."""
    values = prior.gather(latent, 0) if isinstance(model, Hyperprior) else latent
    gain, inverse = (f(DEFAULT_QUALITY)[: len(values), None, None] for f in (model.gain, model.inverse_gain))
    return np.asarray(np.rint(values * gain) * inverse, np.float32)


def describe(model: Model, grid: Grid, parts: Iterable[tuple[Tile, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Sampled latents (C, h, w) of all tiles, dequantised -> (D,) float32, of length 1.

    Two halves of equal length, so that the product of two descriptions is the mean of two cosines: the layout, how the
    means of the strongest channels over 4x4 cells of the picture differ from their mean, and the texture, the
    logarithms of each channel's root mean square, less their mean.
    """
    channels, stride = _channels(model), STRIDE * (2 if isinstance(model, Hyperprior) else 1)
    strongest = _spread(channels, min(LAYOUT, channels))
    rows, columns = -(-grid.height // stride), -(-grid.width // stride)
    means = np.zeros((len(strongest), rows, columns), np.float32)
    squares = np.zeros(channels)
    for tile, values in parts:
        core = narrow(values, channels // 4)
        top, left = tile.y // stride, tile.x // stride
        core = core[:, : -(-tile.height // stride), : -(-tile.width // stride)]
        means[:, top : top + core.shape[1], left : left + core.shape[2]] = core[strongest]
        squares += np.square(core, dtype=np.float64).sum((1, 2))
    texture = np.log(np.sqrt(squares / (rows * columns)) + _FLOOR)
    layout = np.stack(
        [
            means[:, _cell(row, rows), _cell(column, columns)].mean((1, 2))
            for row in range(CELLS)
            for column in range(CELLS)
        ],
        1,
    )
    halves = (layout - layout.mean(1, keepdims=True)).ravel(), texture - texture.mean()
    return np.concatenate([_unit(half) for half in halves]).astype(np.float32) * np.float32(np.sqrt(0.5))


def _channels(model: Model) -> int:
    return min(4 * model.core, model.latent.channels)


def _spread(channels: int, count: int) -> NDArray[np.intp]:
    """The first channels of each quarter, which are the strong ones."""
    return np.concatenate([np.arange(count // 4) + quarter * (channels // 4) for quarter in range(4)])


def _cell(number: int, size: int) -> slice:
    """Of `size` positions those of a cell; one at least, if need be of two cells."""
    begin = min(number * size // CELLS, size - 1)
    return slice(begin, max(-(-(number + 1) * size // CELLS), begin + 1))


def _unit(values: NDArray[np.floating]) -> NDArray[np.floating]:
    return values / max(float(np.linalg.norm(values)), 1e-9)
