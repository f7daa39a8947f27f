"""Coverage-guided fuzzing of what takes bytes from outside, with atheris (`pip install -e '.[fuzz]'`).

    python tests/fuzz.py --decode -max_total_time=2100 -timeout=60 -rss_limit_mb=2048 CORPUS tests/bad/decode

The first argument is the target:

    --parse    a .hgc file: its header, every section, metadata inflated
    --decode   a .hgc file to pixels, whole or in part, and the pixels to a picture file
    --picture  a picture file, loaded as for encoding

All others are libFuzzer's (-help=1 lists them). CORPUS is a folder for what is found; where it is missing it is made,
with seeds. The only exceptions that may leave a target are `HourglassError`s. Any other ends the run, and so do 5
seconds of a core, a minute by the clock, and more memory than the limit; a file crash-..., timeout-... or oom-... is
left behind (-artifact_prefix says where). Put it into tests/bad/TARGET, where tests/test_hostile.py tries it for ever
after, and mend the codec.

    python tests/fuzz.py --decode -merge=1 tests/bad/decode CORPUS

adds what of CORPUS is new to tests/bad.

An input of `decode` is `_VIEW` bytes that say what is decoded, and a .hgc file; one of `picture` is a byte and a file.
Checksums would stop a fuzzer at once. So the files are taken apart, changed, and put together with checksums that are
right most of the time; and where a tile's symbols do not match their checksum, which nobody can know who has not
decoded them, a second run forgives that.
"""

from __future__ import annotations

import io
import math
import random
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    import atheris

    _instrumented = atheris.instrument_imports(include=["hourglass.codec"])
else:  # the tests use the targets, without atheris
    _instrumented = nullcontext()

with _instrumented:
    from hourglass.codec import (
        SCALES,
        Codec,
        HourglassError,
        Limits,
        container,
        entropy,
        errors,
        image,
        tiles,
    )
    from hourglass.codec.container import ALPHA, CODE, EXIF, ICC, IPTC, LOSSLESS, XMP, Front
    from hourglass.codec.settings import View

import numpy as np
from PIL import Image, PngImagePlugin

LIMITS = Limits(pixels=1 << 15, file_bytes=1 << 20, sections=64, metadata_bytes=1 << 16)
"""Small, so that a run is short; what they refuse is refused as with larger ones."""

SECONDS = 5
"""Of a core, that a run may take."""

_VIEW = 6
_FRONTS = {"parse": 0, "decode": _VIEW, "picture": 1}
_FORMATS = (None, *sorted(set(image.WRITABLE.values())))
_METADATA = (ICC, EXIF, XMP, IPTC)


@cache
def codec() -> Codec:
    return Codec(threads=1, limits=LIMITS)


TILES = next(model.tensors[-1] for model in codec().models() if model.id == codec().model)
"""Has one position for each tile."""

TILE = max(TILES.stride, TILES.whole)
"""Pixels a side of a tile, for files that have as many sections as tiles."""


def parse(data: bytes) -> None:
    """Target: every byte of a .hgc file is looked at, but for what a model is needed."""
    with container.Reader(data, LIMITS) as reader:
        header = reader.header
        short = header.version == container.SHORT
        front = Front(header.model, header.colour, header.width, header.height, header.quality, short)
        assert front.pack(header.sections) == data[: header.length], "a header has one form only"
        for number, section in enumerate(header.sections):
            try:
                payload = reader.payload(number)
                if section.kind in _METADATA:
                    assert len(container.inflate(payload, LIMITS.metadata_bytes)) <= LIMITS.metadata_bytes
            except HourglassError:
                continue
        reader.check_length()


def decode(data: bytes) -> None:
    """Target: a .hgc file to pixels, and these to a picture file."""
    options, file = data[:_VIEW].ljust(_VIEW, b"\0"), data[_VIEW:]
    flags, format = options[0], _FORMATS[options[5] % len(_FORMATS)]
    view: View = {"salvage": bool(flags & 1), "scale": SCALES[flags >> 1 & 3]}
    if flags & 8:
        header = codec().read_header(file)
        x, y, width, height = (part / 255 for part in options[1:5])
        view["region"] = (
            round(x * header.width),
            round(y * header.height),
            max(round(width * header.width), 1),
            max(round(height * header.height), 1),
        )
    try:
        if not _decoded(file, view, format):
            return
    except errors.CorruptError:
        pass
    with _forgiving():
        _decoded(file, view, format)


