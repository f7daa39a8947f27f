"""A picture of 600 megapixels from file to file: time and memory of encoding, decoding, and of one region.

    python tests/bench/large.py PICTURE [--width 30000] [--height 20000] [--out large.json]
    python tests/bench/large.py PICTURE --widths 30000,60000,250000,1000000 --formats ppm,png [--height 1024]
    python tests/bench/large.py PICTURE --width 40000 --height 30000    # more than a gigapixel

The picture is PICTURE over and over, shifted and mirrored. Throughput stands beside that of 12 megapixels in the same
run. With --widths only memory and time by width and format, at quality 100, which takes the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from head import head
from robust import run

from hourglass.codec import Codec, image, strips


def make(path: Path, tile: np.ndarray, width: int, height: int) -> None:
    """A PPM file of the size, written row by row of tiles."""
    with path.open("wb") as file:
        file.write(b"P6\n%d %d\n255\n" % (width, height))
        for number, top in enumerate(range(0, height, len(tile))):
            shifted = np.roll(tile if number % 2 else tile[:, ::-1], number * 97, axis=1)
            for line in shifted[: height - top]:
                file.write(np.tile(line, (-(-width // tile.shape[1]), 1))[:width].data)


def convert(source: Path, target: Path) -> None:
    """A PPM as another format, some rows at a time."""
    with strips.open_strips(source) or sys.exit(f"{source} cannot be read") as rows, target.open("wb") as file:
        format = image.format_of(target)
        with strips.StripWriter(file, format, rows.width, rows.height, rows.grey) as writer:
            while len(part := rows.read(64)):
                writer.write(part)


def measure(source: Path, folder: Path, *flags: str) -> dict[str, float]:
    """MP/s and MB of `compress-image` there and back, in the format of the source; all of the process counts."""
    with strips.open_strips(source) or sys.exit(f"{source} cannot be read") as rows:
        width, height = rows.width, rows.height
    coded, back, log = folder / "large.hgc", folder / f"back{source.suffix}", folder / "log"
    row: dict[str, float] = {"megapixels": width * height / 1e6}
    for name, arguments in (
        ("encode", [str(source), *flags, "-fo", str(coded)]),
        ("decode", ["-d", str(coded), "-fo", str(back)]),
    ):
        status, seconds, peak = run(arguments, log)
        if status:
            raise SystemExit(log.read_text())
        row |= {f"{name}_mps": round(row["megapixels"] / seconds, 2), f"{name}_mb": round(peak / 1e6)}
    row["bytes"] = coded.stat().st_size
    back.unlink()
    return row


def by_width(tile: np.ndarray, widths: list[int], height: int, formats: list[str], folder: Path) -> None:
    """Print memory there and back for each width and format."""
    for width in widths:
        source = folder / "wide.ppm"
        make(source, tile, width, height)
        for suffix in formats:
            path = source.with_suffix(f".{suffix}")
            if path != source:
                convert(source, path)
            row = measure(path, folder, "-q", "100")
            print(f"{suffix} {width}x{height}: encode {row['encode_mb']} MB, decode {row['decode_mb']} MB", flush=True)
            if path != source:
                path.unlink()


def region_seconds(coded: Path, width: int, height: int) -> dict[str, float]:
    """Seconds for 512x512 pixels from the middle: where they lie on a tile, and across four; codec loaded before."""
    codec = Codec()
    codec.warm_up()
    found = {}
    for name, shift in (("on a tile", 0), ("across tiles", 200)):
        x, y = (size // 2 // 512 * 512 + shift for size in (width, height))
        times = []
        for _ in range(7):
            started = time.perf_counter()
            codec.decode(coded, region=(x, y, 512, 512))
            times.append(time.perf_counter() - started)
        found[name] = round(statistics.median(times), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=30_000)
    parser.add_argument("--height", type=int, default=20_000)
    parser.add_argument("--widths", type=lambda text: [int(width) for width in text.split(",")])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["ppm"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tile = image.read(given.picture)
    if given.widths:
        with tempfile.TemporaryDirectory() as temporary:
            by_width(tile, given.widths, given.height, given.formats, Path(temporary))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small, large = folder / "small.ppm", folder / "large.ppm"
        make(small, tile, 4000, 3000)
        make(large, tile, given.width, given.height)
        results = {
            **head(Codec().model),
            "12 MP": measure(small, folder),
            "large": measure(large, folder),
        }
        results["region_seconds"] = region_seconds(folder / "large.hgc", given.width, given.height)
    print(json.dumps(results, indent=2))
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
