"""Hostile input: damaged files, files made by hand, bombs. Any bytes give a picture or one of our errors, and soon.

Of the golden files some bits are flipped, and all where that is asked for (minutes):

    HOURGLASS_EVERY_BIT=1 pytest tests/test_hostile.py -k golden

That is every bit, and every length, of those that have one section: there damage is found before anything is decoded.
Of the others it is ten times as many as else.

What tests/fuzz.py has found lies in tests/bad, in a folder for each target.
"""

from __future__ import annotations

import importlib.util
import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hourglass.codec import Codec, HourglassError, Limits, Metadata, Picture, container, errors, image, read_header
from hourglass.codec.container import ALPHA, CODE, EXIF, ICC, LOSSLESS, XMP, Front, Section

HERE = Path(__file__).parent
BAD = HERE / "bad"
EVERY_BIT = bool(os.environ.get("HOURGLASS_EVERY_BIT"))
FEW = 50
"""Bits, and lengths, of a golden file that are tried in a run that is not asked for all."""


def _fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hourglass_fuzz", HERE / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


fuzz = _fuzzer()


def _parses(path: Path) -> bool:
    try:
        return bool(read_header(path).sections)
    except HourglassError:
        return False


GOLDEN = [path for path in sorted((HERE / "golden").glob("*.hgc")) if _parses(path)]


@dataclass(frozen=True)
class Small:
    """A small file and what it decodes to."""

    data: bytes
    picture: Picture


@pytest.fixture(scope="module")
def small(codec: Codec) -> list[Small]:
    return [Small(data, codec.decode_picture(data)) for data in fuzz.seeds("parse")]


def _same(a: Picture, b: Picture) -> bool:
    alphas = (a.alpha is None) == (b.alpha is None) and (
        a.alpha is None or b.alpha is None or np.array_equal(a.alpha, b.alpha)
    )
    return np.array_equal(a.colour, b.colour) and alphas and a.metadata == b.metadata


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _refused_or_same(codec: Codec, data: bytes, expected: Picture) -> bool:
    """Whether `data` is refused; if it is not, it must decode to the same."""
    try:
        decoded = codec.decode_picture(data)
    except HourglassError:
        return True
    assert _same(decoded, expected), "another picture was accepted"
    return False


# What the fuzzer found


@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_what_the_fuzzer_found(target: str) -> None:
    files = sorted((BAD / target).iterdir())
    assert files
    for path in files:
        begin = time.process_time()
        try:
            fuzz.run(target, fuzz.renewed(target, path.read_bytes()))
        except Exception as exc:
            raise AssertionError(f"{path.name} makes the codec raise {exc!r}") from exc
        assert time.process_time() - begin < 5, path.name


def test_what_the_fuzzer_found_is_small() -> None:
    files = [path for path in BAD.rglob("*") if path.is_file()]
    assert len(files) < 300
    assert sum(path.stat().st_size for path in files) < 300_000


@pytest.mark.parametrize("target", list(fuzz.TARGETS))
def test_the_fuzzer_runs(target: str) -> None:
    """Some rounds of it without a guide: enough to see that it is not broken."""
    rng = random.Random(5)
    pool = [*fuzz.seeds(target)]

    def plain(data: bytes, most: int) -> bytes:
        changed = bytearray(data) or bytearray(1)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        return bytes(changed[: rng.randrange(len(changed)) if rng.random() < 0.1 else most])

    for seed in range(100):
        fuzz.run(target, fuzz.mutate(target, rng.choice(pool), 4096, seed, plain))


# Damage


