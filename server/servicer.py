"""CodecService: message -> codec call -> message. The codec works in threads, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio

from hourglass.codec import Codec, image
from hourglass.codec.errors import HourglassError, InvalidArgument
from hourglass.server.status import status_of
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc, convert

_log = logging.getLogger(__name__)

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")

_FORMATS = {pb.IMAGE_FORMAT_PNG: "PNG", pb.IMAGE_FORMAT_JPEG: "JPEG", pb.IMAGE_FORMAT_WEBP: "WEBP"}


class CodecServicer(codec_pb2_grpc.CodecServiceServicer):
    """Answers calls with `codec`, at most as many at a time as `executor` has threads."""

    def __init__(self, codec: Codec, executor: Executor) -> None:
        self._codec = codec
        self._executor = executor

    async def Encode(self, request: pb.EncodeRequest, context: _Context) -> pb.EncodeResponse:  # noqa: N802
        return await self._answer(self._encode, request, context)

    async def Decode(self, request: pb.DecodeRequest, context: _Context) -> pb.DecodeResponse:  # noqa: N802
        return await self._answer(self._decode, request, context)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: _Context
    ) -> pb.ListModelsResponse:
        return await self._answer(self._list_models, request, context)

    async def _answer(self, work: Callable[[_Request], _Answer], request: _Request, context: _Context) -> _Answer:
        """Run `work` in a thread; its errors become the status of the call."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work, request)
        except HourglassError as error:
            status = status_of(error)
            return await _refuse(context, status.code, status.details, status.trailing_metadata)
        except Exception:
            _log.exception("%s failed", work.__name__)
            return await _refuse(context, grpc.StatusCode.INTERNAL, "the server failed on this call; see its log", ())

    def _encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        source = request.WhichOneof("source")
        if source is None:
            raise InvalidArgument("request has no picture; set image_file or pixels")
        settings = convert.get_settings(request)
        given = request.image_file if source == "image_file" else convert.pixels_from_message(request.pixels)
        pixels, losses = image.load(given, self._codec.limits)
        codec = self._codec.with_model(request.model) if request.model else self._codec
        code = codec.analyse(pixels, **settings)
        answer = pb.EncodeResponse(
            model=code.model, quality=code.quality, width=code.width, height=code.height, warnings=losses
        )
        if request.want_file or not request.want_code:
            answer.file = codec.pack(code)
        if request.want_code:
            answer.code.CopyFrom(convert.code_to_message(code))
        if request.want_distortion:
            distortion = codec.measure(pixels, code)
            answer.distortion.CopyFrom(pb.Distortion(psnr=distortion.psnr, ms_ssim=distortion.ms_ssim))
        return answer

    def _decode(self, request: pb.DecodeRequest) -> pb.DecodeResponse:
        source = request.WhichOneof("source")
        if source is None:
            raise InvalidArgument("request has nothing to decode; set file or code")
        if request.format not in (pb.IMAGE_FORMAT_UNSPECIFIED, *_FORMATS):
            raise InvalidArgument(f"format is {request.format}; expected a value of ImageFormat")
        code = self._codec.unpack(request.file) if source == "file" else convert.code_from_message(request.code)
        pixels = self._codec.synthesise(code)
        answer = pb.DecodeResponse(model=code.model, quality=code.quality)
        if request.format == pb.IMAGE_FORMAT_UNSPECIFIED:
            answer.pixels.CopyFrom(convert.pixels_to_message(pixels))
        else:
            answer.image_file = image.write(pixels, _FORMATS[request.format])
        return answer

    def _list_models(self, _: pb.ListModelsRequest) -> pb.ListModelsResponse:
        models = [convert.model_to_message(model) for model in self._codec.models()]
        return pb.ListModelsResponse(models=models, default_model=self._codec.model)


async def _refuse(
    context: _Context, code: grpc.StatusCode, message: str, metadata: tuple[tuple[str, str | bytes], ...]
) -> NoReturn:
    await context.abort(code, message, metadata)
    raise AssertionError("abort returned")
