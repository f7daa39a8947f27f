"""Client and AsyncClient: `Codec`'s calls, answered by a server. What they say and understand is in `plans`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, Unpack

import grpc
import grpc.aio

from hourglass.client.plans import (
    SERVICE,
    STREAM_ABOVE,
    Address,
    Attempts,
    Encoded,
    Features,
    Plan,
    Planner,
    Route,
    ServerInfo,
    Tls,
    Told,
    route,
)
from hourglass.codec import Code, FileSource, ImageSource, ModelInfo, Picture, Pixels, Settings, View, errors
from hourglass.v1 import codec_pb2 as pb

__all__ = ["AsyncClient", "Client", "Encoded", "ServerInfo", "Tls"]

_Result = TypeVar("_Result")
_Progress: TypeAlias = Callable[[int], None]
_FAILURES = (errors.HourglassError, OSError)


class _Channels:
    """Channels, each made when all others are in use, `most` at most. grpc_: grpc or grpc.aio, which name alike."""

    def __init__(self, grpc_: Any, way: Route, most: int) -> None:
        self._grpc, self._way, self._most = grpc_, way, most
        self._lock = threading.Lock()
        self._calls: dict[Any, int] = {}

    @contextmanager
    def lease(self) -> Iterator[Any]:
        """The channel that has the fewest calls."""
        with self._lock:
            channel = min(self._calls, key=self._calls.__getitem__, default=None)
            if channel is None or (self._calls[channel] and len(self._calls) < self._most):
                channel = self._open()
                self._calls[channel] = 0
            self._calls[channel] += 1
        try:
            yield channel
        finally:
            with self._lock:
                self._calls[channel] -= 1

    def taken(self) -> list[Any]:
        """All channels, to be closed."""
        with self._lock:
            return list(self._calls)

    def _open(self) -> Any:
        way = self._way
        if way.credentials is None:
            return self._grpc.insecure_channel(way.target, way.options)
        return self._grpc.secure_channel(way.target, way.credentials, way.options)


class _Base:
    """A connection for many calls, to close when done.

    address: "HOST:PORT"; or several, among which calls go round, as among all addresses of a name. Servers whose health
    is not SERVING are left out.
    model: id of the model that encodes; the server's default when None.
    timeout: seconds that a call may take, with all its tries.
    tls: how to know the server; no encryption when None. token: sent as a bearer token.
    stream_above: bytes from which on a picture or file travels in chunks.
    connections: how many there are at most, opened only when calls overlap: a server's processes share its connections
    out, so that calls at the same time need several to get at all its cores.

    Every call raises what the same call of `Codec` raises, as the same classes, and `RemoteError` when the server
    cannot be reached, does not answer in time, or fails. Calls that a server refuses because it is busy or going away
    are tried again.
    """

    _grpc: ClassVar[Any]

    def __init__(
        self,
        address: Address,
        *,
        model: str | None = None,
        timeout: float = 120.0,
        tls: Tls | None = None,
        token: str | None = None,
        stream_above: int = STREAM_ABOVE,
        connections: int = 4,
    ) -> None:
        _check_count("connections", connections)
        self._route = route(address, tls)
        self.address = self._route.name
        self._timeout, self._token = timeout, token
        self._plans = Planner(model or "", stream_above)
        self._channels = _Channels(self._grpc, self._route, connections)

    def _call(self, channel: Any, plan: Plan[Any], attempts: Attempts) -> Any:
        """Begin a try: what the channel's method returns."""
        method, requests = SERVICE.methods_by_name[plan.method], plan.requests()
        invoke = (channel.stream_stream if plan.streaming else channel.unary_unary)(
            f"/{SERVICE.full_name}/{plan.method}",
            request_serializer=getattr(pb, method.input_type.name).SerializeToString,
            response_deserializer=getattr(pb, method.output_type.name).FromString,
        )
        given = requests if plan.streaming else next(requests)
        return invoke(given, timeout=attempts.left, metadata=attempts.metadata)

    def _attempts(self, plan: Plan[Any]) -> Attempts:
        return Attempts(self.address, plan.method, self._timeout, self._token, plan.streaming)


