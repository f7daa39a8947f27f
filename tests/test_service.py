"""The service as another program sees it: messages, status, health, reflection, its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from PIL import Image

from hourglass.client import Client
from hourglass.codec import Codec, errors, image, metrics
from hourglass.codec.runtime import DEFAULT_MODEL
from hourglass.server.status import STATUS, refusal_of
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]


def test_encode_answers_what_is_wished(stub: Any, parrots: Path, codec: Codec) -> None:
    data = codec.encode(parrots, quality=30)
    both = stub.Encode(
        pb.EncodeRequest(
            image_file=parrots.read_bytes(), quality=30, want_file=True, want_code=True, want_distortion=True
        )
    )
    assert both.file == data
    assert (both.model, both.quality, both.width, both.height) == (codec.model, 30, 768, 512)
    symbols = codec.unpack(data).tensors["y"]
    tensor = both.code.tensors[0]
    assert (tensor.name, tuple(tensor.shape)) == ("y", symbols.shape)
    assert tensor.data == symbols.astype("<i2").tobytes()
    original, decoded = image.read(parrots), codec.decode(data)
    assert both.distortion.psnr == pytest.approx(metrics.psnr(original, decoded))
    assert both.distortion.ms_ssim == pytest.approx(metrics.ms_ssim(original, decoded))

    plain = stub.Encode(pb.EncodeRequest(image_file=parrots.read_bytes()))
    assert plain.file == codec.encode(parrots)
    assert not plain.HasField("code")
    assert not plain.HasField("distortion")
    code_only = stub.Encode(pb.EncodeRequest(image_file=parrots.read_bytes(), quality=30, want_code=True))
    assert code_only.code == both.code
    assert code_only.file == b""
    assert stub.Encode(pb.EncodeRequest(image_file=parrots.read_bytes(), quality=0)).quality == 0


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_decode_to_an_image_file(format: str, stub: Any, parrots: Path, codec: Codec) -> None:
    data = codec.encode(parrots)
    number = pb.ImageFormat.Value(f"IMAGE_FORMAT_{format}")
    answer = stub.Decode(pb.DecodeRequest(file=data, format=number))
    assert answer.image_file == image.write(codec.decode(data), format)


def test_models(stub: Any, client: Client, codec: Codec) -> None:
    answer = stub.ListModels(pb.ListModelsRequest())
    assert answer.default_model == codec.model
    assert client.models() == codec.models()
    assert [m.id for m in answer.models] == [m.id for m in codec.models()]


BAD_REQUESTS = {
    "nothing": ("Encode", pb.EncodeRequest(), "INVALID_ARGUMENT", "InvalidArgument"),
    "text": ("Encode", pb.EncodeRequest(image_file=b"text"), "INVALID_ARGUMENT", "ImageError"),
    "pixels": (
        "Encode",
        pb.EncodeRequest(pixels=pb.Pixels(width=3, height=3, data=b"12")),
        "INVALID_ARGUMENT",
        "InvalidArgument",
    ),
    "huge": (
        "Encode",
        pb.EncodeRequest(pixels=pb.Pixels(width=2**32 - 1, height=2**32 - 1, data=b"")),
        "INVALID_ARGUMENT",
        "LimitError",
    ),
    "empty": (
        "Encode",
        pb.EncodeRequest(pixels=pb.Pixels(width=0, height=9, data=b"")),
        "INVALID_ARGUMENT",
        "InvalidArgument",
    ),
    "long name": (
        "Encode",
        pb.EncodeRequest(pixels=pb.Pixels(width=1, height=1, data=b"abc"), model="x" * 20_000),
        "NOT_FOUND",
        "UnknownModelError",
    ),
    "many axes": (
        "Decode",
        pb.DecodeRequest(code=pb.Code(tensors=[pb.Tensor(name="y", shape=[1] * 65, data_type=1, data=b"ab")])),
        "INVALID_ARGUMENT",
        "CodeError",
    ),
    "no elements": (
        "Decode",
        pb.DecodeRequest(code=pb.Code(tensors=[pb.Tensor(name="y", shape=[2**32 - 1] * 2 + [0], data_type=1)])),
        "INVALID_ARGUMENT",
        "CodeError",
    ),
    "quality": ("Encode", pb.EncodeRequest(image_file=b"x", quality=float("nan")), "INVALID_ARGUMENT", None),
    "model": ("Encode", pb.EncodeRequest(image_file=b"x", model="none-such"), "INVALID_ARGUMENT", "ImageError"),
    "no file": ("Decode", pb.DecodeRequest(), "INVALID_ARGUMENT", "InvalidArgument"),
    "bad file": ("Decode", pb.DecodeRequest(file=b"\x89HGC"), "INVALID_ARGUMENT", "CorruptError"),
    "format": ("Decode", pb.DecodeRequest(file=b"x", format=77), "INVALID_ARGUMENT", "InvalidArgument"),
    "tensor": (
        "Decode",
        pb.DecodeRequest(code=pb.Code(model=DEFAULT_MODEL, width=16, height=16, tensors=[pb.Tensor(name="y")])),
        "INVALID_ARGUMENT",
        "CodeError",
    ),
    "stranger": (
        "Decode",
        pb.DecodeRequest(code=pb.Code(model="x", width=1, height=1)),
        "NOT_FOUND",
        "UnknownModelError",
    ),
    "code size": ("Decode", pb.DecodeRequest(code=pb.Code(model=DEFAULT_MODEL)), "INVALID_ARGUMENT", "CodeError"),
}


@pytest.mark.parametrize("name", list(BAD_REQUESTS))
def test_bad_requests(name: str, stub: Any) -> None:
    method, request, status, reason = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request)
    call: Any = caught.value
    assert call.code().name == status
    assert "Traceback" not in call.details()
    rich = rpc_status.from_call(call)
    assert rich is not None
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert info.domain == "hourglass"
    assert reason is None or info.reason == reason


def _same_error(a: Any, b: Any) -> None:
    with pytest.raises(errors.HourglassError) as local:
        a()
    with pytest.raises(errors.HourglassError) as remote:
        b()
    assert type(local.value) is type(remote.value)
    assert str(local.value) == str(remote.value)


def test_client_raises_what_the_codec_raises(codec: Codec, client: Client, parrots: Path) -> None:
    data = codec.encode(parrots)
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    _same_error(lambda: codec.encode(b"text"), lambda: client.encode(b"text"))
    _same_error(lambda: codec.encode(parrots, quality=101), lambda: client.encode(parrots, quality=101))
    _same_error(lambda: codec.decode(damaged), lambda: client.decode(damaged))
    _same_error(lambda: codec.decode(data[:30]), lambda: client.decode(data[:30]))
    with pytest.raises(FileNotFoundError):
        client.encode("missing.png")
    with Client("127.0.0.1:1", timeout=10) as nobody, pytest.raises(errors.RemoteError, match=r"127\.0\.0\.1:1"):
        nobody.models()


def test_client_model(address: str, parrots: Path, codec: Codec) -> None:
    with Client(address, model=codec.model) as named:
        assert named.encode(parrots) == codec.encode(parrots)
    with Client(address, model="none-such") as wrong, pytest.raises(errors.UnknownModelError, match="none-such"):
        wrong.encode(parrots)


def test_losses_travel(client: Client, tmp_path: Path) -> None:
    pages = [Image.new("RGB", (20, 20), (60 * number, 0, 0)) for number in range(3)]
    pages[0].save(tmp_path / "film.gif", save_all=True, append_images=pages[1:])
    with pytest.warns(errors.LossWarning, match="3 frames"):
        client.encode(tmp_path / "film.gif")


def test_large_pictures_pass(client: Client, codec: Codec) -> None:
    """Raw pixels and code beyond gRPC's default limit of 4 MiB."""
    pixels = np.random.default_rng(1).integers(0, 255, (1100, 1500, 3)).astype(np.uint8)
    code = client.analyse(pixels, quality=90)
    assert code == codec.analyse(pixels, quality=90)
    assert np.array_equal(client.synthesise(code), codec.synthesise(code))