def picture(data: bytes) -> None:
    """Target: a picture file, loaded as for encoding and written again."""
    options, file = data[0] if data else 0, data[1:]
    loaded = image.load(
        file,
        LIMITS,
        keep=("all", "icc", "none", "all")[options & 3],
        srgb=bool(options & 4),
        frame=(None, None, 0, 1)[options >> 3 & 3],
    )
    assert loaded.width * loaded.height <= LIMITS.pixels
    assert loaded.metadata.size <= 2 * LIMITS.metadata_bytes  # a profile may be made on the way
    _written(loaded, _FORMATS[(options >> 5) % len(_FORMATS)])


TARGETS: dict[str, Callable[[bytes], None]] = {"parse": parse, "decode": decode, "picture": picture}


def run(target: str, data: bytes) -> None:
    """One run of a target. Whatever leaves it is a fault of the codec."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began = time.process_time()
        with suppress(HourglassError):
            TARGETS[target](data)
        assert time.process_time() - began < SECONDS, "took too long"


def _decoded(file: bytes, view: View, format: str | None) -> bool:
    """Decode and check what comes out. Returns whether something is lost."""
    header = codec().read_header(file)
    decoded = codec().decode_picture(file, **view)
    x, y, width, height = view.get("region", (0, 0, header.width, header.height))
    scale = view["scale"]
    shape = -(-(y + height) // scale) - y // scale, -(-(x + width) // scale) - x // scale
    assert decoded.colour.shape == (shape if header.colour == container.GREY else (*shape, 3))
    assert decoded.alpha is None or decoded.alpha.shape == shape
    assert decoded.metadata.size <= LIMITS.metadata_bytes
    assert view["salvage"] or not decoded.losses
    _written(decoded, format)
    return bool(decoded.losses)


def _written(decoded: image.Picture, format: str | None) -> None:
    if format:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.LossWarning)
            image.write(decoded, format)


def renewed(target: str, data: bytes) -> bytes:
    """An input that names a model that is no more, with the present one in its place."""
    front = _FRONTS[target]
    file = _File.take_apart(data[front:])
    known = [info.id.encode() for info in codec().models()]
    if file is None or not file.model.startswith(b"hourglass-") or file.model in known:
        return data
    return data[:front] + replace(file, model=codec().model.encode()).put_together()


class _Any:
    """Equal to everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


@contextmanager
def _forgiving() -> Iterator[None]:
    """Whoever makes a file by hand can make the symbols fit their checksum and end where they should."""
    checksum = mock.patch.object(tiles, "_crc", return_value=_Any())
    with checksum, mock.patch.object(entropy.Decoder, "finish"):
        yield


# Seeds


def seeds(target: str) -> Iterator[bytes]:
    """Small inputs that are valid."""
    if target == "picture":
        yield from _picture_seeds()
        return
    number = 0
    for file in _files():
        if target == "parse":
            yield file
            continue
        views = [bytes(_VIEW), bytes([8 | number % 4 << 1, 40, 40, 120, 120, number]), bytes([1, 0, 0, 0, 0, 7])]
        for view in views:
            number += 1
            yield view + file


