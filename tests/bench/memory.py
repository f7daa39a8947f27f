"""Memory of pictures that are held whole: library and command, there and back, beside what the README promises.

    python tests/bench/memory.py PHOTOS DRAWINGS [--megapixels 4,12,67] [--kinds photo,repeats] [--formats jpg,rgba.png]

PHOTOS and DRAWINGS are folders; each picture is a mosaic of what is in one. Each figure is of a process of its own, in
MB. Exits with 1 where one is above 350 MB and twice the raw picture. What is too large for the format that it was read
as is written as PNG.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from robust import COMMAND, run
from speed import mosaic

from hourglass.codec import formats
from hourglass.codec.image import list_pictures

LIBRARY = {
    "encode": "Path(sys.argv[3]).write_bytes(Codec().encode(sys.argv[1], quality=float(sys.argv[2])))",
    "decode": "Codec().decode(sys.argv[1])",
}
"""What the library does in a program of its own."""

SHADES = {"rgba": 4, "la": 2, "grey": 1}
"""Bytes a pixel of the raw picture, where they are not 3."""

FORMATS: dict[str, dict[str, object]] = {
    "jpg": {"quality": 90},
    "progressive.jpg": {"quality": 90, "progressive": True},
    "grey.jpg": {"quality": 90},
    "png": {"compress_level": 1},
    "rgba.png": {"compress_level": 1},
    "la.png": {"compress_level": 1},
    "grey.png": {"compress_level": 1},
    "palette.png": {"compress_level": 1},
    "webp": {"quality": 80, "method": 0},
    "rgba.webp": {"quality": 80, "method": 0},
    "avif": {"quality": 60, "speed": 10},
    "tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "rgba.tif": {"compression": "tiff_lzw"},
    "ppm": {},
}


def repeats(side: int) -> NDArray[np.uint8]:
    """A texture over and over, which lossless WebP makes little of, and takes the most memory for."""
    texture = np.random.default_rng(1).integers(0, 256, (100, 100, 3), np.uint8)
    return np.tile(texture, (-(-side // 100), -(-side // 100), 1))[:side, :side]


def save(pixels: NDArray[np.uint8], path: Path, format: str) -> None:
    picture = Image.fromarray(pixels)
    kind = format.split(".")[0]
    if kind in ("rgba", "la"):
        picture = picture.convert(kind.upper()) if kind == "la" else picture
        picture.putalpha(Image.radial_gradient("L").resize(picture.size))
    elif kind in ("grey", "palette"):
        picture = picture.convert("L") if kind == "grey" else picture.quantize(256, Image.Quantize.FASTOCTREE)
    picture.save(path, formats.WRITABLE[path.suffix], **FORMATS[format])


def figures(source: Path, quality: str, folder: Path) -> dict[str, float]:
    """MB of each of the four."""
    with Image.open(source) as opened:
        room = formats.FORMATS[opened.format or ""].most
        suffix = ".png" if room and opened.width * opened.height > room else source.suffix
    coded, back = str(folder / "coded.hgc"), str(folder / f"back{suffix}")
    programs = {"command": COMMAND, "command -d": COMMAND}
    for name, work in LIBRARY.items():
        path = folder / f"{name}.py"
        path.write_text(f"import sys\nfrom pathlib import Path\nfrom hourglass.codec import Codec\n{work}\n")
        programs[name] = str(path)
    found = {}
    for name, arguments in (
        ("encode", [str(source), quality, coded]),
        ("decode", [coded]),
        ("command", [str(source), "-q", quality, "-fo", coded]),
        ("command -d", ["-d", coded, "-fo", back]),
    ):
        status, _, peak = run(arguments, log := folder / "log", programs[name])
        if status:
            raise SystemExit(log.read_text())
        found[name] = peak / 1e6
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("--megapixels", default="4,8,12,16,30,67")
    parser.add_argument("--kinds", default="photo,drawing,repeats")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--qualities", default="50")
    given = parser.parse_args()

    kinds: dict[str, Callable[[int], NDArray[np.uint8]]] = {
        "photo": lambda side: mosaic(list_pictures(given.photos), side, side),
        "drawing": lambda side: mosaic(list_pictures(given.drawings), side, side),
        "repeats": repeats,
    }
    too_much = 0
    for megapixels in given.megapixels.split(","):
        side = min(round((float(megapixels) * 1e6) ** 0.5), 8192) // 8 * 8
        for kind in given.kinds.split(","):
            pixels = kinds[kind](side)
            for format in given.formats.split(","):
                with tempfile.TemporaryDirectory() as temporary:
                    source = Path(temporary) / f"picture.{format}"
                    save(pixels, source, format)
                    bar = 350 + 2 * SHADES.get(format.split(".")[0], 3) * side * side / 1e6
                    for quality in given.qualities.split(","):
                        row = figures(source, quality, Path(temporary))
                        told = ", ".join(f"{name} {peak:.0f}{'!' * (peak > bar)}" for name, peak in row.items())
                        print(f"{side}x{side} {kind} {format} q{quality}: {told}; bar {bar:.0f}", flush=True)
                        too_much += sum(peak > bar for peak in row.values())
    return min(too_much, 1)


if __name__ == "__main__":
    sys.exit(main())
