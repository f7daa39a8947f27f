"""The file format: FORMAT.md's example, header fields, and damage of every kind."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hourglass.codec import Codec, Limits, container, errors, image, read_header, runtime
from hourglass.codec.container import Front

HERE = Path(__file__).parent
FORMAT = (HERE.parent / "codec" / "FORMAT.md").read_text()
GOLDEN = sorted((HERE / "golden").glob("*.hgc"))


def _example() -> bytes:
    block = FORMAT.split("## Worked example")[1].split("```")[1]
    lines = [line.split("  ")[1] for line in block.strip().splitlines()]
    return bytes.fromhex("".join(lines))


@pytest.fixture(scope="module")
def small(codec: Codec) -> bytes:
    """With a long header, whatever its model has."""
    picture = image.read(HERE / "images" / "motocross.png")[:48, :64]
    return _with_header(codec.encode(picture, quality=30), short=False)


@pytest.fixture(scope="module", params=["long", "short"])
def either(request: pytest.FixtureRequest, small: bytes) -> bytes:
    """With a header of either version."""
    return _with_header(small, short=request.param == "short")


def _with_header(data: bytes, short: bool) -> bytes:
    header, payloads = container.read(data)
    front = Front(header.model, header.colour, header.width, header.height, header.quality, short)
    return container.write(front, [(s.kind, bytes(part)) for s, part in zip(header.sections, payloads, strict=True)])


def test_worked_example_decodes(codec: Codec) -> None:
    data = _example()
    stated = FORMAT.split("decodes to")[1]
    size = re.search(r"(\d+)x(\d+) pixels", stated)
    symbols = re.search(r"symbols other than 0: ([^.]*)\.", stated)
    assert size is not None
    assert symbols is not None
    code = codec.unpack(data)
    assert (code.width, code.height) == (int(size[1]), int(size[2]))
    places = [
        f"{name} {channel} = {tensor[channel, 0, 0]}"
        for name, tensor in code.tensors.items()
        for channel in np.flatnonzero(tensor[:, 0, 0])
    ]
    assert symbols[1].replace("\n", " ").split(", ") == places
    assert codec.pack(code) == data


def test_worked_example_fields() -> None:
    """The table of fields in FORMAT.md, read as a program would, is what the parser finds."""
    data = _example()
    rows = re.findall(r"^\| (\d+) \| ([0-9a-f ]+) \| ([^|]+) \|$", FORMAT.split("field by field")[1], re.M)
    assert b"".join(bytes.fromhex(row[1]) for row in rows) == data[: sum(len(row[1].split()) for row in rows)]
    assert [int(row[0]) for row in rows] == list(np.cumsum([0, *(len(row[1].split()) for row in rows)])[:-1])
    header = read_header(data)
    assert header.length == sum(len(row[1].split()) for row in rows)
    values = {row[2].split(":")[0].strip(): row[2].partition(":")[2].strip() for row in rows}
    assert values["width"] == str(header.width)
    assert values["height"] == str(header.height)
    assert values["model id"] == f"`{header.model}`"
    assert values["quality x 100"] == f"{header.quality * 100:g}"


def test_header_says_what_was_encoded(codec: Codec) -> None:
    picture = image.read(HERE / "images" / "lighthouse.png")
    data = codec.encode(picture, quality=12.34)
    header = read_header(data)
    assert (header.width, header.height, header.quality) == (240, 320, 12.34)
    assert (header.version, header.model, header.colour) == (2, codec.model, container.RGB)
    assert not header.lossless
    assert [section.kind for section in header.sections] == [container.CODE]
    assert header.length + sum(section.length for section in header.sections) == len(data)
    assert header.length < 64
    assert read_header(data[: header.length]) == header  # the sections need not be there


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_file_decodes_for_ever(path: Path, codec: Codec) -> None:
    """Equal symbols (their checksum is in the file), and pixels within one grey level of those first decoded."""
    decoded = codec.decode(path)
    expected = image.load(path.with_suffix(".png")).pixels
    assert decoded.shape == expected.shape
    assert abs(decoded.astype(int) - expected).max() <= 1


def test_every_model_has_golden_files() -> None:
    headers = [read_header(path.read_bytes()) for path in GOLDEN]
    assert {header.model for header in headers if not header.lossless} == {*runtime.model_ids()}


def test_short_header(small: bytes, codec: Codec, tmp_path: Path) -> None:
    """21 bytes less, and nothing else is different: not what it says, not what the file decodes to."""
    short = _with_header(small, short=True)
    assert short[:5] == b"\x89HGC\x02"
    assert len(short) == len(small) - 21
    before, header = read_header(small), read_header(short)
    assert header == replace(before, version=2, length=before.length - 21)
    assert read_header(short[: header.length]) == header
    assert codec.unpack(short) == codec.unpack(small)
    (tmp_path / "short.hgc").write_bytes(short)
    assert np.array_equal(codec.decode(tmp_path / "short.hgc"), codec.decode(small))


def test_many_sections_have_a_long_header() -> None:
    sections = [(container.CODE, b"code")] * 9
    for model, count in (("m", 9), ("m" * 128, 1)):
        front = Front(model, 1, 8, 8, 50, short=True)
        long = replace(front, short=False)
        assert container.write(front, sections[:count]) == container.write(long, sections[:count])
    for model in ("m" * 127, "hourglass-" + "m" * 127, "hourglass-", "hourglass-hourglass-1"):
        header, _ = container.read(container.write(Front(model, 1, 8, 8, 50, short=True), sections[:8]))
        assert (header.version, header.model, len(header.sections)) == (2, model, 8)


def _short(*parts: bytes) -> bytes:
    """A file of version 2 with a right checksum; the code of its one section is missing."""
    head = container.MAGIC + b"".join(parts)
    return head + struct.pack("<I", zlib.crc32(head))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((b"\x88\x00", b"\x08", b"\x32", b"\x01\x01m"), "no encoder writes the number that ends at byte 8"),
        ((b"\x80\x80\x80\x80\x10", b"\x08", b"\x32", b"\x01\x01m"), "the number that ends at byte 11"),
        ((b"\x80\x80\x80\x80\x80\x01", b"\x08", b"\x32", b"\x01\x01m"), "the number that ends at byte 11"),
        ((b"\x08", b"\x08", b"\x32", b"\x09\x01m"), "it says 9 sections; in version 2 there are 8 at most"),
        ((b"\x08", b"\x08", b"\x32", b"\x01\x0bhourglass-1"), "in a way that no encoder writes"),
        ((b"\x08", b"\x08", b"\x32", b"\x01\x7fm"), "inside its header; it was cut short"),
    ],
)
def test_short_headers_that_no_encoder_writes(parts: tuple[bytes, ...], message: str) -> None:
    right = _short(b"\x02\x03", b"\x08", b"\x08", b"\x32", b"\x01\x01m", b"\x01\x00", bytes(4))
    assert read_header(right).model == "m"
    with pytest.raises(errors.CorruptError, match=message):
        read_header(_short(b"\x02\x03", *parts, b"\x01\x00", bytes(4)))


def test_truncation_at_every_byte(either: bytes, codec: Codec) -> None:
    for length in range(len(either)):
        with pytest.raises(errors.ContainerError):
            codec.decode(either[:length])
    with pytest.raises(errors.CorruptError, match="appended"):
        codec.decode(either + b"\0")


def test_damage_of_every_byte(either: bytes, codec: Codec) -> None:
    """Every byte of the header, of each section and of each checksum: changed, it is noticed."""
    for place in range(len(either)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(either)
            damaged[place] ^= change
            with pytest.raises((errors.ContainerError, errors.LimitError)):  # a header may claim a million sections
                codec.decode(damaged)


def test_damage_in_a_section_names_it(small: bytes, codec: Codec) -> None:
    damaged = bytearray(small)
    damaged[-1] ^= 4
    with pytest.raises(
        errors.CorruptError, match=r"section 0 of kind 1 is damaged: its CRC-32 is \w{8}, the file says"
    ):
        codec.decode(damaged)
    damaged = bytearray(small)
    damaged[7] ^= 1
    with pytest.raises(errors.CorruptError, match="header is damaged"):
        codec.decode(damaged)


def _forged(data: bytes, **changes: bytes) -> bytes:
    """`data` with parts of its header replaced and its checksum made right again."""
    header = container.read_header(data)
    head = bytearray(data[: header.length - 4])
    places = {"version": 4, "colour": 5, "width": 6, "height": 10, "quality": 14, "sections": 16}
    for name, value in changes.items():
        head[places[name] : places[name] + len(value)] = value
    return bytes(head) + struct.pack("<I", zlib.crc32(head)) + data[header.length :]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": b"\x07"}, errors.ContainerError, "format version 7; this release reads versions 1 and 2"),
        ({"width": bytes(4)}, errors.ContainerError, "0x48 pixels"),
        ({"quality": b"\xff\xff"}, errors.ContainerError, "quality 655.35"),
        ({"width": b"\0\0\0\x02"}, errors.LimitError, "limit is 16777216 a side"),
        ({"colour": b"\x02"}, errors.ContainerError, "pixels of colour 2"),
        ({"sections": b"\xff\xff\xff\xff"}, errors.LimitError, "4294967295 sections; the limit is 262144"),
        ({"width": b"\xff\xff\0\0", "height": b"\xff\xff\0\0"}, errors.LimitError, "Limits.pixels"),
        ({"width": b"\x80\0\0\0"}, errors.CorruptError, "do not match|goes on|invalid"),
        ({"quality": b"\0\0"}, errors.CorruptError, "do not match|goes on|invalid"),
    ],
)
def test_forged_headers(
    changes: dict[str, bytes], error: type[Exception], message: str, small: bytes, codec: Codec
) -> None:
    with pytest.raises(error, match=message):
        codec.decode(_forged(small, **changes))


def _written(model: str, *sections: tuple[int, bytes]) -> bytes:
    return container.write(Front(model, container.RGB, 8, 8, 50), sections)


def test_sections_that_are_later_inventions_are_skipped() -> None:
    data = _written("some-model", (container.CODE, b"code"), (200, b"later"))
    header, sections = container.read(data)
    assert [bytes(payload) for payload in sections] == [b"code", b"later"]
    assert [section.kind for section in header.sections] == [1, 200]
    assert header.model == "some-model"


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("m", [1, 99]),
        ("m", [200]),
        ("m", []),
        ("m", [1, 200, 200]),
        ("m", [1, 128, 128]),
        ("m", [1, 1, 2]),
        ("m", [1, 3]),
        ("m", [3]),
        ("", [1]),
        ("", [3, 3]),
        ("", [3, 2]),
        ("", []),
    ],
)
def test_sections_that_make_no_sense_are_refused(model: str, kinds: list[int]) -> None:
    with pytest.raises(errors.ContainerError, match="kinds"):
        container.read(_written(model, *((kind, b"") for kind in kinds)))


def test_unknown_model(codec: Codec) -> None:
    data = _written("no-such-model", (container.CODE, b"\0" * 8))
    with pytest.raises(errors.UnknownModelError, match="no model 'no-such-model' is installed; known models: classic-"):
        codec.decode(data)


def test_metadata_is_bounded() -> None:
    payload = memoryview(container.deflate(bytes(1000)))
    assert container.inflate(payload, 1000) == bytes(1000)
    with pytest.raises(errors.LimitError, match="1000 bytes; there is room for 999"):
        container.inflate(payload, 999)
    lying = memoryview(b"\x0a\0\0\0" + bytes(payload[4:]))
    with pytest.raises(errors.CorruptError, match="its section says 10"):
        container.inflate(lying, 1000)


@pytest.mark.parametrize("short", [False, True])
def test_a_file_written_piece_by_piece_is_the_same(short: bool) -> None:
    front = Front("m", container.GREY, 8, 8, 50, short)
    sections = [(container.ICC, b"profile"), (container.CODE, b"code")]
    file = io.BytesIO()
    writer = container.Writer(file, front, 2)
    for kind, payload in sections:
        writer.add(kind, payload)
    writer.finish()
    assert file.getvalue() == container.write(front, sections)


def test_limits_hold_before_anything_is_allocated(small: bytes) -> None:
    with pytest.raises(errors.LimitError, match="64x48 = 3072 pixels; the limit is 3071"):
        Codec(limits=Limits(pixels=3071)).decode(small)
    with pytest.raises(errors.LimitError, match="bytes; the limit is 50"):
        Codec(limits=Limits(file_bytes=50)).decode(small)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_parsed_or_refused(data: bytes, with_magic: bool) -> None:
    try:
        container.read(container.MAGIC + b"\1" + data if with_magic else data)
    except (errors.ContainerError, errors.LimitError):
        return
    raise AssertionError("random bytes passed for a file")
