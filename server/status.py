"""Our errors as gRPC status: the one table."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hourglass.codec import errors
from hourglass.v1.convert import ERROR_DOMAIN

STATUS: dict[type[errors.HourglassError], grpc.StatusCode] = {
    errors.DataError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LimitError: grpc.StatusCode.INVALID_ARGUMENT,  # not RESOURCE_EXHAUSTED: trying again cannot help
    errors.UnknownModelError: grpc.StatusCode.NOT_FOUND,
    errors.ModelError: grpc.StatusCode.INTERNAL,
    errors.HourglassError: grpc.StatusCode.INTERNAL,
}
"""The nearest class of an error's ancestry decides."""


_LONGEST = 1000


def status_of(error: errors.HourglassError) -> grpc.Status:
    """Code, message, and google.rpc.ErrorInfo with the name of the error's class as its reason."""
    code = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN))
    message = str(error)
    if len(message) > _LONGEST:  # it may quote what a client sent, and headers have room for little
        message = message[:_LONGEST] + "..."
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=[detail]))
