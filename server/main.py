"""`hourglass-server`: flags -> frozen config -> supervise."""

from __future__ import annotations

import sys
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hourglass.codec import errors
from hourglass.server.config import Config, options
from hourglass.server.supervisor import supervise
from hourglass.server.telemetry import set_up_logs

_SETTINGS = {"show_default": True, "help_option_names": ["-h", "--help"], "auto_envvar_prefix": "HOURGLASS"}


@click.command(context_settings=_SETTINGS)
@options
@click.option("--check", metavar="HOST:PORT", help="Serve nothing; ask the server there, without TLS, for its health.")
@click.version_option(package_name="hourglass-codec", prog_name="hourglass-server")
def main(check: str | None, **flags: Any) -> None:
    """Serve the Hourglass image codec by gRPC, with health checks and reflection.

    Example: hourglass-server --listen 127.0.0.1:50051 --metrics-listen 127.0.0.1:9464
    """
    if check is not None:
        sys.exit(_check(check))
    try:
        config = Config(**flags)
        set_up_logs(config.log_level)
        supervise(config)
    except errors.HourglassError as exc:
        click.echo(f"hourglass-server: {exc}", err=True)
        sys.exit(2 if isinstance(exc, (errors.InvalidArgument, errors.UnknownModelError)) else 1)


def _check(address: str) -> int:
    """0 when the server at `address` says SERVING, else 1; for health checks of containers."""
    with grpc.insecure_channel(address) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=4)
        except grpc.RpcError as error:  # it is a Call too
            click.echo(f"{address}: {error.code().name}", err=True)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    click.echo(f"{address}: {name}")
    return 0 if name == "SERVING" else 1
