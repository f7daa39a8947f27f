"""CodecService: message -> codec call -> message. The codec works in threads, off the event loop."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from hourglass.codec import Codec, Picture, container, image
from hourglass.codec.errors import Cancelled, CodeError, InvalidArgument, LimitError
from hourglass.codec.settings import load
from hourglass.codec.watch import watching
from hourglass.server.admission import Admission
from hourglass.server.call import Call, Desk
from hourglass.server.config import Config
from hourglass.server.status import refusal_of
from hourglass.server.telemetry import Hop, Record
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import convert

_Result = TypeVar("_Result")

SERVICE = pb.DESCRIPTOR.services_by_name["CodecService"]

_FORMATS = {
    pb.IMAGE_FORMAT_PNG: "PNG",
    pb.IMAGE_FORMAT_JPEG: "JPEG",
    pb.IMAGE_FORMAT_WEBP: "WEBP",
    pb.IMAGE_FORMAT_AVIF: "AVIF",
    pb.IMAGE_FORMAT_TIFF: "TIFF",
    pb.IMAGE_FORMAT_PPM: "PPM",
}

_ID_LENGTH = 128

COST_BASE = 64 << 20
COST_PER_PIXEL = 16
"""Bytes that a work takes beside what it came with: the transforms of one tile, and pixels, latents and copies of the
whole. tests/bench/load.py shows what it is in truth."""


@dataclass(frozen=True)
class _Source:
    """What a call brought to work on. value: bytes of a file, pixels, or a Code message. size: width, height."""

    value: Any
    size: tuple[int, int]


class CodecServicer:
    """Answers calls with `codec`. works: threads for the codec, one for each slot; light: threads for short looks."""

    def __init__(self, codec: Codec, config: Config, admission: Admission, works: Executor, light: Executor) -> None:
        self._codec, self._config, self._admission = codec, config, admission
        self._works, self._light = works, light

    def handlers(self, desk: Desk) -> grpc.GenericRpcHandler:
        """All methods, for gRPC.

        On the wire a call with one message is a stream of one, and served as one here: so it can be refused before its
        picture is read.
        """
        light = {"Inspect", "ListModels"}
        table = {
            method.name: grpc.stream_stream_rpc_method_handler(
                desk.handler(method.name, getattr(self, method.name), method.name in light),
                request_deserializer=getattr(pb, method.input_type.name).FromString,
                response_serializer=getattr(pb, method.output_type.name).SerializeToString,
            )
            for method in SERVICE.methods
        }
        return grpc.method_handlers_generic_handler(SERVICE.full_name, table)

    async def Encode(self, call: Call) -> None:  # noqa: N802
        request = await call.read_one()
        with self._admission.held(request.ByteSize()):
            answer = await self._encode(call.record, request)
        await _send_one(call, answer)

    async def Decode(self, call: Call) -> None:  # noqa: N802
        request = await call.read_one()
        with self._admission.held(request.ByteSize()):
            answer = await self._decode(call.record, request)
        await _send_one(call, answer)

    async def EncodeStream(self, call: Call) -> None:  # noqa: N802
        start = await self._start(call)
        raw = start.HasField("pixels")
        if raw:  # the size is known before the first chunk
            shape = convert.pixels_shape(start.pixels)
            self._codec.limits.check_size(start.pixels.width, start.pixels.height)
            if start.total_bytes != math.prod(shape):
                raise InvalidArgument(
                    f"total_bytes is {start.total_bytes}; pixels of shape {shape} need {math.prod(shape)}"
                )
        # An image file is copied once more, for Pillow.
        with self._admission.held(start.total_bytes * (1 if raw else 2)):
            data = await call.receive(start.total_bytes)
            if raw:
                pixels = convert.pixels_from_message(start.pixels, data.data)
                source = _Source(pixels, (start.pixels.width, start.pixels.height))
            else:
                source = await self._measured(call.record, data.data)
            del data
            answer = await self._encode(call.record, start.request, source)
        file, answer.file = answer.file, b""
        head = pb.EncodeAnswer(response=answer, total_bytes=len(file))
        await call.write(pb.EncodeStreamResponse(answer=head))
        await call.send(pb.EncodeStreamResponse, file)

    async def DecodeStream(self, call: Call) -> None:  # noqa: N802
        start = await self._start(call)
        _check_format(start.request)
        with self._admission.held(2 * start.total_bytes):
            data = (await call.receive(start.total_bytes)).tobytes()
            request = start.request
            if start.is_code:
                try:
                    request.code.ParseFromString(data)
                except DecodeError as exc:
                    raise CodeError(f"the chunks are no serialised Code message: {exc}") from exc
                del data
                answer, picture = await self._decode_to(call.record, request, self._code_source(request.code))
            else:
                answer, picture = await self._decode_to(
                    call.record, request, await self._file_source(call.record, request, data)
                )
        if isinstance(picture, np.ndarray):
            answer.pixels.CopyFrom(convert.pixels_to_message(picture, samples=False))
            content = np.ascontiguousarray(picture).reshape(-1).data
        else:
            answer.image_file = b""
            content = memoryview(picture)
        await call.write(pb.DecodeStreamResponse(answer=pb.DecodeAnswer(response=answer, total_bytes=len(content))))
        await call.send(pb.DecodeStreamResponse, content)

    async def EncodeBatch(self, call: Call) -> None:  # noqa: N802
        await self._batch(call, pb.EncodeBatchResponse, self._encode)

    async def DecodeBatch(self, call: Call) -> None:  # noqa: N802
        await self._batch(call, pb.DecodeBatchResponse, self._decode)

    async def Features(self, call: Call) -> None:  # noqa: N802
        request = await call.read_one()
        with self._admission.held(request.ByteSize()):
            match request.WhichOneof("source"):
                case "file":
                    source = await self._file_source(call.record, pb.DecodeRequest(), request.file)
                case "image_file" | "pixels":
                    source = await self._image_source(call.record, request)
                case _:
                    raise InvalidArgument("request has nothing to describe; set image_file, pixels or file")
            answer = await self._work(call.record, source, partial(_features, request, source.value), False)
        await call.write(answer)

    async def Inspect(self, call: Call) -> None:  # noqa: N802
        request = await call.read_one()
        header = await self._look(lambda: self._codec.read_header(request.file))
        sections = [pb.Section(kind=s.kind, length=s.length, crc32=s.crc) for s in header.sections]
        answer = pb.InspectResponse(
            format_version=header.version,
            model=header.model,
            width=header.width,
            height=header.height,
            quality=header.quality,
            total_bytes=header.length + sum(section.length for section in header.sections),
            decodable=header.lossless or header.model in {model.id for model in await self._look(self._codec.models)},
            grey=header.colour == container.GREY,
            lossless=header.lossless,
            sections=sections,
        )
        await call.write(answer)

    async def ListModels(self, call: Call) -> None:  # noqa: N802
        await call.read_one()
        models = await self._look(self._codec.models)
        answer = pb.ListModelsResponse(
            models=[convert.model_to_message(model) for model in models],
            default_model=self._codec.model,
            server_version=version("hourglass-codec"),
            max_pixels=self._config.max_pixels,
            max_message_bytes=self._config.max_message_bytes,
            max_stream_bytes=self._config.max_stream_bytes,
        )
        await call.write(answer)

    async def _start(self, call: Call) -> Any:
        """The start of a stream, after a look at its figures."""
        message = await call.read_one()
        if message.WhichOneof("part") != "start":
            raise InvalidArgument("the stream begins with no start; send it before the chunks")
        start, limit = message.start, self._config.max_stream_bytes
        if start.request.WhichOneof("source") is not None:
            raise InvalidArgument("start.request has a source; in a stream that comes in chunks")
        if not 0 < start.total_bytes <= limit:
            kind = LimitError if start.total_bytes else InvalidArgument
            raise kind(f"total_bytes is {start.total_bytes}; expected 1 to {limit} (--max-stream-bytes)")
        return start

    async def _batch(self, call: Call, kind: Callable[..., Message], work: Callable[..., Awaitable[Message]]) -> None:
        """Answer each item as it is done. As many are in memory as there are slots, and one that waits for the next."""
        window = asyncio.Semaphore(self._config.slots + 1)

        async def one(item: Any) -> None:
            try:
                if len(item.id) > _ID_LENGTH:
                    raise InvalidArgument(f"id has {len(item.id)} characters; expected {_ID_LENGTH} at most")
                with self._admission.held(item.request.ByteSize()):
                    result = {"response": await work(call.record, item.request, patient=True)}
            except Exception as error:  # whatever it is, the other items go on
                call.record.failures += 1
                result = {"failure": refusal_of(error, call.record.request_id).failure}
            try:
                await call.write(kind(id=item.id[:_ID_LENGTH], **result))
            finally:
                window.release()

        async with asyncio.TaskGroup() as group:
            while True:
                await window.acquire()
                item = await call.read()
                if item is None:
                    return
                group.create_task(one(item))

    async def _encode(
        self, record: Record, request: pb.EncodeRequest, source: _Source | None = None, patient: bool = False
    ) -> pb.EncodeResponse:
        if source is None:
            source = await self._image_source(record, request)
        settings = convert.get_settings(request)
        return await self._work(record, source, partial(_encode, request, source.value, settings), patient)

    async def _decode(self, record: Record, request: pb.DecodeRequest, patient: bool = False) -> pb.DecodeResponse:
        _check_format(request)
        match request.WhichOneof("source"):
            case "file":
                source = await self._file_source(record, request, request.file)
            case "code":
                source = self._code_source(request.code)
            case _:
                raise InvalidArgument("request has nothing to decode; set file or code")
        answer, picture = await self._decode_to(record, request, source, patient)
        if isinstance(picture, np.ndarray):
            answer.pixels.CopyFrom(convert.pixels_to_message(picture))
        else:
            answer.image_file = picture
        return answer

    async def _decode_to(
        self, record: Record, request: pb.DecodeRequest, source: _Source, patient: bool = False
    ) -> tuple[pb.DecodeResponse, NDArray[np.uint8] | bytes]:
        """The answer without its picture, and the picture: pixels, or the bytes of an image file."""
        return await self._work(record, source, partial(_decode, request, source.value), patient)

    async def _work(
        self, record: Record, source: _Source, work: Callable[[Codec, Record], _Result], patient: bool
    ) -> _Result:
        """Wait for a slot and do `work` in it. When the caller goes away it is not begun, or stops at its next tile."""
        cost = COST_BASE + COST_PER_PIXEL * math.prod(source.size)
        if cost > self._config.memory_bytes:
            raise LimitError(
                f"picture is {source.size[0]}x{source.size[1]} pixels, which takes {cost >> 20} MiB to work on; this "
                f"server has {self._config.memory_bytes >> 20} MiB for that (--memory-mib)"
            )
        began = time.time_ns()
        async with self._admission.slot(cost, math.inf if patient else None) as slot:
            record.hops.append(Hop("queue", began, time.time_ns()))
            stop = threading.Event()
            job = partial(work, self._codec, record)
            future = asyncio.get_running_loop().run_in_executor(self._works, _unless, stop, job)
            slot.occupy(future)
            try:
                result = await asyncio.shield(future)
            except asyncio.CancelledError:
                stop.set()
                future.add_done_callback(lambda done: done.exception())  # nobody else will look at it
                raise
        record.pixels += math.prod(source.size)
        record.pictures += 1
        return result

    async def _image_source(self, record: Record, request: pb.EncodeRequest | pb.FeaturesRequest) -> _Source:
        match request.WhichOneof("source"):
            case "image_file":
                return await self._measured(record, request.image_file)
            case "pixels":
                width, height = request.pixels.width, request.pixels.height
                self._codec.limits.check_size(width, height)
                return _Source(convert.pixels_from_message(request.pixels), (width, height))
        raise InvalidArgument("request has no picture; set image_file or pixels")

    async def _measured(self, record: Record, data: bytes | memoryview) -> _Source:
        """An image file with its size, taken from its header and checked."""
        with record.hop("header"):
            return _Source(data, await self._look(lambda: image.size_of(data, self._codec.limits)))

    async def _file_source(self, record: Record, request: pb.DecodeRequest, data: bytes) -> _Source:
        with record.hop("header"):
            header = await self._look(lambda: self._codec.read_header(data))
        if request.HasField("region"):
            size = request.region.width, request.region.height
        else:
            size = header.width, header.height
        scale = request.scale or 1
        self._codec.limits.check_size(-(-size[0] // scale), -(-size[1] // scale))
        return _Source(data, size)

    def _code_source(self, code: pb.Code) -> _Source:
        self._codec.limits.check_size(code.width, code.height)
        return _Source(code, (code.width, code.height))

    async def _look(self, look: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._light, look)


def _unless(stop: threading.Event, job: Callable[[], _Result]) -> _Result:
    if stop.is_set():
        raise Cancelled("nobody waits for the result; the work was not begun")
    with watching(stop):
        return job()


@contextmanager
def _in_codec(record: Record) -> Iterator[None]:
    """The hop `codec`, with what it consists of."""
    with watching() as parts, record.hop("codec", parts):
        yield


def _encode(
    request: pb.EncodeRequest, given: bytes | NDArray[np.uint8], settings: Any, codec: Codec, record: Record
) -> pb.EncodeResponse:
    if request.model:
        codec = codec.with_model(request.model)
    with nullcontext() if isinstance(given, np.ndarray) else record.hop("image"):
        picture = load(given, codec.limits, settings)
    losses, picture = list(picture.losses), replace(picture, losses=())
    wants_file = request.want_file or not request.want_code
    code, file = None, b""
    with _in_codec(record):
        if wants_file:
            if request.want_code:
                settings = {**settings, "fallback": False}
            file = codec.encode(picture, **settings)
        if request.want_code:
            if wants_file:
                code = codec.unpack(file)
            else:
                if picture.alpha is not None:
                    losses.append("a code holds no alpha; it is left out")
                code = codec.analyse(replace(picture, alpha=None), **settings)
    width, height = picture.width, picture.height
    answer = pb.EncodeResponse(model=codec.model, width=width, height=height, file=file, warnings=losses)
    if code is not None:
        answer.quality, answer.model = code.quality, code.model
        answer.code.CopyFrom(convert.code_to_message(code))
    else:
        header = codec.read_header(file)
        answer.quality, answer.model, answer.lossless = header.quality, header.model, header.lossless
    if file:
        record.ratios.append(3 * width * height / len(file))
    if request.want_distortion:
        with record.hop("measure"):
            distortion = codec.measure(picture, code if code is not None else file)
        answer.distortion.CopyFrom(pb.Distortion(psnr=distortion.psnr, ms_ssim=distortion.ms_ssim))
    return answer


def _decode(
    request: pb.DecodeRequest, given: bytes | pb.Code, codec: Codec, record: Record
) -> tuple[pb.DecodeResponse, NDArray[np.uint8] | bytes]:
    with _in_codec(record):
        if isinstance(given, pb.Code):
            code = convert.code_from_message(given)
            picture = Picture(codec.synthesise(code))
            answer = pb.DecodeResponse(model=code.model, quality=code.quality)
        else:
            picture = codec.decode_picture(given, **convert.get_view(request))
            header = codec.read_header(given)
            answer = pb.DecodeResponse(model=header.model, quality=header.quality, damage=picture.losses)
    if request.format == pb.IMAGE_FORMAT_UNSPECIFIED:
        if picture.metadata.size:
            answer.metadata.CopyFrom(convert.metadata_to_message(picture.metadata))
        return answer, picture.pixels
    with record.hop("write"):
        file, losses = image.save(picture, _FORMATS[request.format])
    answer.warnings.extend(losses)
    return answer, file


def _features(
    request: pb.FeaturesRequest, given: bytes | NDArray[np.uint8], codec: Codec, record: Record
) -> pb.FeaturesResponse:
    if request.model:
        codec = codec.with_model(request.model)
    if request.WhichOneof("source") == "file":
        assert isinstance(given, bytes)
        with _in_codec(record):
            values = codec.features(given)
        return pb.FeaturesResponse(values=values, model=codec.read_header(given).model or codec.model)
    with nullcontext() if isinstance(given, np.ndarray) else record.hop("image"):
        picture = load(given, codec.limits, {})
    codec = codec.suited(picture, {})
    with _in_codec(record):
        values = codec.features(replace(picture, losses=()))
    return pb.FeaturesResponse(values=values, model=codec.model, warnings=picture.losses)


def _check_format(request: pb.DecodeRequest) -> None:
    if request.format not in (pb.IMAGE_FORMAT_UNSPECIFIED, *_FORMATS):
        raise InvalidArgument(f"format is {request.format}; expected a value of ImageFormat")


async def _send_one(call: Call, answer: Message) -> None:
    with call.record.hop("send"):
        await call.write(answer)
