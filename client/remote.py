"""Client: `Codec`'s calls, answered by a server."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hourglass.codec import Code, FileSource, ImageSource, ModelInfo, Pixels, Settings, errors, image
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc, convert

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "hourglass.v1.CodecService"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.per_rpc_retry_buffer_size", 64 << 20),  # by default a call above 256 KiB is silently never retried
]


class Client:
    """A connection to one server; use it for many calls, from any number of threads, and close it.

    address: "HOST:PORT". model: id of the model that encodes; the server's default when None.
    timeout: seconds that a call may take.

    Every call raises what the same call of `Codec` raises, as the same classes, and `RemoteError` when the server
    cannot be reached, does not answer in time, or fails.
    """

    def __init__(self, address: str, *, model: str | None = None, timeout: float = 120.0) -> None:
        self.address = address
        self._model = model or ""
        self._timeout = timeout
        self._channel = grpc.insecure_channel(address, _OPTIONS)
        self._stub: Any = codec_pb2_grpc.CodecServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file; the same bytes as `Codec.encode`."""
        request = self._request(image, settings)
        request.want_file = True
        return self._encode(request).file

    def decode(self, data: FileSource) -> Pixels:
        """A .hgc file -> (H, W, 3) uint8; the same pixels as `Codec.decode`."""
        content = Path(data).read_bytes() if isinstance(data, (str, os.PathLike)) else bytes(data)
        return self._decode(pb.DecodeRequest(file=content))

    def analyse(self, image: ImageSource, **settings: Unpack[Settings]) -> Code:
        """A picture -> its Code; the same integers as `Codec.analyse`."""
        request = self._request(image, settings)
        request.want_code = True
        return convert.code_from_message(self._encode(request).code)

    def synthesise(self, code: Code) -> Pixels:
        """A Code -> (H, W, 3) uint8; the same pixels as `Codec.synthesise`."""
        return self._decode(pb.DecodeRequest(code=convert.code_to_message(code)))

    def models(self) -> list[ModelInfo]:
        """The models of the server."""
        answer: pb.ListModelsResponse = self._call(self._stub.ListModels, pb.ListModelsRequest())
        return [convert.model_from_message(model) for model in answer.models]

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, source: ImageSource, settings: Settings) -> pb.EncodeRequest:
        """Image files travel as they are, pictures in memory as raw pixels."""
        request = pb.EncodeRequest(model=self._model)
        if isinstance(source, (str, os.PathLike)):
            request.image_file = Path(source).read_bytes()
        elif isinstance(source, (bytes, bytearray, memoryview)):
            request.image_file = bytes(source)
        else:
            request.pixels.CopyFrom(convert.pixels_to_message(image.read(source)))
        convert.set_settings(request, settings, len(request.image_file) or None)
        return request

    def _encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        answer: pb.EncodeResponse = self._call(self._stub.Encode, request)
        for loss in answer.warnings:
            warnings.warn(loss, errors.LossWarning, stacklevel=3)
        return answer

    def _decode(self, request: pb.DecodeRequest) -> Pixels:
        answer: pb.DecodeResponse = self._call(self._stub.Decode, request)
        return convert.pixels_from_message(answer.pixels)

    def _call(self, method: Callable[..., _Answer], request: _Request) -> _Answer:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise self._error(error) from error

    def _error(self, error: Any) -> errors.HourglassError:
        """The server's own error where it says which, else `RemoteError`. (A raised RpcError is a grpc.Call too.)"""
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == convert.ERROR_DOMAIN and info.reason in errors.__all__:
                kind = getattr(errors, info.reason)
                if issubclass(kind, errors.HourglassError):
                    own: errors.HourglassError = kind(error.details())
                    return own
        return errors.RemoteError(f"server {self.address} gave no answer: {error.code().name}: {error.details()}")