def _files() -> Iterator[bytes]:
    rng = np.random.default_rng(1)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape).astype(np.uint8)

    def encoded(of: np.ndarray, metadata: image.Metadata | None = None, **settings: object) -> bytes:
        loaded = replace(image.load(of), metadata=metadata or image.Metadata())
        return codec().encode(loaded, effort="fast", **settings)  # type: ignore[arg-type]

    for data in (encoded(pixels(1, 1, 3), fallback=False), encoded(pixels(20, 20, 4), _metadata(), fallback=False)):
        for version in (container.LONG, container.SHORT):
            if file := _File.take_apart(data):
                file.version = version
                yield file.put_together()
    yield encoded(pixels(33, 17), fallback=False, quality=20)
    yield encoded(pixels(20, 20, 4), fallback=False, quality=5)
    yield encoded(pixels(9, 10, 2), fallback=False, quality=90)
    yield encoded(pixels(70, 66, 3) // 64, fallback=False, quality=100)
    yield encoded(pixels(2, TILE + 3, 4), fallback=False, quality=10)
    yield encoded(pixels(TILE + 2, 1), fallback=False, quality=30)
    yield encoded(np.full((40, 50, 3), 7, np.uint8), _metadata())
    yield encoded(np.full((4, 5, 4), 7, np.uint8))
    yield encoded(np.full((4, 5, 2), 7, np.uint8))
    yield encoded(np.eye(16, dtype=np.uint8) * 255, _metadata())
    yield encoded(np.dstack([np.eye(16, dtype=np.uint8) * 255] * 4))
    yield encoded(pixels(8, 8, 3), _metadata(), fallback=False, quality=10)
    png = _saved(Image.fromarray(pixels(4, 4, 3)).quantize(4), "PNG")
    yield container.write(Front("", container.RGB, 4, 4, 100), [(LOSSLESS, png)])


def _metadata() -> image.Metadata:
    from PIL import ImageCms

    exif = Image.Exif()
    exif.update({0x0112: 1, 0x010E: "what", 0x8769: {0x9000: b"0230", 0x829A: (1, 60)}, 0x8825: {1: "N"}})
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="1"/></x:xmpmeta>'
    return image.Metadata(icc, exif.tobytes().removeprefix(b"Exif\0\0"), xmp, b"\x1c\x02\x05\0\x04name")


def _picture_seeds() -> Iterator[bytes]:
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)
    alpha = Image.fromarray(np.dstack((rgb, rgb[..., :1])))
    options = 0
    for format in sorted(set(image.WRITABLE.values())):
        for made in (image.Picture(rgb, None, _metadata()), image.Picture(rgb[..., 0].copy(), rgb[..., 1].copy())):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield bytes([options % 256]) + image.write(made, format)
            options += 37
    turned = Image.Exif()
    turned[0x0112] = 6
    told = PngImagePlugin.PngInfo()
    told.add_itxt("XML:com.adobe.xmp", _metadata().xmp.decode(), zip=True)
    told.add_text("Raw profile type iptc", "\niptc\n      12\n1c0205000461626364000000\n", zip=True)
    told.add_text("Raw profile type exif", "\nexif\n      14\n457869660000" + "49492a0008000000")
    others = [
        _saved(alpha.convert("RGB"), "GIF", save_all=True, append_images=[alpha.convert("L")]),
        _saved(alpha.convert("P"), "PNG", transparency=3),
        _saved(alpha.convert("L"), "PNG", transparency=int(rgb[0, 0, 0]), pnginfo=told),
        _saved(alpha.convert("RGB"), "PNG", transparency=tuple(rgb[0, 0].tolist())),
        _saved(alpha.convert("LA"), "TIFF"),
        _saved(alpha, "TIFF", tiffinfo={338: 1}),
        _saved(alpha.convert("1"), "TIFF", compression="group4"),
        _saved(alpha.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        _saved(alpha.convert("CMYK"), "JPEG", exif=turned),
        _saved(alpha.convert("F"), "TIFF"),
        _saved(Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "PNG"),
        _saved(alpha.convert("LAB"), "TIFF"),
        _saved(alpha, "TIFF", save_all=True, append_images=[alpha], compression="tiff_deflate"),
        _saved(alpha, "WEBP", save_all=True, append_images=[alpha.rotate(90)]),
        _saved(alpha, "PNG", save_all=True, append_images=[alpha.rotate(90)]),
        b"P5 3 2 1000\n" + bytes(12),
        b"P3 2 1 7\n1 2 3 4 5 6\n",
        b"P4 9 2\n" + bytes(4),
    ]
    for file in others:
        yield bytes([options % 256]) + file
        options += 37


def _saved(made: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    made.save(out, format, **options)
    return out.getvalue()


# Mutations

_Mutate = Callable[[bytes, int], bytes]

_NUMBERS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 255, TILE - 1, TILE, TILE + 1, TILE + 17, 16383, 16384, 1 << 16, 1 << 24)
_HUGE = ((1 << 24) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


@dataclass
class _File:
    """A .hgc file taken apart; whatever is wrong with it."""

    version: int
    colour: int
    width: int
    height: int
    quality: int
    model: bytes
    sections: list[tuple[int, bytes]]
    behind: bytes

    @staticmethod
    def take_apart(data: bytes) -> _File | None:
        if len(data) < 21 or data[:4] != container.MAGIC:
            return None
        if data[4] == container.SHORT:
            return _File._take_apart_short(data)
        version, colour, width, height, quality, count, length = struct.unpack_from("<BBIIHIB", data, 4)
        place = 21 + length
        table = []
        for _ in range(min(count, LIMITS.sections + 1)):
            if place + 9 > len(data):
                break
            table.append(struct.unpack_from("<BI", data, place))
            place += 9
        place += 4
        sections = []
        for kind, size in table:
            sections.append((kind, data[place : place + size]))
            place += size
        return _File(version, colour, width, height, quality, data[21 : 21 + length], sections, data[place:])

    @staticmethod
    def _take_apart_short(data: bytes) -> _File | None:
        place = 6

        def number() -> int:
            nonlocal place
            value, shift = 0, 0
            while True:
                value |= (data[place] & 127) << shift
                place, shift = place + 1, shift + 7
                if data[place - 1] < 128:
                    return value & 0xFFFFFFFF  # what a long header can hold, too

        try:
            width, height, quality = number(), number(), number()
            count, length = data[place : place + 2]
            place += 2 + (length & 127)
            model = (b"hourglass-" if length & 128 else b"") + data[place - (length & 127) : place]
            table = []
            for _ in range(count):
                place += 1
                table.append((data[place - 1], number()))
                place += 4
        except (IndexError, ValueError):
            return None
        place += 4
        sections = []
        for kind, size in table:
            sections.append((kind, data[place : place + size]))
            place += size
        return _File(container.SHORT, data[5], width, height, quality & 0xFFFF, model, sections, data[place:])

    def _put_together_short(self) -> bytes:
        def number(value: int) -> bytes:
            return (bytes([value & 127 | 128]) + number(value >> 7)) if value > 127 else bytes([value])

        family = self.model.startswith(b"hourglass-")
        model = self.model[10 * family :][:127]
        head = container.MAGIC + bytes([container.SHORT, self.colour])
        head += number(self.width) + number(self.height) + number(self.quality)
        head += bytes([min(len(self.sections), 255), len(model) | family << 7]) + model
        for kind, part in self.sections[:255]:
            head += bytes([kind]) + number(len(part)) + struct.pack("<I", zlib.crc32(part))
        return b"".join([head, struct.pack("<I", zlib.crc32(head)), *(part for _, part in self.sections), self.behind])

    def put_together(self) -> bytes:
        if self.version == container.SHORT:
            return self._put_together_short()
        model = self.model[:255]
        numbers = self.version, self.colour, self.width, self.height, self.quality, len(self.sections), len(model)
        head = container.MAGIC + struct.pack("<BBIIHIB", *numbers) + model
        head += b"".join(struct.pack("<BII", kind, len(part), zlib.crc32(part)) for kind, part in self.sections)
        return b"".join([head, struct.pack("<I", zlib.crc32(head)), *(part for _, part in self.sections), self.behind])

    def fit(self) -> None:
        """As many tiles as the size has, where these are few; the last one is repeated."""
        tiles = math.prod(TILES.shape(self.width, self.height))
        if not 1 <= tiles <= 6:
            return
        for kind in (CODE, ALPHA):
            found = [section for section in self.sections if section[0] == kind]
            if found:
                others = [section for section in self.sections if section[0] != kind]
                self.sections = others + (found + [found[-1]] * tiles)[:tiles]


def _change_size(file: _File, rng: random.Random, _: _Mutate) -> None:
    numbers = _NUMBERS + _HUGE * (rng.random() < 0.1)
    for name in rng.choice((["width"], ["height"], ["width", "height"])):
        value = rng.choice(numbers) if rng.random() < 0.5 else getattr(file, name) + rng.randint(-9, 9)
        setattr(file, name, max(value, 0) & 0xFFFFFFFF)
    if rng.random() < 0.8:
        file.fit()


def _change_field(file: _File, rng: random.Random, mutate: _Mutate) -> None:
    match rng.randrange(8):
        case 0:
            file.version = rng.choice((container.LONG, container.SHORT, rng.randrange(256)))
        case 1:
            file.colour = rng.choice((0, 1, 1, 3, 3, 2, 4, 255))
        case 2:
            file.model = rng.choice((b"", codec().model.encode(), mutate(file.model, 255)))
        case 3:
            file.behind = mutate(file.behind, 20)
        case 4:
            file.colour ^= 2
        case _:
            file.quality = rng.choice((0, 1, 5000, 9999, 10000, 10001, 65535, rng.randrange(10001)))


def _change_payload(file: _File, rng: random.Random, mutate: _Mutate) -> None:
    if file.sections:
        number = rng.randrange(len(file.sections))
        kind, part = file.sections[number]
        # Tiles: the checksum of the symbols and the width stay as they are, most of the time.
        fixed = 0 if kind != CODE else rng.choice((0, 4, 5, 5))
        part = part[:fixed] + mutate(part[fixed:], len(part) + 24)
        if kind == CODE and rng.random() < 0.7:
            part += bytes(-(len(part) - 5) % 4)
        file.sections[number] = kind, part


def _change_metadata(file: _File, rng: random.Random, mutate: _Mutate) -> None:
    kind = rng.choice(_METADATA)
    held = dict(file.sections).get(kind, b"")
    try:
        content = zlib.decompressobj().decompress(held[4:], 1 << 16)
    except zlib.error:
        content = b""
    if kind == EXIF and not content:
        content = _metadata().exif
    content = mutate(content, len(content) + 24)
    packed = container.deflate(content)
    if rng.random() < 0.2:
        length = rng.choice((0, 1, max(len(content) - 1, 0), 1 << 16, (1 << 32) - 1))
        packed = struct.pack("<I", length) + packed[4:]
    file.sections = [section for section in file.sections if section[0] != kind] + [(kind, packed)]


def _change_sections(file: _File, rng: random.Random, _: _Mutate) -> None:
    sections = file.sections
    kind = rng.choice((CODE, ALPHA, LOSSLESS, ICC, EXIF, XMP, IPTC, 200, 99))
    if not sections or rng.random() < 0.2:
        sections.append((kind, rng.randbytes(rng.randrange(9))))
        return
    here, there = rng.randrange(len(sections)), rng.randrange(len(sections))
    match rng.randrange(4):
        case 0:
            sections[here], sections[there] = sections[there], sections[here]
        case 1:
            del sections[here]
        case 2:
            sections.insert(there, sections[here])
        case 3:
            sections[here] = kind, sections[here][1]


def _change_stored(file: _File, rng: random.Random, mutate: _Mutate) -> None:
    """Another picture where alpha, or a picture without loss, is stored."""
    places = [number for number, (kind, _) in enumerate(file.sections) if kind in (ALPHA, LOSSLESS)]
    if not places:
        file.sections += [(ALPHA, b"\x80")] * sum(kind == CODE for kind, _ in file.sections)
        return
    number = rng.choice(places)
    width, height = min(file.width, 2 * TILE), min(file.height, 2 * TILE)
    if rng.random() < 0.2:
        width, height = width + rng.randint(-1, 1), height + rng.randint(-1, 1)
    if min(width, height) < 1 or width * height > LIMITS.pixels or rng.random() < 0.2:
        part = rng.randbytes(rng.randrange(6))
    else:
        format = rng.choice(("PNG", "WEBP", "WEBP", "GIF", "TIFF"))
        mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"))
        noise = Image.frombytes("L", (width, height), rng.randbytes(width * height))
        try:
            made = noise.convert("RGBA").convert(mode)
            more: dict[str, object] = {"lossless": rng.random() < 0.7} if format == "WEBP" else {}
            if rng.random() < 0.2:
                more |= {"save_all": True, "append_images": [made.copy()]}
            if rng.random() < 0.2:
                more |= {"exif": _metadata().exif, "icc_profile": b"profile"}
            part = _saved(made, format, **more)
        except (OSError, ValueError, struct.error):
            part = b"nothing"
    if rng.random() < 0.2:
        part = mutate(part, len(part) + 8)
    file.sections[number] = file.sections[number][0], part


_CHANGES = (
    _change_size,
    _change_field,
    *[_change_payload] * 3,
    _change_metadata,
    _change_sections,
    _change_stored,
)


def mutate(target: str, data: bytes, most: int, seed: int, plain: _Mutate) -> bytes:
    """Another input made of `data`. plain: libFuzzer's own mutation."""
    rng = random.Random(seed)
    front = _FRONTS[target]
    options, rest = data[:front].ljust(front, b"\0"), data[front:]
    if front and rng.random() < 0.15:
        options = rng.randbytes(front)
    if target == "picture":
        rest = plain(rest, most - front)
        return options + (_right_png(rest) if rng.random() < 0.8 else rest)
    file = _File.take_apart(rest)
    if file is None or rng.random() < 0.1:
        return options + plain(rest, most - front)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_CHANGES)(file, rng, plain)
    return (options + file.put_together())[:most]


def _right_png(data: bytes) -> bytes:
    """A PNG with the checksums of its chunks made right."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    out, place = bytearray(data), 8
    while place + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, place)
        end = place + 8 + length
        if end + 4 > len(out):
            break
        struct.pack_into(">I", out, end, zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def main() -> None:
    target = sys.argv[1].lstrip("-") if len(sys.argv) > 1 else ""
    if target not in TARGETS:
        names = ", ".join(f"--{name}" for name in TARGETS)
        raise SystemExit(f"give a target first: {names}; then libFuzzer's arguments")
    folders = [Path(argument) for argument in sys.argv[2:] if not argument.startswith("-")]
    if folders and not folders[0].exists():
        folders[0].mkdir(parents=True)
        for number, seed in enumerate(seeds(target)):
            (folders[0] / f"seed-{number}").write_bytes(seed)
    codec().warm_up()  # no run pays for loading the model
    # libFuzzer starts this again for -merge, as one line of shell.
    program = f"{sys.executable} {Path(__file__).resolve()}"
    atheris.Setup(
        [program, *sys.argv[1:]],
        lambda data: run(target, data),
        custom_mutator=lambda data, most, seed: mutate(target, data, most, seed, atheris.Mutate),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
