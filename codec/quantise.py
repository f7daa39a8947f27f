"""From latents to symbols: rounding, and the encoder's search for the smallest file. No decoder knows of it.

Channels that nothing of note is in are left out first, at any effort. fast: plain rounding. default: symbols whose bits
cost more than the error that they mend move towards zero (rate-distortion optimised quantisation). best: before that,
the latent itself goes downhill on rate + lambda * squared error of the decoded picture, with the gradient of the
synthesis transform from gradient.onnx: first with rounding by chance, less and less of it (Yang, Bamler and Mandt,
"Improving inference for neural image compression", 2020, section 3.2), then with the rounding that counts, step by
step, as long as the sum falls. In the end single symbols move up or down by one where that promises most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import entropy, prior
from hourglass.codec.prior import Part, quarters
from hourglass.codec.runtime import STRIDE, Analysis, Hyperprior, Model
from hourglass.codec.watch import hop

_Number = TypeVar("_Number", bound=np.generic)

Effort: TypeAlias = Literal["fast", "default", "best"]
"""How hard the encoder looks for the smallest file; the decoder neither knows nor cares."""

WORTH, HYPER_WORTH = 18.0, 16.0
"""Bits that one squared step of error in a symbol of the latent, of the hyper-latent is worth; measured, see
train/NOTES.md."""

NEAR = 3
"""Symbols up to this magnitude may move towards 0."""

NOTHING = 0.02
"""Bits for each symbol that is not 0 that the loss of channels left out may be worth; measured, see train/NOTES.md."""

RARE = 9.0
"""Bits that a symbol takes in a channel where almost all are 0."""

_DEARER = 1.3
"""What an error saved costs in bits where one quality goes over into the next, for each bit that it costs the model's
lambda: 1.1 to 1.5, measured. `best` looks for gains along that curve, not for another place on it."""

_ANNEALED, _TURNS, _MOVES = 30, 10, 20
"""Steps of `best` with rounding by chance, behind them without, and of symbols that move by one."""

_WARM, _COLD = 0.5, 0.25
"""Temperature of the rounding by chance at first and in the end."""

_PACE, _MOMENTUM, _INERTIA, _SLIGHT = 0.1, 0.8, 0.9, 5.0
"""Of a step with rounding by chance: about how far it goes at first, in symbols, the decays of Adam's averages, and the
slope, in bits for each step of a symbol, below which it goes less far."""

_MENDED, _PROMISE, _SHARE = 8.0, 0.5, 0.5
"""Bits that one squared step of a symbol is worth in the decoded picture, measured; bits that moving a symbol by one
has to promise, and the share of the symbols that do which move at first."""

SEEN = 64
"""Pixels around a tile that `best` looks at: as far as the tile's latent reaches, and what else reaches there."""

_REACH = 15
"""Magnitude of symbols up to which `best` knows their bits."""


@dataclass(frozen=True)
class Analysed:
    """A tile (H, W, 3) or (H, W) uint8 and what the analysis transforms make of it; they know nothing of quality.

    around: what the tile was cut from, by default nothing more than itself. x, y: where in there it begins.
    """

    model: Model
    pixels: NDArray[np.uint8]
    tensors: Analysis
    around: NDArray[np.uint8] | None = None
    x: int = 0
    y: int = 0


@dataclass(frozen=True)
class Symbols:
    """A tile as integers.

    tensors: by name its part of the code tensors, of the latent the coded channels only. width: index into the model's
    widths, which says how many these are. parts: symbols and their tables in the order coded. latent: what the
    synthesis takes before the inverse gain, in 1/16 symbols, padded.
    """

    tensors: dict[str, NDArray[np.int16]]
    width: int
    parts: list[tuple[NDArray[np.int16], Part]]
    latent: NDArray[np.float32]

    def ideal_bits(self, tables: entropy.Tables) -> dict[str, float]:
        """What the tables say that each tensor takes, in bits."""
        bits = dict.fromkeys(self.tensors, 0.0)
        for chosen, part in self.parts:
            bits[part.name] += entropy.ideal_bits(chosen, part.tables, tables)
        return bits


@hop("quantisation")
def quantise(analysed: Analysed, quality: float, effort: Effort, widest: int | None = None) -> Symbols:
    """Gain, prior, rounding. quality: as the file stores it. For a classic model `best` is `default`.

    widest: index of the largest of the model's widths that may be chosen; by default any.
    """
    if effort == "best" and isinstance(analysed.model, Hyperprior):
        return _best(analysed, analysed.model, quality, widest)
    return _once(analysed, quality, effort, widest)[0]


