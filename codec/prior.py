"""The steps of the prior: one loop that encoder and decoder share, so that both see the same integers.

The latent is coded in four steps. Its channels form four groups (quarters, in order), its positions four phases (2 *
parity of the row + parity of the column); at phase p, step k codes group k XOR p. A part, the elements of one step,
is an array (c, h/2, w/2) phase by phase.

Channels that are strong come first in each quarter. Of a tile where the last ones of each are all zero only the first
n channels of each quarter are worked on, c = 4 n in all; the others have symbols and means of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.runtime import Model
from hourglass.codec.watch import hop

_Number = TypeVar("_Number", bound=np.generic)

STEPS = 4

FINE = 16
"""Means, and with them dequantised symbols, are in units of 1/FINE of a symbol."""

KNOWN = 2047
"""Largest magnitude, in the prior's units, of what is known of the latent."""

Choose: TypeAlias = Callable[[int, NDArray[np.uint8], NDArray[np.int16]], NDArray[np.int16]]
"""(step, tables, means in 1/FINE symbols) -> symbols; all three arrays are parts."""


@hop("prior")
def walk(
    model: Model, quality: float, z: NDArray[np.int16], rows: int, columns: int, width: int, choose: Choose
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Run the prior step by step; `choose` makes each part's symbols, by rounding or from a file.

    z: symbols of the hyper-latent (Z, h, w). rows, columns: of the latent that are coded; those behind them, up to 4 h
    and 4 w, have symbols 0 and are worth their means. width: index into `model.widths`. Returns the symbols
    (c, rows, columns) and the dequantised latent times gain in 1/FINE symbols (c, 4 h, 4 w) float32, exact.
    """
    units = model.units(quality, width)
    channels = 4 * model.widths[width]
    shape = (channels, 4 * z.shape[1], 4 * z.shape[2])
    symbols = np.empty(shape, np.int16)
    known = np.zeros(shape, np.int16)
    latent = np.empty(shape, np.float32)
    features = model.no_features
    for step in range(STEPS):
        level, mean, features = model.step(step, z, known, features, units)
        table = model.level_tables[level]
        for part, (_, down, across) in zip(np.split(table, 4), places(channels, step), strict=True):
            part[:, -((down.start - rows) // 2) :] = 0
            part[:, :, -((across.start - columns) // 2) :] = 0
        chosen = choose(step, table, mean)
        fine = chosen.astype(np.int32)
        fine *= FINE
        fine += mean
        scatter(chosen, symbols, step)
        scatter(fine, latent, step)
        if step + 1 < STEPS:
            scatter(known_of(fine, units.known_unit[step]), known, step)
    return symbols[:, :rows, :columns], latent


def known_of(fine: NDArray[np.int32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the prior gets to know of dequantised symbols: in its own units, integers, rounded.

    Exact: 15 bits times 9; the sum and its floor are one IEEE operation each.
    """
    known: NDArray[np.float32] = np.clip(fine, -32767, 32767).astype(np.float32)
    known *= unit
    known += np.float32(0.5)
    np.floor(known, out=known)
    return np.clip(known, -KNOWN, KNOWN, out=known)


def places(channels: int, step: int) -> Iterator[tuple[slice, slice, slice]]:
    """Channels, rows and columns that `step` codes, for each phase."""
    size = channels // 4
    for phase in range(4):
        group = step ^ phase
        yield slice(group * size, (group + 1) * size), slice(phase // 2, None, 2), slice(phase % 2, None, 2)


def scatter(part: NDArray[Any], whole: NDArray[Any], step: int) -> None:
    """Put a part at its places in an array (C, h, w)."""
    for values, place in zip(np.split(part, 4), places(len(whole), step), strict=True):
        whole[place] = values


def gather(whole: NDArray[_Number], step: int) -> NDArray[_Number]:
    """The part of an array (C, h, w) that `step` codes."""
    return np.concatenate([whole[place] for place in places(len(whole), step)])
