"""Codec: the four hops between a picture and a file.

encode = analyse + pack          image -> pixels -> latent -> Code -> bytes
decode = unpack + synthesise     bytes -> Code -> latent -> pixels
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
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, entropy, image, metrics, prior, runtime
from hourglass.codec.container import Header
from hourglass.codec.errors import CodeError, ContainerError, CorruptError, InvalidArgument
from hourglass.codec.image import ImageSource, Pixels
from hourglass.codec.limits import Limits
from hourglass.codec.quantise import Analysed, Effort, Part, dequantise, hyper_tables, quantise

DEFAULT_QUALITY = 50.0

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


_SYMBOLS_CRC = struct.Struct("<I")


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
        self._threads = threads
        self._zoo = zoo
        self._lock = threading.Lock()
        self._models: dict[str, runtime.Model] = {}
        self.model = self._model(model).id

    def models(self) -> list[ModelInfo]:
        """The models that this codec can decode and encode with."""
        found = [self._model(model_id) for model_id in runtime.model_ids(self._zoo)]
        return [ModelInfo(m.id, m.tensors, m.manifest) for m in found]

    def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file; exactly `pack(analyse(image))`. Raises what these raise."""
        return self._pack(self._analyse(image, settings))

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
        effort = settings.get("effort", "default")
        if "target_psnr" in settings:
            return self._reach_psnr(image, settings["target_psnr"], effort)
        if "target_size" in settings or "target_bpp" in settings:
            return self._reach_size(image, settings, effort)
        return self._quantise(self._transform(image), settings.get("quality", DEFAULT_QUALITY), effort)

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

    def _transform(self, source: ImageSource) -> Analysed:
        pixels = image.read(source, self.limits)
        model = self._model(self.model)
        return Analysed(model, pixels, *model.analyse(pixels))

    def _quantise(self, analysed: Analysed, quality: float, effort: Effort) -> _Coded:
        model, quality = analysed.model, round(float(quality), 2)
        symbols = quantise(analysed, quality, effort)
        height, width = analysed.pixels.shape[:2]
        tensors = {model.latent.name: symbols.y, model.hyper.name: symbols.z}
        return _Coded(Code(model.id, quality, width, height, tensors), symbols.parts, symbols.latent)

    def _synthesise(self, coded: _Coded) -> Pixels:
        code, model = coded.code, self._model(coded.code.model)
        return model.synthesise(dequantise(model, code.quality, coded.latent), code.width, code.height)

    def _pack(self, coded: _Coded) -> bytes:
        code, model = coded.code, self._model(coded.code.model)
        encoder = entropy.Encoder(model.tables)
        try:
            for symbols, tables in coded.parts:
                encoder.put(symbols, tables)
        except ValueError as exc:
            raise CodeError(f"code of model {model.id!r} at quality {code.quality:g} cannot be coded: {exc}") from exc
        section = _SYMBOLS_CRC.pack(_crc(code, model)) + encoder.finish()
        return container.write(model.id, code.width, code.height, code.quality, {container.CODE: section})

    def _unpack(self, data: FileSource) -> _Coded:
        header, sections = container.read(self._bytes(data), self.limits)
        model, quality = self._model(header.model), header.quality
        section = sections[container.CODE]
        if len(section) < _SYMBOLS_CRC.size:
            raise ContainerError(f"code section has {len(section)} bytes; expected {_SYMBOLS_CRC.size} or more")
        decoder = entropy.Decoder(section[_SYMBOLS_CRC.size :], model.tables)
        parts: list[Part] = []

        def decode(tables: NDArray[np.uint8]) -> NDArray[np.int16]:
            parts.append((decoder.get(tables), tables))
            return parts[-1][0]

        z = decode(hyper_tables(model, quality, model.hyper.shape(header.width, header.height)))
        _, height, width = model.latent.shape(header.width, header.height)
        y, latent = prior.walk(model, quality, z, height, width, lambda _step, tables, _mean: decode(tables))
        decoder.finish()
        code = Code(model.id, quality, header.width, header.height, {model.latent.name: y, model.hyper.name: z})
        if _crc(code, model) != _SYMBOLS_CRC.unpack_from(section)[0]:
            raise CorruptError("the decoded symbols do not match their checksum")
        return _Coded(code, parts, latent)

    def _walk(self, code: Code) -> _Coded:
        """What the prior makes of a code that came from outside."""
        model = self._checked(code)
        y, z = code.tensors[model.latent.name], code.tensors[model.hyper.name]
        padded = np.zeros((len(y), 4 * z.shape[1], 4 * z.shape[2]), np.int16)
        padded[:, : y.shape[1], : y.shape[2]] = y
        parts: list[Part] = [(z, hyper_tables(model, code.quality, z.shape))]

        def take(step: int, tables: NDArray[np.uint8], _mean: NDArray[np.int16]) -> NDArray[np.int16]:
            parts.append((prior.gather(padded, step), tables))
            return parts[-1][0]

        _, latent = prior.walk(model, code.quality, z, y.shape[1], y.shape[2], take)
        return _Coded(code, parts, latent)

    def measure(self, image: ImageSource, code: Code) -> Distortion:
        """PSNR and MS-SSIM between a picture and what `code` decodes to."""
        original, decoded = _read_image(image, self.limits), self.synthesise(code)
        return Distortion(metrics.psnr(original, decoded), metrics.ms_ssim(original, decoded))

    def with_model(self, model: str) -> Codec:
        """A codec that encodes with another model and shares all that is loaded. Raises `UnknownModelError`."""
        other = copy.copy(self)
        other.model = self._model(model).id
        return other

    def warm_up(self) -> None:
        """Load the model and run it once, so that the first picture does not wait for it."""
        self.decode(self.encode(np.zeros((16, 16, 3), np.uint8)))

    def _model(self, model_id: str) -> runtime.Model:
        with self._lock:
            if model_id not in self._models:
                self._models[model_id] = runtime.Model(model_id, self._zoo, self._threads)
            return self._models[model_id]

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
class _Coded:
    """A Code and what the prior made of it: parts in the order coded, the latent dequantised in 1/16 symbols."""

    code: Code
    parts: list[Part]
    latent: NDArray[np.float32]


_TOLERANCE = 0.01
"""How near a target a search must come: 1 % of a size, 0.01 dB."""


def _aim(
    attempt: Callable[[float, Effort], tuple[_Coded, float]], effort: Effort, wanted: float, *, below: bool
) -> tuple[_Coded, float]:
    """`_search` with an effort; the slow one begins where a faster one ends."""
    if effort != "best":
        return _search(lambda quality: attempt(quality, effort), wanted, below=below)
    coded, _ = _search(lambda quality: attempt(quality, "default"), wanted, below=below)
    return _search(lambda quality: attempt(quality, effort), wanted, below=below, near=coded.code.quality)


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


def _crc(code: Code, model: runtime.Model) -> int:
    """CRC-32 of all symbols, tensor by tensor, in the model's order."""
    crc = 0
    for rule in model.tensors:
        crc = zlib.crc32(np.ascontiguousarray(code.tensors[rule.name], "<i2").data, crc)
    return crc


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in tensors.items()) or "none"