def test_every_bit_of_small_files(small: list[Small], codec: Codec) -> None:
    for one in small:
        whole = len(one.data) < 250
        # Where there is metadata all of the rest is decoded before damage is found, which takes a while.
        for bit in range(0, 8 * len(one.data), 1 if whole else len(one.data) // 9):
            assert _refused_or_same(codec, _flipped(one.data, bit), one.picture), bit


def test_every_length_of_small_files(small: list[Small], codec: Codec) -> None:
    for one in small:
        for length in range(len(one.data)):
            assert _refused_or_same(codec, one.data[:length], one.picture), length
        for more in (b"\0", one.data):
            with pytest.raises(errors.CorruptError, match="appended"):
                codec.decode(one.data + more)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_bits_of_golden_files(path: Path, codec: Codec) -> None:
    data, expected = path.read_bytes(), codec.decode_picture(path)
    header, bits = read_header(data), range(8 * len(data))
    chosen: Sequence[int] = bits
    if not EVERY_BIT or len(header.sections) > 1:
        some = random.Random(path.stem).sample(bits, 10 * FEW if EVERY_BIT else FEW)
        chosen = [*range(8 * header.length), *some]
    assert all(_refused_or_same(codec, _flipped(data, bit), expected) for bit in chosen)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_lengths_of_golden_files(path: Path, codec: Codec) -> None:
    data, expected = path.read_bytes(), codec.decode_picture(path)
    every = EVERY_BIT and len(read_header(data).sections) == 1
    chosen = range(0, len(data), 1 if every else len(data) // FEW + 1)
    assert all(_refused_or_same(codec, data[:length], expected) for length in chosen)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_damage(data: st.DataObject, small: list[Small], codec: Codec) -> None:
    """Up to 32 bits in a row are noticed for sure by a CRC-32; anything else gives no exception but ours."""
    one = data.draw(st.sampled_from(small))
    changed = bytearray(one.data)
    place = data.draw(st.integers(0, len(changed) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=4))
    changed[place : place + len(noise)] = noise[: len(changed) - place]
    _refused_or_same(codec, bytes(changed), one.picture)


def test_salvage_says_what_is_damaged(small: list[Small], codec: Codec) -> None:
    """With salvage damage is an error, or a loss; where there is no loss the picture is the same."""
    rng = random.Random(3)
    for one in small:
        for bit in rng.sample(range(8 * len(one.data)), 12):
            try:
                decoded = codec.decode_picture(_flipped(one.data, bit), salvage=True)
            except HourglassError:
                continue
            assert decoded.losses or _same(decoded, one.picture)
            assert decoded.colour.shape == one.picture.colour.shape


def test_damage_elsewhere_does_not_change_a_region(codec: Codec) -> None:
    """A region is decoded from its own tiles alone; the others may be damaged, and it stays what it was."""
    pixels = np.random.default_rng(2).integers(0, 256, (16, fuzz.TILE + 100, 3)).astype(np.uint8)
    data = codec.encode(pixels, quality=20, effort="fast", fallback=False)
    region = (4, 0, 16, 16)
    expected = codec.decode_picture(data, region=region)
    header = read_header(data)
    assert len(header.sections) == 2
    accepted = 0
    for bit in random.Random(4).sample(range(8 * header.length, 8 * len(data)), 60):
        try:
            decoded = codec.decode_picture(_flipped(data, bit), region=region)
        except errors.CorruptError:
            continue
        assert _same(decoded, expected)
        accepted += 1
    assert accepted  # damage in the other tile


# Properties


@st.composite
def _pictures(draw: st.DrawFn) -> Picture:
    height, width = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    channels = draw(st.sampled_from((0, 3)))
    shape = (height, width, channels) if channels else (height, width)

    def layer(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        match draw(st.sampled_from(("noise", "flat", "few", "ramp"))):
            case "noise":
                values = rng.integers(0, 256, shape)
            case "flat":
                values = np.full(shape, rng.integers(0, 256))
            case "few":
                values = rng.integers(0, 2, shape) * 255
            case _:
                values = np.indices(shape).sum(0) * 3 % 256
        return np.ascontiguousarray(values, np.uint8)

    alpha = layer((height, width)) if draw(st.booleans()) else None
    kinds = st.one_of(st.just(b""), st.binary(max_size=40), st.binary(min_size=1, max_size=3).map(lambda b: b * 900))
    metadata = Metadata(draw(kinds), draw(kinds), draw(kinds), draw(kinds))
    return Picture(layer(shape), None if alpha is None or alpha.min() == 255 else alpha, metadata)


@settings(deadline=None, max_examples=40)
@given(picture=_pictures(), hundredths=st.integers(0, 10_000), fallback=st.booleans())
def test_round_trip(picture: Picture, hundredths: int, fallback: bool) -> None:
    codec = fuzz.codec()
    data = codec.encode(picture, quality=hundredths / 100, effort="fast", fallback=fallback)
    header = read_header(data)
    assert (header.width, header.height) == (picture.width, picture.height)
    assert header.colour == (container.GREY if picture.grey else container.RGB)
    decoded = codec.decode_picture(data)
    assert decoded.colour.shape == picture.colour.shape
    assert decoded.colour.dtype == np.uint8
    assert decoded.metadata == picture.metadata
    assert decoded.losses == ()
    assert (decoded.alpha is None) == (picture.alpha is None)
    if decoded.alpha is not None:
        assert np.array_equal(decoded.alpha, picture.alpha)
    if header.lossless:
        assert fallback
        assert _same(decoded, picture)
    else:
        assert header.quality == hundredths / 100
    assert codec.encode(picture, quality=hundredths / 100, effort="fast", fallback=fallback) == data


_numbers = st.one_of(
    st.integers(0, 70), st.sampled_from((1024, 1025, 1 << 24, (1 << 24) + 1)), st.integers(0, 2**32 - 1)
)
_kinds = st.one_of(st.sampled_from((CODE, ALPHA, LOSSLESS, ICC, EXIF, XMP, container.IPTC)), st.integers(0, 255))
_fronts = st.builds(
    Front,
    model=st.one_of(st.sampled_from(("", fuzz.codec().model)), st.text(st.characters(max_codepoint=127), max_size=255)),
    colour=st.one_of(st.sampled_from((1, 3)), st.integers(0, 255)),
    width=_numbers,
    height=_numbers,
    quality=st.integers(0, 65535).map(lambda value: value / 100),
    short=st.booleans(),
)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=200), version=st.sampled_from((None, container.LONG, container.SHORT)))
def test_any_bytes_are_refused(data: bytes, version: int | None) -> None:
    data = container.MAGIC + bytes([version]) + data if version else data
    for read in (container.read, read_header, fuzz.codec().decode, fuzz.codec().unpack):
        with pytest.raises((errors.ContainerError, errors.LimitError)):
            read(data)


@settings(deadline=None, max_examples=300)
@given(front=_fronts, sections=st.lists(st.tuples(_kinds, st.binary(max_size=30)), max_size=6), salvage=st.booleans())
def test_any_sections_are_parsed_or_refused(front: Front, sections: list[tuple[int, bytes]], salvage: bool) -> None:
    """With right checksums: what is said is what is read, or it is refused; and what is decoded has the size said."""
    data = container.write(front, sections)
    try:
        header, payloads = container.read(data)
    except (errors.ContainerError, errors.LimitError):
        with pytest.raises((errors.ContainerError, errors.LimitError)):
            fuzz.codec().decode_picture(data, salvage=salvage)
        return
    assert (header.model, header.colour) == (front.model, front.colour)
    assert header.version == (container.SHORT if front.is_short(len(sections)) else container.LONG)
    assert (header.width, header.height, header.quality) == (front.width, front.height, front.quality)
    assert [(section.kind, bytes(part)) for section, part in zip(header.sections, payloads, strict=True)] == sections
    try:
        decoded = fuzz.codec().decode_picture(data, salvage=salvage)
    except HourglassError:
        return
    assert (decoded.width, decoded.height) == (front.width, front.height)


# Limits


@contextmanager
def _cheap(seconds: float = 2, megabytes: float = 4) -> Iterator[None]:
    """What happens within takes little time (of a core: others may be busy) and memory (of Python and numpy)."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
    finally:
        took, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert took < seconds
    assert peak < megabytes * 1e6


def _coded(codec: Codec, width: int, height: int, *sections: tuple[int, bytes]) -> bytes:
    return container.write(Front(codec.model, container.RGB, width, height, 50), sections or [(CODE, bytes(5))])


def _stored(width: int, height: int, payload: bytes, *more: tuple[int, bytes], colour: int = container.RGB) -> bytes:
    return container.write(Front("", colour, width, height, 100), [(LOSSLESS, payload), *more])


def test_largest_claims_are_refused(codec: Codec) -> None:
    side = 1 << 24
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.pixels"):
        codec.decode(_coded(codec, side, side))
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.side"):
        codec.decode(_coded(codec, side + 1, 1))
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.pixels"):
        codec.decode(_stored(side, side, b"abc"))
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.pixels"):
        codec.decode(_stored(side, side, b"abc"), region=(0, 0, 1, 1))
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.streamed_pixels"):
        codec.decode_strips(_coded(codec, side, side))
    # Of a picture of any size a region may be decoded, but its tiles must be there.
    with _cheap(), pytest.raises(errors.ContainerError, match="1 tiles"):
        codec.decode(_coded(codec, side, side), region=(side - 1, side - 1, 1, 1))
    with _cheap(), pytest.raises(errors.ContainerError, match="1 tiles"):
        codec.decode(_coded(codec, side, side), region=(0, 0, 8, 8), salvage=True)


@pytest.mark.parametrize("claimed", [2**32 - 1, (1 << 18) + 1])
def test_more_sections_than_allowed(claimed: int, codec: Codec) -> None:
    data = bytearray(_coded(codec, 8, 8))
    struct.pack_into("<I", data, 16, claimed)
    with _cheap(), pytest.raises(errors.LimitError, match=rf"{claimed} sections; the limit is 262144"):
        codec.decode(bytes(data))


def test_sections_that_are_not_there(tmp_path: Path, codec: Codec) -> None:
    data = bytearray(_coded(codec, 8, 8))
    struct.pack_into("<I", data, 16, 1 << 18)
    with _cheap(), pytest.raises(errors.CorruptError, match="inside its header"):
        codec.decode(bytes(data))
    header = Front(codec.model, container.RGB, 8, 8, 50).pack([Section(CODE, 2**32 - 1, 0)])
    with _cheap(), pytest.raises(errors.CorruptError, match="cut short"):
        codec.decode(header + bytes(9))
    # From bytes, a file, and a pipe; with salvage the section is asked for.
    (tmp_path / "short.hgc").write_bytes(header + bytes(9))
    ends = os.pipe()
    os.write(ends[1], header + bytes(9))
    os.close(ends[1])
    for source in (header + bytes(9), tmp_path / "short.hgc", f"/dev/fd/{ends[0]}"):
        with _cheap():
            assert "cut short" in codec.decode_picture(source, salvage=True).losses[0]
    os.close(ends[0])


@pytest.mark.parametrize("tiles", [2, 3, 50_000])
def test_other_number_of_tiles(tiles: int, codec: Codec) -> None:
    data = _coded(codec, 8, 8, *[(CODE, bytes(5))] * tiles)
    with _cheap(megabytes=40), pytest.raises(errors.ContainerError, match=f"{tiles} tiles; model .* has 1 for"):
        codec.decode(data)


def test_other_number_of_alphas(codec: Codec) -> None:
    with pytest.raises(errors.ContainerError, match="kinds 1 x 1, 2 x 2"):
        codec.decode(_coded(codec, 8, 8, (CODE, bytes(5)), (ALPHA, b"a"), (ALPHA, b"a")))


def _deflated(size: int, said: int | None = None) -> bytes:
    return struct.pack("<I", size if said is None else said) + zlib.compress(bytes(size), 9)


def test_metadata_bombs(codec: Codec) -> None:
    most = Limits().metadata_bytes
    honest, liar = _deflated(4 * most), _deflated(4 * most, said=1000)
    assert len(honest) < 100_000
    with _cheap(), pytest.raises(errors.LimitError, match=r"Limits\.metadata_bytes"):
        codec.decode(_stored(8, 8, b"abc", (EXIF, honest)))
    with _cheap(), pytest.raises(errors.CorruptError, match="inflates to 1001 bytes or more"):
        codec.decode(_stored(8, 8, b"abc", (EXIF, liar)))
    part = _deflated(most // 2 - 1)
    with _cheap(megabytes=2.5 * most / 1e6), pytest.raises(errors.LimitError, match="there is room for 2 "):
        codec.decode(_stored(8, 8, b"abc", (ICC, part), (EXIF, part), (XMP, part)))


@pytest.mark.parametrize(
    "payload", [b"", b"\0\0\0", bytes(4), bytes(5), struct.pack("<I", 1) + b"x\x9c", _deflated(9)[:-1]]
)
def test_broken_metadata(payload: bytes, codec: Codec) -> None:
    with pytest.raises(errors.CorruptError, match="metadata"):
        codec.decode(_stored(8, 8, b"abc", (EXIF, payload)))


def _saved(made: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    made.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("payload", [b"", b"ab", b"abcde", b"\x89PNG\r\n\x1a\n", b"RIFF\4\0\0\0WEBP", bytes(100)])
def test_broken_lossless_pictures(payload: bytes, codec: Codec) -> None:
    with pytest.raises(errors.CorruptError, match="cannot be decoded"):
        codec.decode(_stored(8, 8, payload))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_stored_pictures_of_another_size(format: str, codec: Codec) -> None:
    """As a whole, and as alpha."""
    options = {"lossless": True} if format == "WEBP" else {}
    real = codec.encode(
        Picture(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.uint8)), fallback=False, effort="fast"
    )
    _, parts = container.read(real)
    for size in ((7, 8), (8, 9), (1, 1), (64, 64)):
        payload = _saved(Image.new("L", size), format, **options)
        with pytest.raises(errors.CorruptError, match=r"picture without loss is .*; its file says \(8, 8\)"):
            codec.decode(_stored(8, 8, payload))
        with pytest.raises(errors.CorruptError, match=r"picture without loss is .*; its file says \(8, 8\)"):
            codec.decode(_coded(codec, 8, 8, (CODE, bytes(parts[0])), (ALPHA, payload)))
    moving = _saved(Image.new("L", (8, 8)), format, save_all=True, append_images=[Image.new("L", (8, 8), 9)], **options)
    with pytest.raises(errors.CorruptError):
        codec.decode(_stored(8, 8, moving))


@pytest.mark.parametrize("payload", [b"", b"ab", b"abc", "LA", "RGBA"])
def test_alpha_that_is_none(payload: bytes | str, codec: Codec) -> None:
    real = codec.encode(
        Picture(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.uint8)), fallback=False, effort="fast"
    )
    header, parts = container.read(real)
    if isinstance(payload, str):
        payload = _saved(Image.new(payload, (8, 8)), "PNG")
    data = container.write(
        Front(codec.model, container.RGB, 8, 8, header.quality), [(CODE, bytes(parts[0])), (ALPHA, payload)]
    )
    with pytest.raises(errors.CorruptError, match=r"alpha|cannot be decoded"):
        codec.decode(data)
    salvaged = codec.decode_picture(data, salvage=True)
    assert len(salvaged.losses) == 1
    assert salvaged.alpha is not None
    assert salvaged.alpha.min() == 255


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *chunks, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")])


def _bombs() -> dict[str, bytes]:
    """Picture files of a few kB that want gigabytes."""
    frames = Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 9)
    moving = bytearray(_saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    moving[24:30] = (12_999).to_bytes(3, "little") * 2  # its canvas
    large, text = zlib.compress(bytes(1 << 26), 9), zlib.compress(b" " * (1 << 26), 9)
    few, xmp = zlib.compress(bytes(72)), b"XML:com.adobe.xmp\0\1\0\0\0"
    gif = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;"
    return {
        "png of 12000x12000": _png(12_000, 12_000, pixels=large),
        "png of 2^31": _png((1 << 31) - 1, (1 << 31) - 1, pixels=large),
        "png with more pixels than said": _png(8, 8, pixels=large),
        "png with text": _png(8, 8, _chunk(b"zTXt", b"a\0\0" + text), pixels=few),
        "png with xmp": _png(8, 8, _chunk(b"iTXt", xmp + text), pixels=few),
        "png with profile": _png(8, 8, _chunk(b"iCCP", b"a\0\0" + text), pixels=few),
        "webp canvas": bytes(moving),
        "webp of 16383x16383": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + struct.pack("<I", 0x0FFFFFFE) + bytes(9),
        "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "gif": b"GIF89a" + gif,
        "ppm": b"P6 100000 100000 255\n",
        "pgm of 16 bits": b"P5 100000 100000 65535\n",
    }


_MEASURED = """
import resource, sys, warnings
from pathlib import Path
from hourglass.codec import Codec, HourglassError, image

warnings.simplefilter("always")
codec = Codec()
codec.warm_up()
image.load(Path(sys.argv[1]).read_bytes())
codec.decode(Path(sys.argv[2]).read_bytes())
for name in sys.argv[3:]:
    data = Path(name).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        codec.decode(data) if name.endswith(".hgc") else image.load(data)
        outcome = "taken"
    except HourglassError as exc:
        outcome = type(exc).__name__
    print(outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, Path(name).name, sep="|")
"""


def test_bombs_do_not_go_off(tmp_path: Path) -> None:
    """Picture files on their way in, and the same as stored pictures and alphas: no memory to speak of, measured."""
    codec = fuzz.codec()
    plain = Picture(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=np.uint8))
    coded, parts = container.read(codec.encode(plain, fallback=False, effort="fast"))
    front = Front(codec.model, container.RGB, 8, 8, coded.quality)
    for name, data in {"a.png": _saved(Image.new("RGB", (8, 8)), "PNG"), "a.hgc": codec.encode(plain)}.items():
        (tmp_path / name).write_bytes(data)
    files = []
    for name, data in _bombs().items():
        assert len(data) < 80_000
        variants = {"": data, " stored.hgc": _stored(8, 8, data)}
        variants[" alpha.hgc"] = container.write(front, [(CODE, bytes(parts[0])), (ALPHA, data)])
        if name == "png of 12000x12000":
            variants[" of its size.hgc"] = _stored(12_000, 12_000, data)
        for suffix, content in variants.items():
            files.append(tmp_path / f"{name}{suffix}")
            files[-1].write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-c", _MEASURED, tmp_path / "a.png", tmp_path / "a.hgc", *files]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == len(files)
    print(done.stdout)
    for outcome, grown, name in rows:
        # What follows the last pixel, and text that nobody reads, may be ignored: a small picture is one all the same.
        assert outcome in ("LimitError", "ImageError", "CorruptError") or name.startswith("png with"), name
        assert int(grown) < 64_000, name  # kB
    assert done.stderr == ""
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert used < 20  # seconds of a core, most of them for starting


@pytest.mark.parametrize("format", sorted(set(image.WRITABLE.values())))
def test_hostile_metadata_does_not_break_writers(format: str, codec: Codec) -> None:
    """Any bytes may be kept as metadata; what a format cannot hold is dropped, and a loss says so."""
    rng = random.Random(6)
    exif = Image.Exif()
    exif.update({0x0112: 1, 0x010E: "what", 0x8769: {0x829A: (1, 60)}, 0x8825: {1: "N"}})
    whole = exif.tobytes().removeprefix(b"Exif\0\0")
    for turn in range(24):
        broken = bytearray(whole)
        for _ in range(turn % 4):
            broken[rng.randrange(len(broken))] = rng.choice((0, 1, 3, 127, 255))
        metadata = Metadata(rng.randbytes(turn), bytes(broken), rng.randbytes(turn), rng.randbytes(turn))
        picture = Picture(np.zeros((3, 4, 3), np.uint8), None, metadata)
        data = codec.encode(picture)
        decoded = codec.decode_picture(data)
        assert decoded.metadata == metadata
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.LossWarning)
            written = image.write(decoded, format)
        if format not in ("JPEG", "AVIF"):
            assert np.array_equal(image.load(written).colour, picture.colour)
        else:
            assert image.load(written).colour.shape == picture.colour.shape
