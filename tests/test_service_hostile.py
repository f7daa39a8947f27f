"""Broken and hostile files from eight clients: each is refused or decoded, soon, and the server stays well."""

from __future__ import annotations

import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from hourglass.codec import Codec, container, image
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc


def _png(width: int, height: int, body: bytes) -> bytes:
    """A PNG with a header of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def pictures(parrots: Path) -> list[bytes]:
    """Truncations, flipped bytes and lies of every format, and bombs."""
    chance = np.random.default_rng(3)
    pixels = image.read(parrots)[:64, :96]
    files = [b"", b"\0" * 1000, chance.bytes(5000), b"GIF89a" + b"\xff" * 300, b"II*\0" + b"\xff" * 300]
    files += [_png(60_000, 60_000, b""), _png(7000, 7000, zlib.compress(bytes(10))), _png(0, 9, b"")]
    for format in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "PPM"):
        whole = image.write(pixels, format)
        files += [whole[: len(whole) * part // 7] for part in range(1, 7)]
        for _ in range(8):
            damaged = bytearray(whole)
            for place in chance.integers(0, len(whole), 6):
                damaged[place] = chance.integers(256)
            files.append(bytes(damaged))
    return files


@pytest.fixture(scope="module")
def codes(parrots: Path, codec: Codec) -> list[bytes]:
    """.hgc files: damaged, and with every checksum right but nonsense inside."""
    chance = np.random.default_rng(4)
    whole = codec.encode(image.read(parrots)[:64, :96])
    files = [b"", whole[:-1], whole + b"x", *(whole[: len(whole) * part // 9] for part in range(1, 9))]
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[chance.integers(len(whole))] ^= 1 << chance.integers(8)
        files.append(bytes(damaged))
    for size in ((96, 64), (5000, 5000), (65_535, 700), (2**32 - 1, 2**32 - 1)):
        front = container.Front(codec.model, container.RGB, *size, 50)
        bodies = (b"", bytes(40), chance.bytes(2000))
        files += [container.write(front, [(container.CODE, body)]) for body in bodies]
    return files


def test_nothing_breaks_the_server(address: str, pictures: list[bytes], codes: list[bytes]) -> None:
    requests = [("Encode", pb.EncodeRequest(image_file=file)) for file in pictures]
    requests += [("Decode", pb.DecodeRequest(file=file)) for file in codes]

    def send(number: int) -> list[tuple[str, str, float]]:
        outcomes = []
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]
            for method, request in requests[number::8]:
                began = time.monotonic()
                try:
                    getattr(stub, method)(request, timeout=30)
                    code, details = "OK", ""
                except grpc.RpcError as error:
                    code, details = error.code().name, error.details()  # type: ignore[attr-defined]
                outcomes.append((code, details, time.monotonic() - began))
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        outcomes = [outcome for many in pool.map(send, range(8)) for outcome in many]
    assert {code for code, _, _ in outcomes} <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    refusals = [text for code, text, _ in outcomes if code != "OK"]
    assert all(text and "Traceback" not in text and "/" not in text for text in refusals)
    slowest = sorted(seconds for _, _, seconds in outcomes)[-len(outcomes) // 100 - 1]
    assert slowest < 5  # two on a machine of its own
    with grpc.insecure_channel(address) as channel:
        codec_pb2_grpc.CodecServiceStub(channel).ListModels(pb.ListModelsRequest())  # type: ignore[no-untyped-call]