def test_every_error_has_a_status() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if issubclass(kind, errors.HourglassError):
            refusal = refusal_of(kind("why"), "the-id")
            assert refusal.code in STATUS.values()
            assert refusal.reason == name
            assert refusal.message == "why" or (refusal.code.name == "INTERNAL" and "the-id" in refusal.message)


def test_health(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "hourglass.v1.CodecService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(channel: grpc.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"hourglass.v1.CodecService", "grpc.health.v1.Health"} <= names


def test_own_process(parrots: Path, codec: Codec) -> None:
    """Started as users start it; a second one on its port is refused; SIGTERM ends it with 0."""
    command = [str(Path(sys.executable).with_name("hourglass-server")), "--listen"]
    with subprocess.Popen([*command, "127.0.0.1:0"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        timer = threading.Timer(60, process.kill)
        timer.start()
        line = json.loads(process.stderr.readline())["message"]
        assert "listening on 127.0.0.1:" in line
        address = line.split("listening on ")[1].split(",")[0]
        with Client(address) as client:
            assert client.encode(parrots) == codec.encode(parrots)
        second = subprocess.run([*command, address], capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2
        assert f"cannot listen on '{address}'" in second.stderr
        assert "Traceback" not in second.stderr
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        timer.cancel()
    assert process.returncode == 0
    assert "Traceback" not in rest
