"""Whatever people have becomes (H, W, 3) uint8 sRGB, or a clear error; what is lost is said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from hourglass.codec import Limits, errors, image

IMAGES = Path(__file__).parent / "images"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(IMAGES / "motocross.png").convert("RGB").resize((48, 32))


def _file(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG", "AVIF"])
def test_formats_in_and_out(format: str, picture: Image.Image) -> None:
    pixels = np.asarray(picture)
    back = image.read(image.write(pixels, format))
    if format in ("JPEG", "AVIF"):
        assert abs(back.astype(int) - pixels).mean() < 6
    else:
        assert np.array_equal(back, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.asarray(picture)
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1), 7: np.rot90(pixels.transpose(1, 0, 2), 2),
        8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    assert np.array_equal(image.read(_file(picture, "PNG", exif=exif)), turned)


def test_modes_without_loss(picture: Image.Image) -> None:
    grey = picture.convert("L")
    three = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    assert np.array_equal(image.read(_file(grey, "PNG")), three)
    assert np.array_equal(image.read(np.asarray(grey)), three)
    palette = picture.quantize(16)
    assert np.array_equal(image.read(_file(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bilevel = grey.convert("1")
    assert np.array_equal(image.read(_file(bilevel, "PNG"))[:, :, 0], np.asarray(bilevel) * np.uint8(255))
    opaque = picture.convert("RGBA")
    assert np.array_equal(image.read(_file(opaque, "PNG")), np.asarray(picture))


def test_transparency_goes_on_white_and_is_said(picture: Image.Image) -> None:
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    with pytest.warns(errors.LossWarning, match="transparent"):
        got = image.read(_file(clear, "PNG"))
    alpha = np.asarray(clear)[:, :, 3:].astype(float) / 255
    expected = np.asarray(picture) * alpha + 255 * (1 - alpha)
    assert abs(got - expected).max() <= 2


def test_sixteen_bits_become_eight(picture: Image.Image) -> None:
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    with pytest.warns(errors.LossWarning, match="reduced to 8 bits"):
        got = image.read(_file(Image.fromarray(deep), "PNG"))
    assert np.array_equal(got[:, :, 0], np.asarray(picture.convert("L")))


def test_floats(picture: Image.Image) -> None:
    unit = np.asarray(picture.convert("L")).astype(np.float32) / 255
    with pytest.warns(errors.LossWarning):
        got = image.read(_file(Image.fromarray(unit), "TIFF"))
    assert np.array_equal(got[:, :, 0], np.asarray(picture.convert("L")))
    unit[0, 0] = np.nan
    with pytest.raises(errors.ImageError, match="not finite"):
        image.read(_file(Image.fromarray(unit), "TIFF"))


def test_animation_gives_its_first_frame(picture: Image.Image) -> None:
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with pytest.warns(errors.LossWarning, match="2 frames; only the first"):
        got = image.read(_file(picture, "WEBP", save_all=True, append_images=[other], lossless=True))
    assert np.array_equal(got, np.asarray(picture))


def test_icc_profile_becomes_srgb(picture: Image.Image) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(image.read(_file(picture, "PNG", icc_profile=srgb)), np.asarray(picture))
    for useless in (lab, b"garbage"):
        with pytest.warns(errors.LossWarning, match="ICC profile that cannot be used"):
            got = image.read(_file(picture, "PNG", icc_profile=useless))
        assert np.array_equal(got, np.asarray(picture))


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_no_picture(content: bytes) -> None:
    with pytest.raises(errors.ImageError, match=rf"image data \({len(content)} bytes\)"):
        image.read(content)


def test_truncated_picture(picture: Image.Image) -> None:
    whole = _file(picture, "PNG")
    with pytest.raises(errors.ImageError, match="cannot be decoded"):
        image.read(whole[: len(whole) // 2])


def test_limits_come_before_decoding(picture: Image.Image) -> None:
    data = _file(picture, "PNG")
    with pytest.raises(errors.LimitError, match="48x32 = 1536 pixels; the limit is 1000"):
        image.read(data[:60], Limits(pixels=1000))  # the pixels are not even there
    with pytest.raises(errors.LimitError, match="limit is 40 a side"):
        image.read(np.zeros((2, 41, 3), np.uint8), Limits(side=40))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_arrays_of_another_shape(array: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"expected \(H, W, 3\) or \(H, W\) uint8"):
        image.read(array)


def test_other_arguments() -> None:
    with pytest.raises(errors.InvalidArgument, match="image is a list"):
        image.read([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        image.read(IMAGES / "missing.png")
    with pytest.raises(errors.InvalidArgument, match=r"suffix '\.xyz'"):
        image.format_of("a.xyz")
    with pytest.raises(errors.InvalidArgument, match="expected one of"):
        image.write(np.zeros((2, 2, 3), np.uint8), "GIF")
    with pytest.raises(errors.InvalidArgument, match="cannot be written as WEBP"):
        image.write(np.zeros((1, 20000, 3), np.uint8), "WEBP")
