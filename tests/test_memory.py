"""Pictures that are held in memory: at most 350 MB and twice the raw picture, whatever their format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hourglass import codec

SIDE = 6000

MEASURED = """
import re, sys
from pathlib import Path
{work}
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
"""VmHWM of a process of its own, in KiB: what `resource` tells of a child begins with what its parent had."""

READ = "from hourglass.codec import image; image.load(sys.argv[1])"
THERE = "from hourglass import codec; Path(sys.argv[2]).write_bytes(codec.encode(sys.argv[1]))"
BACK = (
    "from hourglass import codec; from hourglass.codec import image\n"
    "Path(sys.argv[1]).write_bytes(image.write(codec.Codec().decode_picture(sys.argv[2]), 'PNG'))"
)


def measured(work: str, *arguments: Path) -> int:
    """Bytes."""
    command = [sys.executable, "-c", MEASURED.format(work=work), *arguments]
    return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    """36 megapixels."""
    chance = np.random.default_rng(1)
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    for _ in range(1000):
        y, x = chance.integers(0, SIDE, 2)
        pixels[y : y + 99, x : x + chance.integers(5, 400)] = chance.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGB", "WEBP", {"quality": 50, "method": 0}),
        ("RGB", "WEBP", {"lossless": True, "method": 0}),
        ("RGBA", "WEBP", {"quality": 50, "method": 0}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGBA", "TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_reading(mode: str, format: str, options: dict[str, object], drawing: Image.Image, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    picture = drawing if mode == "RGB" else drawing.convert("RGBA")
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    path = tmp_path / "picture"
    picture.save(path, format, **options)
    assert measured(READ, path) < 350_000_000 + 2 * len(mode) * SIDE**2


@pytest.mark.parametrize(
    ("kind", "size"), [("drawing", (5000, 5000)), ("wallpaper", (3840, 2160)), ("wallpaper", (2400, 2300))]
)
def test_without_loss_there_and_back(kind: str, size: tuple[int, int], drawing: Image.Image, tmp_path: Path) -> None:
    """What is large is made a WebP only as far as there is memory for it: it takes up to 53 bytes a pixel."""
    path, coded = tmp_path / "a.png", tmp_path / "a.hgc"
    texture = np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8)
    part = drawing.crop((0, 0, *size)) if kind == "drawing" else Image.fromarray(np.tile(texture, (22, 39, 1)))
    part.crop((0, 0, *size)).save(path, compress_level=1)
    before = np.asarray(Image.open(path))
    for work in (THERE, BACK):
        assert measured(work, path, coded) < 350_000_000 + 2 * 3 * size[0] * size[1]
    assert codec.read_header(coded).lossless
    assert np.array_equal(np.asarray(Image.open(path)), before)


@pytest.mark.parametrize(("suffix", "size"), [("webp", (4000, 3040)), ("avif", (3200, 2400))])
def test_writing(suffix: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Their encoders take 24 and 40 bytes a pixel: of the one pictures are no larger, the other gets them in cells."""
    photo = np.asarray(Image.open(Path(__file__).parent / "images" / "parrots.png").convert("RGB"))
    width, height = size
    whole = np.tile(photo, (-(-height // len(photo)), -(-width // photo.shape[1]), 1))[:height, :width]
    coded, path = tmp_path / "a.hgc", tmp_path / f"a.{suffix}"
    coded.write_bytes(codec.encode(np.ascontiguousarray(whole), quality=60, fallback=False))
    assert measured(BACK.replace("'PNG'", f"'{suffix.upper()}'"), path, coded) < 350_000_000 + 2 * 3 * width * height
    with Image.open(path) as opened:
        assert opened.size == size
