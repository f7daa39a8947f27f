"""Codec: the four hops between a picture and a file.

encode = analyse + pack          image -> pixels -> latent -> Code -> bytes
decode = unpack + synthesise     bytes -> Code -> latent -> pixels

A picture is worked on in bands of tiles, several tiles at a time, so that of a large one only a band is in memory beside
the pixels, and not even these when it goes from file to file.
"""

from __future__ import annotations

import copy
import math
import numbers
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, TypeAlias, TypedDict, TypeVar, Unpack, cast, get_args

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, image, lossless, metrics, runtime
from hourglass.codec.aim import Attempt, aim, parse_size
from hourglass.codec.container import FileSource, Front, Header, Reader, Writer
from hourglass.codec.errors import CodeError, ContainerError, CorruptError, InvalidArgument, LossWarning
from hourglass.codec.image import ImageSource, Keep, Metadata, Picture, Pixels
from hourglass.codec.limits import Limits
from hourglass.codec.quantise import Analysed, Effort, Symbols, quantise, widen
from hourglass.codec.strips import Strips
from hourglass.codec.tiles import Grid, Piece, Tile, conceal, pack_tile, patch, unpack_tile, walk_tile

DEFAULT_QUALITY = 50.0

Region: TypeAlias = tuple[int, int, int, int]
"""x, y, width, height of a rectangle in pixels of the whole picture."""

SCALES = (1, 2, 4, 8)
"""What a picture may be divided by when it is decoded."""

_Result = TypeVar("_Result")

_GOALS = ("quality", "target_size", "target_bpp", "target_psnr")

_KINDS = {"icc": container.ICC, "exif": container.EXIF, "xmp": container.XMP, "iptc": container.IPTC}

_LEAST_TILE = 22
"""No tile takes fewer bytes than this, its entry in the header included."""

_DETAILED = 1 << 24
"""Pixels up to which a search keeps its latents as they are, in float32; above it in float16."""


class Settings(TypedDict, total=False):
    """How to encode. At most one of the first four; without any of them quality 50.

    quality: 0 (smallest) to 100 (best).
    target_size: bytes that the file may have at most: a number, or text such as "40k", "1.5M" or "5%" of the source
        file. The result has at least 97 % of that (or 8 bytes less, for the tiniest), unless quality 100 needs less.
    target_bpp: the same in bits per pixel.
    target_psnr: dB over RGB that the decoded picture has at least.
    effort: "fast" rounds, "default" drops symbols that cost more than they are worth, "best" also searches.
    metadata: "all" keeps ICC profile, EXIF, XMP and IPTC, "icc" the profile only, "none" nothing: then colours are
        converted to sRGB.
    srgb: convert colours to sRGB and drop the profile.
    frame: which one of an animation or of several pages, from 0.
    fallback: whether a picture may be stored losslessly where that is smaller; by default it may.
    """

    quality: float
    target_size: int | str
    target_bpp: float
    target_psnr: float
    effort: Effort
    metadata: Keep
    srgb: bool
    frame: int
    fallback: bool


