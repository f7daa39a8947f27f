"""The server is bounded: what is too large, too many, too late or no longer wanted costs it next to nothing."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hourglass.client import Client
from hourglass.codec import Codec, container, image
from hourglass.codec.runtime import DEFAULT_MODEL
from hourglass.server.config import Config
from hourglass.server.worker import Server
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

Serve = Callable[[Config], AbstractContextManager[Server]]


@pytest.fixture(scope="module")
def server(serve: Serve) -> Iterator[Server]:
    """One slot, two that wait, a second at most."""
    config = Config(listen="127.0.0.1:0", queue=2, queue_seconds=1.0, max_pixels=20_000_000, max_message_bytes=1 << 25)
    with serve(config) as server:
        yield server


@pytest.fixture
def stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]


def large(photo: Path) -> Iterator[pb.EncodeStreamRequest]:
    """16 megapixels in chunks: many tiles, which take seconds."""
    data = np.tile(image.read(photo), (8, 5, 1)).tobytes()
    pixels = pb.Pixels(width=768 * 5, height=512 * 8, channels=3)
    start = pb.EncodeStart(request=pb.EncodeRequest(), pixels=pixels, total_bytes=len(data))
    yield pb.EncodeStreamRequest(start=start)
    for begin in range(0, len(data), 1 << 20):
        yield pb.EncodeStreamRequest(chunk=data[begin : begin + (1 << 20)])


def until(condition: Callable[[], bool], seconds: float = 20) -> float:
    """Seconds that it took until `condition`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "it did not come about"
        time.sleep(0.005)
    return time.monotonic() - began


@contextmanager
def occupied(server: Server, stub: Any, photo: Path) -> Iterator[None]:
    """The one slot is in use for as long as the context lasts."""
    call = stub.EncodeStream(large(photo))
    until(lambda: server.admission.running == 1)
    try:
        yield
    finally:
        call.cancel()
        until(lambda: server.admission.inside == server.admission.running == 0)


def failure(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def retry_after(error: Any) -> float:
    """Seconds of its RetryInfo."""
    status = rpc_status.from_call(error)
    assert status is not None
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return float(info.retry_delay.ToMilliseconds() / 1000)


def test_full_queue_refuses_at_once(server: Server, stub: Any, parrots: Path) -> None:
    request = pb.EncodeRequest(image_file=parrots.read_bytes())
    with occupied(server, stub, parrots):
        waiting = [stub.Encode.future(request) for _ in range(2)]
        until(lambda: server.admission.inside == 3)
        took = []
        for _ in range(15):
            began = time.monotonic()
            error = failure(lambda: stub.Encode(request))
            took.append(time.monotonic() - began)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 0 < retry_after(error) <= 5
        # Alone on its machine it is a few ms; this one may do other things too.
        assert statistics.median(took) < 0.05
        # Those that wait are told after a second that their turn did not come.
        for call in waiting:
            error = failure(call.result)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "waited 1 s" in error.details()


def test_client_that_retries_gets_all_done(server: Server, parrots: Path, codec: Codec) -> None:
    small = image.write(image.read(parrots)[:64, :64], "PNG")
    expected = codec.encode(small)

    def work(_: int) -> list[bytes]:
        with Client(f"127.0.0.1:{server.port}") as client:
            return [client.encode(small) for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        assert all(data == expected for many in pool.map(work, range(16)) for data in many)
    refused = server.telemetry.registry.get_sample_value(
        "hourglass_calls_total", {"method": "Encode", "code": "RESOURCE_EXHAUSTED"}
    )
    assert refused


def test_cancel_stops_the_work(server: Server, stub: Any, parrots: Path) -> None:
    call = stub.EncodeStream(large(parrots))
    until(lambda: server.admission.running == 1)
    time.sleep(0.3)
    before = _pictures(server)
    call.cancel()
    # One tile, that is; a second on a machine of its own.
    assert until(lambda: server.admission.running == 0) < 4
    assert server.admission.memory == 0
    assert _pictures(server) == before


def test_what_nobody_waits_for_is_not_begun(server: Server, stub: Any, parrots: Path) -> None:
    before = _pictures(server)
    with occupied(server, stub, parrots):
        error = failure(lambda: stub.Encode(pb.EncodeRequest(image_file=parrots.read_bytes()), timeout=0.3))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: server.admission.waiting == 0)
    assert _pictures(server) == before


def _pictures(server: Server) -> float:
    registry = server.telemetry.registry
    methods = ("Encode", "EncodeStream")
    labels = [{"method": method, "result": "ok"} for method in methods]
    return sum(registry.get_sample_value("hourglass_pictures_total", label) or 0 for label in labels)


def test_size_is_checked_before_decoding(stub: Any) -> None:
    """A PNG's header that claims 25 megapixels, and a .hgc file's: refused by it, without a slot."""
    from PIL import Image

    bomb = image.write(np.zeros((5000, 5000, 3), np.uint8), "PNG")
    assert len(bomb) < 400_000
    assert Image.MAX_IMAGE_PIXELS is None or Image.MAX_IMAGE_PIXELS > 25_000_000  # it is ours that refuses
    front = container.Front(DEFAULT_MODEL, container.RGB, 5000, 5000, 50)
    file = container.write(front, [(container.CODE, b"")])
    for call in (
        lambda: stub.Encode(pb.EncodeRequest(image_file=bomb)),
        lambda: stub.Encode(pb.EncodeRequest(pixels=pb.Pixels(width=5000, height=5000))),
        lambda: stub.Decode(pb.DecodeRequest(file=file)),
        lambda: stub.Decode(pb.DecodeRequest(code=pb.Code(width=5000, height=5000))),
        lambda: stub.EncodeStream(iter([_start(pb.Pixels(width=5000, height=5000))])).next(),
    ):
        error = failure(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "5000x5000 = 25000000 pixels; the limit is 20000000" in error.details()


def _start(pixels: pb.Pixels, total: int = 75_000_000) -> pb.EncodeStreamRequest:
    return pb.EncodeStreamRequest(start=pb.EncodeStart(request=pb.EncodeRequest(), pixels=pixels, total_bytes=total))


def test_byte_limits(stub: Any) -> None:
    error = failure(lambda: stub.Decode(pb.DecodeRequest(file=bytes((1 << 25) + 1))))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # gRPC's own, before anything is read
    start = pb.DecodeStart(request=pb.DecodeRequest(), total_bytes=1 << 40)
    error = failure(lambda: stub.DecodeStream(iter([pb.DecodeStreamRequest(start=start)])).next())
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "total_bytes is 1099511627776; expected 1 to 536870912" in error.details()


def test_one_client_may_not_take_all(serve: Serve, parrots: Path) -> None:
    config = Config(listen="127.0.0.1:0", client_calls=1, memory_mib=600, idle_seconds=1.0)
    with serve(config) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]
        with occupied(server, stub, parrots):
            error = failure(lambda: stub.Encode(pb.EncodeRequest(image_file=parrots.read_bytes())))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "this client has 1 calls here" in error.details()
        # A picture that would break the memory budget, and a client that sends nothing.
        error = failure(
            lambda: stub.EncodeStream(iter([_start(pb.Pixels(width=7000, height=7000), 147_000_000)])).next()
        )
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        release = threading.Event()
        error = failure(lambda: stub.EncodeStream(_silent(release)).next())
        release.set()
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not send a message for 1 s" in error.details()


def _silent(release: threading.Event) -> Iterator[pb.EncodeStreamRequest]:
    yield _start(pb.Pixels(width=10, height=10), 300)
    release.wait(20)
