"""`hourglass-server`: flags -> frozen config -> serve."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hourglass.codec import Codec, Limits, errors
from hourglass.codec.runtime import DEFAULT_MODEL, usable_cores
from hourglass.server.servicer import CodecServicer
from hourglass.v1 import codec_pb2, codec_pb2_grpc

_log = logging.getLogger("hourglass.server")

SERVICE = codec_pb2.DESCRIPTOR.services_by_name["CodecService"].full_name


@dataclass(frozen=True)
class Config:
    """What the flags say. workers: calls worked on at a time. threads: cores for each. message_bytes: largest call."""

    listen: str = "127.0.0.1:50051"
    model: str = DEFAULT_MODEL
    workers: int = 1
    threads: int = 1
    max_pixels: int = Limits.pixels
    max_message_bytes: int = 256 << 20
    grace_seconds: float = 10.0


class Server:
    """A running service: `start`, then `stop`. `port` is the one in use, also when 0 was asked for."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._codec = Codec(config.model, threads=config.threads, limits=Limits(pixels=config.max_pixels))
        self._executor = ThreadPoolExecutor(config.workers, thread_name_prefix="codec")
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Warm the codec up, listen, and only then say SERVING. Raises `InvalidArgument` when listening fails."""
        size = self._config.max_message_bytes
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on this port is an error, not a silent share
            ]
        )
        add = codec_pb2_grpc.add_CodecServiceServicer_to_server
        add(CodecServicer(self._codec, self._executor), server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            self.port = server.add_insecure_port(self._config.listen)
        except RuntimeError as exc:
            raise errors.InvalidArgument(
                f"cannot listen on {self._config.listen!r}: {exc}; is the port in use, or is it no HOST:PORT?"
            ) from exc
        await asyncio.get_running_loop().run_in_executor(self._executor, self._codec.warm_up)
        await server.start()
        self._server = server
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, let those in flight finish within the grace."""
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._config.grace_seconds)
        self._executor.shutdown()

    async def _say(self, status: Any) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = Server(config)
    await server.start()
    host = config.listen.rpartition(":")[0]
    _log.info("listening on %s:%d, model %s, %d workers", host, server.port, config.model, config.workers)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    _log.info("stopping: calls in flight have %g s to finish", config.grace_seconds)
    await server.stop()


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--listen", default=Config.listen, metavar="HOST:PORT", help="Address to listen on; port 0 picks one.")
@click.option("--model", default=Config.model, metavar="ID", help="Model that encodes when a call names none.")
@click.option("--workers", type=click.IntRange(1), default=usable_cores(), help="Calls worked on at a time.")
@click.option("--threads", type=click.IntRange(1), default=Config.threads, help="Cores for each of them.")
@click.option("--max-pixels", type=click.IntRange(1), default=Config.max_pixels, help="Largest picture, in pixels.")
@click.option("--max-message-bytes", type=click.IntRange(1), default=Config.max_message_bytes, help="Largest call.")
@click.option(
    "--grace-seconds",
    type=click.FloatRange(0),
    default=Config.grace_seconds,
    help="After SIGTERM, how long calls in flight may take.",
)
def main(**flags: str | int | float) -> None:
    """Serve the Hourglass image codec by gRPC, with health checks and reflection, without TLS.

    Example: hourglass-server --listen 127.0.0.1:50051
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(Config(**flags)))  # type: ignore[arg-type]  # click has checked the types
    except errors.HourglassError as exc:
        click.echo(f"hourglass-server: {exc}", err=True)
        sys.exit(2 if isinstance(exc, (errors.InvalidArgument, errors.UnknownModelError)) else 1)
