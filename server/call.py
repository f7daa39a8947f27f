"""One call: its messages under an idle limit, its ticket, its record, and its errors as a status."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from hourglass.codec.errors import InvalidArgument
from hourglass.server.admission import Admission
from hourglass.server.security import Tokens
from hourglass.server.status import refusal_of
from hourglass.server.telemetry import Record, Telemetry

_log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Bytes of one chunk of a stream that the server sends."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_ID = re.compile(r"[\w.:-]{1,64}")


class Call:
    """What a method of the servicer sees of a call."""

    def __init__(self, context: _Context, record: Record, idle_seconds: float) -> None:
        self.record = record
        self._context = context
        self._idle = idle_seconds
        self._writing = asyncio.Lock()

    async def read(self) -> Any:
        """The next message, None at the end. Raises `TimeoutError` when the client is idle for too long."""
        message = await self._soon(self._context.read(), "send")
        if message is grpc.aio.EOF:
            return None
        self.record.bytes_in += message.ByteSize()
        return message

    async def read_one(self) -> Any:
        """The message of a call that has one. Raises `InvalidArgument` when there is none."""
        with self.record.hop("receive"):
            message = await self.read()
        if message is None:
            raise InvalidArgument("the call has no message; expected one")
        return message

    async def receive(self, total: int) -> NDArray[np.uint8]:
        """The chunks that follow: (total,) uint8. Raises `InvalidArgument` for more or fewer bytes."""
        buffer, size = np.empty(total, np.uint8), 0
        with self.record.hop("receive"):
            while (message := await self.read()) is not None:
                if message.WhichOneof("part") != "chunk":
                    raise InvalidArgument("the stream has a second start; expected chunks")
                end = size + len(message.chunk)
                if end > total:
                    raise InvalidArgument(f"the stream has {end} bytes or more; its start said total_bytes {total}")
                buffer[size:end] = np.frombuffer(message.chunk, np.uint8)
                size = end
        if size != total:
            raise InvalidArgument(f"the stream ended after {size} bytes; its start said total_bytes {total}")
        return buffer

    async def write(self, message: Message) -> None:
        """Send a message, from any number of tasks. Raises `TimeoutError` when the client does not take it."""
        async with self._writing:
            await self._soon(self._context.write(message), "receive")
            self.record.bytes_out += message.ByteSize()

    async def send(self, kind: Callable[..., Message], data: bytes | memoryview) -> None:
        """Send bytes as messages of `kind` with one chunk each."""
        view = memoryview(data)
        with self.record.hop("send"):
            for begin in range(0, len(view), CHUNK):
                await self.write(kind(chunk=bytes(view[begin : begin + CHUNK])))

    async def _soon(self, step: Awaitable[Any], what: str) -> Any:
        try:
            async with asyncio.timeout(self._idle):
                return await step
        except TimeoutError as exc:
            raise TimeoutError(
                f"the client did not {what} a message for {self._idle:g} s; the call is given up"
            ) from exc


class Desk:
    """Turns a method on a `Call` into what gRPC calls. Counts the calls that are in it."""

    def __init__(self, admission: Admission, telemetry: Telemetry, idle_seconds: float, tokens: Tokens | None) -> None:
        self._admission, self._telemetry, self._idle, self._tokens = admission, telemetry, idle_seconds, tokens
        self.open = 0

    def handler(
        self, name: str, method: Callable[[Call], Awaitable[None]], light: bool
    ) -> Callable[[object, _Context], Awaitable[None]]:
        """light: a method that takes no ticket."""

        async def handle(_requests: object, context: _Context) -> None:
            record = self._record(name, context)
            context.set_trailing_metadata((("x-request-id", record.request_id),))
            self.open += 1
            try:
                await self._run(method, Call(context, record, self._idle), light)
            except asyncio.CancelledError:
                left = context.time_remaining()
                record.code = "CANCELLED" if left is None or left > 0 else "DEADLINE_EXCEEDED"
                raise
            except Exception as error:  # whatever it is, it becomes a status
                while isinstance(error, ExceptionGroup):
                    error = error.exceptions[0]
                await self._refuse(error, context, record)
            finally:
                self.open -= 1
                self._telemetry.add(record)

        return handle

    async def _run(self, method: Callable[[Call], Awaitable[None]], call: Call, light: bool) -> None:
        if light:
            await method(call)
            return
        with self._admission.ticket(call.record.client):
            await method(call)

    async def _refuse(self, error: Exception, context: _Context, record: Record) -> None:
        refusal = refusal_of(error, record.request_id)
        record.code, record.message = refusal.code.name, refusal.message
        if refusal.code == grpc.StatusCode.INTERNAL:
            _log.error("%s failed", record.method, exc_info=error, extra={"facts": {"request_id": record.request_id}})
        status = refusal.status
        trailer = [("x-request-id", record.request_id), *status.trailing_metadata]
        if refusal.retry_seconds:
            trailer.append(("grpc-retry-pushback-ms", str(round(refusal.retry_seconds * 1000))))
        await context.abort(status.code, status.details, tuple(trailer))

    def _record(self, name: str, context: _Context) -> Record:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        given = metadata.get("x-request-id", "")
        client = self._tokens.name_of(list(metadata.items())) if self._tokens else None
        if client is None:
            names = list((context.auth_context() or {}).get("x509_common_name", ()))
            client = names[0].decode(errors="replace") if names else context.peer().rpartition(":")[0]
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        return Record(name, request_id, client, metadata)
