"""Between the codec's values and the messages of hourglass.v1; server and client share this one pair for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import Code
from hourglass.codec.errors import CodeError, InvalidArgument
from hourglass.v1 import codec_pb2 as pb

ERROR_DOMAIN = "hourglass"
"""Domain of the google.rpc.ErrorInfo in the details of a refused call; its reason is the name of an error class."""


def code_to_message(code: Code) -> pb.Code:
    tensors = [
        pb.Tensor(name=name, shape=t.shape, data_type=pb.DATA_TYPE_INT16, data=np.ascontiguousarray(t, "<i2").tobytes())
        for name, t in code.tensors.items()
    ]
    return pb.Code(model=code.model, quality=code.quality, width=code.width, height=code.height, tensors=tensors)


def code_from_message(message: pb.Code) -> Code:
    """Raises `CodeError` for a tensor whose bytes do not fit its shape."""
    tensors = {}
    for tensor in message.tensors:
        shape = tuple(tensor.shape)
        if tensor.data_type != pb.DATA_TYPE_INT16:
            raise CodeError(f"tensor {tensor.name!r} has data type {tensor.data_type}; expected DATA_TYPE_INT16")
        tensors[tensor.name] = _array(tensor.data, "<i2", shape, f"tensor {tensor.name!r}", CodeError)
    return Code(message.model, message.quality, message.width, message.height, tensors)


def pixels_to_message(pixels: NDArray[np.uint8]) -> pb.Pixels:
    height, width, _ = pixels.shape
    return pb.Pixels(width=width, height=height, rgb=pixels.tobytes())


def pixels_from_message(message: pb.Pixels) -> NDArray[np.uint8]:
    """(height, width, 3) uint8, read only. Raises `InvalidArgument` when the bytes do not fit the size."""
    return _array(message.rgb, "u1", (message.height, message.width, 3), "pixels.rgb", InvalidArgument)


def _array(
    data: bytes, dtype: str, shape: tuple[int, ...], what: str, error: type[CodeError | InvalidArgument]
) -> NDArray[Any]:
    expected = np.dtype(dtype).itemsize
    for size in shape:  # Python's integers: a product of hostile sizes must not wrap around
        expected *= size
    if len(data) != expected:
        raise error(f"{what} has {len(data)} bytes; its shape {shape} needs {expected}")
    return np.frombuffer(data, dtype).reshape(shape)
