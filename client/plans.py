"""What a client says and how it understands the answer, without any I/O: `Client` and `AsyncClient` share all of it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray

from hourglass.codec import (
    Code,
    FileSource,
    ImageSource,
    Limits,
    ModelInfo,
    Picture,
    Pixels,
    Settings,
    View,
    container,
    errors,
    image,
    read_header,
)
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import convert

Result = TypeVar("Result")
_Other = TypeVar("_Other")

CHUNK = 1 << 20
"""Bytes of one chunk of a stream."""

STREAM_ABOVE = 8 << 20
"""Bytes above which a picture travels in chunks: a single message of that size is slower, and held whole by all."""

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "hourglass.v1.CodecService"},
        "methodConfig": [
            {
                "name": [{"service": "hourglass.v1.CodecService"}],
                "retryPolicy": {
                    "maxAttempts": 5,  # gRPC takes no more
                    "initialBackoff": "0.2s",
                    "maxBackoff": "3s",
                    "backoffMultiplier": 2.5,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.per_rpc_retry_buffer_size", 128 << 20),  # by default a call above 256 KiB is silently never retried
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each client: load spreads over workers
    ("grpc.keepalive_time_ms", 60_000),  # finds a server that is gone without a word
    ("grpc.keepalive_timeout_ms", 20_000),
]

SERVICE = pb.DESCRIPTOR.services_by_name["CodecService"]

Address: TypeAlias = "str | Sequence[str]"
"""HOST:PORT, or several of them; calls go round among all, and all that the names stand for."""

_ANY = Limits(pixels=1 << 62)
"""What a server sends has passed its own limits."""

Features: TypeAlias = "NDArray[np.float32]"
"""(D,), of length 1."""

_FilePath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Tls:
    """How to know the server, and be known. All are PEM files.

    ca: authorities to trust, the system's when None. certificate, key: the client's own, for mutual TLS.
    server_name: the name in the server's certificate, where it is not that of the address.
    """

    ca: _FilePath | None = None
    certificate: _FilePath | None = None
    key: _FilePath | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises `OSError` for a file that cannot be read, `InvalidArgument` for one that is no PEM, or a certificate
        without its key.
        """
        if (self.certificate is None) != (self.key is None):
            raise errors.InvalidArgument("the client's certificate and its key go together; give both or none")
        contents = [
            _pem(name, kind)
            for name, kind in (
                (self.ca, b"CERTIFICATE"),
                (self.key, b"PRIVATE KEY"),
                (self.certificate, b"CERTIFICATE"),
            )
        ]
        return grpc.ssl_channel_credentials(*contents)


def _pem(name: _FilePath | None, kind: bytes) -> bytes | None:
    """A file's bytes, after a look at its first line: gRPC only says that it cannot connect."""
    if name is None:
        return None
    content = Path(name).read_bytes()
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind + b"-----", content):
        raise errors.InvalidArgument(
            f"{os.fspath(name)} is no PEM file with a {kind.decode().lower()}; expected -----BEGIN {kind.decode()}-----"
        )
    return content


@dataclass(frozen=True)
class Route:
    """Where calls go and how: all that makes a channel. name: how messages call it."""

    name: str
    target: str
    credentials: grpc.ChannelCredentials | None
    options: list[tuple[str, Any]]


def route(address: Address, tls: Tls | None) -> Route:
    """Raises `InvalidArgument` for what is no address, and what `Tls.credentials` raises."""
    addresses = [address] if isinstance(address, str) else list(address)
    if not addresses or not all(isinstance(one, str) and one for one in addresses):
        raise errors.InvalidArgument(f"address is {address!r}; expected HOST:PORT or several of them")
    options = list(_OPTIONS)
    if tls and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    elif tls and len(addresses) > 1:
        options.append(("grpc.default_authority", addresses[0].rpartition(":")[0]))
    target = addresses[0] if len(addresses) == 1 else _target(addresses)
    return Route(", ".join(addresses), target, tls.credentials() if tls else None, options)


def _target(addresses: list[str]) -> str:
    """Several addresses as one target, which has to be of numbers."""
    found: dict[int, list[str]] = {socket.AF_INET: [], socket.AF_INET6: []}
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            infos = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as exc:
            raise errors.InvalidArgument(f"address {address!r} cannot be resolved: {exc}; expected HOST:PORT") from exc
        for family, _, _, _, place in infos:
            name, number = str(place[0]), int(port)
            found[family].append(f"[{name}]:{number}" if ":" in name else f"{name}:{number}")
    if found[socket.AF_INET]:
        return "ipv4:" + ",".join(dict.fromkeys(found[socket.AF_INET]))
    return "ipv6:" + ",".join(dict.fromkeys(found[socket.AF_INET6]))


@dataclass(frozen=True)
class Plan(Generic[Result]):
    """One call. requests: its messages, anew for each attempt. finish: what its answers mean, fed one by one.

    streaming: whether it has any number of messages each way; else one.
    """

    method: str
    requests: Callable[[], Iterator[Any]]
    finish: Callable[[Iterator[Any]], Result]
    streaming: bool = False

    def then(self, more: Callable[[Result], _Other]) -> Plan[_Other]:
        """The same call with its result taken further."""
        return Plan(self.method, self.requests, lambda answers: more(self.finish(answers)), self.streaming)


