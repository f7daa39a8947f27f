"""Between the codec's values and the messages of hourglass.v1; server and client share this one pair for each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import (
    SCALES,
    Code,
    Effort,
    Keep,
    Metadata,
    ModelInfo,
    Settings,
    TensorRule,
    View,
    check_settings,
    parse_size,
)
from hourglass.codec.errors import CodeError, InvalidArgument
from hourglass.v1 import codec_pb2 as pb

ERROR_DOMAIN = "hourglass"
"""Domain of the google.rpc.ErrorInfo in the details of a refused call; its reason is the name of an error class."""


EFFORTS: dict[int, Effort] = {
    pb.EFFORT_UNSPECIFIED: "default",
    pb.EFFORT_FAST: "fast",
    pb.EFFORT_BEST: "best",
}


KEPT: dict[int, Keep] = {
    pb.METADATA_KEPT_UNSPECIFIED: "all",
    pb.METADATA_KEPT_ICC: "icc",
    pb.METADATA_KEPT_NONE: "none",
}


def set_view(request: pb.DecodeRequest, view: View) -> None:
    """Write what to decode into a request. Raises `InvalidArgument`."""
    if "region" in view:
        x, y, width, height = view["region"]
        if min(x, y, width, height) < 0 or max(x, y, width, height) >= 1 << 32:
            raise InvalidArgument(f"region is {view['region']}; expected x, y, width, height within the picture")
        request.region.CopyFrom(pb.Region(x=x, y=y, width=width, height=height))
    if (scale := view.get("scale", 1)) not in SCALES:
        raise InvalidArgument(f"scale is {scale!r}; expected one of {', '.join(map(str, SCALES))}")
    request.scale, request.salvage = scale, view.get("salvage", False)


def get_view(request: pb.DecodeRequest) -> View:
    """What a request wants decoded."""
    view: View = {"scale": request.scale or 1, "salvage": request.salvage}
    if request.HasField("region"):
        region = request.region
        view["region"] = region.x, region.y, region.width, region.height
    return view


def metadata_to_message(metadata: Metadata) -> pb.Metadata:
    return pb.Metadata(icc=metadata.icc, exif=metadata.exif, xmp=metadata.xmp, iptc=metadata.iptc)


def metadata_from_message(message: pb.Metadata) -> Metadata:
    return Metadata(icc=message.icc, exif=message.exif, xmp=message.xmp, iptc=message.iptc)


def set_settings(request: pb.EncodeRequest, settings: Settings, source: int | None) -> None:
    """Write settings into a request. source: bytes of the source file, for a target_size in per cent of it.

    Raises `InvalidArgument`.
    """
    check_settings(settings)
    for name, value in settings.items():
        if name == "effort":
            request.effort = next(number for number, effort in EFFORTS.items() if effort == value)  # type: ignore[assignment]
        elif name == "metadata":
            request.metadata = next(number for number, keep in KEPT.items() if keep == value)  # type: ignore[assignment]
        elif name in ("fallback", "grey_model"):
            setattr(request, f"no_{name}", not value)
        else:
            setattr(request, name, parse_size(value, source) if name == "target_size" else value)  # type: ignore[arg-type]


def get_settings(request: pb.EncodeRequest) -> Settings:
    """The settings that a request holds. Raises `InvalidArgument` for an effort that is unknown."""
    if request.effort not in EFFORTS:
        raise InvalidArgument(f"effort is {request.effort}; expected a value of Effort")
    if request.metadata not in KEPT:
        raise InvalidArgument(f"metadata is {request.metadata}; expected a value of MetadataKept")
    settings: Settings = {
        "effort": EFFORTS[request.effort],
        "metadata": KEPT[request.metadata],
        "srgb": request.srgb,
        "fallback": not request.no_fallback,
        "grey_model": not request.no_grey_model,
    }
    if request.HasField("frame"):
        settings["frame"] = request.frame
    match request.WhichOneof("goal"):
        case "quality":
            settings["quality"] = request.quality
        case "target_size":
            settings["target_size"] = request.target_size
        case "target_bpp":
            settings["target_bpp"] = request.target_bpp
        case "target_psnr":
            settings["target_psnr"] = request.target_psnr
    return settings


def model_to_message(info: ModelInfo) -> pb.Model:
    tensors = [pb.TensorRule(**asdict(rule)) for rule in info.tensors]
    return pb.Model(id=info.id, tensors=tensors, manifest_json=json.dumps(dict(info.manifest)))


def model_from_message(message: pb.Model) -> ModelInfo:
    tensors = tuple(TensorRule(rule.name, rule.channels, rule.stride, rule.whole) for rule in message.tensors)
    return ModelInfo(message.id, tensors, json.loads(message.manifest_json))


def code_to_message(code: Code) -> pb.Code:
    tensors = [
        pb.Tensor(name=name, shape=t.shape, data_type=pb.DATA_TYPE_INT16, data=np.ascontiguousarray(t, "<i2").tobytes())
        for name, t in code.tensors.items()
    ]
    return pb.Code(
        model=code.model,
        quality=code.quality,
        width=code.width,
        height=code.height,
        tensors=tensors,
        grey=code.grey,
    )


def code_from_message(message: pb.Code) -> Code:
    """Raises `CodeError` for a tensor whose bytes do not fit its shape."""
    tensors = {}
    for tensor in message.tensors:
        shape = tuple(tensor.shape)
        if len(shape) != 3 or not all(shape):
            raise CodeError(f"tensor {tensor.name[:80]!r} has shape {shape[:8]}; expected channels, rows, columns")
        if tensor.name in tensors:
            raise CodeError(f"tensor {tensor.name[:80]!r} is there twice")
        if tensor.data_type != pb.DATA_TYPE_INT16:
            raise CodeError(f"tensor {tensor.name!r} has data type {tensor.data_type}; expected DATA_TYPE_INT16")
        tensors[tensor.name] = _array(tensor.data, "<i2", shape, f"tensor {tensor.name!r}", CodeError)
    return Code(message.model, message.quality, message.width, message.height, tensors, message.grey)


def pixels_to_message(pixels: NDArray[np.uint8], *, samples: bool = True) -> pb.Pixels:
    """pixels: (H, W) or (H, W, channels) uint8. samples: with them; else only what they are, when they go in chunks."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    return pb.Pixels(width=width, height=height, channels=channels, data=pixels.tobytes() if samples else b"")