class View(TypedDict, total=False):
    """What to decode. region: a rectangle of the picture. scale: 1, 2, 4 or 8, by which its sides are divided.

    salvage: decode what is not damaged, mark the rest, and say so in a `LossWarning`.
    """

    region: Region
    scale: int
    salvage: bool


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

    def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file, with alpha and metadata.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`; a `LossWarning` for each thing that is not kept.
        """
        picture = self._load(image, settings)
        _warn(picture.losses)
        return self.encode_picture(picture, _length_of(image), **settings)

    def encode_picture(self, picture: Picture, source: int | None = None, **settings: Unpack[Settings]) -> bytes:
        """`encode` of a picture that is loaded already. source: bytes of the file it came from, for a target in per cent.

        Raises `LimitError`, `InvalidArgument`.
        """
        check_settings(settings)
        self.limits.check_size(picture.width, picture.height)
        thorough = settings.get("effort") == "best"
        outlook = lossless.Outlook(picture.pixels) if settings.get("fallback", True) else None
        grid = Grid(picture.width, picture.height, self._model(self.model).tile.stride)
        if outlook and outlook.is_nearly_empty:
            stored = _stored(picture, thorough)
            if len(stored) <= _LEAST_TILE * len(grid):
                return stored
        limit = self._limit(picture, source, settings)
        try:
            data = self._coded(picture, source, settings)
        except InvalidArgument:
            # Too small for the learned codec, or too good; without loss it may be neither.
            stored = _stored(picture, thorough) if outlook else b""
            if stored and (len(stored) <= limit if limit else "target_psnr" in settings):
                return stored
            raise
        most = max(len(data), limit or 0)  # what has no loss is the best that fits
        if outlook and outlook.may_beat(most):
            stored = _stored(picture, thorough)
            if len(stored) <= most:
                return stored
        return data

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
            return self._decoded(reader, view)

    def read_header(self, data: FileSource) -> Header:
        """The header of a .hgc file; its sections may be missing. Raises `ContainerError`, `LimitError`."""
        return container.read_header(data, self.limits)

    def encode_strips(self, strips: Strips, out: BinaryIO, **settings: Unpack[Settings]) -> None:
        """`encode` of a picture that is read a few rows at a time, into a seekable file; never stored losslessly.

        Its bytes are those of `encode`. Memory is bounded by the picture's width. Raises as `encode`.
        """
        check_settings(settings)
        if _is_aimed(settings):
            raise InvalidArgument(
                "a target needs the whole picture in memory; give a quality for one that is too large"
            )
        self.limits.check_streamed(strips.width, strips.height)
        model, quality = self._model(self.model), _quality_of(settings)
        grid = Grid(strips.width, strips.height, model.tile.stride)
        metadata = _metadata_sections(strips.metadata)
        writer = Writer(out, self._front(quality, strips), len(grid) + len(metadata))
        for kind, payload in metadata:
            writer.add(kind, payload)
        for sections in self._encoded_bands(
            model, grid, _strip_bands(strips, grid, self._bands(grid), model.halo * runtime.STRIDE), settings
        ):
            for section in sections:
                writer.add(container.CODE, section)
        writer.finish()

    def decode_strips(self, data: FileSource) -> tuple[Header, Metadata, Iterator[Pixels]]:
        """A .hgc file -> its header, metadata, and the rows of its picture from top to bottom, some at a time.

        Memory is bounded by the picture's width. Raises as `decode`, also while the rows are made; for one with alpha, or
        one that is stored losslessly, `InvalidArgument`.
        """
        reader = Reader(data, self.limits)
        try:
            header = reader.header
            self.limits.check_streamed(header.width, header.height)
            reader.check_length()
            if header.lossless or header.numbers(container.ALPHA):
                raise InvalidArgument("a picture with alpha, or stored losslessly, can only be decoded as a whole")
            decoding = _Decoding(reader, *self._model_and_grid(header), salvage=False)
            region = 0, 0, header.width, header.height
            return header, _metadata_of(reader), _closing(reader, self._strips(decoding, region, 1))
        except BaseException:
            reader.close()
            raise

    def analyse(self, image: ImageSource, **settings: Unpack[Settings]) -> Code:
        """Analysis transform, gain, prior, rounding: a picture -> the Code of its colours.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`.
        """
        check_settings(settings)
        picture = self._load(image, settings)
        losses = [*picture.losses, *(["a Code holds no alpha; it is left out"] if picture.alpha is not None else [])]
        _warn(losses)
        if _is_aimed(settings):
            bare = Picture(picture.colour, None, Metadata(), ())
            return self.unpack(self._coded(bare, _length_of(image), settings))
        model, quality = self._model(self.model), _quality_of(settings)
        grid = Grid(picture.width, picture.height, model.tile.stride)
        bands = _whole_bands(_colour(picture, grid), self._bands(grid))
        effort = settings.get("effort", "default")

        def analyse(own: runtime.Model, analysed: Analysed) -> Symbols:
            return quantise(analysed, quality, effort)

        symbols = [s for band in self._analysed_bands(model, grid, bands, analyse) for s in band]
        return _code(model, quality, grid, picture.grey, symbols)

    def encode_many(
        self, image: ImageSource, qualities: Iterable[float], effort: Effort = "default"
    ) -> Iterator[bytes]:
        """The files of one picture at many qualities, from one pass of the analysis transform, without fallback.

        Raises as `encode`.
        """
        picture = image if isinstance(image, Picture) else self._load(image, {})
        _warn(picture.losses)
        requantised = self._requantiser(picture)
        for quality in qualities:
            check_quality(quality)
            yield requantised(quality, effort)

    def synthesise(self, code: Code) -> Pixels:
        """Prior, inverse gain, synthesis transform: a Code -> (H, W, 3) uint8, or (H, W) if it is grey.

        Raises `CodeError`, `UnknownModelError`.
        """
        model, grid, symbols = self._walked(code)
        out = np.empty((code.height, code.width) if code.grey else (code.height, code.width, 3), np.uint8)
        pieces = {number: Piece(s.latent, s.width) for number, s in enumerate(symbols)}

        def synthesise(tile: Tile, own: runtime.Model) -> None:
            pixels = own.synthesise(patch(own, code.quality, grid, tile, pieces))
            out[_place(tile)] = _as_colour(pixels[: tile.height, : tile.width], code.grey)

        self._each(model, grid, grid.tiles(), synthesise)
        return out

    def pack(self, code: Code) -> bytes:
        """A Code -> the bytes of a .hgc file. Raises `CodeError`, `UnknownModelError`."""
        model, _, symbols = self._walked(code)
        colour = container.GREY if code.grey else container.RGB
        front = Front(model.id, colour, code.width, code.height, code.quality)
        return container.write(front, [(container.CODE, pack_tile(model, code.quality, s)) for s in symbols])

    def unpack(self, data: FileSource) -> Code:
        """The bytes of a .hgc file -> its Code, without alpha and metadata.

        Raises `ContainerError` (with `CorruptError`), `LimitError`, `UnknownModelError`, `OSError`, and `CodeError` for a
        picture that is stored losslessly.
        """
        with Reader(data, self.limits) as reader:
            header = reader.header
            reader.check_length()
            self.limits.check_size(header.width, header.height)
            if header.lossless:
                raise CodeError("the picture is stored losslessly: the file has no code; decode it")
            decoding = _Decoding(reader, *self._model_and_grid(header), salvage=False)
            grid = decoding.grid
            symbols = self._each(decoding.model, grid, grid.tiles(), decoding.symbols)
        grey = header.colour == container.GREY
        return _code(decoding.model, header.quality, grid, grey, symbols)

    def measure(self, image: ImageSource, code: Code) -> Distortion:
        """PSNR and MS-SSIM between a picture and what `code` decodes to."""
        original, decoded = _rgb(_load(image, self.limits, {}).colour), _rgb(self.synthesise(code))
        return Distortion(metrics.psnr(original, decoded), metrics.ms_ssim(original, decoded))

    def with_model(self, model: str) -> Codec:
        """A codec that encodes with another model and shares all that is loaded. Raises `UnknownModelError`."""
        other = copy.copy(self)
        other.model = self._model(model).id
        return other

    def warm_up(self) -> None:
        """Load the model and run it once, so that the first picture does not wait for it."""
        side = self._model(self.model).tile.stride
        for width in (16, side + 16):  # one tile with all threads, more with a thread each
            self.decode(self.encode(np.zeros((16, width, 3), np.uint8), fallback=False))

    def _model(self, model_id: str, threads: int = 0) -> runtime.Model:
        key = model_id, threads or self._threads
        with self._lock:
            if key not in self._models:
                self._models[key] = runtime.Model(model_id, self._zoo, key[1])
            return self._models[key]

    def _model_and_grid(self, header: Header) -> tuple[runtime.Model, Grid]:
        model = self._model(header.model)
        return model, Grid(header.width, header.height, model.tile.stride)

    def _load(self, source: ImageSource, settings: Settings) -> Picture:
        check_settings(settings)
        return _load(source, self.limits, settings)

    def _bands(self, grid: Grid) -> list[range]:
        return grid.bands(2 * self._threads)

    def _each(
        self, model: runtime.Model, grid: Grid, tiles: list[Tile], work: Callable[[Tile, runtime.Model], _Result]
    ) -> list[_Result]:
        """Results of `work` for tiles of a picture: of one tile with all threads, of more with a thread for each tile.

        What runs in a thread gets the model that works in one thread.
        """
        single = model if len(grid) == 1 else self._model(model.id, 1)
        if len(tiles) == 1 or self._threads == 1:
            return [work(tile, single) for tile in tiles]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(lambda tile: work(tile, single), tiles))

    def _front(self, quality: float, picture: Picture | Strips) -> Front:
        colour = container.GREY if picture.grey else container.RGB
        return Front(self.model, colour, picture.width, picture.height, quality)

    def _analysed_bands(
        self,
        model: runtime.Model,
        grid: Grid,
        bands: Iterable[tuple[range, int, NDArray[np.uint8]]],
        work: Callable[[runtime.Model, Analysed], _Result],
    ) -> Iterator[list[_Result]]:
        """What `work` makes of the tiles, band by band: (rows of tiles, row of pixels where its pixels begin, pixels)."""
        for rows, top, pixels in bands:

            def analyse(tile: Tile, own: runtime.Model, top: int = top, pixels: NDArray[np.uint8] = pixels) -> _Result:
                place = tile.x, tile.y - top, tile.width, tile.height
                mine = pixels[tile.y - top : tile.y - top + tile.height, tile.x : tile.x + tile.width]
                return work(own, Analysed(own, mine, *own.analyse(pixels, *place)))

            yield self._each(model, grid, grid.tiles(rows), analyse)

    def _encoded_bands(
        self,
        model: runtime.Model,
        grid: Grid,
        bands: Iterable[tuple[range, int, NDArray[np.uint8]]],
        settings: Settings,
    ) -> Iterator[list[bytes]]:
        quality, effort = _quality_of(settings), settings.get("effort", "default")

        def encode(own: runtime.Model, analysed: Analysed) -> bytes:
            return pack_tile(own, quality, quantise(analysed, quality, effort))

        return self._analysed_bands(model, grid, bands, encode)

    def _coded(self, picture: Picture, source: int | None, settings: Settings) -> bytes:
        """The file of a picture by the learned codec."""
        if "target_psnr" in settings:
            return self._reach_psnr(picture, settings)
        if _is_aimed(settings):
            return self._reach_size(picture, source, settings)
        model, quality = self._model(self.model), _quality_of(settings)
        grid = Grid(picture.width, picture.height, model.tile.stride)
        bands = _whole_bands(_colour(picture, grid), self._bands(grid))
        sections = [section for band in self._encoded_bands(model, grid, bands, settings) for section in band]
        return self._file(picture, grid, quality, sections)

    def _file(self, picture: Picture, grid: Grid, quality: float, sections: list[bytes]) -> bytes:
        coded = [(container.CODE, section) for section in sections]
        return container.write(
            self._front(quality, picture),
            [*_metadata_sections(picture.metadata), *coded, *self._alpha_sections(picture, grid)],
        )

    def _alpha_sections(self, picture: Picture, grid: Grid) -> list[tuple[int, bytes]]:
        if (alpha := picture.alpha) is None:
            return []
        model = self._model(self.model)
        packed = self._each(model, grid, grid.tiles(), lambda tile, _: lossless.pack(alpha[_place(tile)]))
        return [(container.ALPHA, payload) for payload in packed]

    def _requantiser(self, picture: Picture) -> Callable[[float, Effort], bytes]:
        """quality, effort -> file, for one picture; the analysis transform runs once."""
        model = self._model(self.model)
        grid = Grid(picture.width, picture.height, model.tile.stride)
        alpha = self._alpha_sections(picture, grid)
        metadata = _metadata_sections(picture.metadata)
        analysed = self._transformed(picture, grid)

        def encode(quality: float, effort: Effort) -> bytes:
            quality = round(float(quality), 2)

            def work(tile: Tile, own: runtime.Model) -> bytes:
                return pack_tile(own, quality, quantise(analysed[tile.number], quality, effort))

            coded = [(container.CODE, section) for section in self._each(model, grid, grid.tiles(), work)]
            return container.write(self._front(quality, picture), [*metadata, *coded, *alpha])

        return encode

    def _transformed(self, picture: Picture, grid: Grid) -> list[Analysed]:
        model, detailed = self._model(self.model), picture.width * picture.height <= _DETAILED

        def keep(_: runtime.Model, analysed: Analysed) -> Analysed:
            if detailed:
                return analysed
            short = cast("NDArray[np.float32]", analysed.latent.astype(np.float16))
            return replace(analysed, latent=short)

        bands = _whole_bands(_colour(picture, grid), self._bands(grid))
        return [analysed for band in self._analysed_bands(model, grid, bands, keep) for analysed in band]

    def _limit(self, picture: Picture, source: int | None, settings: Settings) -> int | None:
        """Bytes that were asked for."""
        if "target_size" in settings:
            return parse_size(settings["target_size"], source)
        if "target_bpp" in settings:
            return int(min(settings["target_bpp"] * picture.width * picture.height / 8, 2.0**62))
        return None

    def _reach_size(self, picture: Picture, source: int | None, settings: Settings) -> bytes:
        """The file of the highest quality that is no larger than asked for."""
        limit = self._limit(picture, source, settings) or 0
        encode = self._requantiser(picture)

        def attempt(quality: float, effort: Effort) -> Attempt:
            data = encode(quality, effort)
            return Attempt(quality, data, math.log(len(data)))

        effort = settings.get("effort", "default")
        found = aim(attempt, effort, math.log(limit) if limit else 0.0, below=True)
        if (least := len(found.data)) > limit:
            asked = next(f"{goal} is {value}" for goal, value in settings.items() if goal in _GOALS)
            raise InvalidArgument(
                f"{asked}, {limit} bytes; at quality 0, the smallest, this picture takes {least} "
                f"bytes, {metrics.bpp(least, picture.width, picture.height):.4f} bpp"
            )
        return found.data

    def _reach_psnr(self, picture: Picture, settings: Settings) -> bytes:
        """The file of the lowest quality whose colours are at least as good as asked for."""
        asked, encode = settings["target_psnr"], self._requantiser(picture)
        grid = Grid(picture.width, picture.height, self._model(self.model).tile.stride)
        original = _rgb(_colour(picture, grid))

        def attempt(quality: float, effort: Effort) -> Attempt:
            data = encode(quality, effort)
            decoded = self.decode_picture(data)
            return Attempt(quality, data, metrics.psnr(original, _rgb(decoded.colour)))

        found = aim(attempt, settings.get("effort", "default"), asked, below=False)
        if found.figure < asked:
            raise InvalidArgument(
                f"target_psnr is {asked:g} dB; at quality 100, the best, this picture has {found.figure:.2f} dB"
            )
        return found.data

    def _decoded(self, reader: Reader, view: View) -> Picture:
        header, salvage = reader.header, view.get("salvage", False)
        whole = (0, 0, header.width, header.height)
        region, scale = view.get("region", whole), view.get("scale", 1)
        check_view(header.width, header.height, view)
        self.limits.check_size(-(-region[2] // scale), -(-region[3] // scale))
        if not salvage:
            reader.check_length()
        if header.lossless:
            return _unstored(reader, region, scale, self.limits)
        decoding = _Decoding(reader, *self._model_and_grid(header), salvage=salvage)
        colour = self._colours(decoding, region, scale)
        alpha = self._alphas(decoding, region, scale)
        metadata = _metadata_of(reader, decoding.holes if salvage else None)
        return Picture(colour, alpha, metadata, tuple(decoding.holes))

    def _colours(self, decoding: _Decoding, region: Region, scale: int) -> NDArray[np.uint8]:
        """The colours of a region, (h, w, 3) or (h, w), divided by `scale`."""
        _, top, _, bottom = _scaled(region, scale)
        out, filled = None, 0
        for strip in self._strips(decoding, region, scale):
            if len(strip) == bottom - top:
                return strip
            if out is None:
                out = np.empty((bottom - top, *strip.shape[1:]), np.uint8)
            out[filled : filled + len(strip)] = strip
            filled += len(strip)
        assert out is not None  # a region has a row
        return out

    def _strips(self, decoding: _Decoding, region: Region, scale: int) -> Iterator[NDArray[np.uint8]]:
        """The colours of a region, a band of tiles at a time.

        Of the tiles' latents only the positions that the region depends on are synthesised.
        """
        x, y, width, height = region
        grid, model, margin = decoding.grid, decoding.model, decoding.model.reach * runtime.STRIDE
        rows_wanted = _tiles_of(y, height, 0, grid.side, grid.height)
        rows_needed = _tiles_of(y, height, margin, grid.side, grid.height)
        columns_wanted = _tiles_of(x, width, 0, grid.side, grid.width)
        columns_needed = _tiles_of(x, width, margin, grid.side, grid.width)
        at_once = max(1, -(-2 * self._threads // len(columns_needed)))
        pieces: dict[int, Piece] = {}
        read = rows_needed.start
        for first in rows_wanted[::at_once]:
            rows = range(first, min(first + at_once, rows_wanted.stop))
            upto = min(rows.stop + 1, rows_needed.stop)
            tiles = grid.tiles(range(read, upto), columns_needed)
            found = self._each(model, grid, tiles, decoding.piece)
            pieces |= {tile.number: piece for tile, piece in zip(tiles, found, strict=True) if piece is not None}
            read = upto
            begin, end = max(y, rows.start * grid.side), min(y + height, rows.stop * grid.side)
            left, top, right, bottom = _scaled((x, begin, width, end - begin), scale)
            shape = (bottom - top, right - left)
            out = np.empty(shape if decoding.grey else (*shape, 3), np.uint8)

            def synthesise(tile: Tile, own: runtime.Model, out: Pixels = out, left: int = left, top: int = top) -> None:
                """The part of a tile that is wanted, into its place."""
                x0, x1 = max(x, tile.x), min(x + width, tile.x + tile.width)
                y0, y1 = max(y, tile.y), min(y + height, tile.y + tile.height)
                x2, y2, x3, y3 = _scaled((x0, y0, x1 - x0, y1 - y0), scale)
                into = out[y2 - top : y3 - top, x2 - left : x3 - left]
                if tile.number not in pieces:
                    into[:] = _hole(into)
                    return
                up, down, before, behind = (
                    (y0 - tile.y) // runtime.STRIDE,
                    -(-(y1 - tile.y) // runtime.STRIDE),
                    (x0 - tile.x) // runtime.STRIDE,
                    -(-(x1 - tile.x) // runtime.STRIDE),
                )
                part = patch(own, decoding.quality, grid, tile, pieces, (up, down, before, behind))
                pixels = own.synthesise(part, scale)
                skip_y = y2 - (tile.y + up * runtime.STRIDE) // scale
                skip_x = x2 - (tile.x + before * runtime.STRIDE) // scale
                into[:] = _as_colour(
                    pixels[skip_y : skip_y + len(into), skip_x : skip_x + into.shape[1]], decoding.grey
                )

            self._each(model, grid, grid.tiles(rows, columns_wanted), synthesise)
            for tile in grid.tiles(range(rows.start, rows.stop - 1)):
                pieces.pop(tile.number, None)
            for tile in grid.tiles(range(max(rows.start - 1, 0), rows.start)):
                pieces.pop(tile.number, None)
            for tile in grid.tiles(range(rows.stop - 1, rows.stop)):
                if tile.number in pieces:  # of what lies above the next band its edge is enough
                    pieces[tile.number] = pieces[tile.number].bottom(model.halo)
            yield out

    def _alphas(self, decoding: _Decoding, region: Region, scale: int) -> NDArray[np.uint8] | None:
        """The alpha of a region, (h, w), divided by `scale`."""
        numbers = decoding.reader.header.numbers(container.ALPHA)
        if not numbers:
            return None
        x, y, width, height = region
        grid = decoding.grid
        tiles = grid.tiles(
            _tiles_of(y, height, 0, grid.side, grid.height), _tiles_of(x, width, 0, grid.side, grid.width)
        )
        left, top, right, bottom = _scaled(region, scale)
        out = np.empty((bottom - top, right - left), np.uint8)

        def fill(tile: Tile, _: runtime.Model) -> None:
            try:
                alpha = lossless.unpack(decoding.reader.payload(numbers[tile.number]), tile.width, tile.height, 1)
                if alpha.ndim != 2:
                    raise CorruptError(f"the alpha of tile {tile.number} has an alpha itself")
            except CorruptError as exc:
                decoding.lose(f"the alpha of tile {tile.number}", tile, exc)
                alpha = np.full((tile.height, tile.width), 255, np.uint8)
            x0, x1 = max(x, tile.x), min(x + width, tile.x + tile.width)
            y0, y1 = max(y, tile.y), min(y + height, tile.y + tile.height)
            x2, y2, x3, y3 = _scaled((x0, y0, x1 - x0, y1 - y0), scale)
            small = _reduced(alpha, scale)[y2 - tile.y // scale :, x2 - tile.x // scale :]
            out[y2 - top : y3 - top, x2 - left : x3 - left] = small[: y3 - y2, : x3 - x2]

        self._each(decoding.model, grid, tiles, fill)
        return out

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
        grid = Grid(code.width, code.height, model.tile.stride)

        def walk(tile: Tile, own: runtime.Model) -> Symbols:
            place = tile.x, tile.y, tile.width, tile.height
            y, z, coded = (rule.part(code.tensors[rule.name], *place) for rule in model.tensors)
            return walk_tile(own, code.quality, y, z, int(coded[0, 0, 0]), tile.number)

        return model, grid, self._each(model, grid, grid.tiles(), walk)


class _Decoding:
    """A file on its way to pixels: its sections as pieces of latent. holes: what is damaged, where that is not an error."""

    def __init__(self, reader: Reader, model: runtime.Model, grid: Grid, *, salvage: bool) -> None:
        header = reader.header
        self.reader, self.model, self.grid = reader, model, grid
        self.quality, self.grey = header.quality, header.colour == container.GREY
        self.holes: list[str] = []
        self._salvage = salvage
        self._numbers = header.numbers(container.CODE)
        if len(self._numbers) != len(grid):
            raise ContainerError(
                f"file has {len(self._numbers)} tiles; model {model.id!r} has {len(grid)} "
                f"for a picture of {header.width}x{header.height} pixels"
            )

    def symbols(self, tile: Tile, own: runtime.Model) -> Symbols:
        return unpack_tile(own, self.quality, self.reader.payload(self._numbers[tile.number]), tile)

    def piece(self, tile: Tile, own: runtime.Model) -> Piece | None:
        """None for a tile that is damaged, when salvaging."""
        try:
            symbols = self.symbols(tile, own)
        except ContainerError as exc:
            self.lose(f"tile {tile.number}", tile, exc)
            return None
        return Piece(symbols.latent, symbols.width)

    def lose(self, what: str, tile: Tile, error: ContainerError) -> None:
        if not self._salvage:
            raise error
        self.holes.append(f"{what}, {tile.width}x{tile.height} pixels at {tile.x},{tile.y}, is lost: {error}")


def _closing(reader: Reader, rows: Iterator[_Result]) -> Iterator[_Result]:
    with reader:
        yield from rows


def check_settings(settings: Settings) -> None:
    """Raise `InvalidArgument` for names or values that no picture can be encoded with."""
    _check_names(settings, Settings)
    effort, keep = settings.get("effort", "default"), settings.get("metadata", "all")
    if effort not in get_args(Effort):
        raise InvalidArgument(f"effort is {effort!r}; expected one of {', '.join(get_args(Effort))}")
    if keep not in get_args(Keep):
        raise InvalidArgument(f"metadata is {keep!r}; expected one of {', '.join(get_args(Keep))}")
    frame = settings.get("frame", 0)
    if not isinstance(frame, numbers.Integral) or frame < 0:
        raise InvalidArgument(f"frame is {frame!r}; expected 0 or a larger whole number")
    given = [name for name in settings if name in _GOALS]
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


def check_view(width: int, height: int, view: View) -> None:
    """Raise `InvalidArgument` for what cannot be decoded of a picture of this size."""
    _check_names(view, View)
    scale = view.get("scale", 1)
    if scale not in SCALES:
        raise InvalidArgument(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
    region = tuple(view.get("region", (0, 0, width, height)))
    if len(region) != 4 or not all(isinstance(value, numbers.Integral) for value in region):
        raise InvalidArgument(f"region is {region}; expected four whole numbers: x, y, width, height")
    x, y, across, down = region
    if x < 0 or y < 0 or across < 1 or down < 1 or x + across > width or y + down > height:
        raise InvalidArgument(f"region is {across}x{down} at {x},{y}; the picture has {width}x{height} pixels")


def _check_names(given: Settings | View, kind: type[Settings | View]) -> None:
    unknown = [name for name in given if name not in kind.__annotations__]
    if unknown:
        raise InvalidArgument(f"{unknown[0]!r} is no setting; expected {', '.join(kind.__annotations__)}")


def _is_aimed(settings: Settings) -> bool:
    """Whether something else than a quality is asked for, which takes a search."""
    return any(name in settings for name in _GOALS[1:])


def _quality_of(settings: Settings) -> float:
    """As the file stores it."""
    return round(float(settings.get("quality", DEFAULT_QUALITY)), 2)


def _load(source: ImageSource, limits: Limits, settings: Settings) -> Picture:
    keep, srgb, frame = settings.get("metadata", "all"), settings.get("srgb", False), settings.get("frame")
    return image.load(source, limits, keep=keep, srgb=srgb, frame=frame)


def _length_of(source: ImageSource) -> int | None:
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


def _rgb(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return colour if colour.ndim == 3 else np.repeat(colour[..., None], 3, axis=2)


def _as_colour(pixels: NDArray[np.uint8], grey: bool) -> NDArray[np.uint8]:
    """(h, w, 3) as it is, or (h, w): the mean of the three."""
    if not grey:
        return pixels
    return np.asarray((pixels.sum(2, dtype=np.uint16) + 1) // 3, np.uint8)


def _place(tile: Tile) -> tuple[slice, slice]:
    return slice(tile.y, tile.y + tile.height), slice(tile.x, tile.x + tile.width)


def _whole_bands(colour: NDArray[np.uint8], bands: list[range]) -> Iterator[tuple[range, int, NDArray[np.uint8]]]:
    """What `_analysed_bands` takes, of a picture in memory."""
    return ((rows, 0, colour) for rows in bands)


def _strip_bands(
    strips: Strips, grid: Grid, bands: list[range], halo: int
) -> Iterator[tuple[range, int, NDArray[np.uint8]]]:
    """What `_analysed_bands` takes, of a picture that is read from top to bottom; bands overlap by the analysis' halo."""
    kept = np.empty((0,), np.uint8)
    top = bottom = 0
    for rows in bands:
        end = min(rows.stop * grid.side + halo, grid.height)
        parts = [] if bottom == 0 else [kept]
        while bottom < end:
            part = strips.read(end - bottom)
            parts.append(part)
            bottom += len(part)
        pixels = np.concatenate(parts) if len(parts) > 1 else parts[0]
        yield rows, top, pixels
        begin = max(rows.stop * grid.side - halo, 0)
        kept, top = pixels[begin - top :].copy(), begin


