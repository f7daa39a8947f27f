"""A picture of 600 megapixels from file to file: time and memory of encoding, decoding, and of one region.

    python tests/bench/large.py PICTURE [--width 30000] [--height 20000] [--out large.json]

The picture is PICTURE over and over, shifted and mirrored. Throughput stands beside that of 12 megapixels in the same
run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from robust import run

from hourglass.codec import Codec, image


def make(path: Path, tile: np.ndarray, width: int, height: int) -> None:
    """A PPM file of the size, written row by row of tiles."""
    with path.open("wb") as file:
        file.write(b"P6\n%d %d\n255\n" % (width, height))
        for number, top in enumerate(range(0, height, len(tile))):
            shifted = np.roll(tile if number % 2 else tile[:, ::-1], number * 97, axis=1)
            row = np.tile(shifted, (1, -(-width // tile.shape[1]), 1))[: height - top, :width]
            file.write(np.ascontiguousarray(row).data)


def measure(source: Path, folder: Path) -> dict[str, float]:
    """MP/s and MB of `compress-image` there and back; all of the process counts."""
    with source.open("rb") as file:
        file.readline()
        width, height = map(int, file.readline().split())
    coded, back, log = folder / "large.hgc", folder / "back.ppm", folder / "log"
    row: dict[str, float] = {"megapixels": width * height / 1e6}
    for name, arguments in (
        ("encode", [str(source), "-fo", str(coded)]),
        ("decode", ["-d", str(coded), "-fo", str(back)]),
    ):
        status, seconds, peak = run(arguments, log)
        if status:
            raise SystemExit(log.read_text())
        row |= {f"{name}_mps": round(row["megapixels"] / seconds, 2), f"{name}_mb": round(peak / 1e6)}
    row["bytes"] = coded.stat().st_size
    back.unlink()
    return row


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
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tile = image.read(given.picture)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small, large = folder / "small.ppm", folder / "large.ppm"
        make(small, tile, 4000, 3000)
        make(large, tile, given.width, given.height)
        results = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": Codec().model,
            "12 MP": measure(small, folder),
            "large": measure(large, folder),
        }
        results["region_seconds"] = region_seconds(folder / "large.hgc", given.width, given.height)
    print(json.dumps(results, indent=2))
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
