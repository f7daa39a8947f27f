"""Codec: the four hops between a picture and a file.

encode = analyse + pack          image -> pixels -> latent -> Code -> bytes
decode = unpack + synthesise     bytes -> Code -> latent -> pixels
"""

from __future__ import annotations

import copy
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import container, entropy, image, metrics, runtime
from hourglass.codec.container import Header
from hourglass.codec.errors import CodeError, ContainerError, CorruptError, InvalidArgument
from hourglass.codec.image import ImageSource, Pixels
from hourglass.codec.limits import Limits

DEFAULT_QUALITY = 50.0

FileSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview"
"""The bytes of a .hgc file, or a path to one."""

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
        object.__setattr__(self, "quality", round(self.quality, 2))
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

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
    """What a model is: its id, its code shape rule, and its manifest as plain data."""

    id: str
    channels: int
    stride: int
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
        return [ModelInfo(m.id, m.tensor.channels, m.tensor.stride, m.manifest) for m in found]

    def encode(self, image: ImageSource, *, quality: float = DEFAULT_QUALITY) -> bytes:
        """A picture -> the bytes of a .hgc file; exactly `pack(analyse(image))`. Raises what these raise."""
        return self.pack(self.analyse(image, quality=quality))

    def decode(self, data: FileSource) -> Pixels:
        """A .hgc file -> (H, W, 3) uint8; exactly `synthesise(unpack(data))`. Raises what these raise."""
        return self.synthesise(self.unpack(data))

    def read_header(self, data: FileSource) -> Header:
        """The header of a .hgc file; its sections may be missing. Raises `ContainerError`, `LimitError`."""
        return container.read_header(self._bytes(data), self.limits)

    def analyse(self, image: ImageSource, *, quality: float = DEFAULT_QUALITY) -> Code:
        """Analysis transform, gain, rounding: a picture -> its Code.

        Raises `ImageError`, `LimitError`, `InvalidArgument`, `OSError`.
        """
        check_quality(quality)
        return next(self.analyse_many(image, [quality]))

    def analyse_many(self, image: ImageSource, qualities: Iterable[float]) -> Iterator[Code]:
        """The Codes of one picture at many qualities, from one pass of the analysis transform. Raises as `analyse`."""
        pixels = _read_image(image, self.limits)
        height, width = pixels.shape[:2]
        model = self._model(self.model)
        latent = model.analyse(pixels)
        for wanted in qualities:
            check_quality(wanted)
            quality = round(wanted, 2)
            symbols = _quantise(model, latent, quality)
            yield Code(model.id, quality, width, height, {model.tensor.name: symbols})

    def synthesise(self, code: Code) -> Pixels:
        """Inverse gain, synthesis transform: a Code -> (H, W, 3) uint8. Raises `CodeError`, `UnknownModelError`."""
        model, symbols = self._checked(code)
        latent = symbols * model.inverse_gain(code.quality)[:, None, None]
        return model.synthesise(latent, code.width, code.height)

    def pack(self, code: Code) -> bytes:
        """A Code -> the bytes of a .hgc file. Raises `CodeError`, `UnknownModelError`."""
        model, symbols = self._checked(code)
        index = _index(model, code.quality, symbols.shape)
        try:
            payload = entropy.encode(symbols, index, model.tables)
        except ValueError as exc:
            raise CodeError(f"code of model {model.id!r} at quality {code.quality:g} cannot be coded: {exc}") from exc
        section = _SYMBOLS_CRC.pack(_crc(symbols)) + payload
        return container.write(model.id, code.width, code.height, code.quality, {container.CODE: section})

    def unpack(self, data: FileSource) -> Code:
        """The bytes of a .hgc file -> its Code.

        Raises `ContainerError` (with `CorruptError`), `LimitError`, `UnknownModelError`, `OSError`.
        """
        header, sections = container.read(self._bytes(data), self.limits)
        model = self._model(header.model)
        section = sections[container.CODE]
        if len(section) < _SYMBOLS_CRC.size:
            raise ContainerError(f"code section has {len(section)} bytes; expected {_SYMBOLS_CRC.size} or more")
        index = _index(model, header.quality, model.tensor.shape(header.width, header.height))
        symbols = entropy.decode(section[_SYMBOLS_CRC.size :], index, model.tables)
        if _crc(symbols) != _SYMBOLS_CRC.unpack_from(section)[0]:
            raise CorruptError("the decoded symbols do not match their checksum")
        tensors = {model.tensor.name: symbols}
        return Code(model.id, header.quality, header.width, header.height, tensors)

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
            return memoryview(data).cast("B")
        raise InvalidArgument(f"data is a {type(data).__name__}; expected the bytes of a .hgc file or a path")

    def _checked(self, code: Code) -> tuple[runtime.Model, NDArray[np.int16]]:
        """The model of a code and its symbols, after comparing the code with the model's rule."""
        if code.width < 1 or code.height < 1:
            raise CodeError(f"code is for a picture of {code.width}x{code.height} pixels; expected 1x1 or more")
        self.limits.check_size(code.width, code.height)
        model = self._model(code.model)
        rule = model.tensor
        expected = {rule.name: (rule.shape(code.width, code.height), np.dtype(np.int16))}
        got = {name: (tensor.shape, tensor.dtype) for name, tensor in code.tensors.items()}
        if got != expected:
            raise CodeError(
                f"code tensors are {_describe(got)}; model {model.id!r} expects {_describe(expected)} "
                f"for a picture of {code.width}x{code.height} pixels"
            )
        return model, code.tensors[rule.name]


def check_quality(quality: float) -> None:
    """Raise `InvalidArgument` unless `quality` is a number from 0 to 100."""
    if not isinstance(quality, (int, float)) or not 0 <= quality <= 100:
        got = f"{quality:g}" if isinstance(quality, (int, float)) else repr(quality)
        raise InvalidArgument(f"quality is {got}; expected a number from 0 (smallest) to 100 (best)")


def _read_image(source: ImageSource, limits: Limits) -> Pixels:
    return image.read(source, limits)


def _index(model: runtime.Model, quality: float, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.broadcast_to(model.table_index(quality)[:, None, None], shape)


def _quantise(model: runtime.Model, latent: NDArray[np.float32], quality: float) -> NDArray[np.int16]:
    """latent * gain, rounded, to int16; channels that `quality` does not code are left at zero."""
    symbols = np.zeros(latent.shape, np.int16)
    coded = np.flatnonzero(~model.tables.sure_zero[model.table_index(quality)])
    scaled = latent[coded] * model.gain(quality)[coded, None, None]
    symbols[coded] = np.clip(np.rint(scaled, out=scaled), -32767, 32767)
    return symbols


def _crc(symbols: NDArray[np.int16]) -> int:
    return zlib.crc32(np.ascontiguousarray(symbols, "<i2").data)


def _describe(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in tensors.items()) or "none"
