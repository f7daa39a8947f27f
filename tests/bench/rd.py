"""Rate and distortion on a folder of pictures, beside JPEG, WebP and AVIF in the same run.

    python tests/bench/rd.py FOLDER [--out results.json] [--chart rd.png] [--anchors FOLDER] [--model ID]

Rates are bytes of whole files; pictures are 8-bit RGB; PSNR is over RGB, curves are means over the pictures at each
setting. --anchors: a folder of published curves (JSON: results.bpp, results.psnr-rgb), drawn thin; their rates are what
their authors state, mostly estimated and without headers. Printed: every curve, the BD-rate of the codec against each
rival, and for every picture the file nearest 0.5 bpp beside the smallest JPEG that is no smaller.
"""

from __future__ import annotations

import argparse
import bisect
import io
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from head import head
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from hourglass import codec
from hourglass.codec import image, metrics
from hourglass.codec.image import list_pictures
from hourglass.codec.runtime import DEFAULT_MODEL, usable_cores

Pixels = NDArray[np.uint8]
Coder = Callable[[Pixels, int], tuple[int, Pixels]]


def pillow(pixels: Pixels, quality: int, *, format: str, **options: Any) -> tuple[int, Pixels]:
    """Bytes of the file that Pillow writes, and the picture that it reads back."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, quality=quality, **options)
    return len(out.getvalue()), np.asarray(Image.open(out).convert("RGB"))


QUALITIES = range(0, 101, 10)

jpeg = partial(pillow, format="JPEG", subsampling="4:2:0", optimize=True, progressive=True)
RIVALS: dict[str, tuple[Coder, list[int]]] = {
    "JPEG 4:2:0 optimised progressive": (jpeg, [5, 10, 20, 30, 40, 50, 60, 70, 80, 87, 92, 95]),
    "WebP method 6": (partial(pillow, format="WEBP", method=6), [0, 5, 10, 25, 50, 65, 75, 85, 92, 96]),
    "AVIF speed 6": (partial(pillow, format="AVIF", subsampling="4:4:4", speed=6), [20, 30, 40, 50, 60, 70, 80, 88]),
    "AVIF speed 9": (partial(pillow, format="AVIF", subsampling="4:4:4", speed=9), [20, 30, 40, 50, 60, 70, 80, 88]),
}


def point(pixels: Pixels, coder: Coder, quality: int) -> dict[str, float]:
    size, decoded = coder(pixels, quality)
    return measured(pixels, decoded, size, quality)


def measured(pixels: Pixels, decoded: Pixels, size: int, quality: float) -> dict[str, float]:
    return {
        "quality": quality,
        "bytes": size,
        "bpp": metrics.bpp(size, pixels.shape[1], pixels.shape[0]),
        "psnr": metrics.psnr(pixels, decoded),
        "ms_ssim": metrics.ms_ssim(pixels, decoded),
    }


def own_points(pixels: Pixels, coder: codec.Codec, effort: codec.Effort) -> dict[str, Any]:
    """Points at `QUALITIES`; the one nearest 0.5 bpp; the file's bytes at each quality 0, 1, ... 100; what the prior's
    tables ask for at `QUALITIES` in bytes, to which the file adds header, checksums and escapes.
    """

    def own_point(quality: int) -> dict[str, float]:
        return measured(pixels, coder.decode(files[quality]), len(files[quality]), quality)

    files = list(coder.encode_many(pixels, range(101), effort))
    sizes = [len(data) for data in files]
    goal = 0.5 * pixels.shape[0] * pixels.shape[1] / 8
    near = min(range(101), key=lambda quality: abs(sizes[quality] - goal))
    tables = coder._model(coder.model).tables
    ideal = [
        sum(sum(tile.ideal_bits(tables).values()) for tile in coder._unpacked(files[quality])[1]) / 8
        for quality in QUALITIES
    ]
    return {"points": [own_point(q) for q in QUALITIES], "near": own_point(near), "sizes": sizes, "ideal": ideal}


def jpeg_no_smaller(pixels: Pixels, size: float) -> dict[str, float]:
    """The smallest JPEG of `size` bytes or more (sizes rise with quality)."""
    return point(pixels, jpeg, min(95, bisect.bisect_left(range(96), size, key=lambda q: jpeg(pixels, q)[0])))


def mean_curve(rows: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Mean over the pictures at each setting."""
    names = ("quality", "bpp", "psnr", "ms_ssim")
    return [{name: float(np.mean([p[name] for p in points])) for name in names} for points in zip(*rows, strict=True)]


def measure(paths: list[Path], coder: Coder, qualities: list[int], name: str) -> list[list[dict[str, float]]]:
    with ThreadPoolExecutor(usable_cores()) as pool:
        return [list(pool.map(partial(point, image.read(path), coder), qualities)) for path in tqdm(paths, desc=name)]


