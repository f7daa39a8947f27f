"""Which table codes a symbol: one walk over the parts of a tile's code, which encoder and decoder share, so that both
see the same integers.

Of a classic model a tile has one part, the symbols of y, each channel with its table; and where it has a location map
a second, the locations of those that are not 0.

Of a hyperprior model the hyper-latent z comes first, of some models in two parts: the positions of one colour of a
chessboard, which say what to expect at those of the other. Then comes the latent, in four steps. Its channels form
four groups (quarters, in order), its positions four phases (2 * parity of the row + parity of the column); at phase p,
step k codes group k XOR p. The elements of one step are an array (c, h/2, w/2) phase by phase.

Channels that are strong come first in each quarter. Of a tile where the last ones of each are all zero only the first
n channels of each quarter are worked on, c = 4 n in all; the others have symbols and means of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import ModelError
from hourglass.codec.runtime import Classic, Hyperprior, Model, Units
from hourglass.codec.watch import hop

_Number = TypeVar("_Number", bound=np.generic)

STEPS = 4

FINE = 16
"""Means, and with them dequantised symbols, are in units of 1/FINE of a symbol."""

KNOWN = 2047
"""Largest magnitude, in the prior's units, of what is known of the latent."""


@dataclass(frozen=True)
class Part:
    """Some symbols of a tile and how they are coded.

    name: of the code tensor that they belong to. tables: for each symbol. mean: in 1/FINE symbols what was subtracted
    before rounding, or None for nothing. step: of those that code the tensor. where: (h, w), positions that are coded,
    in raster order, (C, n) in all.
    """

    name: str
    tables: NDArray[np.uint8]
    mean: NDArray[np.int16] | None = None
    step: int | None = None
    where: NDArray[np.bool_] | None = None

    def of(self, whole: NDArray[_Number]) -> NDArray[_Number]:
        """The elements of a tensor (C, h, w) that this part codes."""
        if self.where is not None:
            return whole[:, self.where]
        return whole if self.step is None else gather(whole, self.step)


Choose: TypeAlias = Callable[[Part], NDArray[np.int16]]
"""The symbols of a part, of the shape of its tables."""


@hop("prior")
def walk(
    model: Model, quality: float, width: int, height: int, index: int, choose: Choose
) -> tuple[dict[str, NDArray[np.int16]], NDArray[np.float32]]:
    """Go through the parts of a tile of width x height pixels. `choose` makes their symbols, by rounding or from a
    file.

    index: into `model.widths`. Returns by name the symbols, of the latent the coded channels; and what the synthesis
    takes before the inverse gain: (c, h, w) float32 in 1/FINE symbols, exact, with positions that pad the picture.
    """
    if isinstance(model, Hyperprior):
        units = model.units(quality, index)
        z, known = _hyper(model, quality, model.hyper.shape(width, height), units, choose)
        _, rows, columns = model.latent.shape(width, height)
        y, latent = _steps(model, known, rows, columns, model.widths[index], units, choose)
        return {"y": y, "z": z}, latent
    if not isinstance(model, Classic):
        raise ModelError(f"model {model.id!r} is of no family that this release knows; upgrade")
    shape = model.latent.shape(width, height)
    y = choose(Part("y", np.broadcast_to(model.symbol_tables(quality)[:, None, None], shape)))
    symbols, fine = {"y": y}, y.astype(np.float32) * FINE
    if model.located:
        tables = np.where(y, model.location_tables[:, None, None], 0).astype(np.uint8)
        symbols["l"] = choose(Part("l", tables))
        fine = np.concatenate([fine, symbols["l"].astype(np.float32) * FINE])
    return symbols, fine


class _Enough(Exception):  # ends a walk, and is no error
    def __init__(self, part: Part, symbols: NDArray[np.int16]) -> None:
        self.part, self.symbols = part, symbols


def first_of_latent(
    model: Model, quality: float, width: int, height: int, index: int, choose: Choose
) -> NDArray[np.float32]:
    """`walk` to the end of the first part that codes the latent, and no further: its values before the inverse gain.

    Of a hyperprior model these are a quarter of the latent, each channel at one position in four: (c, h/2, w/2) float32
    in symbols; of a classic one all of it.
    """

    def until(part: Part) -> NDArray[np.int16]:
        symbols = choose(part)
        if part.name == "y":
            raise _Enough(part, symbols)
        return symbols

    try:
        walk(model, quality, width, height, index, until)
    except _Enough as found:
        values = found.symbols.astype(np.float32)
        return values if found.part.mean is None else values + found.part.mean * np.float32(1 / FINE)
    raise AssertionError(f"model {model.id!r} codes no latent")


def later(rows: int, columns: int) -> NDArray[np.bool_]:
    """(rows, columns): the positions of a chessboard's second colour; the first corner has the first."""
    places: NDArray[np.bool_] = np.add.outer(np.arange(rows), np.arange(columns)) % 2 == 1
    return places


