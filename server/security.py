"""Who may talk to the server: TLS from files that can be read again, and bearer tokens."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from hourglass.codec.errors import InvalidArgument
from hourglass.server.config import Config

_log = logging.getLogger(__name__)

_OPEN = "/grpc.health.v1.Health/"
"""Health checks need no token: those who ask, kubelets and load balancers, have none."""


class Tls:
    """Server credentials whose files `reload` reads again; connections that stand keep what they have."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._read(),
            self._next,  # type: ignore[arg-type]  # None is allowed, and means: as before
            require_client_authentication=bool(config.tls_client_ca),
        )

    def reload(self) -> None:
        """Take the files as they are now for new connections. Raises `InvalidArgument`; the old ones then stay."""
        fresh = self._read()
        with self._lock:
            self._fresh = fresh

    def _next(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks for at each new connection: a configuration when there is a newer one."""
        with self._lock:
            fresh, self._fresh = self._fresh, None
            return fresh

    def _read(self) -> grpc.ServerCertificateConfiguration:
        config = self._config
        assert config.tls_key is not None
        assert config.tls_cert is not None
        pair = _read(config.tls_key, "--tls-key"), _read(config.tls_cert, "--tls-cert")
        ca = _read(config.tls_client_ca, "--tls-client-ca") if config.tls_client_ca else None
        for data, flag in zip((*pair, ca), ("--tls-key", "--tls-cert", "--tls-client-ca"), strict=True):
            if data is not None and b"-----BEGIN " not in data:
                raise InvalidArgument(f"the file of {flag} is no PEM; expected -----BEGIN ...-----")
        return grpc.ssl_server_certificate_configuration([pair], ca)


class Tokens:
    """The bearer tokens of a file, NAME:TOKEN a line; blank lines and those that begin with # are skipped."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tokens = self._read()

    def reload(self) -> None:
        """Take the file as it is now. Raises `InvalidArgument`; the old tokens then stay."""
        self._tokens = self._read()

    def name_of(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """The name of the token in a call's metadata, None where there is none that is known.

        Every token is compared, each in constant time, so that the time taken tells nothing.
        """
        given = next((value for key, value in metadata if key == "authorization"), "")
        text = given.encode() if isinstance(given, str) else given
        found = None
        for name, token in self._tokens:
            if hmac.compare_digest(text, b"Bearer " + token):
                found = name
        return found

    def _read(self) -> list[tuple[str, bytes]]:
        tokens = []
        for number, line in enumerate(_read(self._path, "--token-file").decode().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, token = line.strip().partition(":")
            if not name or len(token) < 16:
                raise InvalidArgument(f"line {number} of --token-file is no NAME:TOKEN with 16 characters or more")
            tokens.append((name, token.encode()))
        if not tokens:
            raise InvalidArgument("--token-file has no token; expected NAME:TOKEN lines")
        return tokens


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses, before anything of it is read, a call that has no known token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        method, metadata = str(details.method), details.invocation_metadata or ()
        if method.startswith(_OPEN) or self._tokens.name_of(metadata) is not None:
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_deny)


async def _deny(_requests: object, context: Any) -> NoReturn:
    message = "no valid token; send the metadata `authorization: Bearer TOKEN` with a token of this server"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
    raise AssertionError("abort returned")


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise InvalidArgument(f"the file of {flag} cannot be read: {exc}") from exc