def _tiles_of(begin: int, size: int, margin: int, side: int, whole: int) -> range:
    """Rows (or columns) of tiles that a stretch of pixels and a margin around it lie in."""
    return range(max(begin - margin, 0) // side, -(-min(begin + size + margin, whole) // side))


def _scaled(region: Region, scale: int) -> tuple[int, int, int, int]:
    """First and last (exclusive) column and row of a region in a picture that is divided by `scale`: x, y, x, y."""
    x, y, width, height = region
    return x // scale, y // scale, -(-(x + width) // scale), -(-(y + height) // scale)


def _reduced(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """Means of scale x scale pixels; where the picture ends it is padded with its last row and column."""
    if scale == 1:
        return pixels
    height, width = pixels.shape[:2]
    padding = [(0, -height % scale), (0, -width % scale), *[(0, 0)] * (pixels.ndim - 2)]
    padded = np.pad(pixels, padding, mode="edge")
    shape = (len(padded) // scale, scale, padded.shape[1] // scale, scale, *pixels.shape[2:])
    sums = padded.reshape(shape).sum((1, 3), dtype=np.uint32)
    means: NDArray[np.uint8] = ((sums + scale * scale // 2) // (scale * scale)).astype(np.uint8)
    return means


def _hole(like: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A chequer of two greys, in place of what is lost."""
    rows, columns = np.ogrid[: like.shape[0], : like.shape[1]]
    chequer = np.where((rows // 8 + columns // 8) % 2, 96, 160).astype(np.uint8)
    return chequer if like.ndim == 2 else chequer[..., None]


def _metadata_sections(metadata: Metadata) -> list[tuple[int, bytes]]:
    found = ((kind, getattr(metadata, name)) for name, kind in _KINDS.items())
    return [(kind, container.deflate(data)) for kind, data in found if data]


def _metadata_of(reader: Reader, holes: list[str] | None = None) -> Metadata:
    """holes: where to say what is damaged; None makes that an error."""
    found = {}
    room = reader.limits.metadata_bytes
    for name, kind in _KINDS.items():
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


def _stored(picture: Picture, thorough: bool) -> bytes:
    """The file of a picture without any loss."""
    colour = container.GREY if picture.grey else container.RGB
    payload = lossless.pack(picture.pixels, thorough)
    sections = [*_metadata_sections(picture.metadata), (container.LOSSLESS, payload)]
    return container.write(Front("", colour, picture.width, picture.height, 100), sections)


def _unstored(reader: Reader, region: Region, scale: int, limits: Limits) -> Picture:
    """Inverse of `_stored`."""
    header = reader.header
    limits.check_size(header.width, header.height)
    (number,) = header.numbers(container.LOSSLESS)
    pixels = lossless.unpack(reader.payload(number), header.width, header.height, header.colour)
    x, y, width, height = region
    left, top, right, bottom = _scaled(region, scale)
    pixels = _reduced(pixels, scale)[top:bottom, left:right] if scale > 1 else pixels[y : y + height, x : x + width]
    opaque = pixels.ndim == 2 or pixels.shape[2] == 3
    colour = pixels if opaque else pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]
    alpha = None if opaque else np.ascontiguousarray(pixels[..., -1])
    return Picture(np.ascontiguousarray(colour), alpha, _metadata_of(reader), ())


def _code(model: runtime.Model, quality: float, grid: Grid, grey: bool, symbols: list[Symbols]) -> Code:
    width, height = grid.width, grid.height
    tensors = {rule.name: np.zeros(rule.shape(width, height), np.int16) for rule in model.tensors}
    for tile, own in zip(grid.tiles(), symbols, strict=True):
        values = (widen(own.y, model.latent.channels), own.z, np.full((1, 1, 1), 4 * model.widths[own.width]))
        for rule, value in zip(model.tensors, values, strict=True):
            rule.part(tensors[rule.name], tile.x, tile.y, tile.width, tile.height)[:] = value
    return Code(model.id, quality, width, height, tensors, grey)


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in tensors.items()) or "none"