def _hyper(
    model: Hyperprior, quality: float, shape: tuple[int, int, int], units: Units, choose: Choose
) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """The hyper-latent (Z, h, w): its symbols, and what the steps get to know of it.

    That are the symbols; where the model has a context for them, what they stand for in 1/FINE symbols.
    """
    tables = np.broadcast_to(model.hyper_tables(quality)[:, None, None], shape)
    if not model.contextual:
        z = choose(Part("z", tables))
        return z, z
    symbols, known = np.empty(shape, np.int16), np.zeros(shape, np.int16)
    second = later(*shape[1:])
    first = ~second
    symbols[:, first] = choose(Part("z", tables[:, first], where=first))
    known[:, first] = _fine(symbols[:, first])
    if second.any():
        level, mean = model.expect(known, units)
        level, mean = level[:, second], mean[:, second]
        symbols[:, second] = choose(Part("z", model.tables_of(level), mean, where=second))
        known[:, second] = _fine(symbols[:, second], mean)
    return symbols, known


def _fine(symbols: NDArray[np.int16], mean: NDArray[np.int16] | int = 0) -> NDArray[np.int32]:
    """Symbols and their means in 1/FINE symbols, clipped to what int16 holds."""
    fine: NDArray[np.int32] = symbols.astype(np.int32) * FINE + mean
    return np.clip(fine, -32767, 32767, out=fine)


def _steps(
    model: Hyperprior, z: NDArray[np.int16], rows: int, columns: int, width: int, units: Units, choose: Choose
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Run the prior step by step.

    z: what is known of the hyper-latent (Z, h, w). rows, columns: of the latent that are coded; those behind them, up
    to 4 h and 4 w, have symbols 0 and are worth their means. width: channels of each quarter. Returns the symbols
    (c, rows, columns) and the dequantised latent times gain in 1/FINE symbols (c, 4 h, 4 w) float32, exact.
    """
    channels = 4 * width
    shape = (channels, 4 * z.shape[1], 4 * z.shape[2])
    symbols = np.empty(shape, np.int16)
    known = np.zeros(shape, np.int16)
    latent = np.empty(shape, np.float32)
    features = model.no_features
    for step in range(STEPS):
        level, mean, features = model.step(step, z, known, features, units)
        table = model.tables_of(level)
        for part, (_, down, across) in zip(quarters(table), places(channels, step), strict=True):
            part[:, -((down.start - rows) // 2) :] = 0
            part[:, :, -((across.start - columns) // 2) :] = 0
        chosen = choose(Part("y", table, mean, step))
        fine = chosen.astype(np.int32)
        fine *= FINE
        fine += mean
        scatter(chosen, symbols, step)
        if step + 1 < STEPS:
            scatter(known_of(fine, units.known_unit[step]), known, step)
        if model.centroids is not None:
            fine += _shift(chosen, level, model.centroids)
        scatter(fine, latent, step)
    return symbols[:, :rows, :columns], latent


def _shift(symbols: NDArray[np.int16], level: NDArray[np.uint8], centroids: NDArray[np.int32]) -> NDArray[np.int32]:
    """From symbols to the centroids that they stand for, of their shape; see `Hyperprior.centroids`."""
    count = centroids.shape[1]
    which = np.clip(symbols, -(count // 2), count // 2)
    which += level * np.int16(count)
    which += np.int16(count // 2)
    return centroids.reshape(-1).take(which, mode="clip")  # never clipped: the faster way to look up


def known_of(fine: NDArray[np.int32], unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the prior gets to know of dequantised symbols: in its own units, integers, rounded.

    Exact: 15 bits times 9; the sum and its floor are one IEEE operation each.
    """
    known: NDArray[np.float32] = np.clip(fine, -32767, 32767).astype(np.float32)
    known *= unit
    known += np.float32(0.5)
    np.floor(known, out=known)
    return np.clip(known, -KNOWN, KNOWN, out=known)


def quarters(x: NDArray[_Number]) -> NDArray[_Number]:
    """(4 n, h, w) as (4, n, h, w), a view: the groups of channels, or the phases of what one step codes."""
    return x.reshape(4, -1, *x.shape[1:])


def places(channels: int, step: int) -> Iterator[tuple[slice, slice, slice]]:
    """Channels, rows and columns that `step` codes, for each phase."""
    size = channels // 4
    for phase in range(4):
        group = step ^ phase
        yield slice(group * size, (group + 1) * size), slice(phase // 2, None, 2), slice(phase % 2, None, 2)


def scatter(part: NDArray[Any], whole: NDArray[Any], step: int) -> None:
    """Put a part at its places in an array (C, h, w)."""
    for values, place in zip(quarters(part), places(len(whole), step), strict=True):
        whole[place] = values


def gather(whole: NDArray[_Number], step: int) -> NDArray[_Number]:
    """The part of an array (C, h, w) that `step` codes."""
    return np.concatenate([whole[place] for place in places(len(whole), step)])
