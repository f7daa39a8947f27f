"""Codec: the four hops between a picture and a file.

encode = analyse + pack          image -> pixels -> latent -> Code -> bytes
decode = unpack + synthesise     bytes -> Code -> latent -> pixels

A picture is worked on in tiles, several at a time. Each is quantised and coded by itself; the transforms look a
little beyond its edges, so that no seam shows.
"""

from __future__ import annotations

import copy
import itertools
import math
import numbers
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, entropy, image, metrics, prior, runtime
from hourglass.codec.container import Header
from hourglass.codec.errors import Cancelled, CodeError, ContainerError, CorruptError, InvalidArgument
from hourglass.codec.image import ImageSource, Pixels
from hourglass.codec.limits import Limits
from hourglass.codec.quantise import (
    Analysed,
    Effort,
    Part,
    Symbols,
    dequantise,
    hyper_tables,
    narrow,
    quantise,
    widen,
)

DEFAULT_QUALITY = 50.0

_Result = TypeVar("_Result")

FileSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview"
"""The bytes of a .hgc file, or a path to one."""


class Settings(TypedDict, total=False):
    """How to encode. At most one of the first four; without any of them quality 50.

    quality: 0 (smallest) to 100 (best).
    target_size: bytes that the file may have at most: a number, or text such as "40k", "1.5M" or "5%" of the source
        file. The result has at least 97 % of that (or 8 bytes less, for the tiniest), unless quality 100 needs less.
    target_bpp: the same in bits per pixel.
    target_psnr: dB over RGB that the decoded picture has at least.
    effort: "fast" rounds, "default" drops symbols that cost more than they are worth, "best" also searches.
    """

    quality: float
    target_size: int | str
    target_bpp: float
    target_psnr: float
    effort: Effort


_TILE = struct.Struct("<IB")  # CRC-32 of the symbols, width


@dataclass(frozen=True)
class Code:
    """A picture as integers: what lies between the analysis transform and the entropy coder.

    model: id of the model that made it, and that alone can synthesise it. quality: 0 to 100.
    width, height: of the picture, in pixels. tensors: name -> (C, h, w) int16, read only.
    """

    model: str
    quality: float
    width: int
    height: int
    tensors: Mapping[str, NDArray[np.int16]]

    def __post_init__(self) -> None:
        check_quality(self.quality)
        # As the file stores it, so that a Code is the same, and its tables too, before and after packing.
        object.__setattr__(self, "quality", round(float(self.quality), 2))
        tensors = {name: np.asarray(tensor).view() for name, tensor in self.tensors.items()}
        for tensor in tensors.values():
            tensor.setflags(write=False)
        object.__setattr__(self, "tensors", MappingProxyType(tensors))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Code):
            return NotImplemented
        return (
            (self.model, self.quality, self.width, self.height, self.tensors.keys())
            == (other.model, other.quality, other.width, other.height, other.tensors.keys())
        ) and all(np.array_equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())

    __hash__ = None  # type: ignore[assignment]  # arrays inside


@dataclass(frozen=True)
class Distortion:
    """How far a decoded picture is from its original. psnr in dB over RGB; ms_ssim at most 1."""

    psnr: float
    ms_ssim: float


@dataclass(frozen=True)
class ModelInfo:
    """What a model is: its id, the shape rule of each code tensor, and its manifest as plain data."""

    id: str
    tensors: tuple[runtime.TensorRule, ...]
    manifest: Mapping[str, Any]


