"""The clients: they try again, choose streams by size, bound many pictures, and say clearly what is the matter."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from hourglass.client import AsyncClient, Client
from hourglass.codec import Codec, errors, image
from hourglass.v1 import codec_pb2 as pb


class _Faulty:
    """A server that answers UNAVAILABLE so many times, after it has read all, and then with a digest of it."""

    def __init__(self, faults: int) -> None:
        self.faults, self.calls = faults, 0

    def encode(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._fail(context)
        return pb.EncodeResponse(file=hashlib.sha256(request.image_file).digest())

    def encode_stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        digest = hashlib.sha256()
        for request in requests:
            digest.update(request.chunk)
        self._fail(context)
        yield pb.EncodeStreamResponse(answer=pb.EncodeAnswer(total_bytes=32))
        yield pb.EncodeStreamResponse(chunk=digest.digest())

    def _fail(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        if self.calls <= self.faults:
            context.abort(grpc.StatusCode.UNAVAILABLE, "injected")


@contextmanager
def faulty(faults: int) -> Iterator[tuple[_Faulty, str]]:
    broken = _Faulty(faults)
    handlers = {
        "Encode": grpc.unary_unary_rpc_method_handler(
            broken.encode, pb.EncodeRequest.FromString, pb.EncodeResponse.SerializeToString
        ),
        "EncodeStream": grpc.stream_stream_rpc_method_handler(
            broken.encode_stream, pb.EncodeStreamRequest.FromString, pb.EncodeStreamResponse.SerializeToString
        ),
    }
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("hourglass.v1.CodecService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield broken, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("stream_above", [1 << 30, 1 << 20], ids=["one message", "stream"])
def test_20_mib_are_sent_again(stream_above: int) -> None:
    content = np.random.default_rng(1).integers(0, 255, 20 << 20).astype(np.uint8).tobytes()
    with faulty(2) as (broken, address), Client(address, stream_above=stream_above) as client:
        assert client.encode(content) == hashlib.sha256(content).digest()
        assert broken.calls == 3


def test_tries_end(parrots: Path) -> None:
    with faulty(1000) as (broken, address), Client(address, timeout=60) as client:
        with pytest.raises(errors.RemoteError, match="cannot be reached, or is going away: UNAVAILABLE: injected"):
            client.encode(parrots)
        assert broken.calls == 5


def test_other_versions_and_silence(parrots: Path, codec: Codec) -> None:
    data = codec.encode(parrots)
    other = pytest.raises(errors.RemoteError, match=r"another version: it has no call Decode.* version \d")
    with faulty(0) as (_, address), Client(address) as client, other:
        client.decode(data)
    silent = pytest.raises(errors.RemoteError, match=r"127\.0\.0\.1:1 (did not answer within 0.2 s|cannot be reached)")
    with Client("127.0.0.1:1", timeout=0.2) as client, silent:
        client.models()
    for address in ("", [], [""]):
        with pytest.raises(errors.InvalidArgument, match="expected HOST:PORT"):
            Client(address)
    with pytest.raises(errors.InvalidArgument, match="cannot be resolved"):
        Client(["127.0.0.1:1", "no port"])


def test_streams_and_messages_agree(address: str, parrots: Path, codec: Codec) -> None:
    """The same calls above and below the size at which they become streams, by both clients."""
    pixels = image.read(parrots)
    data = codec.encode(pixels, quality=40)
    code, decoded = codec.analyse(pixels, quality=40), codec.decode(data)
    with Client(address, stream_above=1000) as streams:
        assert streams.encode(pixels, quality=40) == streams.encode(parrots, quality=40) == data
        assert np.array_equal(streams.decode(data), decoded)
        assert streams.analyse(pixels, quality=40) == code
        assert np.array_equal(streams.synthesise(code), decoded)
        with pytest.raises(errors.CorruptError):
            streams.decode(data[:-1])

    async def both() -> None:
        for stream_above in (1000, 1 << 30):
            async with AsyncClient([address, address], stream_above=stream_above) as client:
                assert await client.encode(pixels, quality=40) == data
                assert np.array_equal(await client.decode(data), decoded)
                assert await client.analyse(pixels, quality=40) == code
                assert np.array_equal(await client.synthesise(code), decoded)
                assert [model.id for model in await client.models()] == [model.id for model in codec.models()]
                with pytest.raises(errors.ImageError):
                    await client.encode(b"text")

    asyncio.run(both())


def test_encode_many(address: str, parrots: Path, codec: Codec, tmp_path: Path) -> None:
    moving = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    small = image.write(image.read(parrots)[:80, :80], "PNG")
    pictures: list[Any] = [small, b"broken", tmp_path / "missing.png", moving, *[small] * 8]
    taken: list[int] = []

    def lazily() -> Iterator[Any]:
        for number, picture in enumerate(pictures):
            taken.append(number)
            yield picture

    done: list[int] = []
    with Client(address) as client:
        results = client.encode_many(lazily(), concurrency=2, progress=done.append, quality=30)
        first = next(results)
        assert len(taken) <= 4
        everything = [first, *results]
        loose = list(client.encode_many(pictures, ordered=False, quality=30))
        with pytest.raises(errors.InvalidArgument, match="concurrency is 0"):
            list(client.encode_many(pictures, concurrency=0))
    assert done == list(range(1, 13))
    assert [result.index for result in everything] == list(range(12))
    assert first.data == everything[-1].data == codec.encode(small, quality=30)
    assert isinstance(everything[1].error, errors.ImageError)
    assert isinstance(everything[2].error, FileNotFoundError)
    assert "2 frames" in everything[3].losses[0]
    assert sorted(result.index for result in loose) == list(range(12))

    async def asynchronously(wrap: Callable[[list[Any]], Any]) -> list[Any]:
        async with AsyncClient(address) as client:
            return [result async for result in client.encode_many(wrap(pictures), ordered=False, quality=30)]

    async def agen(pictures: list[Any]) -> Any:
        for picture in pictures:
            yield picture

    for wrap in (list, agen):
        assert {r.index: r.data for r in asyncio.run(asynchronously(wrap))} == {r.index: r.data for r in everything}


def test_connections_are_opened_when_calls_overlap(address: str, parrots: Path) -> None:
    small = image.write(image.read(parrots)[:64, :64], "PNG")
    with Client(address, connections=3) as client:
        for _ in range(3):
            client.encode(small)
        assert len(client._channels.taken()) == 1
        assert all(result.data for result in client.encode_many([small] * 12, concurrency=6))
        assert 1 < len(client._channels.taken()) <= 3
    with pytest.raises(errors.InvalidArgument, match="connections is 0"):
        Client(address, connections=0)