def pixels_from_message(message: pb.Pixels, samples: bytes | memoryview | None = None) -> NDArray[np.uint8]:
    """(height, width) uint8 for one channel, (height, width, channels) for more; read only.

    samples: the bytes, when they came in chunks. Raises `InvalidArgument` when the bytes do not fit the size.
    """
    shape = pixels_shape(message)
    return _array(message.data if samples is None else samples, "u1", shape, "pixels.data", InvalidArgument)


def pixels_shape(message: pb.Pixels) -> tuple[int, ...]:
    """(height, width) for one channel, (height, width, channels) for more; 3 when not set. Raises `InvalidArgument`."""
    if message.channels > 4:
        raise InvalidArgument(f"pixels.channels is {message.channels}; expected 1, 2, 3 or 4")
    size = message.height, message.width
    return size if message.channels == 1 else (*size, message.channels or 3)


def _array(
    data: bytes | memoryview, dtype: str, shape: tuple[int, ...], what: str, error: type[CodeError | InvalidArgument]
) -> NDArray[Any]:
    expected = np.dtype(dtype).itemsize
    for size in shape:  # Python's integers: a product of hostile sizes must not wrap around
        expected *= size
    if len(data) != expected or not expected:
        raise error(f"{what} has {len(data)} bytes; its shape {shape} needs {expected}")
    return np.frombuffer(data, dtype).reshape(shape)