class Codec:
    """Encoder and decoder. Build one and use it for many pictures, from any number of threads.

    model: id of the model that encodes; decoding takes the model that the file names.
    threads: cores for one transform; by default all that this process may use.
    limits: bounds on what is taken in. zoo: folder of models, by default those of the package.
    """

    def __init__(
        self,
        model: str = runtime.DEFAULT_MODEL,
        *,
        threads: int | None = None,
        limits: Limits | None = None,
        zoo: Path = runtime.ZOO,
    ) -> None:
        self.limits = limits or Limits()
        self._threads = threads or runtime.usable_cores()
        self._zoo = zoo
        self._lock = threading.Lock()
        self._models: dict[tuple[str, int], runtime.Model] = {}
        self._stop = threading.Event()
        self.model = self._model(model).id

    def models(self) -> list[ModelInfo]:
        """The models that this codec can decode and encode with."""
        found = [self._model(model_id) for model_id in runtime.model_ids(self._zoo)]
        return [ModelInfo(m.id, m.tensors, m.manifest) for m in found]

    def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file; exactly `pack(analyse(image))`. Raises what these raise."""
        check_settings(settings)
        if _is_aimed(settings):
            return self._pack(self._aimed(image, settings))
        # Each tile goes all the way by itself: of a large picture only the bytes stay.
        return _file(*self._plainly(image, settings, _pack_tile))

    def decode(self, data: FileSource) -> Pixels:
        """A .hgc file -> (H, W, 3) uint8; exactly `synthesise(unpack(data))`. Raises what these raise."""
        return self._synthesise(self._unpack(data))

    def read_header(self, data: FileSource) -> Header:
        """The header of a .hgc file; its sections may be missing. Raises `ContainerError`, `LimitError`."""
        return container.read_header(self._bytes(data), self.limits)

    def analyse(self, image: ImageSource, **settings: Unpack[Settings]) -> Code:
        """Analysis transform, gain, prior, rounding: a picture -> its Code.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`.
        """
        return self._analyse(image, settings).code

    def encode_many(
        self, image: ImageSource, qualities: Iterable[float], effort: Effort = "default"
    ) -> Iterator[bytes]:
        """The files of one picture at many qualities, from one pass of the analysis transform. Raises as `encode`."""
        analysed = self._transform(image)
        for quality in qualities:
            check_quality(quality)
            yield self._pack(self._quantise(analysed, quality, effort))

    def synthesise(self, code: Code) -> Pixels:
        """Prior, inverse gain, synthesis transform: a Code -> (H, W, 3) uint8.

        Raises `CodeError`, `UnknownModelError`.
        """
        return self._synthesise(self._walk(code))

    def pack(self, code: Code) -> bytes:
        """A Code -> the bytes of a .hgc file. Raises `CodeError`, `UnknownModelError`."""
        return self._pack(self._walk(code))

    def unpack(self, data: FileSource) -> Code:
        """The bytes of a .hgc file -> its Code.

        Raises `ContainerError` (with `CorruptError`), `LimitError`, `UnknownModelError`, `OSError`.
        """
        return self._unpack(data).code

    def _analyse(self, image: ImageSource, settings: Settings) -> _Coded:
        check_settings(settings)
        if _is_aimed(settings):
            return self._aimed(image, settings)
        return _Coded(*self._plainly(image, settings, lambda _model, _quality, symbols: symbols))

    def _plainly(
        self, source: ImageSource, settings: Settings, finish: Callable[[runtime.Model, float, Symbols], _Result]
    ) -> tuple[runtime.Model, float, int, int, list[_Result]]:
        """Model, quality, width, height, and what `finish` makes of each tile's symbols."""
        pixels, model = image.read(source, self.limits), self._model(self.model)
        quality = round(float(settings.get("quality", DEFAULT_QUALITY)), 2)
        effort = settings.get("effort", "default")

        def encode(tile: Tile, own: runtime.Model) -> _Result:
            return finish(own, quality, quantise(_analysed(own, pixels, tile), quality, effort))

        height, width = pixels.shape[:2]
        return model, quality, width, height, self._each(model, width, height, encode)

    def _aimed(self, source: ImageSource, settings: Settings) -> _Coded:
        effort = settings.get("effort", "default")
        if "target_psnr" in settings:
            return self._reach_psnr(source, settings["target_psnr"], effort)
        return self._reach_size(source, settings, effort)

    def _each(
        self, model: runtime.Model, width: int, height: int, work: Callable[[Tile, runtime.Model], _Result]
    ) -> list[_Result]:
        """Results of `work` for each tile of a picture: one tile with all threads, more than one on a thread each.

        What runs in a thread gets the model that works in one thread.
        """
        tiles = tiles_of(width, height, model.tile.stride)

        def one(tile: Tile, own: runtime.Model) -> _Result:
            if self._stop.is_set():
                raise Cancelled(f"stopped before tile {tile.number} of {len(tiles)}: nobody waits for the result")
            return work(tile, own)

        if len(tiles) == 1 or self._threads == 1:
            return [one(tile, model) for tile in tiles]
        single = self._model(model.id, 1)
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda tile: one(tile, single), tiles))

    def _reach_size(self, source: ImageSource, settings: Settings, effort: Effort) -> _Coded:
        """The Code of the highest quality whose file is no larger than asked for."""
        analysed = self._transform(source)
        height, width = analysed.pixels.shape[:2]
        if "target_size" in settings:
            asked = f"target_size is {settings['target_size']}"
            limit = parse_size(settings["target_size"], _length_of(source))
        else:
            asked = f"target_bpp is {settings['target_bpp']:g}"
            limit = int(min(settings["target_bpp"] * width * height / 8, 2.0**62))

        def attempt(quality: float, effort: Effort) -> tuple[_Coded, float]:
            coded = self._quantise(analysed, quality, effort)
            return coded, math.log(len(self._pack(coded)))

        coded, size = _aim(attempt, effort, math.log(limit) if limit else 0.0, below=True)
        if round(math.exp(size)) > limit:
            least = round(math.exp(size))
            raise InvalidArgument(
                f"{asked}, {limit} bytes; at quality 0, the smallest, this picture takes {least} bytes, "
                f"{metrics.bpp(least, width, height):.4f} bpp"
            )
        return coded

    def _reach_psnr(self, source: ImageSource, asked: float, effort: Effort) -> _Coded:
        """The Code of the lowest quality whose picture is at least as good as asked for."""
        analysed = self._transform(source)

        def attempt(quality: float, effort: Effort) -> tuple[_Coded, float]:
            coded = self._quantise(analysed, quality, effort)
            return coded, metrics.psnr(analysed.pixels, self._synthesise(coded))

        coded, psnr = _aim(attempt, effort, asked, below=False)
        if psnr < asked:
            raise InvalidArgument(
                f"target_psnr is {asked:g} dB; at quality 100, the best, this picture has {psnr:.2f} dB"
            )
        return coded

    def _transform(self, source: ImageSource) -> _Transformed:
        pixels, model = image.read(source, self.limits), self._model(self.model)
        height, width = pixels.shape[:2]
        tiles = self._each(model, width, height, lambda tile, own: _analysed(own, pixels, tile))
        return _Transformed(pixels, tiles)

    def _quantise(self, transformed: _Transformed, quality: float, effort: Effort) -> _Coded:
        model, quality = self._model(self.model), round(float(quality), 2)
        height, width = transformed.pixels.shape[:2]
        tiles = self._each(
            model, width, height, lambda tile, _: quantise(transformed.tiles[tile.number], quality, effort)
        )
        return _Coded(model, quality, width, height, tiles)

    def _synthesise(self, coded: _Coded) -> Pixels:
        out = np.empty((coded.height, coded.width, 3), np.uint8)

        def synthesise(tile: Tile, model: runtime.Model) -> None:
            pixels = model.synthesise(coded.patch(tile))
            out[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = pixels[: tile.height, : tile.width]

        self._each(coded.model, coded.width, coded.height, synthesise)
        return out

    def _pack(self, coded: _Coded) -> bytes:
        sections = [_pack_tile(coded.model, coded.quality, tile) for tile in coded.tiles]
        return _file(coded.model, coded.quality, coded.width, coded.height, sections)

    def _unpack(self, data: FileSource) -> _Coded:
        header, payloads = container.read(self._bytes(data), self.limits)
        model = self._model(header.model)
        sections = [p for p, s in zip(payloads, header.sections, strict=True) if s.kind == container.CODE]
        expected = len(tiles_of(header.width, header.height, model.tile.stride))
        if len(sections) != expected:
            raise ContainerError(
                f"file has {len(sections)} tiles; model {model.id!r} has {expected} "
                f"for a picture of {header.width}x{header.height} pixels"
            )

        def unpack(tile: Tile, own: runtime.Model) -> Symbols:
            return _unpack_tile(own, header.quality, sections[tile.number], tile)

        tiles = self._each(model, header.width, header.height, unpack)
        return _Coded(model, header.quality, header.width, header.height, tiles)

    def _walk(self, code: Code) -> _Coded:
        """What the prior makes of a code that came from outside."""
        model = self._checked(code)
        tiles = self._each(model, code.width, code.height, lambda tile, own: _walk_tile(own, code, tile))
        return _Coded(model, code.quality, code.width, code.height, tiles)

    def measure(self, image: ImageSource, code: Code) -> Distortion:
        """PSNR and MS-SSIM between a picture and what `code` decodes to."""
        original, decoded = _read_image(image, self.limits), self.synthesise(code)
        return Distortion(metrics.psnr(original, decoded), metrics.ms_ssim(original, decoded))

    def with_model(self, model: str) -> Codec:
        """A codec that encodes with another model and shares all that is loaded. Raises `UnknownModelError`."""
        other = copy.copy(self)
        other.model = self._model(model).id
        return other

    def stopped_by(self, event: threading.Event) -> Codec:
        """A codec that shares all that is loaded and raises `Cancelled` before its next tile once `event` is set."""
        other = copy.copy(self)
        other._stop = event
        return other

    def warm_up(self) -> None:
        """Load the model and run it once, so that the first picture does not wait for it."""
        side = self._model(self.model).tile.stride
        for width in (16, side + 16):  # one tile with all threads, more with a thread each
            self.decode(self.encode(np.zeros((16, width, 3), np.uint8)))

    def _model(self, model_id: str, threads: int = 0) -> runtime.Model:
        key = model_id, threads or self._threads
        with self._lock:
            if key not in self._models:
                self._models[key] = runtime.Model(model_id, self._zoo, key[1])
            return self._models[key]

    def _bytes(self, data: FileSource) -> bytes | memoryview:
        if isinstance(data, (str, os.PathLike)):
            self.limits.check_bytes(Path(data).stat().st_size)
            return Path(data).read_bytes()
        if isinstance(data, (bytes, bytearray, memoryview)):
            view = memoryview(data)
            return view.cast("B") if view.contiguous else bytes(view)
        raise InvalidArgument(f"data is a {type(data).__name__}; expected the bytes of a .hgc file or a path")

    def _checked(self, code: Code) -> runtime.Model:
        """The model of a code, after comparing the code with the model's rules."""
        if code.width < 1 or code.height < 1:
            raise CodeError(f"code is for a picture of {code.width}x{code.height} pixels; expected 1x1 or more")
        self.limits.check_size(code.width, code.height)
        model = self._model(code.model)
        expected = {rule.name: (rule.shape(code.width, code.height), np.dtype(np.int16)) for rule in model.tensors}
        got = {name: (tensor.shape, tensor.dtype) for name, tensor in code.tensors.items()}
        if got != expected:
            raise CodeError(
                f"code tensors are {_describe(got)}; model {model.id!r} expects {_describe(expected)} "
                f"for a picture of {code.width}x{code.height} pixels"
            )
        return model


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture that is coded by itself: its number in raster order, corner and size in pixels."""

    number: int
    x: int
    y: int
    width: int
    height: int


def tiles_of(width: int, height: int, side: int) -> list[Tile]:
    """The tiles of a picture, row by row; the last ones of a row or column may be smaller than `side`."""
    corners = itertools.product(range(0, height, side), range(0, width, side))
    return [Tile(number, x, y, min(side, width - x), min(side, height - y)) for number, (y, x) in enumerate(corners)]


@dataclass(frozen=True)
class _Transformed:
    """A picture (H, W, 3) uint8, and what the analysis makes of its tiles."""

    pixels: Pixels
    tiles: list[Analysed]


@dataclass(frozen=True)
class _Coded:
    """A picture as symbols, tile by tile."""

    model: runtime.Model
    quality: float
    width: int
    height: int
    tiles: list[Symbols]

    @cached_property
    def code(self) -> Code:
        model = self.model
        tensors = {rule.name: np.zeros(rule.shape(self.width, self.height), np.int16) for rule in model.tensors}
        for tile, symbols in zip(tiles_of(self.width, self.height, model.tile.stride), self.tiles, strict=True):
            count = model.widths[symbols.width]
            values = (widen(symbols.y, model.latent.channels), symbols.z, np.full((1, 1, 1), 4 * count))
            for rule, value in zip(model.tensors, values, strict=True):
                rule.part(tensors[rule.name], tile.x, tile.y, tile.width, tile.height)[:] = value
        return Code(model.id, self.quality, self.width, self.height, tensors)

    def patch(self, tile: Tile) -> runtime.Patch:
        """The latents of a tile and, where there are some, of its model's `halo` around it, dequantised."""
        model, halo = self.model, self.model.halo
        rows, columns = self.tiles[tile.number].latent.shape[1:]
        side, across = model.tile.stride // runtime.STRIDE, -(-self.width // model.tile.stride)
        top, left = tile.y // runtime.STRIDE, tile.x // runtime.STRIDE
        above, before = min(halo, top), min(halo, left)
        below = halo if tile.y + tile.height < self.height else 0
        behind = halo if tile.x + tile.width < self.width else 0
        height, width = above + rows + below, before + columns + behind
        around = list(self._around(tile, across))
        core = np.zeros((1, 4 * model.core, height, width), np.float32)
        all_zero = all(model.widths[symbols.width] <= model.core for _, symbols in around)
        others = (1, model.latent.channels - 4 * model.core)
        rest = np.zeros((*others, 1, 1) if all_zero else (*others, height, width), np.float32)
        for number, symbols in around:
            # Where this tile's latents lie in the patch.
            y = number // across * side - (top - above)
            x = number % across * side - (left - before)
            latent = symbols.latent[:, max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0)]
            y, x = max(y, 0), max(x, 0)
            place = np.s_[0, :, y : y + latent.shape[1], x : x + latent.shape[2]]
            dequantise(model, self.quality, latent, core[place], None if all_zero else rest[place])
        return runtime.Patch(core, rest, (above, above + rows, before, before + columns))

    def _around(self, tile: Tile, across: int) -> Iterator[tuple[int, Symbols]]:
        """Numbers and symbols of a tile and its neighbours."""
        row, column = divmod(tile.number, across)
        for y, x in itertools.product(range(row - 1, row + 2), range(column - 1, column + 2)):
            if 0 <= x < across and 0 <= y * across + x < len(self.tiles):
                yield y * across + x, self.tiles[y * across + x]


def _analysed(model: runtime.Model, pixels: Pixels, tile: Tile) -> Analysed:
    own = pixels[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width]
    return Analysed(model, own, *model.analyse(pixels, tile.x, tile.y, tile.width, tile.height))


def _file(model: runtime.Model, quality: float, width: int, height: int, sections: list[bytes]) -> bytes:
    return container.write(model.id, width, height, quality, [(container.CODE, section) for section in sections])


def _pack_tile(model: runtime.Model, quality: float, tile: Symbols) -> bytes:
    encoder = entropy.Encoder(model.tables)
    try:
        for symbols, tables in tile.parts:
            encoder.put(symbols, tables)
    except ValueError as exc:
        raise CodeError(f"code of model {model.id!r} at quality {quality:g} cannot be coded: {exc}") from exc
    return _TILE.pack(_crc(tile), tile.width) + encoder.finish()


def _unpack_tile(model: runtime.Model, quality: float, section: memoryview, tile: Tile) -> Symbols:
    if len(section) < _TILE.size:
        raise ContainerError(f"code section has {len(section)} bytes; expected {_TILE.size} or more")
    crc, width = _TILE.unpack_from(section)
    if width >= len(model.widths):
        raise ContainerError(f"tile {tile.number} has width {width}; model {model.id!r} has {len(model.widths)}")
    decoder = entropy.Decoder(section[_TILE.size :], model.tables)
    parts: list[Part] = []

    def decode(tables: NDArray[np.uint8]) -> NDArray[np.int16]:
        parts.append((decoder.get(tables), tables))
        return parts[-1][0]

    z = decode(hyper_tables(model, quality, model.hyper.shape(tile.width, tile.height)))
    _, rows, columns = model.latent.shape(tile.width, tile.height)
    y, latent = prior.walk(model, quality, z, rows, columns, width, lambda _step, tables, _mean: decode(tables))
    decoder.finish()
    symbols = Symbols(y, z, width, parts, latent)
    if _crc(symbols) != crc:
        raise CorruptError(f"the decoded symbols of tile {tile.number} do not match their checksum")
    return symbols


def _walk_tile(model: runtime.Model, code: Code, tile: Tile) -> Symbols:
    place = tile.x, tile.y, tile.width, tile.height
    whole, z, coded = (rule.part(code.tensors[rule.name], *place) for rule in model.tensors)
    width = int(coded[0, 0, 0])
    if width not in [4 * count for count in model.widths]:
        expected = ", ".join(str(4 * count) for count in model.widths)
        raise CodeError(f"{model.tile.name} of tile {tile.number} is {width}; expected one of {expected}")
    y = narrow(whole, width // 4)
    if np.count_nonzero(y) != np.count_nonzero(whole):
        raise CodeError(f"tile {tile.number} has {width} channels that are coded, and symbols in other ones")
    padded = np.zeros((len(y), 4 * z.shape[1], 4 * z.shape[2]), np.int16)
    padded[:, : y.shape[1], : y.shape[2]] = y
    parts: list[Part] = [(z, hyper_tables(model, code.quality, z.shape))]

    def take(step: int, tables: NDArray[np.uint8], _mean: NDArray[np.int16]) -> NDArray[np.int16]:
        parts.append((prior.gather(padded, step), tables))
        return parts[-1][0]

    index = model.widths.index(width // 4)
    _, latent = prior.walk(model, code.quality, z, y.shape[1], y.shape[2], index, take)
    return Symbols(y, z, index, parts, latent)


_TOLERANCE = 0.01
"""How near a target a search must come: 1 % of a size, 0.01 dB."""


def _aim(
    attempt: Callable[[float, Effort], tuple[_Coded, float]], effort: Effort, wanted: float, *, below: bool
) -> tuple[_Coded, float]:
    """`_search` with an effort; the slow one begins where a faster one ends."""
    if effort != "best":
        return _search(lambda quality: attempt(quality, effort), wanted, below=below)
    coded, _ = _search(lambda quality: attempt(quality, "default"), wanted, below=below)
    return _search(lambda quality: attempt(quality, effort), wanted, below=below, near=coded.quality)


def _search(
    attempt: Callable[[float], tuple[_Coded, float]], wanted: float, *, below: bool, near: float | None = None
) -> tuple[_Coded, float]:
    """Search over quality for a Code whose figure, which rises with quality, is as near `wanted` as can be.

    below: the figure may not be above `wanted`; else it may not be below. near: a quality to begin at. Ends within
    _TOLERANCE or at neighbouring qualities. Where even quality 0 (or 100) is on the wrong side, that comes back.
    """
    low, high = (0.0, 100.0) if near is None else (max(near - 1, 0.0), min(near + 1, 100.0))
    at_low, at_high = attempt(low), attempt(high)
    while at_low[1] > wanted and low > 0:
        high, at_high = low, at_low
        low = max(2 * low - near, 0.0) if near else 0.0
        at_low = attempt(low)
    while at_high[1] < wanted and high < 100:
        low, at_low = high, at_high
        high = min(2 * high - near, 100.0) if near else 100.0
        at_high = attempt(high)
    if at_low[1] >= wanted:
        return at_low
    if at_high[1] <= wanted:
        return at_high
    best = at_low if below else at_high
    for turn in itertools.count():
        if abs(best[1] - wanted) <= _TOLERANCE or high - low < 0.015:
            break
        part = (wanted - at_low[1]) / (at_high[1] - at_low[1])
        if turn % 3 == 2:
            part = 0.5  # secants can creep along a bent curve
        quality = round(low + (high - low) * min(max(part, 0.02), 0.98), 2)
        quality = min(max(quality, low + 0.01), high - 0.01)
        tried = attempt(quality)
        if (tried[1] <= wanted) if below else (tried[1] < wanted):
            low, at_low = quality, tried
        else:
            high, at_high = quality, tried
        best = at_low if below else at_high
    return best


def parse_size(value: int | str, source: int | None) -> int:
    """Bytes: a number, or text as "40000", "40k", "1.5M", or "5%" of `source`, the bytes of the source file.

    k and M are 1000 and 1000000. Raises `InvalidArgument`.
    """
    text = str(value).strip()
    factors = {"%": (source or 0) / 100, "k": 1e3, "K": 1e3, "M": 1e6}
    if text.endswith("%") and source is None:
        raise InvalidArgument(f"target_size is {text}, but the picture has no source file; give it in bytes")
    try:
        bytes_ = float(text[:-1]) * factors[text[-1]] if text[-1:] in factors else float(text)
    except ValueError:
        bytes_ = 0.0
    if not 1 <= bytes_ < 2**62:
        raise InvalidArgument(f'target_size is {text!r}; expected bytes, 1 to 2**62, as 40000, "40k", "1.5M" or "5%"')
    return int(bytes_)


def _length_of(source: ImageSource) -> int | None:
    """Bytes of the file that a picture comes from, where it comes from one."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stat().st_size
    return len(source) if isinstance(source, (bytes, bytearray, memoryview)) else None


def _is_aimed(settings: Settings) -> bool:
    """Whether something else than a quality is asked for, which takes a search."""
    return bool(settings.keys() - {"quality", "effort"})


def check_settings(settings: Settings) -> None:
    """Raise `InvalidArgument` for names or values that no picture can be encoded with."""
    unknown = [name for name in settings if name not in Settings.__annotations__]
    if unknown:
        raise InvalidArgument(f"{unknown[0]!r} is no setting; expected {', '.join(Settings.__annotations__)}")
    effort = settings.get("effort", "default")
    if effort not in get_args(Effort):
        raise InvalidArgument(f"effort is {effort!r}; expected one of {', '.join(get_args(Effort))}")
    given = [name for name in settings if name != "effort"]
    if len(given) > 1:
        raise InvalidArgument(f"{' and '.join(given)} exclude each other; give one of them")
    if "quality" in settings:
        check_quality(settings["quality"])
    bpp, psnr = settings.get("target_bpp", 1.0), settings.get("target_psnr", 30.0)
    if not isinstance(bpp, numbers.Real) or not 0 < bpp < math.inf:
        raise InvalidArgument(f"target_bpp is {bpp!r}; expected a positive number of bits per pixel")
    if not isinstance(psnr, numbers.Real) or not 0 < psnr < 100:
        raise InvalidArgument(f"target_psnr is {psnr!r}; expected dB, more than 0 and less than 100")


def check_quality(quality: float) -> None:
    """Raise `InvalidArgument` unless `quality` is a number from 0 to 100."""
    if not isinstance(quality, numbers.Real) or not 0 <= quality <= 100:
        got = f"{quality:g}" if isinstance(quality, numbers.Real) else repr(quality)
        raise InvalidArgument(f"quality is {got}; expected a number from 0 (smallest) to 100 (best)")


def _read_image(source: ImageSource, limits: Limits) -> Pixels:
    return image.read(source, limits)


def _crc(tile: Symbols) -> int:
    """CRC-32 of all symbols that are coded: of y, then of z."""
    crc = 0
    for tensor in (tile.y, tile.z):
        crc = zlib.crc32(np.ascontiguousarray(tensor, "<i2").data, crc)
    return crc


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in tensors.items()) or "none"
