"""What a picture means comes back: grey, alpha, metadata; and what is better stored without loss is stored so."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw

from hourglass.client import Client
from hourglass.codec import Codec, Metadata, Picture, errors, image, lossless, metrics
from hourglass.codec.lossless import _EVERY, _SPACING, _STRIP

COMMAND = str(Path(sys.executable).with_name("compress-image"))
IMAGES = Path(__file__).parent / "images"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    return exif.tobytes().removeprefix(b"Exif\0\0")


METADATA = Metadata(PROFILE, _exif(), b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>', b"\x1c\x02\x78\0\x04text")


@pytest.fixture(scope="module")
def photo_with_all() -> Picture:
    """A photograph with a round window, a profile, EXIF, XMP and IPTC."""
    colour = image.read(IMAGES / "motocross.png")
    y, x = np.mgrid[: colour.shape[0], : colour.shape[1]]
    alpha = np.clip(300 - 2 * np.hypot(y - 100, x - 150), 0, 255).astype(np.uint8)
    return Picture(colour, alpha, METADATA)


def _drawing() -> NDArray[np.uint8]:
    """A chart: lines, flat areas, small text."""
    picture = Image.new("RGB", (500, 300), "white")
    draw = ImageDraw.Draw(picture)
    for number in range(12):
        draw.rectangle((20 + 40 * number, 280 - 20 * number, 45 + 40 * number, 280), fill=(20 * number, 90, 160))
        draw.text((20 + 40 * number, 10), f"{number} %", fill="black")
    return np.asarray(picture)


def test_everything_comes_back(photo_with_all: Picture, codec: Codec) -> None:
    data = codec.encode(photo_with_all, quality=60)
    decoded = codec.decode_picture(data)
    assert decoded.alpha is not None
    assert photo_with_all.alpha is not None
    assert np.array_equal(decoded.alpha, photo_with_all.alpha)
    assert decoded.metadata == METADATA
    assert decoded.losses == ()
    seen = photo_with_all.alpha > 0
    error = (decoded.colour[seen].astype(float) - photo_with_all.colour[seen]) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 28
    assert codec.decode(data).shape == (*photo_with_all.colour.shape[:2], 4)


def test_what_is_hidden_costs_nothing(codec: Codec) -> None:
    """Noise under alpha 0 takes no more bytes than nothing does."""
    colour = image.read(IMAGES / "motocross.png")[:192, :256].copy()
    alpha = np.full(colour.shape[:2], 255, np.uint8)
    alpha[:, 100:] = 0
    plain = len(codec.encode(Picture(colour, alpha), fallback=False))
    colour[:, 100:] = np.random.default_rng(0).integers(0, 256, (192, 156, 3))
    assert len(codec.encode(Picture(colour, alpha), fallback=False)) == plain
    assert plain < len(codec.encode(Picture(colour), fallback=False)) / 2


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "avif", "jpg"])
def test_by_the_command_from_and_to_every_format(
    suffix: str, photo_with_all: Picture, tmp_path: Path, address: str
) -> None:
    """Orientation is applied once; alpha and metadata pass from file to file, where the format has them."""
    format = image.format_of(f"a.{suffix}")
    alpha = suffix not in ("jpg",)
    source = photo_with_all if alpha else Picture(photo_with_all.colour, None, METADATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # PNG holds no IPTC, and says so
        (tmp_path / f"a.{suffix}").write_bytes(image.write(source, format))
    for where in ([], ["--server", address]):
        run = [COMMAND, *where, "-q", "70", "-fo", tmp_path / "a.hgc", tmp_path / f"a.{suffix}"]
        subprocess.run(run, check=True, capture_output=True)
        run = [COMMAND, *where, "-dfo", tmp_path / f"b.{suffix}", tmp_path / "a.hgc"]
        subprocess.run(run, check=True, capture_output=True)
        first, second = image.load(tmp_path / f"a.{suffix}"), image.load(tmp_path / f"b.{suffix}")
        assert (second.alpha is not None) == alpha
        if suffix != "avif" and first.alpha is not None and second.alpha is not None:  # AVIF's alpha is lossy
            assert np.array_equal(first.alpha, second.alpha)
        assert second.metadata == first.metadata
        assert first.metadata.icc == PROFILE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, tmp_path: Path) -> None:
    with Image.open(IMAGES / "motocross.png") as opened:
        exif = Image.Exif()
        exif[0x0112] = orientation
        opened.save(tmp_path / "a.jpg", exif=exif, quality=95)
    subprocess.run([COMMAND, "-q", "80", tmp_path / "a.jpg"], check=True, capture_output=True)
    subprocess.run([COMMAND, "-d", tmp_path / "a.hgc", "-o", tmp_path / "b.jpg"], check=True, capture_output=True)
    first, second = (image.load(tmp_path / name) for name in ("a.jpg", "b.jpg"))
    assert first.colour.shape == second.colour.shape
    assert metrics.psnr(first.colour, second.colour) > 28
    with Image.open(tmp_path / "b.jpg") as opened:
        assert opened.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("keep", "kept"), [("all", METADATA), ("icc", Metadata(PROFILE)), ("none", Metadata())])
def test_metadata_is_kept_as_asked(
    keep: Any, kept: Metadata, photo_with_all: Picture, codec: Codec, client: Client
) -> None:
    file = image.write(Picture(photo_with_all.colour, None, METADATA), "TIFF")
    for coder in (codec, client):
        found = coder.decode_picture(coder.encode(file, metadata=keep, quality=10)).metadata
        assert (found.icc, found.xmp, found.iptc) == (kept.icc, kept.xmp, kept.iptc)
        assert bool(found.exif) == bool(kept.exif)


def test_too_much_metadata(codec: Codec) -> None:
    picture = Picture(np.zeros((8, 8, 3), np.uint8), None, Metadata(xmp=bytes(1 << 25)))
    with pytest.raises(errors.LimitError, match="metadata"):
        codec.decode(codec.encode(picture))


def test_frames(codec: Codec, client: Client, tmp_path: Path) -> None:
    pages = [Image.new("RGB", (40, 30), (number * 60, 100, 100)) for number in range(4)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    for coder in (codec, client):
        with pytest.warns(errors.LossWarning, match="4 frames"):
            first = coder.decode(coder.encode(tmp_path / "a.gif"))
        third = coder.decode(coder.encode(tmp_path / "a.gif", frame=2))
        assert abs(int(first[0, 0, 0])) < 20
        assert abs(int(third[0, 0, 0]) - 120) < 20
        with pytest.raises(errors.InvalidArgument, match="4"):
            coder.encode(tmp_path / "a.gif", frame=4)
    done = subprocess.run([COMMAND, "--frame", "2", "-fo", tmp_path / "a.hgc", tmp_path / "a.gif"], check=False)
    assert done.returncode == 0
    assert np.array_equal(codec.decode(tmp_path / "a.hgc"), third)


@pytest.mark.parametrize("quality", [30, 100])
def test_a_drawing_is_stored_without_loss(quality: float, codec: Codec, client: Client) -> None:
    drawing = _drawing()
    data = codec.encode(drawing, quality=quality)
    header = codec.read_header(data)
    assert (header.lossless, header.model, header.quality) == (True, "", 100)
    assert np.array_equal(codec.decode(data), drawing)
    out = io.BytesIO()
    Image.fromarray(drawing).save(out, "WEBP", lossless=True, exact=True)
    assert len(data) <= len(out.getvalue()) + 64
    coded = codec.encode(drawing, quality=quality, fallback=False)
    assert not codec.read_header(coded).lossless
    assert len(coded) > len(data)
    assert client.encode(drawing, quality=quality) == data
    assert client.encode(drawing, quality=quality, fallback=False) == coded
    assert np.array_equal(client.decode(data, region=(50, 20, 300, 200)), drawing[20:220, 50:350])
    with pytest.raises(errors.CodeError, match="stored losslessly"):
        codec.unpack(data)


def test_without_loss_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebP takes leaner ways where there is less room, and PNG the place of it in the end."""
    drawing, photo = _drawing()[:150], np.random.default_rng(1).integers(0, 256, (150, 500, 3), np.uint8)
    for colour, alpha in ((drawing, None), (photo, None), (drawing, photo[..., 0]), (drawing[..., 0], None)):
        kinds = []
        for room in (100, 45, 35, 28, 22, 2):
            monkeypatch.setattr("hourglass.codec.lossless._ROOM", room * 150 * 500)
            data = lossless.pack(colour, alpha)
            back = lossless.unpack(data, 500, 150, 1 if colour.ndim == 2 else 3)
            assert np.array_equal(back, colour if alpha is None else np.dstack((colour, alpha)))
            kinds.append(data[:4])
        assert (kinds[0], kinds[-1]) == (b"RIFF", b"\x89PNG")


