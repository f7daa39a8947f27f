"""What the server can be told: one frozen Config, from which the flags and their environment variables are made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from hourglass.codec import errors
from hourglass.codec.runtime import DEFAULT_MODEL, usable_cores

MIB = 1 << 20


def _flag(default: Any, help: str, kind: Any = str, metavar: str | None = None) -> Any:
    """A field of Config with what its flag needs."""
    return field(default=default, metadata={"help": help, "type": kind, "metavar": metavar})


_COUNT, _SECONDS = click.IntRange(1), click.FloatRange(0)
_FILE = click.Path(exists=True, dir_okay=False, readable=True)
_FOLDER = click.Path(exists=True, file_okay=False)


@dataclass(frozen=True)
class Config:
    """Sizes in bytes or MiB, times in seconds; empty text turns a thing off."""

    listen: str = _flag("127.0.0.1:50051", "Address to serve on; port 0 picks one.", metavar="HOST:PORT")
    probe_listen: str = _flag("", "Address for health checks alone, always without TLS or token.", metavar="HOST:PORT")
    metrics_listen: str = _flag("", "Address for Prometheus to scrape, by HTTP at /metrics.", metavar="HOST:PORT")
    model: str = _flag(DEFAULT_MODEL, "Model that encodes when a call names none.", metavar="ID")
    models: str | None = _flag(None, "Folder of models beside those of the package; SIGHUP looks again.", _FOLDER)
    workers: int = _flag(0, "Processes; 0 for one for each core.", click.IntRange(0))
    slots: int = _flag(1, "Calls that one process works on at a time.", _COUNT)
    threads: int = _flag(1, "Cores for each of these calls.", _COUNT)
    max_pixels: int = _flag(50_000_000, "Largest picture, width times height.", _COUNT)
    max_message_bytes: int = _flag(64 * MIB, "Largest message; larger pictures come in chunks.", _COUNT)
    max_stream_bytes: int = _flag(512 * MIB, "Largest picture or file in chunks.", _COUNT)
    memory_mib: int = _flag(0, "Memory for the calls of one process; 0 for its share of two thirds.", click.IntRange(0))
    queue: int = _flag(32, "Calls of one process that may wait; more are told to try again.", click.IntRange(0))
    queue_seconds: float = _flag(20.0, "How long a call may wait for its turn.", _SECONDS)
    client_calls: int = _flag(32, "Calls of one client, by its token, certificate or address, in one process.", _COUNT)
    idle_seconds: float = _flag(60.0, "How long a client may take to send or receive the next message.", _SECONDS)
    connection_seconds: float = _flag(600.0, "Age at which a connection is closed, so that load spreads.", _SECONDS)
    grace_seconds: float = _flag(30.0, "After SIGTERM, how long calls in flight may take.", _SECONDS)
    stall_seconds: float = _flag(
        30.0, "A process that stands still for so long is killed and replaced; 0: never.", _SECONDS
    )
    tls_cert: str | None = _flag(None, "Certificate chain in PEM; SIGHUP reads it again.", _FILE)
    tls_key: str | None = _flag(None, "Its private key in PEM.", _FILE)
    tls_client_ca: str | None = _flag(None, "Authorities in PEM; clients must have a certificate of theirs.", _FILE)
    token_file: str | None = _flag(None, "Bearer tokens, one NAME:TOKEN a line; SIGHUP reads it again.", _FILE)
    insecure: bool = _flag(False, "Allow to listen beyond loopback without TLS.", bool)
    log_level: str = _flag(
        "info", "Least weight of what is logged.", click.Choice(["debug", "info", "warning", "error"])
    )
    trace_endpoint: str = _flag("", "OTLP endpoint (gRPC) for traces; needs the extra `tracing`.", metavar="URL")

    def __post_init__(self) -> None:
        """Raises `InvalidArgument` for what does not go together."""
        for name in ("listen", "probe_listen", "metrics_listen"):
            if getattr(self, name) or name == "listen":
                split_address(getattr(self, name), f"--{name.replace('_', '-')}")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise errors.InvalidArgument("--tls-cert and --tls-key go together; give both or none")
        if self.tls_client_ca and not self.tls_cert:
            raise errors.InvalidArgument("--tls-client-ca needs --tls-cert and --tls-key")
        if not (self.tls_cert or self.insecure or _is_loopback(split_address(self.listen)[0])):
            raise errors.InvalidArgument(
                f"--listen {self.listen} is beyond loopback and there is no TLS; give --tls-cert and --tls-key, "
                "or --insecure when something in front encrypts"
            )

    @property
    def processes(self) -> int:
        """Workers, with the default worked out."""
        return self.workers or usable_cores()

    @property
    def memory_bytes(self) -> int:
        """Budget of one process for what its calls hold and work with."""
        return self.memory_mib * MIB or max(_memory() * 2 // 3 // self.processes, 256 * MIB)


def options(command: Any) -> Any:
    """The decorator that gives a click command one flag, and one variable HOURGLASS_..., for each field of Config."""
    for one in reversed(fields(Config)):
        flag = "--" + one.name.replace("_", "-")
        command = click.option(
            flag,
            default=one.default,
            type=one.metadata["type"],
            is_flag=one.metadata["type"] is bool,
            metavar=one.metadata["metavar"],
            help=one.metadata["help"],
            show_envvar=True,
        )(command)
    return command


def split_address(address: str, flag: str = "--listen") -> tuple[str, int]:
    """Host, without brackets, and port. Raises `InvalidArgument`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise errors.InvalidArgument(f"{flag} is {address!r}; expected HOST:PORT, as 127.0.0.1:50051 or [::1]:50051")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _memory() -> int:
    """Bytes that this machine, or the container in it, has."""
    sizes = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(path).read_text().strip() if Path(path).exists() else ""
        sizes += [int(text)] if text.isdecimal() else []
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    return min(sizes, default=4 << 30)
