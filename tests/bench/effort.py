"""What the encoder's efforts gain and cost: curves of whole files on folders of pictures, beside AVIF speed 6.

    python tests/bench/effort.py FOLDER [FOLDER ...] [--out effort.json] [--every 3]

Curves as in rd.py, without its checks at every quality, of every third picture. Time: of one picture at quality 50 from
pixels to the file, on one core with nothing beside it, median over the first pictures of the first folder.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

from head import head
from rd import RIVALS, bd, mean_curve, measure, measured
from tqdm import tqdm

from hourglass import codec
from hourglass.codec import image
from hourglass.codec.image import list_pictures
from hourglass.codec.runtime import usable_cores

# `best` moves along the curve: the ones that it is measured against have points enough to be true between its own.
QUALITIES: dict[codec.Effort, range] = {
    "fast": range(0, 101, 10),
    "default": range(0, 101, 10),
    "best": range(0, 101, 20),
}
RIVAL = "AVIF speed 6"
EFFORTS = get_args(codec.Effort)
TIMED = 5


def points(path: Path, coder: codec.Codec, effort: codec.Effort) -> list[dict[str, float]]:
    pixels = image.read(path)
    files = coder.encode_many(pixels, QUALITIES[effort], effort)
    return [
        measured(pixels, coder.decode(data), len(data), q) for q, data in zip(QUALITIES[effort], files, strict=True)
    ]


def seconds_a_megapixel(paths: list[Path], coder: codec.Codec, effort: codec.Effort) -> float:
    times = []
    for path in paths:
        pixels = image.read(path)
        started = time.perf_counter()
        coder.encode(pixels, quality=50, effort=effort, fallback=False)
        times.append((time.perf_counter() - started) / (pixels.shape[0] * pixels.shape[1] / 1e6))
    return median(times)


def folder_row(folder: Path, every: int, coder: codec.Codec) -> dict[str, Any]:
    paths = list_pictures(folder)[::every]
    rival = mean_curve(measure(paths, *RIVALS[RIVAL], RIVAL))
    curves = {}
    for effort in EFFORTS:
        with ThreadPoolExecutor(usable_cores()) as pool:
            rows = pool.map(partial(points, coder=coder, effort=effort), paths)
            curves[effort] = mean_curve(list(tqdm(rows, desc=f"{folder.name}, {effort}", total=len(paths))))
    return {
        "folder": folder.name,
        "pictures": len(paths),
        "curves": {**curves, RIVAL: rival},
        "bd_rate_psnr": {
            effort: {"default": bd(curve, curves["default"]), RIVAL: bd(curve, rival)}
            for effort, curve in curves.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--every", type=int, default=3, help="take one picture in so many")
    options = parser.parse_args()
    coder = codec.Codec(threads=1)
    coder.encode(image.read(list_pictures(options.folders[0])[0]), effort="best")  # the models are loaded
    timed = list_pictures(options.folders[0])[:TIMED]
    results = {
        **head(coder.model),
        "seconds_a_megapixel": {effort: seconds_a_megapixel(timed, coder, effort) for effort in EFFORTS},
        "folders": [folder_row(folder, options.every, coder) for folder in options.folders],
    }
    for effort in EFFORTS:
        rates = "; ".join(
            f"{row['folder']} {rates['default']:+.2f} % against default, {rates[RIVAL]:+.2f} % against {RIVAL}"
            for row in results["folders"]
            for rates in [row["bd_rate_psnr"][effort]]
        )
        print(f"{effort}: {results['seconds_a_megapixel'][effort]:.2f} s a megapixel; {rates}")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
