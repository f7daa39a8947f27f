"""Whatever people have becomes a picture with its meaning kept, or a clear error; what is lost is said."""

from __future__ import annotations

import io
import struct
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from hourglass.codec import Limits, avif, errors, image, reader, strips, watch
from hourglass.codec.image import Metadata, Picture

IMAGES = Path(__file__).parent / "images"
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d" dc:title="\xc3\xa4"/></x:xmpmeta>'
IPTC = b"\x1c\x02\x78\x00\x05Crash\x1c\x02\x50\x00\x02Me"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def _profile(space: bytes, gamma: float) -> bytes:
    """A small ICC profile: grey, or RGB with the primaries of Adobe RGB."""
    curve = b"curv" + bytes(4) + struct.pack(">LH", 1, round(gamma * 256)) + bytes(2)

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3l", *(round(v * 65536) for v in values))

    text = b"desc" + bytes(4) + struct.pack(">L", 5) + b"test\0" + bytes(78 + 1)
    tags = {b"desc": text, b"wtpt": xyz(0.9642, 1.0, 0.8249), b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(0.60974, 0.31111, 0.01947), b"gXYZ": xyz(0.20528, 0.62567, 0.06087)}
        tags |= {b"bXYZ": xyz(0.14919, 0.06322, 0.74457), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, body = struct.pack(">L", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">LL", start + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    head = struct.pack(">L4sL4s4s4s", start + len(body), b"none", 0x02200000, b"mntr", space, b"XYZ ")
    head = (head + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp").ljust(68, b"\0")
    return (head + struct.pack(">3l", 63190, 65536, 54061)).ljust(128, b"\0") + table + body


WIDE = _profile(b"RGB ", 2.2)
GREY = _profile(b"GRAY", 1.8)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(IMAGES / "motocross.png").convert("RGB").resize((48, 32))


def _file(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    exif.get_ifd(0x8825)[1] = "N"
    return bytes(exif.tobytes()).removeprefix(b"Exif\0\0")


def _tags(exif: bytes) -> dict[int, Any]:
    """What EXIF says, without the layout that each format gives it; orientation 1 is as none."""
    read = Image.Exif()
    read.load(exif)
    tags: dict[int, Any] = {tag: value for tag, value in read.items() if tag not in (0x8769, 0x8825)}
    assert tags.pop(0x0112, 1) == 1
    return tags | {ifd: {k: v for k, v in read.get_ifd(ifd).items() if v is not None} for ifd in (0x8769, 0x8825)}


def _turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    return {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 7: np.rot90(pixels.swapaxes(0, 1), 2), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip


def _alpha(source: image.ImageSource) -> NDArray[np.uint8]:
    alpha = image.load(source).alpha
    assert alpha is not None
    return alpha


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def _png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG from filtered rows."""
    header = struct.pack(">LLBBBBB", width, height, depth, kind, 0, 0, 0)
    body = b"".join(_chunk(*chunk) for chunk in chunks)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            body,
            _chunk(b"IDAT", zlib.compress(rows)),
            _chunk(b"IEND", b""),
        )
    )


# Pixels


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_formats_in_and_out(format: str, mode: str, picture: Image.Image) -> None:
    pixels = np.asarray(picture.convert(mode)).copy()
    if mode.endswith("A"):
        pixels[:, :, -1] = np.arange(48)[None] * 5
    if mode.endswith("A") and format in ("BMP", "PPM", "JPEG"):
        with pytest.warns(errors.LossWarning, match=f"{format} holds no transparency; it is put on white"):
            back = image.load(image.write(pixels, format))
        expected = image.load(pixels)
        assert expected.alpha is not None
        pixels = image.on_white(expected.colour, expected.alpha)
    else:
        back = image.load(image.write(pixels, format))
    if not mode.startswith("L") or (format != "WEBP" and (format, mode) != ("AVIF", "LA")):  # they become RGB
        assert back.grey == mode.startswith("L")
    if format in ("WEBP", "AVIF") and mode.startswith("L") and not back.grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("RGBA" if mode == "LA" else "RGB"))
    assert back.losses == ()
    assert back.pixels.shape == pixels.shape
    assert back.colour.flags.c_contiguous
    if format in ("JPEG", "AVIF"):
        assert abs(back.pixels.astype(int) - pixels).mean() < 6
    else:
        assert np.array_equal(back.pixels, pixels)


def test_arrays(picture: Image.Image) -> None:
    colour = np.asarray(picture)
    alpha = np.full((32, 48, 1), 7, np.uint8)
    got = image.load(np.concatenate((colour, alpha), axis=2))
    assert np.array_equal(got.colour, colour)
    assert got.alpha is not None
    assert (got.alpha == 7).all()
    assert (got.width, got.height, got.grey) == (48, 32, False)
    assert got.pixels.shape == (32, 48, 4)
    for grey in (colour[:, :, 0], colour[:, :, :1]):
        assert np.array_equal(image.load(grey).colour, colour[:, :, 0])
        assert np.array_equal(image.read(grey), np.repeat(colour[:, :, :1], 3, axis=2))
    opaque = image.load(np.dstack((colour[:, :, 0], np.full((32, 48), 255, np.uint8))))
    assert (opaque.alpha, opaque.grey) == (None, True)


def test_modes_without_loss(picture: Image.Image) -> None:
    grey = picture.convert("L")
    bilevel = grey.convert("1")
    palette = picture.quantize(16)
    greys = grey.quantize(16)
    expected = {
        "L": (grey, np.asarray(grey)),
        "1": (bilevel, np.asarray(bilevel) * np.uint8(255)),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "grey P": (greys, np.asarray(greys.convert("RGB"))[:, :, 0]),
        "opaque": (picture.convert("RGBA"), np.asarray(picture)),
    }
    for name, (source, pixels) in expected.items():
        for format in ("PNG", "TIFF", "pillow"):
            got = image.load(source if format == "pillow" else _file(source, format))
            assert np.array_equal(got.colour, pixels), (name, format)
            assert (got.alpha, got.losses) == (None, ()), (name, format)


def test_read_is_rgb_on_white(picture: Image.Image) -> None:
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    with pytest.warns(errors.LossWarning, match="transparent"):
        got = image.read(_file(clear, "PNG"))
    alpha = np.asarray(clear)[:, :, 3:].astype(float) / 255
    expected = np.asarray(picture) * alpha + 255 * (1 - alpha)
    assert abs(got - expected).max() <= 0.5 + 1e-6


def test_palette_with_alpha_and_premultiplied(picture: Image.Image) -> None:
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda v: max(v, 1)))
    values = np.asarray(clear)
    premultiplied = Image.merge("RGBA", clear.convert("RGBa").split())
    for compression in ("raw", "tiff_lzw"):
        data = bytearray(_file(premultiplied, "TIFF", compression=compression))
        at = data.index(struct.pack("<HHLH", 338, 3, 1, 2))
        data[at + 8] = 1  # associated alpha
        got = image.load(bytes(data)).pixels.astype(int)
        assert np.array_equal(got[:, :, 3], values[:, :, 3])
        step = 255 / np.maximum(values[:, :, 3:].astype(float), 1)
        assert (abs(got - values)[:, :, :3] <= step + 1).all()
    for kept in (clear.convert("RGBa"), clear.convert("LA").convert("La")):
        assert np.array_equal(_alpha(kept), values[:, :, 3])
    palette = picture.quantize(16)
    keyed = _file(palette, "PNG", transparency=bytes(range(0, 160, 10)))
    assert np.array_equal(_alpha(keyed), np.asarray(palette) * 10)
    one = _alpha(_file(palette, "GIF", transparency=3))
    assert np.array_equal(one, np.where(np.asarray(Image.open(io.BytesIO(_file(palette, "GIF")))) == 3, 0, 255))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_colour_key(depth: int) -> None:
    row = {1: b"\x50", 2: b"\x1b", 4: b"\x12\x34", 8: b"\1\2\3\4", 16: b"\0\1\0\2\1\2\0\2"}[depth]
    key = {1: 1, 2: 2, 4: 2, 8: 2, 16: 2}[depth]
    got = image.load(_png(4, 1, depth, 0, b"\0" + row, (b"tRNS", struct.pack(">H", key))))
    values = {1: [0, 1, 0, 1], 2: [0, 1, 2, 3], 4: [1, 2, 3, 4], 8: [1, 2, 3, 4], 16: [1, 2, 258, 2]}[depth]
    assert got.grey
    assert got.alpha is not None
    assert got.alpha.tolist() == [[0 if v == key else 255 for v in values]]


def test_rgb_colour_key() -> None:
    got = image.load(_png(2, 1, 8, 2, b"\0\1\2\3\1\2\4", (b"tRNS", b"\0\1\0\2\0\3")))
    assert got.alpha is not None
    assert got.alpha.tolist() == [[0, 255]]
    assert got.colour.tolist() == [[[1, 2, 3], [1, 2, 4]]]
    deep = _png(2, 1, 16, 2, b"\0\1\0\2\0\3\0\1\0\2\0\4\0", (b"tRNS", b"\1\0\2\0\3\0"))
    assert image.load(deep).pixels.tolist() == [[[1, 2, 3, 0], [1, 2, 4, 255]]]


def test_more_than_eight_bits(picture: Image.Image) -> None:
    grey = np.asarray(picture.convert("L"))
    deep = grey.astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        got = image.load(_file(Image.fromarray(deep), format))
        assert np.array_equal(got.colour, grey)
        assert got.losses[0].endswith("has samples of 16 bits; they are reduced to 8 bits")
    assert image.load(_png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 128, 129))).colour.tolist() == [[0, 1]]  # rounded
    for kind, samples in ((2, 3), (4, 2), (6, 4)):
        row = b"".join(struct.pack(">H", 257 * v) for v in range(10, 10 + samples))
        got = image.load(_png(1, 1, 16, kind, b"\0" + row))
        assert got.pixels.tolist() == [[list(range(10, 10 + samples))]]
        assert "16 bits" in got.losses[0]
    ppm = b"P6 1 1 65535\n" + struct.pack(">3H", 257, 514, 65535)
    assert image.load(ppm).colour.tolist() == [[[1, 2, 255]]]
    assert "16 bits" in image.load(ppm).losses[0]
    few = image.load(b"P5 4 1 3\n\0\1\2\3")
    assert (few.colour.tolist(), few.losses) == ([[0, 85, 170, 255]], ())
    assert image.load(b"P2 2 1 7\n0 # none\n7\n").colour.tolist() == [[0, 255]]
    assert image.load(b"P3 1 1 255 1 2\n3").colour.tolist() == [[[1, 2, 3]]]
    for bad in (b"P2 2 1 7\n0 8\n", b"P2 2 1 7\n0\n", b"P2 2 1 7\n0 x\n", b"P5 2 1 7\n\0", b"P5 2 1 7\n\0\x08"):
        with pytest.raises(errors.ImageError):
            image.load(bad)
    data = bytearray(_file(Image.fromarray(deep), "TIFF"))
    at = data.index(struct.pack("<HHLH", 262, 3, 1, 1))
    data[at + 8] = 0  # white is zero
    assert np.array_equal(image.load(bytes(data)).colour, 255 - grey)


def test_integers_and_floats(picture: Image.Image) -> None:
    grey = np.asarray(picture.convert("L"))
    for values in (grey.astype(np.float32) / 255, grey.astype(np.float32)):
        got = image.load(_file(Image.fromarray(values), "TIFF"))
        assert np.array_equal(got.colour, grey)
        assert "float samples; they are reduced" in got.losses[0]
    got = image.load(Image.fromarray(grey.astype(np.int32) * 257))
    assert np.array_equal(got.colour, grey)
    bad = [np.nan, -1.0, 300.0]
    for value, match in zip(bad, ("not finite", "from -1 to", "expected 0 to 255"), strict=True):
        values = grey.astype(np.float32)
        values[0, 0] = value
        with pytest.raises(errors.ImageError, match=match):
            image.load(_file(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr", "HSV"])
def test_other_colour_spaces(mode: str, picture: Image.Image) -> None:
    if mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", mode)
        source = ImageCms.applyTransform(picture, transform)
        assert source is not None
    else:
        source = picture.convert(mode)
    got = image.load(source)
    assert abs(got.colour.astype(int) - np.asarray(picture)).mean() < 4
    assert f"has {mode} samples; they are converted to" in got.losses[0]
    if mode in ("CMYK", "LAB"):
        assert np.array_equal(image.load(_file(source, "TIFF")).colour, got.colour)


# Frames


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_frames(format: str, picture: Image.Image) -> None:
    frames = [
        picture.quantize(8).convert("RGB").transpose(t)
        for t in (Image.Transpose.ROTATE_180, *list(Image.Transpose)[:2])
    ]
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = _file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    for n, frame in enumerate(frames):
        got = image.load(data, frame=n)
        assert got.losses == ()
        assert abs(got.colour.astype(int) - np.asarray(frame)).mean() < (12 if format == "AVIF" else 0.01)
    first = image.load(data)
    assert np.array_equal(first.colour, image.load(data, frame=0).colour)
    assert first.losses[0].endswith("has 3 frames; only the first is used (--frame N picks another)")
    with pytest.raises(errors.InvalidArgument, match=r"frame is 3; image data \(\d+ bytes\) has 3, numbered from 0"):
        image.load(data, frame=3)
    with pytest.raises(errors.InvalidArgument, match="frame is -1"):
        image.load(data, frame=-1)


def test_second_picture_of_a_phone_is_no_frame(picture: Image.Image) -> None:
    data = _file(picture, "MPO", save_all=True, append_images=[picture])
    assert image.load(data).losses == ()
    with pytest.raises(errors.InvalidArgument, match="has 1, numbered from 0"):
        image.load(data, frame=1)


# Metadata


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_once(format: str, orientation: int, picture: Image.Image) -> None:
    exact: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95, "subsampling": 0},
        "AVIF": {"quality": 95},
    }
    data = _file(picture, format, exif=b"Exif\0\0" + _exif(orientation), **exact.get(format, {}))
    got = image.load(data)
    plain = image.load(_file(picture, format, **exact.get(format, {}))).colour
    assert np.array_equal(got.colour, _turned(plain, orientation))
    assert _tags(got.metadata.exif)[0x010F] == "Maker"
    again = image.load(image.write(got, "PNG"))
    assert np.array_equal(again.colour, got.colour)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_orientation_of_xmp(format: str, picture: Image.Image) -> None:
    def saved(**options: Any) -> Picture:
        return image.load(_file(picture, format, **options, **({"lossless": True} if format == "WEBP" else {})))

    def xmp(orientation: int) -> dict[str, Any]:
        if format != "PNG":
            return {"xmp": XMP % orientation}
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", (XMP % orientation).decode(), zip=True)
        return {"pnginfo": info}

    plain = saved().colour
    alone = saved(**xmp(6))
    assert np.array_equal(alone.colour, _turned(plain, 6))
    assert alone.metadata.xmp == XMP % 1
    both = saved(**xmp(6), exif=b"Exif\0\0" + _exif(3))  # EXIF goes first
    assert np.array_equal(both.colour, _turned(plain, 3))
    assert both.metadata.xmp == XMP % 1


@pytest.mark.parametrize("value", [0, 9, 99, 65535])
def test_orientation_out_of_range(value: int, picture: Image.Image) -> None:
    got = image.load(_file(picture, "PNG", exif=_exif(value)))
    assert np.array_equal(got.colour, np.asarray(picture))
    assert got.losses == ()
    assert _tags(got.metadata.exif)[0x010F] == "Maker"


@pytest.mark.parametrize("exif", [b"MM\0*", b"nonsense", _exif(6)[:20], b"II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_dropped(format: str, exif: bytes, picture: Image.Image) -> None:
    data = _file(picture, format, exif=b"Exif\0\0" + exif)
    got = image.load(data)
    assert (got.width, got.height) == picture.size
    assert got.metadata.exif == b""
    assert got.losses == (
        f"image data ({len(data)} bytes) has EXIF of {len(exif)} bytes that cannot be read; it is dropped",
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "PPM", "BMP"])
@pytest.mark.parametrize("grey", [False, True])
def test_metadata_round_trip(format: str, grey: bool, picture: Image.Image) -> None:
    given = Metadata(icc=GREY if grey else WIDE, exif=_exif(1), xmp=XMP % 1, iptc=IPTC)
    colour = np.asarray(picture.convert("L") if grey else picture)
    held = {"JPEG": "icc exif xmp iptc", "TIFF": "icc exif xmp iptc", "PPM": "", "BMP": ""}.get(
        format, "icc exif xmp"
    ).split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = image.write(Picture(colour, metadata=given), format)
    assert [w.category for w in caught] == [errors.LossWarning] * (4 - len(held))
    if grey and format == "WEBP":
        held.remove("icc")  # it becomes RGB, and sRGB
        colour = image.load(
            Image.open(io.BytesIO(image.write(Picture(colour, metadata=given), "TIFF"))), srgb=True
        ).colour
        assert np.array_equal(image.load(data).colour[:, :, 0], colour)
    got = image.load(data)
    assert got.losses == ()
    for kind in held:
        if kind == "exif":
            assert _tags(got.metadata.exif) == _tags(given.exif)
        else:
            assert getattr(got.metadata, kind) == getattr(given, kind)
    assert {kind for kind in ("icc", "exif", "xmp", "iptc") if getattr(got.metadata, kind)} == set(held)
    again = image.load(data, keep="icc")
    assert again.metadata == Metadata(icc=got.metadata.icc)
    assert np.array_equal(again.colour, got.colour)
    assert image.load(data, keep="none").metadata == Metadata()


def test_metadata_too_large_for_a_format(picture: Image.Image) -> None:
    big = Metadata(xmp=b"x" * 70000, iptc=b"y" * 70000)
    with pytest.warns(errors.LossWarning, match=r"JPEG holds \d+ bytes of (XMP|IPTC); 70000 bytes are dropped"):
        data = image.write(Picture(np.asarray(picture), metadata=big), "JPEG")
    assert image.load(data).metadata == Metadata()
    with pytest.warns(errors.LossWarning, match="EXIF cannot be written as TIFF"):
        image.write(Picture(np.asarray(picture), metadata=Metadata(exif=b"II*\0\xff\xff\xff\xff")), "TIFF")


def test_extended_xmp_is_said(picture: Image.Image) -> None:
    part = b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + b"<more/>"
    data = _file(picture, "JPEG", xmp=XMP % 1, extra=b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part)
    got = image.load(data)
    assert got.metadata.xmp == XMP % 1
    assert "XMP in more than one part" in got.losses[0]


def test_old_text_exif_of_a_png(picture: Image.Image) -> None:
    """ImageMagick wrote EXIF and IPTC as hexadecimal text before PNG had a chunk for it."""
    info = PngImagePlugin.PngInfo()
    for name, content in (("exif", b"Exif\0\0" + _exif(6)), ("iptc", IPTC)):
        info.add_text(f"Raw profile type {name}", f"\n{name}\n{len(content):8}\n{content.hex()}\n", zip=True)
    got = image.load(_file(picture, "PNG", pnginfo=info))
    assert np.array_equal(got.colour, _turned(np.asarray(picture), 6))
    assert _tags(got.metadata.exif)[0x010F] == "Maker"
    assert got.metadata.iptc == IPTC


def test_profiles(picture: Image.Image) -> None:
    pixels = np.asarray(picture)
    kept = image.load(_file(picture, "PNG", icc_profile=WIDE))
    assert np.array_equal(kept.colour, pixels)
    assert kept.metadata.icc == WIDE
    for converted in (
        image.load(_file(picture, "PNG", icc_profile=WIDE), **how) for how in ({"srgb": True}, {"keep": "none"})
    ):
        assert converted.metadata == Metadata()
        assert 1 < abs(converted.colour.astype(int) - pixels).mean() < 40
        assert np.array_equal(converted.colour, image.read(_file(picture, "PNG", icc_profile=WIDE)))
    same = image.load(_file(picture, "PNG", icc_profile=SRGB), srgb=True)
    assert np.array_equal(same.colour, pixels)
    grey = picture.convert("L")
    got = image.load(_file(grey, "PNG", icc_profile=GREY), srgb=True)
    assert got.grey
    assert 1 < abs(got.colour.astype(int) - np.asarray(grey)).mean() < 40
    clear = np.dstack((pixels, np.full(pixels.shape[:2], 9, np.uint8)))
    turned = image.load(_file(Image.fromarray(clear), "PNG", icc_profile=WIDE), srgb=True)
    assert np.array_equal(turned.colour, image.read(_file(picture, "PNG", icc_profile=WIDE)))
    assert turned.alpha is not None


@pytest.mark.parametrize("profile", [LAB, b"garbage", GREY, WIDE[:200], WIDE[:128] + bytes(len(WIDE) - 128)])
def test_profile_that_does_not_fit(profile: bytes, picture: Image.Image) -> None:
    ways: list[dict[str, Any]] = [{}, {"srgb": True}]
    for how in ways:
        got = image.load(_file(picture, "PNG", icc_profile=profile), **how)
        assert np.array_equal(got.colour, np.asarray(picture))
        assert got.metadata.icc == b""
        assert "has an ICC profile that cannot be used" in got.losses[0]
    assert "it is for RGB pixels" in image.load(_file(picture.convert("L"), "PNG", icc_profile=WIDE)).losses[0]


def test_png_colours_without_profile() -> None:
    def losses(*chunks: tuple[bytes, bytes]) -> str:
        return " ".join(image.load(_png(1, 1, 8, 0, b"\0\7", *chunks)).losses)

    gamma = (b"gAMA", struct.pack(">L", 100000))
    assert "has gamma 1 other than sRGB's" in losses(gamma)
    assert losses((b"gAMA", struct.pack(">L", 45455))) == ""
    assert losses(gamma, (b"sRGB", b"\0")) == ""
    assert "chromaticities" in losses(
        (b"cHRM", struct.pack(">8L", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600))
    )
    assert "colour code 9/16" in losses((b"cICP", b"\x09\x10\0\1"))


# Limits and hostile files


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_no_picture(content: bytes) -> None:
    with pytest.raises(errors.ImageError, match=rf"image data \({len(content)} bytes\)"):
        image.load(content)


@pytest.mark.parametrize("format", ["TGA", "ICO", "JPEG2000", "PCX"])
def test_formats_that_are_not_read(format: str, picture: Image.Image) -> None:
    with pytest.raises(errors.ImageError, match=r"no picture format that can be read \(JPEG, PNG, WEBP, AVIF"):
        image.load(_file(picture, format))


@pytest.mark.parametrize(
    "format", ["JPEG", "JPEG progressive", "PNG", "WEBP", "TIFF", "TIFF lzw", "GIF", "BMP", "PPM", "AVIF"]
)
def test_truncation_gives_the_picture_or_an_error(format: str, picture: Image.Image) -> None:
    kind, _, how = format.partition(" ")
    ways: dict[str, dict[str, Any]] = {"progressive": {"progressive": True}, "lzw": {"compression": "tiff_lzw"}}
    options = ways.get(how, {})
    whole = _file(picture, kind, **options)
    pixels = image.load(whole).pixels
    cuts = {len(whole) * n // 50 for n in range(50)} | {len(whole) - n for n in range(1, 20)}
    for cut in sorted(cuts):
        try:
            got = image.load(whole[:cut])
        except errors.ImageError:
            continue
        assert np.array_equal(got.pixels, pixels), cut


def test_bit_flips_of_a_png_are_found(picture: Image.Image) -> None:
    whole = _file(picture, "PNG")
    pixels = image.load(whole).pixels
    for at in range(8, len(whole), 97):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        try:
            got = image.load(bytes(flipped))
        except errors.HourglassError:
            continue
        assert np.array_equal(got.pixels, pixels), at


def test_limits_come_before_decoding(picture: Image.Image) -> None:
    data = _file(picture, "PNG")
    with pytest.raises(errors.LimitError, match="48x32 = 1536 pixels; the limit is 1000"):
        image.load(_file(picture, "BMP")[:60], Limits(pixels=1000))  # the pixels are not even there
    with pytest.raises(errors.LimitError, match="48x32 = 1536 pixels; the limit is 1000"):
        image.load(data, Limits(pixels=1000))
    with pytest.raises(errors.LimitError, match="limit is 40 a side"):
        image.load(np.zeros((2, 41, 3), np.uint8), Limits(side=40))
    assert image.load(np.zeros((1, 100_000), np.uint8)).width == 100_000
    with pytest.raises(errors.LimitError, match=r"bytes of metadata; the limit is 500 \(Limits.metadata_bytes\)"):
        image.load(_file(picture, "JPEG", exif=b"Exif\0\0" + _exif(1), icc_profile=WIDE), Limits(metadata_bytes=500))


def _bombs() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(50_000_000), 9)
    text = b"Comment\0\0" + zeros
    dot = _png(1, 1, 8, 0, b"\0\7")
    webp = b"VP8X" + struct.pack("<L", 10) + bytes(4) + b"\xfe\x3f\0" * 2 + b"VP8L" + struct.pack("<L", 8) + bytes(8)
    page = _file(Image.fromarray(np.array([[7]], np.uint8)), "TIFF")
    page = page[8 : 8 + 2 + 12 * page[8]]
    pages = b"".join(page + struct.pack("<L", 8 + (len(page) + 4) * (n + 1)) for n in range(20_000))
    return {
        "pages": b"II*\0\x08\0\0\0" + pages,
        "pixels": _png(30000, 30000, 8, 2, b"", (b"tEXt", b"a\0b")),
        "sides": _png(1 << 30, 1, 8, 0, b""),
        "text": _png(1, 1, 8, 0, b"\0\7", *[(b"zTXt", text)] * 20),
        "XMP": _png(1, 1, 8, 0, b"\0\7", (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros)),
        "profile": _png(1, 1, 8, 0, b"\0\7", (b"iCCP", b"a\0\0" + zeros)),
        "IDAT": dot.replace(_chunk(b"IDAT", zlib.compress(b"\0\7")), _chunk(b"IDAT", zeros)),
        "chunks": dot[:33] + _chunk(b"tEXt", b"a\0b") * 100_000 + dot[33:],
        "EXIF": _png(1, 1, 8, 0, b"\0\7", (b"eXIf", bytes(17 << 20))),
        "WebP": b"RIFF" + struct.pack("<L", len(webp) + 4) + b"WEBP" + webp,
        "GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08" + b"\xff" * 256,
        "frames": _png(1, 1, 8, 0, b"\0\7", (b"acTL", struct.pack(">LL", 1 << 30, 0)),
                       (b"fcTL", struct.pack(">5L2H2B", 0, 1, 1, 0, 0, 1, 1, 0, 0))),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_bombs()))
def test_bombs(name: str) -> None:
    data = _bombs()[name]
    started = time.process_time()
    try:
        got = image.load(data, frame=0 if name == "frames" else None)
    except (errors.ImageError, errors.LimitError):
        pass
    else:
        assert name == "pages" or got.colour.tolist() == [[7 if name != "IDAT" else 0]]
    assert time.process_time() - started < 2


@pytest.mark.parametrize("profile", [None, WIDE])
def test_bands_seam_nowhere(profile: bytes | None) -> None:
    # more than one band, and a height that they do not divide
    rng = np.random.default_rng(2)
    colour = rng.integers(0, 256, (1501, 1003, 3), np.uint8)
    data = _file(Image.fromarray(colour), "PNG", compress_level=1, icc_profile=profile)
    assert np.array_equal(image.load(data).colour, colour)
    if profile:
        made = image.load(data, srgb=True).colour
        strip = _file(Image.fromarray(colour[1030:1060]), "PNG", icc_profile=profile)
        assert np.array_equal(made[1030:1060], image.load(strip, srgb=True).colour)


def test_pillow_warns_nobody(picture: Image.Image) -> None:
    """Not in threads either, and its warnings are as before afterwards."""
    broken = _file(picture, "PNG", exif=b"Exif\0\0" + _exif(1)[:40])
    before = list(warnings.filters)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                image.load(broken)
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 0), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_of_another_shape(array: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"expected \(H, W\) or \(H, W, 1 to 4\) uint8"):
        image.load(array)
    with pytest.raises(errors.InvalidArgument, match=r"expected \(H, W, 3\) or \(H, W\) uint8"):
        Picture(array)


def test_other_arguments() -> None:
    dot = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(errors.InvalidArgument, match="image is a list"):
        image.read([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        image.read(IMAGES / "missing.png")
    with pytest.raises(errors.InvalidArgument, match=r"suffix '\.xyz'"):
        image.format_of("a.xyz")
    with pytest.raises(errors.InvalidArgument, match="keep is 'some'; expected one of all, icc, none"):
        image.load(dot, keep="some")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="expected one of"):
        image.write(dot, "GIF")
    with pytest.raises(errors.InvalidArgument, match="cannot be written as WEBP"):
        image.write(np.zeros((1, 20000, 3), np.uint8), "WEBP")
    with pytest.raises(errors.InvalidArgument, match="cannot be written as JPEG"):
        image.write(np.zeros((1, 70000), np.uint8), "JPEG")
    with pytest.raises(errors.InvalidArgument, match=r"4000x3100 = 12400000 pixels .* choose PNG or JPEG or AVIF or"):
        image.write(np.broadcast_to(np.uint8(7), (3100, 4000)), "WEBP")
    with pytest.raises(
        errors.InvalidArgument, match=r"20000x14000 = 280000000 .* readers take no more.* choose PNG or"
    ):
        image.write(np.broadcast_to(np.uint8(7), (14000, 20000)), "AVIF")
    with pytest.raises(errors.InvalidArgument, match="cannot be written as AVIF, which has 1 to 32768 a side"):
        image.write(np.broadcast_to(np.uint8(7), (1, 40000)), "AVIF")
    with pytest.raises(errors.InvalidArgument, match=r"alpha is an array \(3, 2\)"):
        Picture(dot, np.zeros((3, 2), np.uint8))


# Strips


def _write_strips(colour: NDArray[np.uint8], format: str, metadata: Metadata | None = None, rows: int = 7) -> bytes:
    out = io.BytesIO()
    with strips.StripWriter(out, format, colour.shape[1], colour.shape[0], colour.ndim == 2, metadata) as writer:
        for y in range(0, len(colour), rows):
            writer.write(colour[y : y + rows])
    return out.getvalue()


def _read_strips(path: Path, rows: int = 7, **options: Any) -> tuple[NDArray[np.uint8], Metadata, tuple[str, ...]]:
    opened = strips.open_strips(path, **options)
    assert opened is not None
    with opened:
        parts = []
        while len(part := opened.read(rows)):
            parts.append(part)
        whole = np.concatenate(parts)
        assert whole.shape == ((opened.height, opened.width) if opened.grey else (opened.height, opened.width, 3))
        return whole, opened.metadata, opened.losses


@pytest.mark.parametrize("format", sorted(strips.STRIP_WRITABLE))
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (301, 2), (997, 333)])
def test_strips_written(format: str, grey: bool, size: tuple[int, int]) -> None:
    width, height = size
    colour = np.random.default_rng(1).integers(0, 256, (height, width) if grey else (height, width, 3), np.uint8)
    got = image.load(_write_strips(colour, format))
    if format == "AVIF":  # has losses, of noise a little more than of a photograph
        assert got.colour.shape == colour.shape
        assert abs(got.colour.astype(int) - colour).mean() < 4
    else:
        assert np.array_equal(got.colour, colour)
    assert got.losses == ()


@pytest.mark.parametrize("format", ["PPM", "TIFF"])
@pytest.mark.parametrize("grey", [False, True])
def test_parts_written_in_any_order(format: str, grey: bool) -> None:
    colour = np.random.default_rng(1).integers(0, 256, (50, 70) if grey else (50, 70, 3), np.uint8)
    out = io.BytesIO(b"what stands before")
    out.seek(0, io.SEEK_END)
    with strips.StripWriter(out, format, 70, 50, grey) as writer:
        assert writer.by_parts
        for y, x in ((20, 30), (0, 0), (20, 0), (0, 30)):
            part = colour[y : y + (20 if y == 0 else 30), x : x + (30 if x == 0 else 40)]
            writer.put(x, y, part)
    if format == "PPM":  # of a TIFF the places are those of the whole file
        assert np.array_equal(image.load(out.getvalue()[18:]).colour, colour)
    out = io.BytesIO()
    with strips.StripWriter(out, format, 70, 50, grey) as writer:
        writer.put(35, 0, colour[:, 35:])
        for wrong in ((36, 0, colour[:, 35:]), (-1, 0, colour[:, 35:]), (0, 0, colour[None]), (0, 1, colour)):
            with pytest.raises(errors.InvalidArgument, match="expected uint8 within 70x50"):
                writer.put(*wrong)
        writer.put(0, 0, colour[:, :35])
    assert np.array_equal(image.load(out.getvalue()).colour, colour)
    with pytest.raises(errors.InvalidArgument, match="PNG is written by rows"):
        strips.StripWriter(io.BytesIO(), "PNG", 70, 50, grey).put(0, 0, colour)


@pytest.mark.parametrize("name", ["a.ppm", "a.pgm", "a.tif", "grey.tif", "big endian.tif"])
def test_parts_equal_the_whole(name: str, tmp_path: Path) -> None:
    """Without libvips too."""
    picture = Image.open(IMAGES / "parrots.png").convert("L" if name in ("a.pgm", "grey.tif") else "RGB")
    picture.save(tmp_path / name, **({"big_tiff": True} if name.startswith("big") else {}))
    whole = image.load(tmp_path / name)
    with strips.open_strips(tmp_path / name) or pytest.fail("no strips") as opened:
        assert opened.by_parts
        for x, y, width, height in ((0, 0, 768, 512), (767, 511, 1, 1), (100, 30, 333, 200)):
            assert np.array_equal(opened.part(x, y, width, height), whole.colour[y : y + height, x : x + width])
        assert np.array_equal(opened.read(99), whole.colour[:99])
        with pytest.raises(errors.InvalidArgument, match="part is 2x1 at 767,0; the picture has 768x512"):
            opened.part(767, 0, 2, 1)


def test_a_large_webp_takes_another_way(picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By libvips it is the same picture; above what Pillow can bear it is refused without it."""
    pytest.importorskip("pyvips")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    for number, (one, options) in enumerate(
        ((picture, {"quality": 70}), (picture, {"lossless": True}), (clear, {"quality": 70}), (clear, {"exact": True}))
    ):
        path = tmp_path / f"{number}.webp"
        one.save(path, exif=b"Exif\0\0" + _exif(6), xmp=XMP % 1, icc_profile=WIDE, **options)
        plain, srgb = image.load(path), image.load(path, srgb=True)
        with monkeypatch.context() as patched:
            patched.setattr(reader, "_LARGE_WEBP", 0)
            patched.setattr(reader, "_MOST_WEBP", 0)
            for source in (path, path.read_bytes()):
                for before, after in ((plain, image.load(source)), (srgb, image.load(source, srgb=True))):
                    assert np.array_equal(before.pixels, after.pixels)
                    assert before.metadata == after.metadata
            cut = path.read_bytes()[: path.stat().st_size * 2 // 3]
            with pytest.raises(errors.ImageError):
                image.load(cut)
            patched.setitem(sys.modules, "pyvips", None)  # as if it were not installed
            with pytest.raises(errors.LimitError, match=r"install libvips, pip install 'hourglass-codec\[large\]'"):
                image.load(path)


def test_strips_keep_metadata(picture: Image.Image) -> None:
    given = Metadata(WIDE, _exif(1), XMP % 1, IPTC)
    for format, kinds in (("PNG", ("icc", "exif", "xmp")), ("TIFF", ("icc", "xmp", "iptc")), ("PPM", ())):
        with pytest.warns(errors.LossWarning, match=f"{format} written by strips holds no"):
            got = image.load(_write_strips(np.asarray(picture), format, given))
        assert got.metadata == Metadata(**{kind: getattr(given, kind) for kind in kinds})
        assert np.array_equal(got.colour, np.asarray(picture))


def test_bigtiff_header() -> None:
    header = strips._tiff_header(40000, 40000, 3, Metadata(icc=WIDE))
    assert header[:4] == b"II+\0"
    with TiffImagePlugin.TiffImageFile(io.BytesIO(header)) as opened:
        assert opened.size == (40000, 40000)
        assert opened.info["icc_profile"] == WIDE
        offsets, counts = opened.tag_v2[273], opened.tag_v2[279]
    assert offsets[0] == len(header)
    assert sum(counts) == 40000 * 40000 * 3 == offsets[-1] + counts[-1] - offsets[0]


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.tif", "lzw.tif", "a.ppm", "grey.png", "grey.jpg", "a.pgm", "strips.tif"]
)
def test_strips_equal_the_whole(name: str, tmp_path: Path) -> None:
    if not name.endswith(("ppm", "pgm")):
        pytest.importorskip("pyvips")
    picture = Image.open(IMAGES / "parrots.png").convert("L" if name.startswith("grey") or name == "a.pgm" else "RGB")
    path = tmp_path / name
    if name == "strips.tif":
        path.write_bytes(_write_strips(np.asarray(picture), "TIFF"))
    else:
        picture.save(path, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    whole = image.load(path)
    got, metadata, losses = _read_strips(path, 100)
    assert np.array_equal(got, whole.colour)
    assert (metadata, losses) == (whole.metadata, whole.losses)


def test_strips_with_metadata_and_conversion(picture: Image.Image, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / "a.jpg"
    path.write_bytes(
        image.write(Picture(np.asarray(picture), metadata=Metadata(WIDE, _exif(1), XMP % 1, IPTC)), "JPEG")
    )
    for keep in ("all", "icc", "none"):
        whole = image.load(path, keep=keep)
        got, metadata, losses = _read_strips(path, keep=keep)
        assert np.array_equal(got, whole.colour)
        assert (metadata, losses) == (whole.metadata, whole.losses)


def test_what_must_be_read_whole(picture: Image.Image, tmp_path: Path) -> None:
    clear = picture.convert("RGBA")
    clear.putalpha(7)
    deep = Image.fromarray(np.zeros((2, 2), np.uint16))
    cases = {
        "turned.jpg": _file(picture, "JPEG", exif=b"Exif\0\0" + _exif(6)),
        "turned.tif": _file(picture, "TIFF", exif=_exif(6)),
        "progressive.jpg": _file(picture, "JPEG", progressive=True),
        "cmyk.jpg": _file(picture.convert("CMYK"), "JPEG"),
        "alpha.png": _file(clear, "PNG"),
        "alpha.tif": _file(clear, "TIFF"),
        "palette.png": _file(picture.quantize(9), "PNG"),
        "deep.png": _file(deep, "PNG"),
        "deep.tif": _file(deep, "TIFF"),
        "key.png": _png(1, 1, 8, 0, b"\0\7", (b"tRNS", b"\0\7")),
        "frames.png": _file(picture, "PNG", save_all=True, append_images=[clear.convert("RGB").rotate(180)]),
        "pages.tif": _file(picture, "TIFF", save_all=True, append_images=[picture]),
        "a.webp": _file(picture, "WEBP"),
        "a.gif": _file(picture, "GIF"),
        "deep.ppm": b"P6 1 1 65535\n123456",
        "nothing": b"nothing",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        assert strips.open_strips(tmp_path / name) is None, name


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "PPM"])
def test_strips_of_a_file_cut_short(format: str, tmp_path: Path) -> None:
    if format != "PPM":
        pytest.importorskip("pyvips")
    whole = image.write(image.load(IMAGES / "parrots.png"), format)
    path = tmp_path / "cut"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(errors.ImageError, match=r"cannot be decoded|cut short"):
        _read_strips(path)


@pytest.mark.parametrize("format", ["PNG", "TIFF lzw"])
def test_strips_of_a_damaged_file(format: str, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    kind, _, how = format.partition(" ")
    picture = Image.open(IMAGES / "parrots.png").convert("RGB")
    whole = bytearray(_file(picture, kind, **({"compression": "tiff_lzw"} if how else {})))
    whole[len(whole) // 2 : len(whole) // 2 + 64] = bytes(64)
    path = tmp_path / "damaged"
    path.write_bytes(whole)
    with pytest.raises(errors.ImageError, match="cannot be decoded"):
        _read_strips(path)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_a_large_avif_is_a_grid(grey: bool, transparent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of cells that other programs read too, with what the picture means, and no seams."""
    monkeypatch.setattr(avif, "WHOLE", 1)
    monkeypatch.setattr(avif, "_WIDTH", 100)
    monkeypatch.setattr(avif, "_HEIGHT", 100)
    colour = image.read(IMAGES / "parrots.png")[:200, :301]
    height, width = colour.shape[:2]
    alpha = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8) if transparent else None
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    metadata = Metadata(b"" if grey else profile, exif.tobytes()[6:], b"<x:xmpmeta/>")
    picture = Picture(np.ascontiguousarray(colour[..., 1]) if grey else colour, alpha, metadata)
    data, losses = image.save(picture, "AVIF")
    assert data.count(b"grid") == 1 + transparent
    assert data.count(b"mdat") == 6 * (1 + transparent) + 3 + transparent  # cells, and what is beside them
    assert losses == []
    got = image.load(data)
    off = abs(got.colour.astype(int) - (picture.colour if got.grey else np.atleast_3d(picture.colour)))
    assert off.mean() < 1.5
    # Cells are 128 pixels wide: beside their borders nothing is worse than elsewhere.
    seams = off[:, [at + beside for at in (128, 256) for beside in (-1, 0)]]
    assert seams.mean() < 1.25 * off.mean()
    if alpha is not None:
        assert got.alpha is not None
        assert abs(got.alpha.astype(int) - alpha).mean() < 1
    assert (got.metadata.icc, got.metadata.xmp) == (metadata.icc, metadata.xmp)
    tags = Image.Exif()
    tags.load(got.metadata.exif)
    assert tags[0x010F] == "a camera"
    pyvips = pytest.importorskip("pyvips")  # libheif, a reader of its own
    other = pyvips.Image.new_from_buffer(data, "").numpy()
    assert abs(other[..., :3].astype(int) - np.atleast_3d(picture.colour)).mean() < 1.5
    assert other.shape == (height, width, 4 if transparent else 3)


def test_a_grid_does_not_depend_on_how_its_rows_come() -> None:
    colour = np.tile(image.read(IMAGES / "parrots.png")[:70, :90], (16, 1, 1))  # three rows of cells
    whole = _write_strips(colour, "AVIF", rows=len(colour))
    assert _write_strips(colour, "AVIF", rows=13) == whole == _write_strips(colour, "AVIF", rows=512)
    stop = threading.Event()
    stop.set()
    with watch.watching(stop), pytest.raises(errors.Cancelled):
        _write_strips(colour, "AVIF")
    with pytest.raises(errors.InvalidArgument, match="PNG written by strips holds no alpha"):
        strips.StripWriter(io.BytesIO(), "PNG", 8, 8, True, alpha=True)


def test_strip_arguments(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="expected one of AVIF, PNG, PPM, TIFF"):
        strips.StripWriter(io.BytesIO(), "JPEG", 1, 1, True)
    with pytest.raises(errors.InvalidArgument, match="0x1 pixels cannot be written"):
        strips.StripWriter(io.BytesIO(), "PNG", 0, 1, True)
    writer = strips.StripWriter(io.BytesIO(), "PNG", 2, 2, True)
    with pytest.raises(errors.InvalidArgument, match=r"expected at most 2 rows of \(2,\) uint8"):
        writer.write(np.zeros((3, 2), np.uint8))
    with pytest.raises(errors.InvalidArgument, match="0 of 2 rows were written"):
        writer.close()
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n# a comment\n2 1\n255\n\1\2")
    with pytest.raises(errors.LimitError, match="limit is 1 a side"):
        strips.open_strips(path, Limits(side=1))
    opened = strips.open_strips(path, Limits(pixels=1))  # pixels are no limit by rows
    assert opened is not None
    with opened:
        with pytest.raises(errors.InvalidArgument, match="rows is 0"):
            opened.read(0)
        assert opened.read(5).tolist() == [[1, 2]]
        assert opened.read(5).shape == (0, 2)


def test_a_large_webp_of_noise_is_refused() -> None:
    """Its encoder would take more memory than the README says."""
    noise = np.random.default_rng(0).integers(0, 256, (3200, 3200, 3), dtype=np.uint8)
    with pytest.raises(errors.InvalidArgument, match="3200x3200 pixels that is all but noise is not written as WEBP"):
        image.write(noise, "WEBP")
    noise[100:-100, 100:-100] = 7  # most of it is not
    assert np.array_equal(image.load(image.write(noise, "WEBP")).colour, noise)