def test_an_unloaded_codec_goes_on(photo: Path) -> None:
    coder = Codec()
    data = coder.encode(photo)
    coder.unload()
    assert coder.encode(photo) == data


PATTERNS = [
    "wallpaper",
    "shifted wallpaper",
    "scattered",
    "stripes",
    "lines of noise",
    "noise beside nothing",
    "checks",
    "noise where it is looked",
]


@pytest.mark.parametrize("kind", PATTERNS)
def test_no_pattern_is_larger_than_without_loss(kind: str, codec: Codec) -> None:
    """Repetition far apart, and what a look at some of the rows may miss."""
    chance = np.random.default_rng(3)
    picture = np.zeros((600, 700, 3), np.uint8)
    noise = chance.integers(0, 256, (100, 100, 3), np.uint8)
    if kind == "wallpaper":
        picture[:] = np.tile(noise, (6, 7, 1))
    elif kind == "shifted wallpaper":
        for y in range(0, 600, 100):
            picture[y : y + 100] = np.roll(np.tile(noise, (1, 7, 1)), chance.integers(100), axis=1)
    elif kind == "scattered":
        for y, x in zip(chance.integers(0, 500, 300), chance.integers(0, 600, 300), strict=True):
            picture[y : y + 100, x : x + 100] = noise
    elif kind == "stripes":
        picture[:] = np.tile(noise[:1], (600, 7, 1))
    elif kind == "lines of noise":
        picture[::_EVERY] = chance.integers(0, 256, (55, 700, 3), np.uint8)
    elif kind == "noise where it is looked":
        rows = [y for y in range(600) if y % _EVERY == 0 or y % _SPACING < _STRIP]
        picture[rows] = chance.integers(0, 256, (len(rows), 700, 3), np.uint8)
    elif kind == "noise beside nothing":
        picture[:100, :100] = noise
    else:
        picture[:] = np.kron(chance.integers(0, 256, (60, 70, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "WEBP", lossless=True, exact=True)
    for quality in (50, 100):
        assert len(codec.encode(picture, quality=quality)) <= len(out.getvalue()) + 64


def test_a_photograph_is_not(photo: Path, codec: Codec) -> None:
    for quality in (0, 60, 100):
        assert not codec.read_header(codec.encode(photo, quality=quality)).lossless


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (16, 16), (3, 70), (2000, 3000)])
def test_flat_and_tiny_pictures_take_next_to_nothing(mode: str, size: tuple[int, int], codec: Codec) -> None:
    flat = np.asarray(Image.new(mode, size, {"L": 9, "LA": (9, 8), "RGB": (1, 2, 3), "RGBA": (1, 2, 3, 4)}[mode]))
    data = codec.encode(flat)
    assert len(data) < 64
    assert np.array_equal(codec.decode(data), flat)
    icon = np.random.default_rng(1).integers(0, 2, flat.shape[:2], np.uint8) * 255
    if icon.size < 5000:
        data = codec.encode(icon)
        assert codec.read_header(data).lossless
        out = io.BytesIO()
        Image.fromarray(icon).convert("1").save(out, "PNG", optimize=True)
        assert len(data) <= len(out.getvalue()) + 64
        assert np.array_equal(codec.decode(data), icon)