@dataclass(frozen=True)
class Told(Generic[Result]):
    """A result, and what of the picture is not kept, one sentence each."""

    value: Result
    losses: tuple[str, ...]

    def aloud(self) -> Result:
        """The result, with a `LossWarning` at the caller's caller for each loss."""
        for loss in self.losses:
            warnings.warn(loss, errors.LossWarning, stacklevel=3)
        return self.value


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself. Sizes in bytes; max_pixels is width times height."""

    version: str
    default_model: str
    models: tuple[ModelInfo, ...]
    max_pixels: int
    max_message_bytes: int
    max_stream_bytes: int


@dataclass(frozen=True)
class Encoded:
    """What became of one picture of many: `data`, the bytes of a .hgc file, or `error`. index: its place, from 0.

    losses: what of the picture is not kept, one sentence each.
    """

    index: int
    data: bytes | None
    error: errors.HourglassError | OSError | None = None
    losses: tuple[str, ...] = ()


class Planner:
    """Makes the plans of a client. model: id of the model that encodes, the server's default when empty."""

    def __init__(self, model: str, stream_above: int) -> None:
        self._model, self._stream_above = model, stream_above

    def encode(self, source: ImageSource, settings: Settings) -> Plan[Told[bytes]]:
        """The call that encodes to a file."""
        return self._encode(source, settings, "want_file").then(
            lambda answer: Told(answer.file, tuple(answer.warnings))
        )

    def analyse(self, source: ImageSource, settings: Settings) -> Plan[Told[Code]]:
        """The call that encodes to a code."""
        plan = self._encode(source, settings, "want_code")
        return plan.then(lambda answer: Told(convert.code_from_message(answer.code), tuple(answer.warnings)))

    def decode(self, data: FileSource, view: View) -> Plan[Picture]:
        """The call that decodes a file; what is damaged is in the picture's losses."""
        request = pb.DecodeRequest()
        convert.set_view(request, view)
        content = _content(data)
        try:
            header = read_header(content)
            pixels = header.width * header.height
        except errors.HourglassError:
            pixels = 0  # the server says what is wrong with it
        if max(len(content), 3 * pixels) <= self._stream_above:
            request.file = content
            return _one("Decode", request).then(_picture)
        return _decode_stream(request, content, is_code=False)

    def synthesise(self, code: Code) -> Plan[Pixels]:
        """The call that decodes a code."""
        message = convert.code_to_message(code)
        if max(message.ByteSize(), 3 * code.width * code.height) <= self._stream_above:
            return _one("Decode", pb.DecodeRequest(code=message)).then(_picture).then(_pixels)
        return _decode_stream(pb.DecodeRequest(), message.SerializeToString(), is_code=True).then(_pixels)

    def features(self, source: ImageSource | FileSource) -> Plan[Told[Features]]:
        """The call that describes a picture or a file."""
        request = pb.FeaturesRequest(model=self._model)
        if container.is_file(source):
            request.file = _content(source)
        elif isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            request.image_file = _content(source)
        else:
            request.pixels.CopyFrom(convert.pixels_to_message(image.load(source).pixels))
        return _one("Features", request).then(
            lambda answer: Told(np.array(answer.values, np.float32), tuple(answer.warnings))
        )

    def info(self) -> Plan[ServerInfo]:
        """The call that asks for models and limits."""
        return _one("ListModels", pb.ListModelsRequest()).then(_info)

    def _encode(self, source: ImageSource, settings: Settings, wish: str) -> Plan[Any]:
        """Image files travel as they are, pictures in memory as raw pixels."""
        request = pb.EncodeRequest(model=self._model)
        setattr(request, wish, True)
        pixels, content = None, b""
        if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            content = _content(source)
        else:
            picture = image.load(source)
            if picture.metadata.size:
                content = image.write(picture, "PNG")
            else:
                pixels = picture.pixels
        convert.set_settings(request, settings, len(content) or None)
        size = len(content) if pixels is None else pixels.nbytes
        if size > self._stream_above:
            start = pb.EncodeStart(request=request, total_bytes=size)
            if pixels is not None:
                start.pixels.CopyFrom(convert.pixels_to_message(pixels, samples=False))
            data = memoryview(content) if pixels is None else np.ascontiguousarray(pixels).reshape(-1).data
            return Plan("EncodeStream", lambda: _parts(pb.EncodeStreamRequest, start, data), _encoded, streaming=True)
        if pixels is None:
            request.image_file = content
        else:
            request.pixels.CopyFrom(convert.pixels_to_message(pixels))
        return _one("Encode", request)


def _content(source: Any) -> bytes:
    return Path(source).read_bytes() if isinstance(source, (str, os.PathLike)) else bytes(source)


