"""Large pictures in chunks, and many pictures in one stream of which no bad one ends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hourglass.codec import Codec, image
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc, convert


@pytest.fixture
def stub(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]


def chunks(kind: Any, start: Any, data: bytes, size: int = 100_000) -> Iterator[Any]:
    yield kind(start=start)
    for begin in range(0, len(data), size):
        yield kind(chunk=data[begin : begin + size])


def test_encode_stream(stub: Any, parrots: Path, codec: Codec) -> None:
    content, pixels = parrots.read_bytes(), image.read(parrots)
    expected = codec.encode(parrots, quality=30)
    raw = convert.pixels_to_message(pixels, samples=False)
    for start, data in (
        (pb.EncodeStart(request=pb.EncodeRequest(quality=30), total_bytes=len(content)), content),
        (pb.EncodeStart(request=pb.EncodeRequest(quality=30), pixels=raw, total_bytes=pixels.size), pixels.tobytes()),
    ):
        head, *rest = stub.EncodeStream(chunks(pb.EncodeStreamRequest, start, data))
        assert (head.answer.response.width, head.answer.response.quality) == (768, 30)
        assert head.answer.total_bytes == len(expected)
        assert b"".join(part.chunk for part in rest) == expected


def test_decode_stream(stub: Any, parrots: Path, codec: Codec) -> None:
    data = codec.encode(parrots)
    pixels = codec.decode(data)
    start = pb.DecodeStart(request=pb.DecodeRequest(), total_bytes=len(data))
    head, *rest = stub.DecodeStream(chunks(pb.DecodeStreamRequest, start, data))
    shape = head.answer.response.pixels
    assert (shape.width, shape.height, shape.channels) == (768, 512, 3)
    assert b"".join(part.chunk for part in rest) == pixels.tobytes()
    assert max(len(part.chunk) for part in rest) <= 1 << 20

    code = convert.code_to_message(codec.unpack(data)).SerializeToString()
    request = pb.DecodeRequest(format=pb.IMAGE_FORMAT_PNG)
    start = pb.DecodeStart(request=request, is_code=True, total_bytes=len(code))
    head, *rest = stub.DecodeStream(chunks(pb.DecodeStreamRequest, start, code))
    assert head.answer.response.WhichOneof("picture") == "image_file"
    assert np.array_equal(image.read(b"".join(part.chunk for part in rest)), pixels)


def _encode_start(**fields: Any) -> Any:
    return pb.EncodeStreamRequest(start=pb.EncodeStart(request=pb.EncodeRequest(), **fields))


BAD_STREAMS = {
    "nothing": ([], "no message"),
    "no start": ([pb.EncodeStreamRequest(chunk=b"x")], "begins with no start"),
    "two starts": ([_encode_start(total_bytes=9)] * 2, "second start"),
    "short": ([_encode_start(total_bytes=9), pb.EncodeStreamRequest(chunk=b"x")], "ended after 1 bytes"),
    "long": ([_encode_start(total_bytes=1), pb.EncodeStreamRequest(chunk=b"xy")], "has 2 bytes or more"),
    "empty": ([_encode_start(total_bytes=0)], "total_bytes is 0"),
    "mismatch": ([_encode_start(total_bytes=9, pixels=pb.Pixels(width=2, height=2))], "need 12"),
    "channels": ([_encode_start(total_bytes=9, pixels=pb.Pixels(width=1, height=1, channels=9))], "channels is 9"),
    "no picture": (
        [_encode_start(total_bytes=2), pb.EncodeStreamRequest(chunk=b"xy")],
        "no picture format that can be read",
    ),
}


@pytest.mark.parametrize("name", list(BAD_STREAMS))
def test_bad_streams(name: str, stub: Any) -> None:
    messages, reason = BAD_STREAMS[name]
    with pytest.raises(grpc.RpcError, match=reason) as caught:
        list(stub.EncodeStream(iter(messages)))
    call: Any = caught.value
    assert call.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_batch_answers_each(stub: Any, parrots: Path, codec: Codec) -> None:
    """12 pictures, every third broken: each has its answer, by its id."""
    small = image.write(image.read(parrots)[:80, :80], "PNG")
    expected = codec.encode(small, quality=30)

    def items() -> Iterator[pb.EncodeBatchRequest]:
        for number in range(12):
            content = b"broken" if number % 3 == 0 else small
            yield pb.EncodeBatchRequest(id=f"p{number}", request=pb.EncodeRequest(image_file=content, quality=30))
        yield pb.EncodeBatchRequest(id="x" * 200, request=pb.EncodeRequest(image_file=small))

    answers = {answer.id: answer for answer in stub.EncodeBatch(items())}
    assert set(answers) == {f"p{number}" for number in range(12)} | {"x" * 128}
    for number in range(12):
        answer = answers[f"p{number}"]
        if number % 3:
            assert answer.response.file == expected
        else:
            assert answer.failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert answer.failure.reason == "ImageError"
            assert "no picture format that can be read" in answer.failure.message
    assert "id has 200 characters" in answers["x" * 128].failure.message

    back = [
        pb.DecodeBatchRequest(id=name, request=pb.DecodeRequest(file=file))
        for name, file in (("good", expected), ("bad", expected[:-1]))
    ]
    decoded = {answer.id: answer for answer in stub.DecodeBatch(iter(back))}
    assert np.array_equal(convert.pixels_from_message(decoded["good"].response.pixels), codec.decode(expected))
    assert decoded["bad"].failure.reason == "CorruptError"


def test_batch_answers_while_it_is_sent(stub: Any, parrots: Path) -> None:
    """The answer to the first item comes before the second is sent."""
    small = image.write(image.read(parrots)[:80, :80], "PNG")
    answered: list[str] = []
    arrived = threading.Event()

    def items() -> Iterator[pb.EncodeBatchRequest]:
        yield pb.EncodeBatchRequest(id="first", request=pb.EncodeRequest(image_file=small))
        arrived.wait(20)
        yield pb.EncodeBatchRequest(id=f"after {answered}", request=pb.EncodeRequest(image_file=small))

    for answer in stub.EncodeBatch(items(), timeout=30):
        answered.append(answer.id)
        arrived.set()
    assert answered == ["first", "after ['first']"]


def test_inspect(stub: Any, parrots: Path, codec: Codec) -> None:
    data = codec.encode(parrots, quality=30)
    header = codec.read_header(data)
    for front in (data, data[: header.length]):
        answer = stub.Inspect(pb.InspectRequest(file=front))
        assert (answer.model, answer.width, answer.height, answer.quality) == (codec.model, 768, 512, 30)
        assert (answer.total_bytes, answer.decodable, len(answer.sections)) == (len(data), True, 1)
    with pytest.raises(grpc.RpcError, match=r"not a \.hgc file"):
        stub.Inspect(pb.InspectRequest(file=b"text"))