def test_targets_may_be_met_without_loss(codec: Codec) -> None:
    drawing = _drawing()
    stored = codec.encode(drawing)
    assert codec.encode(drawing, target_size=len(stored) + 1000) == stored
    assert codec.encode(drawing, target_psnr=90) == stored
    with pytest.raises(errors.InvalidArgument, match="at quality 0"):
        codec.encode(drawing, target_size=len(stored) - 500)
    with pytest.raises(errors.InvalidArgument, match="at quality 100"):
        codec.encode(drawing, target_psnr=90, fallback=False)


def test_command_says_how_it_is_stored(tmp_path: Path) -> None:
    Image.fromarray(_drawing()).save(tmp_path / "a.png")
    done = subprocess.run([COMMAND, tmp_path / "a.png"], check=True, capture_output=True, text=True)
    assert ", lossless, " in done.stdout
    done = subprocess.run([COMMAND, "-l", tmp_path / "a.hgc"], check=True, capture_output=True, text=True)
    assert "a.hgc: 500x300, lossless, " in done.stdout
    assert "bytes of picture " in done.stdout
    run = [COMMAND, "--no-fallback", "-f", tmp_path / "a.png"]
    assert ", lossless, " not in subprocess.run(run, check=True, capture_output=True, text=True).stdout