class Client(_Base):
    """`Codec`'s calls on a server, from any number of threads."""

    _grpc: ClassVar[Any] = grpc

    def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """A picture -> the bytes of a .hgc file; the same bytes as `Codec.encode`."""
        return self._run(self._plans.encode(image, settings)).aloud()

    def decode(self, data: FileSource, **view: Unpack[View]) -> Pixels:
        """A .hgc file -> uint8 (H, W, 3) or what else it has; the same pixels as `Codec.decode`."""
        picture = self._run(self._plans.decode(data, view))
        return Told(picture.pixels, picture.losses).aloud()

    def decode_picture(self, data: FileSource, **view: Unpack[View]) -> Picture:
        """The same with the picture's metadata, as `Codec.decode_picture`."""
        return self._run(self._plans.decode(data, view))

    def analyse(self, image: ImageSource, **settings: Unpack[Settings]) -> Code:
        """A picture -> its Code; the same integers as `Codec.analyse`."""
        return self._run(self._plans.analyse(image, settings)).aloud()

    def synthesise(self, code: Code) -> Pixels:
        """A Code -> (H, W, 3) uint8; the same pixels as `Codec.synthesise`."""
        return self._run(self._plans.synthesise(code))

    def features(self, source: ImageSource | FileSource) -> Features:
        """A picture or a .hgc file -> what describes it, (D,) float32; the same numbers as `Codec.features`."""
        return self._run(self._plans.features(source)).aloud()

    def models(self) -> list[ModelInfo]:
        """The models of the server."""
        return list(self.info().models)

    def info(self) -> ServerInfo:
        """Version, models and limits of the server."""
        return self._run(self._plans.info())

    def encode_many(
        self,
        pictures: Iterable[ImageSource],
        *,
        ordered: bool = True,
        concurrency: int = 4,
        progress: _Progress | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Encoded]:
        """Encode pictures, `concurrency` at a time; a bad one is an `Encoded` with its error and the others go on.

        ordered: results in the order of the pictures; else as they are done. Pictures are taken only as results are, so
        that at most twice `concurrency` are in memory. progress: called with the number done, after each.
        """
        _check_count("concurrency", concurrency)
        pending: list[Future[Encoded]] = []
        done = 0

        def take() -> Encoded:
            nonlocal done
            ready = pending[0] if ordered else next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
            pending.remove(ready)
            result = ready.result()
            done += 1
            if progress is not None:
                progress(done)
            return result

        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="encode_many")
        try:
            for index, picture in enumerate(pictures):
                pending.append(pool.submit(self._encode_one, index, picture, settings))
                if len(pending) >= 2 * concurrency:
                    yield take()
            while pending:
                yield take()
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Close the connections; calls in flight fail."""
        for channel in self._channels.taken():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode_one(self, index: int, picture: ImageSource, settings: Settings) -> Encoded:
        try:
            told = self._run(self._plans.encode(picture, settings))
        except _FAILURES as error:
            return Encoded(index, None, error)
        return Encoded(index, told.value, None, told.losses)

    def _run(self, plan: Plan[_Result]) -> _Result:
        attempts = self._attempts(plan)
        while True:
            try:
                with self._channels.lease() as channel:
                    answer = self._call(channel, plan, attempts)
                    return plan.finish(answer if plan.streaming else iter([answer]))
            except grpc.RpcError as error:
                time.sleep(attempts.pause(error))


class AsyncClient(_Base):
    """`Codec`'s calls on a server, as coroutines of one event loop. They are those of `Client`, with the same words."""

    _grpc: ClassVar[Any] = grpc.aio

    async def encode(self, image: ImageSource, **settings: Unpack[Settings]) -> bytes:
        """See `Client.encode`."""
        return (await self._run(self._plans.encode(image, settings))).aloud()

    async def decode(self, data: FileSource, **view: Unpack[View]) -> Pixels:
        """See `Client.decode`."""
        picture = await self._run(self._plans.decode(data, view))
        return Told(picture.pixels, picture.losses).aloud()

    async def decode_picture(self, data: FileSource, **view: Unpack[View]) -> Picture:
        """See `Client.decode_picture`."""
        return await self._run(self._plans.decode(data, view))

    async def analyse(self, image: ImageSource, **settings: Unpack[Settings]) -> Code:
        """See `Client.analyse`."""
        return (await self._run(self._plans.analyse(image, settings))).aloud()

    async def synthesise(self, code: Code) -> Pixels:
        """See `Client.synthesise`."""
        return await self._run(self._plans.synthesise(code))

    async def features(self, source: ImageSource | FileSource) -> Features:
        """See `Client.features`."""
        return (await self._run(self._plans.features(source))).aloud()

    async def models(self) -> list[ModelInfo]:
        """See `Client.models`."""
        return list((await self.info()).models)

    async def info(self) -> ServerInfo:
        """See `Client.info`."""
        return await self._run(self._plans.info())

    async def encode_many(
        self,
        pictures: Iterable[ImageSource] | AsyncIterable[ImageSource],
        *,
        ordered: bool = True,
        concurrency: int = 4,
        progress: _Progress | None = None,
        **settings: Unpack[Settings],
    ) -> AsyncIterator[Encoded]:
        """See `Client.encode_many`; `pictures` may be asynchronous too."""
        _check_count("concurrency", concurrency)
        pending: list[asyncio.Task[Encoded]] = []
        places = asyncio.Semaphore(concurrency)
        done = 0

        async def one(index: int, picture: ImageSource) -> Encoded:
            async with places:
                return await self._encode_one(index, picture, settings)

        async def take() -> Encoded:
            nonlocal done
            if ordered:
                ready = pending[0]
            else:
                ready = next(iter((await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))[0]))
            result = await ready
            pending.remove(ready)
            done += 1
            if progress is not None:
                progress(done)
            return result

        index = 0
        try:
            async for picture in _each(pictures):
                pending.append(asyncio.create_task(one(index, picture)))
                index += 1
                if len(pending) >= 2 * concurrency:
                    yield await take()
            while pending:
                yield await take()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def close(self) -> None:
        """Close the connections; calls in flight fail."""
        for channel in self._channels.taken():
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _encode_one(self, index: int, picture: ImageSource, settings: Settings) -> Encoded:
        try:
            told = await self._run(self._plans.encode(picture, settings))
        except _FAILURES as error:
            return Encoded(index, None, error)
        return Encoded(index, told.value, None, told.losses)

    async def _run(self, plan: Plan[_Result]) -> _Result:
        attempts = self._attempts(plan)
        while True:
            try:
                with self._channels.lease() as channel:
                    call = self._call(channel, plan, attempts)
                    answers = [answer async for answer in call] if plan.streaming else [await call]
                return plan.finish(iter(answers))
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause(error))


async def _each(things: Iterable[_Result] | AsyncIterable[_Result]) -> AsyncIterator[_Result]:
    if isinstance(things, AsyncIterable):
        async for thing in things:
            yield thing
    else:
        for thing in things:
            yield thing


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise errors.InvalidArgument(f"{name} is {count}; expected 1 or more")