def bd(own: list[dict[str, float]], rival: list[dict[str, float]], quality: str = "psnr") -> float:
    """BD-rate at equal PSNR, or at equal MS-SSIM in dB."""

    def value(point: dict[str, float]) -> float:
        return point["psnr"] if quality == "psnr" else float(-10 * np.log10(1 - point["ms_ssim"]))

    columns = [column for curve in (own, rival) for column in ([p["bpp"] for p in curve], [value(p) for p in curve])]
    return metrics.bd_rate(*columns)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, name, label in zip(axes, ("psnr", "ms_ssim"), ("PSNR in dB (RGB)", "MS-SSIM in dB"), strict=True):
        for curve, points in results["curves"].items():
            values = [p[name] if name == "psnr" else -10 * np.log10(1 - p[name]) for p in points]
            own = curve == results["model"]
            axis.plot([p["bpp"] for p in points], values, "o-", ms=3, lw=2.2 if own else 1.2, label=curve)
        for name_, curve in results.get("published", {}).items():
            if name == "psnr":
                axis.plot(curve["bpp"], curve["psnr"], "--", lw=0.6, color="0.5", zorder=0)
                inside = [i for i, bpp in enumerate(curve["bpp"]) if bpp < 1.95]
                axis.annotate(name_, (curve["bpp"][inside[-1]], curve["psnr"][inside[-1]]), fontsize=5, color="0.4")
        axis.set(xlabel="bits per pixel, whole files", ylabel=label, xlim=(0, 2))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{results['pictures']} pictures of {results['folder']}")
    figure.savefig(path, dpi=110)


PUBLISHED = {
    "vtm": "VTM",
    "hm": "HM",
    "bpg_444_x265_ycbcr": "BPG 4:4:4",
    "compressai-bmshj2018-factorized_mse_cuda": "factorised 2018",
    "compressai-bmshj2018-hyperprior_mse_cuda": "hyperprior 2018",
    "compressai-mbt2018-mean_mse_cuda": "mean and scale 2018",
    "compressai-cheng2020-attn_mse_cuda": "cheng2020",
    "paper-elic2022_mse": "ELIC 2022",
    "EVC-EncS_DecS": "EVC S",
    "shallowntc-2-layer_syn+SGA": "shallow NTC + SGA",
}
"""Curves of --anchors that are drawn: file name -> label."""


def published(folder: Path) -> dict[str, dict[str, list[float]]]:
    curves = {}
    for file, label in PUBLISHED.items():
        values = json.loads((folder / f"{file}.json").read_text())["results"]
        points = sorted(zip(values["bpp"], values["psnr-rgb"], strict=True))
        curves[label] = {"bpp": [p[0] for p in points], "psnr": [p[1] for p in points]}
    return curves


def report(results: dict[str, Any]) -> None:
    for name, curve in results["curves"].items():
        print(f"{name}: " + "  ".join(f"{p['bpp']:.3f}→{p['psnr']:.2f}" for p in curve))
    for name, rate in results["bd_rate_psnr"].items():
        print(f"BD-rate against {name}: {rate:+.1f} % (PSNR), {results['bd_rate_ms_ssim'][name]:+.1f} % (MS-SSIM)")
    print(f"\n{'picture':<28}{'q':>4}{'bpp':>7}{'PSNR':>7}  |{'JPEG q':>7}{'bpp':>7}{'PSNR':>7}{'gain dB':>9}")
    wins = 0
    for name, pair in results["near_half_bpp"].items():
        own, other = pair["hourglass"], pair["jpeg"]
        gain = own["psnr"] - other["psnr"]
        wins += gain > 0
        print(
            f"{name:<28}{own['quality']:>4.0f}{own['bpp']:>7.3f}{own['psnr']:>7.2f}  |"
            f"{other['quality']:>7}{other['bpp']:>7.3f}{other['psnr']:>7.2f}{gain:>+9.2f}"
        )
    print(f"higher PSNR than a JPEG of the same size or larger: {wins} of {len(results['near_half_bpp'])} pictures")
    worst = max((ratio, q) for q, ratio in results["real_to_ideal"].items())
    print(
        f"bytes of files above what the tables say: at most {worst[0] - 1:.2%} (quality {worst[1]}), mean of pictures"
    )
    print(f"sizes rise with quality (0, 1, ... 100) on {results['monotone']} of {results['pictures']} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--chart", type=Path, help="draw the curves (.png or .svg)")
    parser.add_argument("--anchors", type=Path, help="folder of published curves to draw beside")
    parser.add_argument("--effort", choices=get_args(codec.Effort), default="default")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--zoo", type=Path, default=None)
    options = parser.parse_args()
    coder = codec.Codec(options.model, threads=1, **({"zoo": options.zoo} if options.zoo else {}))
    paths = list_pictures(options.folder)
    with ThreadPoolExecutor(usable_cores()) as pool:
        work = pool.map(lambda path: own_points(image.read(path), coder, options.effort), paths)
        own = list(tqdm(work, desc=options.model, total=len(paths)))
    curves = {options.model: mean_curve([row["points"] for row in own])}
    for name, (rival, qualities) in RIVALS.items():
        curves[name] = mean_curve(measure(paths, rival, qualities, name))
    results: dict[str, Any] = {
        **head(options.model),
        "folder": options.folder.name,
        "pictures": len(paths),
        "effort": options.effort,
        "curves": curves,
        "real_to_ideal": {
            str(q): float(np.mean([row["points"][i]["bytes"] / row["ideal"][i] for row in own]))
            for i, q in enumerate(QUALITIES)
        },
        "bd_rate_psnr": {name: bd(curves[options.model], curves[name]) for name in RIVALS},
        "bd_rate_ms_ssim": {name: bd(curves[options.model], curves[name], "ms_ssim") for name in RIVALS},
        "monotone": sum(all(a < b for a, b in itertools.pairwise(row["sizes"])) for row in own),
        "near_half_bpp": {
            path.name: {"hourglass": row["near"], "jpeg": jpeg_no_smaller(image.read(path), row["near"]["bytes"])}
            for path, row in zip(paths, own, strict=True)
        },
    }
    if options.anchors:
        results["published"] = published(options.anchors)
    report(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.chart:
        draw(results, options.chart)


if __name__ == "__main__":
    main()
