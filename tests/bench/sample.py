"""The picture of the README: a photograph, its .hgc file decoded, and a JPEG that is no smaller.

python tests/bench/sample.py PHOTO [--quality 20] [--out sample.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rd import jpeg, jpeg_no_smaller

from hourglass import codec
from hourglass.codec import image, metrics

CROP = (slice(90, 410), slice(330, 650))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--quality", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sample.png"))
    options = parser.parse_args()
    original = image.read(options.photo)
    data = codec.encode(original, quality=options.quality)
    decoded = codec.decode(data)
    other = jpeg_no_smaller(original, len(data))
    _, rival = jpeg(original, int(other["quality"]))
    panels = {
        f"original, {original.nbytes} bytes raw": original,
        f"Hourglass, {len(data)} bytes, {metrics.psnr(original, decoded):.1f} dB": decoded,
        f"JPEG, {other['bytes']:.0f} bytes, {other['psnr']:.1f} dB": rival,
    }
    strip = np.full((CROP[0].stop - CROP[0].start + 22, 0, 3), 255, np.uint8)
    for text, pixels in panels.items():
        part = pixels[CROP]
        panel = Image.new("RGB", (part.shape[1] + 6, part.shape[0] + 22), "white")
        panel.paste(Image.fromarray(part), (3, 19))
        ImageDraw.Draw(panel).text((4, 3), text, fill="black")
        strip = np.concatenate([strip, np.asarray(panel)], axis=1)
    Image.fromarray(strip).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
