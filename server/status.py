"""Our errors as gRPC status: the one table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hourglass.codec import errors
from hourglass.server.admission import Busy, Closing
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1.convert import ERROR_DOMAIN

STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitError: grpc.StatusCode.INVALID_ARGUMENT,  # not RESOURCE_EXHAUSTED: trying again cannot help
    errors.UnknownModelError: grpc.StatusCode.NOT_FOUND,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    Busy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Closing: grpc.StatusCode.UNAVAILABLE,
    TimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    Exception: grpc.StatusCode.INTERNAL,
}
"""The nearest class of an error's ancestry decides."""

_LONGEST = 1000


@dataclass(frozen=True)
class Refusal:
    """An error as a client sees it. reason: name of its class. retry_seconds: 0 where trying again cannot help."""

    code: grpc.StatusCode
    message: str
    reason: str
    retry_seconds: float = 0.0

    @property
    def status(self) -> grpc.Status:
        """Code, message, and ErrorInfo and RetryInfo of google.rpc as details; gRPC's own hint to retries beside it."""
        details: list[message.Message] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN)]
        if self.retry_seconds:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self._milliseconds)
            details.append(retry)
        packed = [any_pb2.Any() for _ in details]
        for space, detail in zip(packed, details, strict=True):
            space.Pack(detail)
        return rpc_status.to_status(status_pb2.Status(code=self.number, message=self.message, details=packed))

    @property
    def failure(self) -> pb.Failure:
        """The same inside a batch."""
        return pb.Failure(
            code=self.number, message=self.message, reason=self.reason, retry_milliseconds=self._milliseconds
        )

    @property
    def number(self) -> int:
        """The code's number on the wire."""
        return int(self.code.value[0])

    @property
    def _milliseconds(self) -> int:
        return math.ceil(self.retry_seconds * 1000)


def refusal_of(error: Exception, request_id: str = "") -> Refusal:
    """What a client is told of `error`. Of our own failures only where to look: their messages may name files."""
    code = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    own = isinstance(error, (errors.HourglassError, Busy, Closing))
    reason = type(error).__name__ if own else "TimeoutError" if isinstance(error, TimeoutError) else "InternalError"
    text = str(error)
    if code == grpc.StatusCode.INTERNAL:
        text = f"the server failed on this call; its log tells why under request id {request_id or 'none'}"
    if len(text) > _LONGEST:  # it may quote what a client sent, and headers have room for little
        text = text[:_LONGEST] + "..."
    return Refusal(code, text, reason, getattr(error, "retry_seconds", 0.0))
