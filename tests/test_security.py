"""Only those get in who may: TLS both ways, tokens, loopback; and what is reloaded counts at once."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hourglass.client import AsyncClient, Client, Tls
from hourglass.codec import Codec, errors, image
from hourglass.server.config import Config
from hourglass.server.worker import Server
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

TOKEN = "a-token-of-many-letters"


class Files:
    """An authority and what it issued, as files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, trustme.CA()
        self.ca = self._file("ca.pem", self.authority.cert_pem)
        self.server = self.issue("server", "localhost", "127.0.0.1")
        self.client = self.issue("client", "someone@example.org", common_name="someone")

    def issue(self, name: str, *identities: str, **options: Any) -> tuple[str, str]:
        made = self.authority.issue_cert(*identities, **options)
        chain, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key.write_bytes(made.private_key_pem.bytes())
        return str(chain), str(key)

    def _file(self, name: str, blob: trustme.Blob) -> str:
        (self.folder / name).write_bytes(blob.bytes())
        return str(self.folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    (folder / "tokens").write_text(f"# people\n\nsomebody:{TOKEN}\nother:another-long-token\n")
    return Files(folder)


@pytest.fixture(scope="module")
def server(serve: Callable[[Config], AbstractContextManager[Server]], files: Files) -> Iterator[Server]:
    certificate, key = files.server
    config = Config(
        listen="127.0.0.1:0",
        tls_cert=certificate,
        tls_key=key,
        tls_client_ca=files.ca,
        token_file=str(files.folder / "tokens"),
    )
    with serve(config) as server:
        yield server


def _client(server: Server, files: Files, token: str | None = TOKEN, timeout: float = 20, **changed: Any) -> Client:
    certificate, key = files.client
    tls = Tls(**{"ca": files.ca, "certificate": certificate, "key": key, **changed})
    return Client(f"localhost:{server.port}", tls=tls, token=token, timeout=timeout)


def test_mutual_tls_and_token(server: Server, files: Files) -> None:
    with _client(server, files) as client:
        assert client.models()

    async def too() -> None:
        certificate, key = files.client
        tls = Tls(files.ca, certificate, key, server_name="localhost")
        async with AsyncClient([f"127.0.0.1:{server.port}"] * 2, tls=tls, token=TOKEN) as client:
            assert await client.models()

    asyncio.run(too())


def _command(server: Server, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("compress-image")), "--server", f"localhost:{server.port}"]
    environment = {**os.environ, **variables}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_the_command_lets_itself_be_known(
    server: Server, files: Files, tmp_path: Path, parrots: Path, codec: Codec
) -> None:
    """By flags and by variables alike; there and back."""
    certificate, key = files.client
    token, out, back = tmp_path / "token", str(tmp_path / "p.hgc"), str(tmp_path / "p.png")
    token.write_text(f"{TOKEN}\n")
    flags = ("--ca", files.ca, "--cert", certificate, "--key", key, "--token-file", str(token))
    done = _command(server, *flags, str(parrots), "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(out).read_bytes() == codec.encode(parrots)
    names = {"--ca": "CA", "--cert": "CERT", "--key": "KEY", "--token-file": "TOKEN_FILE"}
    variables = {f"HOURGLASS_CLIENT_{names[flag]}": value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    done = _command(server, "--server-name", "localhost", "-d", out, "-o", back, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert np.array_equal(image.read(back), codec.decode(Path(out)))
    # Without a server the variables do not matter.
    alone = subprocess.run(
        [str(Path(sys.executable).with_name("compress-image")), "-fd", out, "-o", back],
        env={**os.environ, **variables},
        check=False,
    )
    assert alone.returncode == 0


def test_the_command_says_what_is_wrong(server: Server, files: Files, tmp_path: Path, parrots: Path) -> None:
    certificate, key = files.client
    token, wrong, several = tmp_path / "token", tmp_path / "wrong", tmp_path / "several"
    token.write_text(TOKEN)
    wrong.write_text("not-the-token-there-is")
    several.write_text(f"one:{TOKEN}\ntwo:{TOKEN}\n")
    pair = ("--cert", certificate, "--key", key)
    known = ("--ca", files.ca, *pair)
    for arguments, status, message in (
        (("--ca", str(tmp_path / "none.pem")), 2, "none.pem' does not exist"),
        (("--ca", str(token)), 2, "token is no PEM file with a certificate; expected -----BEGIN CERTIFICATE-----"),
        (("--ca", files.ca, "--cert", certificate), 2, "certificate and its key go together"),
        (("--ca", files.ca, "--cert", key, "--key", key), 2, "is no PEM file with a certificate"),
        (("--ca", files.ca, "--cert", certificate, "--key", certificate), 2, "is no PEM file with a private key"),
        ((*known, "--token-file", str(several)), 2, "several has 2 words; expected one"),
        ((*known, "--token-file", str(wrong)), 1, "wants a valid token"),
        (known, 1, "wants a valid token"),
        (("--tls", *pair, "--token-file", str(token)), 1, "cannot be reached"),
    ):
        done = _command(server, *arguments, str(parrots), "-o", str(tmp_path / "out.hgc"))
        assert done.returncode == status, arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr
    assert not (tmp_path / "out.hgc").exists()


def test_strangers_are_refused(server: Server, files: Files) -> None:
    for token in (None, "", TOKEN[:-1], TOKEN + "x"):
        no_token = pytest.raises(errors.RemoteError, match="wants a valid token")
        with _client(server, files, token) as client, no_token:
            client.models()
    # Without a certificate, with one of nobody's, and a server that is not who it should be; then without TLS.
    stranger = Files(files.folder.parent)
    for wrong in (
        {"certificate": None, "key": None},
        {"certificate": stranger.client[0], "key": stranger.client[1]},
        {"ca": stranger.ca},
        {"server_name": "elsewhere.example"},
    ):
        with _client(server, files, timeout=1, **wrong) as client, pytest.raises(errors.RemoteError):
            client.models()
    with Client(f"127.0.0.1:{server.port}", token=TOKEN, timeout=1) as client, pytest.raises(errors.RemoteError):
        client.models()


def test_health_needs_no_token(server: Server, files: Files) -> None:
    certificate, key = files.client
    with grpc.secure_channel(f"localhost:{server.port}", Tls(files.ca, certificate, key).credentials()) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reload(server: Server, files: Files, caplog: pytest.LogCaptureFixture) -> None:
    """A connection stands while tokens and certificates change under it; new ones see the new."""
    tokens = files.folder / "tokens"
    before = tokens.read_text()
    with _client(server, files) as old:
        assert old.models()
        files.issue("server", "elsewhere.example")
        tokens.write_text("new:a-new-token-of-many-letters\n")
        server.reload()
        with pytest.raises(errors.RemoteError, match="valid token"):
            old.models()
        with _client(server, files, "a-new-token-of-many-letters") as new, pytest.raises(errors.RemoteError):
            new.models()  # the certificate is not for localhost any more
        with _client(server, files, "a-new-token-of-many-letters", server_name="elsewhere.example") as new:
            assert new.models()
        tokens.write_text("short:x\n")
        with caplog.at_level(logging.ERROR):
            server.reload()
        assert "line 1 of --token-file is no NAME:TOKEN" in caplog.text
        with _client(server, files, "a-new-token-of-many-letters", server_name="elsewhere.example") as new:
            assert new.models()
        tokens.write_text(before)
        files.issue("server", "localhost", "127.0.0.1")
        server.reload()
        assert old.models()


def test_configuration_is_checked() -> None:
    for bad in (
        {"listen": "0.0.0.0:50051"},
        {"listen": "[::]:50051"},
        {"listen": "example.org:50051"},
        {"listen": "nonsense"},
        {"listen": "127.0.0.1:99999"},
        {"tls_cert": "a"},
        {"tls_client_ca": "a"},
        {"metrics_listen": "9464"},
    ):
        with pytest.raises(errors.InvalidArgument):
            Config(**bad)  # type: ignore[arg-type]
    Config(listen="0.0.0.0:50051", insecure=True)
    Config(listen="[::1]:50051")
    Config(listen="localhost:50051")


def test_metadata_is_limited(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(pb.ListModelsRequest(), metadata=[("x-much", "y" * 40_000)])
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        _, call = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=[("x-request-id", "mine-1")])
        assert dict(call.trailing_metadata())["x-request-id"] == "mine-1"
        _, call = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=[("x-request-id", "bad id {}")])
        assert len(dict(call.trailing_metadata())["x-request-id"]) == 32