def narrow(whole: NDArray[_Number], count: int) -> NDArray[_Number]:
    """The first `count` channels of each quarter of an array (C, h, w)."""
    return quarters(whole)[:, :count].reshape(-1, *whole.shape[1:])


def widen(coded: NDArray[_Number], channels: int) -> NDArray[_Number]:
    """Inverse of `narrow`, with zeros."""
    whole = np.zeros((channels, *coded.shape[1:]), coded.dtype)
    quarters(whole)[:, : len(coded) // 4] = quarters(coded)
    return whole


def _once(
    analysed: Analysed, quality: float, effort: Effort, widest: int | None
) -> tuple[Symbols, list[NDArray[np.float32]]]:
    """Symbols, and for each of their parts the values, less their means, that became these."""
    model, tensors = analysed.model, dict(analysed.tensors)
    height, width = analysed.pixels.shape[:2]
    _, rows, columns = model.latent.shape(width, height)
    tensors["y"] = tensors["y"] * model.gain(quality)[:, None, None]
    index = _width(tensors["y"][:, :rows, :columns], model.widths[: None if widest is None else widest + 1])
    if isinstance(model, Hyperprior):
        tensors["z"] = tensors["z"] * model.hyper_gain(quality)[:, None, None]
        tensors["y"] = narrow(tensors["y"], model.widths[index])
    parts: list[tuple[NDArray[np.int16], Part]] = []
    rests = []

    @hop("quantisation")
    def choose(part: Part) -> NDArray[np.int16]:
        wanted = part.of(tensors[part.name])
        if part.name == "l":  # locations are whole as they are, and there are none where the latent is 0
            symbols = np.where(model.tables.sure_zero[part.tables], 0, wanted).astype(np.int16)
        else:
            if part.mean is not None:
                wanted -= part.mean * np.float32(1 / prior.FINE)
            symbols = _rounded(wanted, part.tables, model)
            if effort != "fast":
                _drop(symbols, wanted, part.tables, model, HYPER_WORTH if part.name == "z" else WORTH)
        rests.append(wanted)
        parts.append((symbols, part))
        return symbols

    coded, latent = prior.walk(model, quality, width, height, index, choose)
    return Symbols(coded, index, parts, latent), rests


def _width(scaled: NDArray[np.float32], widths: tuple[int, ...]) -> int:
    """Index of the smallest width that loses next to nothing of a latent times gain (C, rows, columns)."""
    sizes = abs(scaled)
    lost, symbols = 0.0, np.count_nonzero(sizes > 0.5)
    for index, width in reversed(list(enumerate(widths[:-1]))):
        for quarter in quarters(sizes):
            size = quarter[width : widths[index + 1]]
            size = size[size > 0.5]
            # Bits that the error of leaving them out is worth, less the bits that they would take.
            lost += float(np.maximum((2 * size - 1) * WORTH - RARE, 0).sum())
        if lost > NOTHING * symbols:
            return index + 1
    return 0


def _rounded(values: NDArray[np.float32], tables: NDArray[np.uint8], model: Model) -> NDArray[np.int16]:
    """Symbols, in C order, which `_drop` relies on; sure zeros are 0."""
    symbols = np.clip(np.rint(values), -32767, 32767).astype(np.int16, order="C")
    symbols *= ~model.tables.sure_zero.take(tables)
    return symbols


def _drop(
    symbols: NDArray[np.int16], rest: NDArray[np.float32], tables: NDArray[np.uint8], model: Model, worth: float
) -> None:
    """Rate-distortion optimised quantisation, in place: a symbol moves one step towards 0 where that pays."""
    flat, tables, rest = symbols.reshape(-1), tables.reshape(-1), rest.reshape(-1)
    places = np.flatnonzero(flat)
    places = places[abs(flat[places]) <= NEAR]
    symbol, table, wanted = flat[places], tables[places], rest[places]
    nearer = symbol - np.sign(symbol)
    costs = model.costs(NEAR)
    saved = costs[table, symbol + NEAR] - costs[table, nearer + NEAR]
    worse = (wanted - nearer) ** 2 - (wanted - symbol) ** 2
    flat[places] = np.where(saved > worth * worse, nearer, symbol)


def _best(analysed: Analysed, model: Hyperprior, quality: float, widest: int | None) -> Symbols:
    """The better of every step that was tried, by bits + lambda * squared error."""
    # Of the error summed over red, green and blue.
    weight = model.weight_of_error(quality) * _DEARER / 3
    gain, inverse = model.gain(quality)[:, None, None], model.inverse_gain(quality)[:, None, None]

    def once(latent: NDArray[np.float32]) -> tuple[Symbols, _Rounding]:
        symbols, rests = _once(replace(analysed, tensors={**analysed.tensors, "y": latent}), quality, "default", widest)
        return symbols, _Rounding.of(symbols, rests, model)

    scene = _Scene.of(analysed, model, gain * inverse)

    def error_slope(coded: NDArray[np.float32]) -> tuple[float, NDArray[np.float32]]:
        """Weighted error of a latent as in `Symbols`, and the direction in which it grows, in symbols."""
        dequantised = widen(coded, len(gain)) * (inverse * np.float32(1 / prior.FINE))
        error, slope = scene.error_slope(model, dequantised, quality)
        slope *= weight * inverse
        return weight * error, narrow(slope, len(coded) // 4)

    def annealed(latent: NDArray[np.float32]) -> NDArray[np.float32]:
        chance = np.random.default_rng(0)  # the same file every time
        latent, mean, square = latent.copy(), np.zeros_like(latent), np.zeros_like(latent)
        for turn in range(_ANNEALED):
            symbols, rounding = once(latent)
            temperature = _WARM * (_COLD / _WARM) ** (turn / (_ANNEALED - 1))
            soft, grows = rounding.by_chance(temperature, chance)
            _, slope = error_slope(symbols.latent + (soft - rounding.symbols) * np.float32(prior.FINE))
            slope += rounding.rate_slope(model)
            slope = widen(slope * grows, len(latent))
            mean += (1 - _MOMENTUM) * (slope - mean)
            square += (1 - _INERTIA) * (slope**2 - square)
            length = _PACE * (0.5 + 0.5 * math.cos(math.pi * (turn + 0.5) / _ANNEALED))
            length *= math.sqrt(1 - _INERTIA ** (turn + 1)) / (1 - _MOMENTUM ** (turn + 1))
            latent -= np.float32(length) * mean / (np.sqrt(square) + np.float32(_SLIGHT)) / gain
        return latent

    def judge(latent: NDArray[np.float32]) -> _Judged:
        symbols, rounding = once(latent)
        error, slope = error_slope(symbols.latent)
        return _Judged(latent, sum(symbols.ideal_bits(model.tables).values()) + error, symbols, rounding, slope)

    first = analysed.tensors["y"].astype(np.float32, copy=False)
    unsearched, best = judge(first), judge(annealed(first))
    length = 0.3
    for _ in range(_TURNS):
        # A squared step of a symbol is worth WORTH bits, half the curvature: `length` damps a Newton step.
        slope = widen(best.slope + best.rounding.rate_slope(model), len(gain))
        tried = judge(best.latent - np.clip(slope * np.float32(length / (2 * WORTH)), -0.3, 0.3) / gain)
        better = tried.total < best.total
        best, length = (tried, length * 1.2) if better else (best, length * 0.4)
    share = _SHARE
    for _ in range(_MOVES):
        # Each promises to pay by itself; of too many at once some undo each other.
        moves = best.rounding.moves(best.slope, model, share)
        if not moves.any():
            break
        tried = judge(best.latent + widen(moves, len(gain)) / gain)
        better = tried.total < best.total
        best, share = (tried, min(share * 1.2, 1.0)) if better else (best, share * 0.5)
    return min(best, unsearched, key=lambda judged: judged.total).symbols


@dataclass(frozen=True)
class _Judged:
    """A latent (C, h, w), what becomes of it, the sum to make small in bits, and how its error grows with the coded
    symbols (c, h, w), in bits for each step."""

    latent: NDArray[np.float32]
    total: float
    symbols: Symbols
    rounding: _Rounding
    slope: NDArray[np.float32]


@dataclass(frozen=True)
class _Scene:
    """A tile with what lies around it, up to SEEN pixels: pixels (H, W, 3) or (H, W) uint8; their latent (C, h, w) as
    the synthesis takes it; the tile's place in that; and which rows and columns of pixels the tile's latent reaches.

    The tile alone would end in zeros where in the file its neighbours go on.
    """

    pixels: NDArray[np.uint8]
    latent: NDArray[np.float32]
    place: tuple[slice, slice]
    reached: tuple[slice, slice]

    @staticmethod
    def of(analysed: Analysed, model: Hyperprior, factor: NDArray[np.float32]) -> _Scene:
        """factor (C, 1, 1): gain times inverse gain. What lies around has the values that it has before rounding."""
        around = analysed.pixels if analysed.around is None else analysed.around
        places, reached, window = [], [], []
        for begin, size, end in zip((analysed.y, analysed.x), analysed.pixels.shape[:2], around.shape[:2], strict=True):
            first, last = max(begin - SEEN, 0), min(begin + size + SEEN, end)
            halo = model.halo * STRIDE
            window.append(slice(first, last))
            reached.append(slice(max(begin - halo, first) - first, min(begin + size + halo, last) - first))
            places.append(slice((begin - first) // STRIDE, (begin - first) // STRIDE - (-size // STRIDE)))
        rows, columns = window
        height, width = rows.stop - rows.start, columns.stop - columns.start
        latent = model.analyse(around, columns.start, rows.start, width, height)["y"] * factor
        return _Scene(around[rows, columns], latent, (places[0], places[1]), (reached[0], reached[1]))

    def error_slope(
        self, model: Hyperprior, latent: NDArray[np.float32], quality: float
    ) -> tuple[float, NDArray[np.float32]]:
        """`Hyperprior.error_slope` of the tile's own latent (C, h, w), padded."""
        rows, columns = self.place
        own = np.s_[:, : rows.stop - rows.start, : columns.stop - columns.start]
        self.latent[:, rows, columns] = latent[own]
        error, slope = model.error_slope(self.latent, quality, self.pixels, self.reached)
        whole = np.zeros_like(latent)
        whole[own] = slope[:, rows, columns]
        return error, whole


@dataclass(frozen=True)
class _Rounding:
    """What becomes of a latent's values less their means: rest, the symbols made of it, and their tables, each
    (c, h, w), padded.

    fixed: where the search changes nothing: what is not coded, and what is so large that its bits are not known.
    """

    rest: NDArray[np.float32]
    symbols: NDArray[np.float32]
    tables: NDArray[np.uint8]
    fixed: NDArray[np.bool_]

    @staticmethod
    def of(symbols: Symbols, rests: list[NDArray[np.float32]], model: Hyperprior) -> _Rounding:
        shape = symbols.latent.shape
        rest, whole, tables = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.uint8)
        for (chosen, part), left in zip(symbols.parts, rests, strict=True):
            if part.step is None:  # of the hyper-latent
                continue
            for values, into in ((left, rest), (chosen, whole), (part.tables, tables)):
                prior.scatter(values, into, part.step)
        return _Rounding(rest, whole, tables, model.tables.sure_zero[tables] | (abs(rest) > _REACH))

    def rate_slope(self, model: Hyperprior) -> NDArray[np.float32]:
        """How the bits of the symbols grow with the rest, tables held: bits for each step of a symbol."""
        costs = model.costs(_REACH)
        below = np.clip(np.floor(self.rest), -_REACH, _REACH - 1).astype(np.intp) + _REACH
        slope: NDArray[np.float32] = np.clip(costs[self.tables, below + 1] - costs[self.tables, below], -15, 15)
        slope[self.fixed] = 0
        return slope

    def moves(self, slope: NDArray[np.float32], model: Hyperprior, share: float) -> NDArray[np.float32]:
        """What to add to the rest for single symbols to become larger or smaller by one: of those that would save bits
        and error, tables held, the given share that would save the most. slope: how the error grows with the symbols.
        """
        costs = model.costs(_REACH + 1)
        at = np.clip(self.symbols, -_REACH, _REACH).astype(np.intp) + _REACH + 1
        now = costs[self.tables, at]
        up = costs[self.tables, at + 1] - now + slope
        down = costs[self.tables, at - 1] - now - slope
        change = np.minimum(up, down) + np.float32(_MENDED)
        change[self.fixed] = 0
        chosen = change < -_PROMISE
        if chosen.any():
            chosen &= change <= np.quantile(change[chosen], share)
        step = np.where(up < down, np.float32(1), np.float32(-1))
        return np.where(chosen, self.symbols + step - self.rest, np.float32(0))

    def by_chance(
        self, temperature: float, chance: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The rest rounded up or down by chance, the nearer the likelier, and softly: a sample of the Gumbel-softmax
        with the distances' hyperbolic arctangents, negative, as its logits. And how that grows with the rest."""
        below = np.floor(self.rest)
        part = np.clip(self.rest - below, 1e-3, 1 - 1e-3)
        # atanh(part) - atanh(1 - part) in one logarithm.
        lean = np.log((1 + part) * part / ((1 - part) * (2 - part)))
        lean *= np.float32(0.5 / temperature)
        uniform = np.clip(chance.random(lean.shape, np.float32), 1e-6, 1 - 1e-6)
        lean += np.log(uniform / (1 - uniform))
        up = 1 / (1 + np.exp(-np.clip(lean, -30, 30)))
        steep = 1 / (1 + part) + 1 / part + 1 / (1 - part) + 1 / (2 - part)
        grows = up * (1 - up) * steep * np.float32(0.5 / temperature)
        grows[self.fixed] = 0
        return np.where(self.fixed, self.symbols, below + up), grows
