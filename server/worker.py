"""One process's share of the service: a gRPC server, its codec and its threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hourglass.codec import Codec, Limits, errors
from hourglass.codec.runtime import ZOO
from hourglass.server.admission import Admission, Bounds
from hourglass.server.call import Desk
from hourglass.server.config import Config
from hourglass.server.heart import Heart
from hourglass.server.security import Tls, TokenInterceptor, Tokens
from hourglass.server.servicer import SERVICE, CodecServicer
from hourglass.server.telemetry import Telemetry, set_up_logs

_log = logging.getLogger(__name__)

_GAUGES_SECONDS = 1.0
_BEAT_SECONDS = 0.2

_NICE = 2
"""How much the codec's threads stand back for the event loop, so that a full server still refuses at once."""


class Server:
    """A running service in this process: `start`, then `stop`. `port` is the one in use, also when 0 was asked for;
    `admission` tells what is going on.

    shared: whether other processes serve on the same port. zoo: the folder of models.
    """

    def __init__(self, config: Config, *, shared: bool = False, zoo: Path = ZOO) -> None:
        self._config = config
        limits = Limits(pixels=config.max_pixels, file_bytes=config.max_stream_bytes)
        self._codec = Codec(config.model, threads=config.threads, limits=limits, zoo=zoo)
        self._tls = Tls(config) if config.tls_cert else None
        self._tokens = Tokens(config.token_file) if config.token_file else None
        self._works = ThreadPoolExecutor(config.slots, thread_name_prefix="codec", initializer=_stand_back)
        self._light = ThreadPoolExecutor(2, thread_name_prefix="header")
        self._health = _Health()
        self.admission = Admission(
            Bounds(config.slots, config.queue, config.queue_seconds, config.client_calls, config.memory_bytes)
        )
        self.telemetry = Telemetry(config.trace_endpoint)
        self._desk = Desk(self.admission, self.telemetry, config.idle_seconds, self._tokens)
        self._shared = shared
        self._servers: list[grpc.aio.Server] = []
        self._gauges: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Warm the codec up, listen, and say SERVING. Raises `InvalidArgument` when listening fails."""
        await asyncio.get_running_loop().run_in_executor(self._works, self._codec.warm_up)
        await self._health.say(health_pb2.HealthCheckResponse.SERVING)
        servicer = CodecServicer(self._codec, self._config, self.admission, self._works, self._light)
        interceptors = [TokenInterceptor(self._tokens)] if self._tokens else []
        server = grpc.aio.server(options=self._options(), interceptors=interceptors)
        server.add_generic_rpc_handlers((servicer.handlers(self._desk),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        self.port = _listen(server, self._config.listen, self._tls)
        self._servers.append(server)
        if self._config.probe_listen:
            probe = grpc.aio.server(options=self._options())
            health_pb2_grpc.add_HealthServicer_to_server(self._health, probe)
            _listen(probe, self._config.probe_listen, None)
            self._servers.append(probe)
        for one in self._servers:
            await one.start()
        self._gauges = asyncio.create_task(self._keep_gauges())

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, let those in flight finish within the grace."""
        grace = self._config.grace_seconds
        self.admission.closing = True
        await self._health.say(health_pb2.HealthCheckResponse.NOT_SERVING)
        stopping = [asyncio.create_task(server.stop(grace)) for server in self._servers]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._desk.open:
                    await asyncio.sleep(0.02)
        if self._desk.open:
            _log.warning("%d calls did not finish within %g s", self._desk.open, grace)
        await self._health.end()  # watchers would stay for all of the grace
        # A call that has left the desk may still be sending its status: on a busy machine that takes its time too.
        for server in self._servers:
            await server.stop(5)
        await asyncio.gather(*stopping)
        if self._gauges is not None:
            self._gauges.cancel()
        self._works.shutdown(cancel_futures=True)
        self._light.shutdown()
        await asyncio.to_thread(self.telemetry.close)

    def reload(self) -> None:
        """Read certificates and tokens again; what cannot be read stays as it is."""
        for part in (self._tls, self._tokens):
            try:
                if part is not None:
                    part.reload()
            except errors.InvalidArgument as exc:
                _log.error("not reloaded: %s", exc)
        _log.info("reloaded; models: %s", ", ".join(model.id for model in self._codec.models()))

    async def _keep_gauges(self) -> None:
        while True:
            admission = self.admission
            self.telemetry.gauges(
                queue_length=admission.waiting,
                running=admission.running,
                inside=admission.inside,
                budget_bytes=admission.memory,
                workers=1,
            )
            await asyncio.sleep(_GAUGES_SECONDS)

    def _options(self) -> list[tuple[str, Any]]:
        age = self._config.connection_seconds
        return [
            ("grpc.max_receive_message_length", self._config.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Without a shared port a second server on it is an error, not a silent share.
            ("grpc.so_reuseport", int(self._shared)),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 16 << 10),
            ("grpc.max_concurrent_streams", 1000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_time_ms", 60_000),  # finds clients that are gone without a word
            *([("grpc.max_connection_age_ms", round(age * 1000))] if age else []),
        ]


class _Health(health.aio.HealthServicer):
    """The standard health service, whose watchers can be sent home."""

    def __init__(self) -> None:
        super().__init__()
        self._watchers: set[asyncio.Task[Any]] = set()

    async def say(self, status: Any) -> None:
        """The status of the whole and of the service."""
        for name in ("", SERVICE.full_name):
            await self.set(name, status)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        task = asyncio.current_task()
        assert task is not None
        self._watchers.add(task)
        try:
            await super().Watch(request, context)
        finally:
            self._watchers.discard(task)

    async def end(self) -> None:
        """End all watches, after a moment in which they tell the last news."""
        await asyncio.sleep(0.05)
        for task in tuple(self._watchers):
            task.cancel()


def _listen(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    try:
        port: int = server.add_secure_port(address, tls.credentials) if tls else server.add_insecure_port(address)
    except RuntimeError as exc:
        raise errors.InvalidArgument(
            f"cannot listen on {address!r}: {exc}; is the port in use, or is it no HOST:PORT?"
        ) from exc
    return port


def _stand_back() -> None:
    if hasattr(os, "setpriority") and sys.platform == "linux":  # there a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def run(config: Config, zoo: str, pipe: Connection, heart: str) -> None:
    """A worker process: serve until SIGTERM or the supervisor's end, reload at SIGHUP.

    pipe: is told None when the worker serves, or why it cannot. heart: file of a `Heart`, which beats for as long
    as the event loop goes round.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the supervisor decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    set_up_logs(config.log_level)
    sys.setswitchinterval(0.001)  # the event loop waits less for the codec's Python
    try:
        asyncio.run(_serve(config, Path(zoo), pipe, Heart(Path(heart))))
    except errors.HourglassError as exc:
        pipe.send(exc)
        sys.exit(1)
    except Exception:  # multiprocessing would print it, not log it
        _log.critical("the worker fails", exc_info=True)
        sys.exit(1)


async def _serve(config: Config, zoo: Path, pipe: Connection, heart: Heart) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    beating = asyncio.create_task(_beat(heart))
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    server = Server(config, shared=True, zoo=zoo)
    await server.start()
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    loop.add_reader(pipe.fileno(), stop.set)  # the supervisor sends nothing: it is gone
    with contextlib.suppress(OSError):  # gone already
        pipe.send(None)
    await stop.wait()
    loop.remove_reader(pipe.fileno())
    await server.stop()
    beating.cancel()


async def _beat(heart: Heart) -> None:
    while True:
        heart.beat()
        await asyncio.sleep(_BEAT_SECONDS)
