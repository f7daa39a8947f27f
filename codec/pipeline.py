"""Codec: the four hops between a picture and a file.

encode = analyse + pack          image -> pixels -> latent -> Code -> bytes
decode = unpack + synthesise     bytes -> Code -> latent -> pixels

A picture is worked on in bands of tiles, several tiles at a time, so that of a large one only a band is in memory
beside the pixels, and not even these when it goes from file to file.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeVar, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, features, lossless, metrics, runtime
from hourglass.codec.aim import Attempt, aim, parse_size
from hourglass.codec.bands import Band, of_picture, of_strips
from hourglass.codec.container import FileSource, Front, Header, Reader, Writer
from hourglass.codec.crew import Crew
from hourglass.codec.decoding import KINDS, Decoding, as_colour, metadata_of, unstored, whole
from hourglass.codec.errors import CodeError, InvalidArgument, LossWarning
from hourglass.codec.image import ImageSource, Metadata, Picture, Pixels, seen
from hourglass.codec.limits import Limits
from hourglass.codec.quantise import SEEN, Analysed, Effort, Symbols, quantise, widen
from hourglass.codec.settings import (
    GOALS,
    Settings,
    View,
    check_quality,
    check_settings,
    check_view,
    is_aimed,
    load,
    quality_of,
)
from hourglass.codec.strips import Strips
from hourglass.codec.tiles import Grid, Piece, Tile, conceal, pack_tile, patch, walk_tile

_Result = TypeVar("_Result")

_ROOMY = 3 << 20
"""Pixels above which what needs several copies of a picture first has the models closed."""

_AT_ONCE = 4
"""Tiles for each thread that work goes on with before the threads wait for each other: they are not of equal size."""

_LEAST_TILE = 22
"""No tile takes fewer bytes than this, its entry in the header included."""

_FILLED = 0.97
"""Part of a target in size that a file fills at least."""

_DETAILED = 1 << 24
"""Pixels up to which a search keeps its latents as they are, in float32; above it in float16."""


@dataclass(frozen=True)
class Code:
    """The colours of a picture as integers: what lies between the analysis transform and the entropy coder.

    model: id of the model that made it, and that alone can synthesise it. quality: 0 to 100.
    width, height: of the picture, in pixels. tensors: name -> (C, h, w) int16, read only. grey: whether it decodes to
    shades of grey.
    """

    model: str
    quality: float
    width: int
    height: int
    tensors: Mapping[str, NDArray[np.int16]]
    grey: bool = False

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
            (self.model, self.quality, self.width, self.height, self.grey, self.tensors.keys())
            == (other.model, other.quality, other.width, other.height, other.grey, other.tensors.keys())
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
        self.model = self._model(model).id

    def models(self) -> list[ModelInfo]:
        """The models that this codec can decode and encode with."""
        found = [self._model(model_id) for model_id in runtime.model_ids(self._zoo)]
        return [ModelInfo(m.id, m.tensors, m.manifest) for m in found]

    def encode(self, image: ImageSource | Picture, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file, with alpha and metadata.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`; a `LossWarning` for each thing that is not
        kept.
        """
        picture = self._load(image, settings)
        _warn(picture.losses)
        return self.suited(picture, settings)._encode(picture, _length_of(image), settings)

    def decode(self, data: FileSource, **view: Unpack[View]) -> Pixels:
        """A .hgc file -> uint8 (H, W, 3), or (H, W) grey, with alpha (H, W, 4) or (H, W, 2).

        Raises `ContainerError` (with `CorruptError`), `LimitError`, `UnknownModelError`, `InvalidArgument`, `OSError`.
        """
        picture = self.decode_picture(data, **view)
        _warn(picture.losses)
        return picture.pixels

    def decode_picture(self, data: FileSource, **view: Unpack[View]) -> Picture:
        """`decode` with the picture's metadata; what is damaged is in its `losses`. Raises as `decode`."""
        with Reader(data, self.limits) as reader:
            header, salvage = reader.header, view.get("salvage", False)
            check_view(header.width, header.height, view)
            region, scale = view.get("region", whole(header)), view.get("scale", 1)
            self.limits.check_size(-(-region[2] // scale), -(-region[3] // scale))
            if not salvage:
                reader.check_length()
            if header.lossless:
                return unstored(reader, region, scale)
            return self._decoding(reader, salvage).picture(region, scale)

    def read_header(self, data: FileSource) -> Header:
        """The header of a .hgc file; its sections may be missing. Raises `ContainerError`, `LimitError`."""
        return container.read_header(data, self.limits)

    def encode_strips(self, strips: Strips, out: BinaryIO, **settings: Unpack[Settings]) -> None:
        """`encode` of a picture that is read a few rows at a time, into a seekable file; never stored losslessly.

        Its bytes are those of `encode`. Memory does not grow with the picture, but for a file that is read by rows
        with its width; `LimitError` where it would be too much. Raises as `encode`.
        """
        check_settings(settings)
        if is_aimed(settings):
            raise InvalidArgument(
                "a target needs the whole picture in memory; give a quality for one that is too large"
            )
        self.limits.check_streamed(strips.width, strips.height)
        codec, quality = self.suited(strips, settings), quality_of(settings)
        model = codec._model(codec.model)
        grid, halo = codec._grid(strips), model.halo * runtime.STRIDE
        if settings.get("effort") == "best":
            halo += SEEN
        if not strips.by_parts:
            rows = min(max(len(part) for part in self._bands(grid)) * grid.tile_height + 2 * halo, grid.height)
            self.limits.check_band(grid.width, grid.height, rows * grid.width * (1 if strips.grey else 3))
        metadata = _metadata_sections(strips.metadata)
        writer = Writer(out, codec._front(quality, strips), len(grid) + len(metadata))
        for kind, payload in metadata:
            writer.add(kind, payload)
        bands = of_strips(strips, grid, self._bands(grid), halo)
        for sections in self._encoded_bands(model, grid, bands, settings):
            for section in sections:
                writer.add(container.CODE, section)
        writer.finish()

    def decode_strips(self, data: FileSource) -> tuple[Header, Metadata, Iterator[Pixels]]:
        """A .hgc file -> its header, metadata, and the rows of its picture from top to bottom, some at a time.

        Memory grows with the picture's width; `LimitError` where it would be too much. Raises as `decode`, also while
        the rows are made; for one with alpha, or one that is stored losslessly, `InvalidArgument`.
        """

        def rows(decoding: Decoding) -> Iterator[Pixels]:
            self.limits.check_band(decoding.grid.width, decoding.grid.height, decoding.band_bytes)
            return decoding.strips(whole(reader.header), 1)

        reader = Reader(data, self.limits)
        return self._streamed(reader, rows)

    def decode_parts(self, data: FileSource) -> tuple[Header, Metadata, Iterator[tuple[int, int, Pixels]]]:
        """`decode_strips` of parts of rows, each with the place of its corner, x and y; each pixel comes once.

        Memory does not grow with the picture. Raises as `decode_strips`.
        """
        reader = Reader(data, self.limits)
        return self._streamed(reader, lambda decoding: decoding.parts(whole(reader.header), 1))

    def analyse(self, image: ImageSource | Picture, **settings: Unpack[Settings]) -> Code:
        """Analysis transform, gain, prior, rounding: a picture -> the Code of its colours.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`.
        """
        picture = self._load(image, settings)
        losses = [*picture.losses, *(["a Code holds no alpha; it is left out"] if picture.alpha is not None else [])]
        _warn(losses)
        codec = self.suited(picture, settings)
        if is_aimed(settings):
            bare = Picture(picture.colour, None, Metadata(), ())
            return self.unpack(codec._coded(bare, _length_of(image), settings))
        model, quality = codec._model(codec.model), quality_of(settings)
        grid = codec._grid(picture)
        bands = of_picture(_colour(picture, grid), grid, self._bands(grid))
        effort = settings.get("effort", "default")

        def analyse(_: runtime.Model, analysed: Analysed) -> Symbols:
            return quantise(analysed, quality, effort)

        symbols = [s for band in self._analysed_bands(model, grid, bands, analyse) for s in band]
        return _code(model, quality, grid, picture.grey, symbols)

    def encode_many(
        self, image: ImageSource | Picture, qualities: Iterable[float], effort: Effort = "default"
    ) -> Iterator[bytes]:
        """The files of one picture at many qualities, from one pass of the analysis transform, without fallback.

        Raises as `encode`.
        """
        picture = self._load(image, {})
        _warn(picture.losses)
        requantised = self.suited(picture, {})._requantiser(picture)
        for quality in qualities:
            check_quality(quality)
            yield requantised(quality, effort, None)

    def synthesise(self, code: Code) -> Pixels:
        """Prior, inverse gain, synthesis transform: a Code -> (H, W, 3) uint8, or (H, W) if it is grey.

        Raises `CodeError`, `UnknownModelError`.
        """
        model, grid, symbols = self._walked(code)
        out = np.empty((code.height, code.width) if code.grey else (code.height, code.width, 3), np.uint8)
        pieces = {number: Piece(s.latent, s.width) for number, s in enumerate(symbols)}

        def synthesise(tile: Tile, own: runtime.Model) -> None:
            pixels = own.synthesise(patch(own, code.quality, grid, tile, pieces))
            out[_place(tile)] = as_colour(pixels[: tile.height, : tile.width], code.grey)

        self._crew(model, grid).each(grid.tiles(), synthesise)
        return out

    def pack(self, code: Code) -> bytes:
        """A Code -> the bytes of a .hgc file. Raises `CodeError`, `UnknownModelError`."""
        model, _, symbols = self._walked(code)
        colour = container.GREY if code.grey else container.RGB
        front = Front(model.id, colour, code.width, code.height, code.quality, model.short)
        return container.write(front, [(container.CODE, pack_tile(model, code.quality, s)) for s in symbols])

    def unpack(self, data: FileSource) -> Code:
        """The bytes of a .hgc file -> its Code, without alpha and metadata.

        Raises `ContainerError` (with `CorruptError`), `LimitError`, `UnknownModelError`, `OSError`, and `CodeError`
        for a picture that is stored losslessly.
        """
        decoding, symbols = self._unpacked(data)
        return _code(decoding.model, decoding.quality, decoding.grid, decoding.grey, symbols)

    def features(self, source: ImageSource | Picture | FileSource) -> NDArray[np.float32]:
        """A picture, or a .hgc file -> (D,) float32 of length 1: pooled statistics of the latent, see `features`.

        The product of two, from -1 to 1, says how alike two pictures are. Of a file only a part of the symbols is
        decoded and no pixels; its model, and the one that describes a picture, must be the same for that. A file with a
        picture that is stored without loss is described as that picture.

        Raises as `encode` and `decode`.
        """
        if not container.is_file(source):
            return self._described(self._load(source, {}))
        with Reader(cast("FileSource", source), self.limits) as reader:
            header = reader.header
            reader.check_length()
            if header.lossless:
                return self._described(unstored(reader, whole(header), 1))
            decoding = self._decoding(reader)
            tiles = decoding.grid.tiles()
            found = decoding.crew.each(tiles, decoding.first)
            return features.describe(decoding.model, decoding.grid, zip(tiles, found, strict=True))

    def _described(self, picture: Picture) -> NDArray[np.float32]:
        codec = self.suited(picture, {})
        model, grid = codec._model(codec.model), codec._grid(picture)
        bands = of_picture(_colour(picture, grid), grid, codec._bands(grid))

        def sample(own: runtime.Model, analysed: Analysed) -> NDArray[np.float32]:
            return features.sampled(own, analysed.tensors["y"])

        found = (values for band in codec._analysed_bands(model, grid, bands, sample, coded=False) for values in band)
        return features.describe(model, grid, zip(grid.tiles(), found, strict=True))

    def tensor_bits(self, data: FileSource) -> dict[str, float]:
        """What each code tensor of a .hgc file takes of it, in bits, by the tables. Raises as `unpack`."""
        decoding, symbols = self._unpacked(data)
        bits = [tile.ideal_bits(decoding.model.tables) for tile in symbols]
        return {name: sum(tile[name] for tile in bits) for name in bits[0]}

    def measure(self, image: ImageSource | Picture, coded: Code | FileSource) -> Distortion:
        """PSNR and MS-SSIM between a picture and what a Code or a file decodes to, on white where there is alpha.

        Raises as `decode`.
        """
        original = self._load(image, {})
        decoded = Picture(self.synthesise(coded)) if isinstance(coded, Code) else self.decode_picture(coded)
        pair = seen(original), seen(decoded)
        return Distortion(metrics.psnr(*pair), metrics.ms_ssim(*pair))

    def with_model(self, model: str) -> Codec:
        """A codec that encodes with another model and shares all that is loaded. Raises `UnknownModelError`."""
        other = copy.copy(self)
        other.model = self._model(model).id
        return other

    def warm_up(self) -> None:
        """Load the model and run it once, so that the first picture does not wait for it."""
        model = self._model(self.model)
        for width in (16, max(model.side, model.whole) + 16):  # one tile with all threads, more with a thread each
            shape = (16, width, 3) if model.colours == 3 else (16, width)
            self.decode(self.encode(np.zeros(shape, np.uint8), fallback=False))

    def unload(self) -> None:
        """Give back the memory of what is loaded. It is loaded again when it is used, which takes a moment."""
        with self._lock:
            models = [*self._models.values()]
        for model in models:
            model.unload()
        runtime.trim()

    def _model(self, model_id: str, threads: int = 0) -> runtime.Model:
        key = model_id, threads or self._threads
        with self._lock:
            if key not in self._models:
                self._models[key] = runtime.open_model(model_id, self._zoo, key[1])
            return self._models[key]

    def _load(self, source: ImageSource | Picture, settings: Settings) -> Picture:
        check_settings(settings)
        if isinstance(source, Picture):
            self.limits.check_size(source.width, source.height)
            self.limits.check_metadata(source.metadata.size)
            return source
        return load(source, self.limits, settings)

    def suited(self, picture: Picture | Strips, settings: Settings) -> Codec:
        """The codec that encodes a picture: this one, or one with its model's counterpart for grey ones, where that is
        wanted and there is one.

        Raises `InvalidArgument` for colours and a model of grey pictures.
        """
        model = self._model(self.model)
        if picture.grey and model.grey and settings.get("grey_model", True):
            return self.with_model(model.grey)
        if model.colours == 1 and not picture.grey:
            raise InvalidArgument(
                f"model {model.id!r} codes grey pictures only, and this one has colours; make it grey first, or choose "
                "another model"
            )
        return self

    def _grid(self, picture: Picture | Strips) -> Grid:
        return Grid.of(self._model(self.model), picture.width, picture.height)

    def _bands(self, grid: Grid) -> list[range]:
        self.limits.check_tiles(len(grid))
        return grid.bands(_AT_ONCE * self._threads)

    def _crew(self, model: runtime.Model, grid: Grid) -> Crew:
        """A single tile is worked on with all threads, each of several with one."""
        return Crew(model if len(grid) == 1 else self._model(model.id, 1), self._threads)

    def _front(self, quality: float, picture: Picture | Strips) -> Front:
        colour = container.GREY if picture.grey else container.RGB
        return Front(self.model, colour, picture.width, picture.height, quality, self._model(self.model).short)

    def _analysed_bands(
        self,
        model: runtime.Model,
        grid: Grid,
        bands: Iterable[Band],
        work: Callable[[runtime.Model, Analysed], _Result],
        *,
        coded: bool = True,
    ) -> Iterator[list[_Result]]:
        """What `work` makes of the tiles, band by band. coded: symbols become of them."""
        crew = self._crew(model, grid)
        if coded:
            crew.model.expect_prior()
        for band in bands:

            def analyse(tile: Tile, own: runtime.Model, band: Band = band) -> _Result:
                x, y = tile.x - band.x, tile.y - band.y
                mine = band.pixels[y : y + tile.height, x : x + tile.width]
                tensors = own.analyse(band.pixels, x, y, tile.width, tile.height)
                return work(own, Analysed(own, mine, tensors, band.pixels, x, y))

            yield crew.each(band.tiles, analyse)

    def _encoded_bands(
        self,
        model: runtime.Model,
        grid: Grid,
        bands: Iterable[Band],
        settings: Settings,
    ) -> Iterator[list[bytes]]:
        quality, effort = quality_of(settings), settings.get("effort", "default")

        def encode(own: runtime.Model, analysed: Analysed) -> bytes:
            return pack_tile(own, quality, quantise(analysed, quality, effort))

        return self._analysed_bands(model, grid, bands, encode)

    def _encode(self, picture: Picture, source: int | None, settings: Settings) -> bytes:
        """source: bytes of the file that the picture came from, for a target in per cent of it."""
        thorough = settings.get("effort") == "best"
        outlook = lossless.Outlook(picture.colour, picture.alpha) if settings.get("fallback", True) else None

        @cache
        def stored() -> bytes:
            if large := picture.width * picture.height > _ROOMY:
                self.unload()
            data = _stored(picture, thorough)
            if large:  # Pillow's copy is still the process's: the learned codec may come after this
                runtime.trim()
            return data

        limit = self._limit(picture, source, settings)
        next_to_nothing = min(_LEAST_TILE * len(self._grid(picture)), limit or math.inf)
        if outlook and outlook.is_nearly_empty and len(stored()) <= next_to_nothing:
            return stored()
        try:
            data = self._coded(picture, source, settings)
        except InvalidArgument:
            # Too small for the learned codec, or too good; without loss it may be neither.
            if outlook and (len(stored()) <= limit if limit else "target_psnr" in settings):
                return stored()
            raise
        most = max(len(data), limit or 0)  # what has no loss is the best that fits
        return stored() if outlook and outlook.may_beat(most) and len(stored()) <= most else data

    def _coded(self, picture: Picture, source: int | None, settings: Settings) -> bytes:
        """The file of a picture by the learned codec."""
        if "target_psnr" in settings:
            return self._reach_psnr(picture, settings)
        if is_aimed(settings):
            return self._reach_size(picture, source, settings)
        model, quality = self._model(self.model), quality_of(settings)
        grid = self._grid(picture)
        bands = of_picture(_colour(picture, grid), grid, self._bands(grid))
        coded = [section for band in self._encoded_bands(model, grid, bands, settings) for section in band]
        return self._file(picture, quality, coded, self._alpha_sections(picture, grid))

    def _file(self, picture: Picture, quality: float, coded: list[bytes], alpha: list[tuple[int, bytes]]) -> bytes:
        tiles = [(container.CODE, section) for section in coded]
        return container.write(self._front(quality, picture), [*_metadata_sections(picture.metadata), *tiles, *alpha])

    def _alpha_sections(self, picture: Picture, grid: Grid) -> list[tuple[int, bytes]]:
        if (alpha := picture.alpha) is None:
            return []
        model = self._model(self.model)
        packed = self._crew(model, grid).each(grid.tiles(), lambda tile, _: lossless.pack(alpha[_place(tile)]))
        return [(container.ALPHA, payload) for payload in packed]

    def _requantiser(self, picture: Picture) -> Callable[[float, Effort, int | None], bytes]:
        """quality, effort, widest (see `quantise`) -> file, for one picture; the analysis transform runs once."""
        model = self._model(self.model)
        grid = self._grid(picture)
        alpha = self._alpha_sections(picture, grid)
        analysed = self._transformed(picture, grid)

        def encode(quality: float, effort: Effort, widest: int | None) -> bytes:
            quality = round(float(quality), 2)

            def work(tile: Tile, own: runtime.Model) -> bytes:
                return pack_tile(own, quality, quantise(analysed[tile.number], quality, effort, widest))

            return self._file(picture, quality, self._crew(model, grid).each(grid.tiles(), work), alpha)

        return encode

    def _transformed(self, picture: Picture, grid: Grid) -> list[Analysed]:
        model, detailed = self._model(self.model), picture.width * picture.height <= _DETAILED

        def keep(_: runtime.Model, analysed: Analysed) -> Analysed:
            if detailed:
                return analysed
            return replace(analysed, tensors={**analysed.tensors, "y": analysed.tensors["y"].astype(np.float16)})

        bands = of_picture(_colour(picture, grid), grid, self._bands(grid))
        return [analysed for band in self._analysed_bands(model, grid, bands, keep) for analysed in band]

    def _limit(self, picture: Picture, source: int | None, settings: Settings) -> int | None:
        """Bytes that were asked for."""
        if "target_size" in settings:
            return parse_size(settings["target_size"], source)
        if "target_bpp" in settings:
            return int(min(settings["target_bpp"] * picture.width * picture.height / 8, 2.0**62))
        return None

    def _reach_size(self, picture: Picture, source: int | None, settings: Settings) -> bytes:
        """The file of the highest quality that is no larger than asked for, and no less than _FILLED of it.

        Where a tile goes from one width to the next, its size jumps. What falls into such a gap is reached by a higher
        quality in the smaller width.
        """
        limit = self._limit(picture, source, settings) or 0
        encode = self._requantiser(picture)

        def search(widest: int | None) -> Attempt:
            def attempt(quality: float, effort: Effort) -> Attempt:
                data = encode(quality, effort, widest)
                return Attempt(quality, data, math.log(len(data)))

            return aim(attempt, settings.get("effort", "default"), math.log(limit) if limit else 0.0, below=True)

        found = search(None)
        for widest in reversed(range(len(self._model(self.model).widths) - 1)):
            if found.quality < 100 and len(found.data) < _FILLED * limit:
                found = max(found, search(widest), key=lambda attempt: len(attempt.data))
        if (least := len(found.data)) > limit:
            asked = next(f"{goal} is {value}" for goal, value in settings.items() if goal in GOALS)
            raise InvalidArgument(
                f"{asked}, {limit} bytes; at quality 0, the smallest, this picture takes {least} "
                f"bytes, {metrics.bpp(least, picture.width, picture.height):.4f} bpp"
            )
        return found.data

    def _reach_psnr(self, picture: Picture, settings: Settings) -> bytes:
        """The file of the lowest quality whose colours are at least as good as asked for."""
        asked, encode = settings["target_psnr"], self._requantiser(picture)
        grid = self._grid(picture)
        original = seen(Picture(_colour(picture, grid)))

        def attempt(quality: float, effort: Effort) -> Attempt:
            data = encode(quality, effort, None)
            decoded = self.decode_picture(data)
            return Attempt(quality, data, metrics.psnr(original, seen(Picture(decoded.colour))))

        found = aim(attempt, settings.get("effort", "default"), asked, below=False)
        if found.figure < asked:
            raise InvalidArgument(
                f"target_psnr is {asked:g} dB; at quality 100, the best, this picture has {found.figure:.2f} dB"
            )
        return found.data

    def _decoding(self, reader: Reader, salvage: bool = False) -> Decoding:
        model, header = self._model(reader.header.model), reader.header
        crew = self._crew(model, Grid.of(model, header.width, header.height))
        return Decoding(reader, model, crew, at_once=_AT_ONCE * self._threads, salvage=salvage)

    def _streamed(
        self, reader: Reader, made: Callable[[Decoding], Iterator[_Result]]
    ) -> tuple[Header, Metadata, Iterator[_Result]]:
        """A file's header, metadata and what is made of it while it is read. The reader is closed in the end."""
        try:
            header = reader.header
            self.limits.check_streamed(header.width, header.height)
            reader.check_length()
            if header.lossless or header.numbers(container.ALPHA):
                raise InvalidArgument("a picture with alpha, or stored losslessly, can only be decoded as a whole")
            return header, metadata_of(reader), _closing(reader, made(self._decoding(reader)))
        except BaseException:
            reader.close()
            raise

    def _unpacked(self, data: FileSource) -> tuple[Decoding, list[Symbols]]:
        """The symbols of a file, tile by tile. Raises as `unpack`."""
        with Reader(data, self.limits) as reader:
            header = reader.header
            reader.check_length()
            self.limits.check_size(header.width, header.height)
            if header.lossless:
                raise CodeError("the picture is stored losslessly: the file has no code; decode it")
            decoding = self._decoding(reader)
            tiles = decoding.grid.tiles()
            return decoding, decoding.crew.each(tiles, decoding.symbols)

    def _walked(self, code: Code) -> tuple[runtime.Model, Grid, list[Symbols]]:
        """What the prior makes of a code that came from outside, after comparing the code with its model's rules."""
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
        if model.colours == 1 and not code.grey:
            raise CodeError(f"code is of a picture with colours; model {model.id!r} has grey ones only")
        grid = Grid.of(model, code.width, code.height)

        def walk(tile: Tile, own: runtime.Model) -> Symbols:
            place = tile.x, tile.y, tile.width, tile.height
            parts = {rule.name: rule.part(code.tensors[rule.name], *place) for rule in own.tensors if rule != own.coded}
            coded = int(code.tensors[own.coded.name].flat[tile.number]) if own.coded else own.latent.channels
            return walk_tile(own, code.quality, parts, coded, tile)

        return model, grid, self._crew(model, grid).each(grid.tiles(), walk)


def _closing(reader: Reader, rows: Iterator[_Result]) -> Iterator[_Result]:
    with reader:
        yield from rows


def _length_of(source: ImageSource | Picture) -> int | None:
    """Bytes of the file that a picture comes from, where it comes from one."""
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stat().st_size
    return len(source) if isinstance(source, (bytes, bytearray, memoryview)) else None


def _warn(losses: Iterable[str]) -> None:
    for loss in losses:
        warnings.warn(loss, LossWarning, stacklevel=3)


def _colour(picture: Picture, grid: Grid) -> NDArray[np.uint8]:
    """The colours to code: where nothing can be seen, something cheap."""
    if picture.alpha is None:
        return picture.colour
    return conceal(picture.colour, picture.alpha, grid.side)


def _place(tile: Tile) -> tuple[slice, slice]:
    return slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width)


def _metadata_sections(metadata: Metadata) -> list[tuple[int, bytes]]:
    found = ((kind, getattr(metadata, name)) for name, kind in KINDS.items())
    return [(kind, container.deflate(data)) for kind, data in found if data]


def _stored(picture: Picture, thorough: bool) -> bytes:
    """The file of a picture without any loss."""
    colour = container.GREY if picture.grey else container.RGB
    payload = lossless.pack(picture.colour, picture.alpha, thorough)
    sections = [*_metadata_sections(picture.metadata), (container.LOSSLESS, payload)]
    return container.write(Front("", colour, picture.width, picture.height, 100, short=True), sections)


def _code(model: runtime.Model, quality: float, grid: Grid, grey: bool, symbols: list[Symbols]) -> Code:
    width, height = grid.width, grid.height
    tensors = {rule.name: np.zeros(rule.shape(width, height), np.int16) for rule in model.tensors}
    for tile, own in zip(grid.tiles(), symbols, strict=True):
        for rule in model.tensors:
            if rule == model.coded:
                tensors[rule.name].flat[tile.number] = 4 * model.widths[own.width]
            else:
                part = rule.part(tensors[rule.name], tile.x, tile.y, tile.width, tile.height)
                part[:] = widen(own.tensors[rule.name], len(part))
    return Code(model.id, quality, width, height, tensors, grey)


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in tensors.items()) or "none"