def _one(method: str, request: Any) -> Plan[Any]:
    return Plan(method, lambda: iter([request]), next)


def _decode_stream(request: pb.DecodeRequest, content: bytes, *, is_code: bool) -> Plan[Picture]:
    start = pb.DecodeStart(request=request, is_code=is_code, total_bytes=len(content))
    data = memoryview(content)
    return Plan("DecodeStream", lambda: _parts(pb.DecodeStreamRequest, start, data), _decoded, streaming=True)


def _parts(kind: Callable[..., Any], start: Any, data: memoryview) -> Iterator[Any]:
    yield kind(start=start)
    for begin in range(0, len(data), CHUNK):
        yield kind(chunk=bytes(data[begin : begin + CHUNK]))


def _encoded(answers: Iterator[Any]) -> Any:
    head = next(answers).answer
    head.response.file = _joined(answers, head.total_bytes).tobytes()
    return head.response


def _decoded(answers: Iterator[Any]) -> Picture:
    head = next(answers).answer
    return _picture(head.response, _joined(answers, head.total_bytes).data)


def _joined(answers: Iterator[Any], total: int) -> Pixels:
    buffer, size = np.empty(total, np.uint8), 0
    for answer in answers:
        end = size + len(answer.chunk)
        if end > total:
            break
        buffer[size:end] = np.frombuffer(answer.chunk, np.uint8)
        size = end
    if size != total:
        raise errors.RemoteError(f"the server's stream has not the {total} bytes that it said")
    return buffer


def _picture(answer: Any, samples: memoryview | None = None) -> Picture:
    pixels = convert.pixels_from_message(answer.pixels, samples)
    metadata = convert.metadata_from_message(answer.metadata)
    return replace(image.load(pixels, _ANY), metadata=metadata, losses=tuple(answer.damage))


def _pixels(picture: Picture) -> Pixels:
    return picture.pixels


def _info(answer: Any) -> ServerInfo:
    models = tuple(convert.model_from_message(model) for model in answer.models)
    limits = answer.max_pixels, answer.max_message_bytes, answer.max_stream_bytes
    return ServerInfo(answer.server_version, answer.default_model, models, *limits)


class Attempts:
    """The tries of one call within its time. name: of the server. timeout: seconds for all of them together."""

    _MOST_BROKEN = 5

    def __init__(self, name: str, method: str, timeout: float, token: str | None, streaming: bool) -> None:
        self._name, self._method, self._timeout, self._streaming = name, method, timeout, streaming
        self._end = time.monotonic() + timeout
        self._broken = 0
        self.metadata = [("x-request-id", uuid.uuid4().hex)]
        if token:
            self.metadata.append(("authorization", f"Bearer {token}"))

    @property
    def left(self) -> float:
        """Seconds for the next try."""
        return max(self._end - time.monotonic(), 0.001)

    def pause(self, error: Any) -> float:
        """Seconds to wait before trying again. Raises what the failed call means when that is no use.

        gRPC itself tries again after UNAVAILABLE, but not when it had to forget what was sent, or an answer had begun;
        and it does not know RetryInfo. (A raised RpcError is a grpc.Call too.)
        """
        code, pause = error.code(), math.inf
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            retry = error_details_pb2.RetryInfo()
            if code == grpc.StatusCode.RESOURCE_EXHAUSTED and detail.Unpack(retry):
                # Spread, or all that were refused together come back together.
                pause = retry.retry_delay.ToMilliseconds() / 1000 * random.uniform(0.75, 1.5)
        details = (error.details() or "").lower()
        lost = self._streaming or any(
            words in details for words in ("stream removed", "socket closed", "connection reset")
        )
        if code == grpc.StatusCode.UNAVAILABLE and lost and self._broken < self._MOST_BROKEN - 1:
            pause = 0.2 * 2.5**self._broken * random.uniform(0.8, 1.2)
            self._broken += 1
        if pause < self.left:
            return pause
        raise self.meaning(error, status) from error

    def meaning(self, error: Any, status: Any) -> errors.HourglassError:
        """The server's own error where it says which, else a `RemoteError` that says what is the matter."""
        code, details = error.code(), error.details()
        for detail in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == convert.ERROR_DOMAIN and info.reason in errors.__all__:
                kind = getattr(errors, info.reason)
                if issubclass(kind, errors.HourglassError):
                    own: errors.HourglassError = kind(details)
                    return own
        meanings = {
            grpc.StatusCode.UNAVAILABLE: "cannot be reached, or is going away",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"did not answer within {self._timeout:g} s (the client's timeout)",
            grpc.StatusCode.UNIMPLEMENTED: f"speaks another version: it has no call {self._method}, which this client, "
            f"version {version('hourglass-codec')}, needs",
            grpc.StatusCode.UNAUTHENTICATED: "wants a valid token (the client's token)",
            grpc.StatusCode.RESOURCE_EXHAUSTED: "is too busy, or the message is too large for it",
        }
        what = meanings.get(code, "gave no answer")
        return errors.RemoteError(f"server {self._name} {what}: {code.name}: {details}")
