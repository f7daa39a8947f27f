"""`hourglass-server`: flags -> frozen config -> supervise."""

from __future__ import annotations

import sys
from typing import Any

import click

from hourglass.codec import errors
from hourglass.server.config import Config, options
from hourglass.server.supervisor import supervise
from hourglass.server.telemetry import set_up_logs

_SETTINGS = {"show_default": True, "help_option_names": ["-h", "--help"], "auto_envvar_prefix": "HOURGLASS"}


@click.command(context_settings=_SETTINGS)
@options
@click.version_option(package_name="hourglass-codec", prog_name="hourglass-server")
def main(**flags: Any) -> None:
    """Serve the Hourglass image codec by gRPC, with health checks and reflection.

    Example: hourglass-server --listen 127.0.0.1:50051 --metrics-listen 127.0.0.1:9464
    """
    try:
        config = Config(**flags)
        set_up_logs(config.log_level)
        supervise(config)
    except errors.HourglassError as exc:
        click.echo(f"hourglass-server: {exc}", err=True)
        sys.exit(2 if isinstance(exc, (errors.InvalidArgument, errors.UnknownModelError)) else 1)
