"""Every model of the zoo on a folder of pictures, beside JPEG; what noise on the picture does to them; and a figure.

    python tests/bench/family.py FOLDER [--out family.json] [--figure family.png] [--photo NAME] [--models ID ...]

Rates are bytes of whole files, pictures 8-bit; curves are means over the pictures at each quality. Models of grey
pictures get the luma of the pictures, and a grey JPEG for a rival. Noise: Gaussian, of 5, 15, 25 grey levels; PSNR is
that of what is decoded against the picture without noise. A model never changes: with --models the rows of the others
stay as they are in the file.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from head import head
from PIL import Image, ImageDraw
from rd import Pixels, bd, jpeg, mean_curve, measured, pillow
from readme import present
from tqdm import tqdm

from hourglass.codec import Codec, image, metrics, runtime

QUALITIES = (0, 25, 50, 75, 100)
JPEG = (1, 5, 10, 20, 35, 50, 70, 85, 95)
SIGMAS = (0, 5, 15, 25)
NOISE_QUALITIES = (50, 100)
LUMA = np.array([0.299, 0.587, 0.114])


def grey_jpeg(pixels: Pixels, quality: int) -> tuple[int, Pixels]:
    size, decoded = pillow(pixels, quality, format="JPEG", optimize=True, progressive=True)
    return size, decoded[..., 0]


def luma(pixels: Pixels) -> Pixels:
    return np.asarray(np.rint(pixels @ LUMA), np.uint8)


def of_picture(path: Path, codec: Codec, grey: bool) -> dict[str, Any]:
    """Points of one picture, of a JPEG too, and the JPEG that is no smaller than the lowest file."""
    pixels = luma(image.read(path)) if grey else image.read(path)
    files = list(codec.encode_many(pixels, QUALITIES))
    shares = []
    for data in files:
        bits = codec.tensor_bits(data)
        shares.append(bits.get("l", 0.0) / sum(bits.values()))
    coder = grey_jpeg if grey else jpeg
    rivals = [measured(pixels, decoded, size, q) for q in JPEG for size, decoded in [coder(pixels, q)]]
    least = len(files[0])
    above = next((q for q in range(1, 96) if coder(pixels, q)[0] >= least), 95)
    size, decoded = coder(pixels, above)
    return {
        "points": [measured(pixels, codec.decode(f), len(f), q) for q, f in zip(QUALITIES, files, strict=True)],
        "jpeg": rivals,
        "jpeg_no_smaller": measured(pixels, decoded, size, above),
        "location_shares": shares,
    }


def of_model(model: str, paths: list[Path]) -> dict[str, Any]:
    codec, own = Codec(model, threads=1), runtime.open_model(model)
    grey = own.colours == 1
    with ThreadPoolExecutor(runtime.usable_cores()) as pool:
        rows = list(tqdm(pool.map(lambda path: of_picture(path, codec, grey), paths), total=len(paths), desc=model))
    curve = mean_curve([row["points"] for row in rows])
    rival = mean_curve([row["jpeg"] for row in rows])
    lowest = {name: float(np.mean([row["jpeg_no_smaller"][name] for row in rows])) for name in ("bpp", "psnr")}
    return {
        "colours": own.colours,
        "code": {rule.name: [rule.channels, rule.stride] for rule in own.tensors if rule != own.coded},
        "values_per_pixel": sum(rule.channels / rule.stride**2 for rule in own.tensors if rule != own.coded),
        "kmac_per_pixel": own.manifest["kmac_per_pixel"],
        "curve": curve,
        "location_shares": [float(np.mean(s)) for s in zip(*(row["location_shares"] for row in rows), strict=True)],
        "bd_rate_against_jpeg": bd(curve, rival),
        "lowest": {"bpp": curve[0]["bpp"], "psnr": curve[0]["psnr"], "jpeg": lowest},
    }


def noise(models: list[str], paths: list[Path]) -> dict[str, Any]:
    """PSNR against the clean picture by model, quality and deviation of the noise, and that of the noisy one itself."""
    clean = [image.read(path) for path in paths]

    def noisy(number: int, sigma: int) -> Pixels:
        added = np.random.default_rng([number, sigma]).normal(0, sigma, clean[number].shape)
        return np.clip(np.rint(clean[number] + added), 0, 255).astype(np.uint8)

    inputs = {sigma: [noisy(number, sigma) for number in range(len(clean))] for sigma in SIGMAS}
    results: dict[str, Any] = {
        "input": {
            str(sigma): float(np.mean([metrics.psnr(a, b) for a, b in zip(clean, inputs[sigma], strict=True)]))
            for sigma in SIGMAS[1:]
        }
    }
    for model in tqdm(models, desc="noise"):
        codec = Codec(model)
        results[model] = {}
        for quality in NOISE_QUALITIES:
            results[model][str(quality)] = {}
            for sigma in SIGMAS:
                pairs = []
                for original, disturbed in zip(clean, inputs[sigma], strict=True):
                    data = codec.encode(disturbed, quality=quality, fallback=False)
                    bpp = metrics.bpp(len(data), original.shape[1], original.shape[0])
                    pairs.append((metrics.psnr(original, codec.decode(data)), bpp))
                psnr, bpp = np.mean(pairs, axis=0)
                results[model][str(quality)][str(sigma)] = {"psnr": float(psnr), "bpp": float(bpp)}
    return results


def figure(models: list[str], photo: Path, out: Path) -> None:
    """The original and what each model makes of it at about 0.4 bpp; below each, some channels of its code."""
    pixels = image.read(photo)
    top, left, side = pixels.shape[0] // 3, pixels.shape[1] // 3, 256
    panels = []
    for model in [None, *models]:
        panel = Image.new("RGB", (side + 8, 2 * side + 44), "white")
        draw = ImageDraw.Draw(panel)
        shown, text = pixels, "original"
        if model:
            codec = Codec(model)
            data = codec.encode(pixels, target_bpp=0.4, fallback=False)
            shown, code = codec.decode(data), codec.unpack(data)
            bpp = metrics.bpp(len(data), pixels.shape[1], pixels.shape[0])
            text = f"{model}, {bpp:.2f} bpp, {metrics.psnr(pixels, shown):.1f} dB"
            panel.paste(channels(code.tensors["y"], side), (4, side + 40))
            draw.text((4, side + 25), "channels of the code with most in them", fill="black")
        panel.paste(Image.fromarray(shown[top : top + side, left : left + side]), (4, 18))
        draw.text((4, 3), text, fill="black")
        panels.append(np.asarray(panel))
    Image.fromarray(np.concatenate(panels, 1)).quantize(200).save(out, optimize=True)


def channels(symbols: np.ndarray[Any, np.dtype[np.int16]], side: int) -> Image.Image:
    """The nine channels that hold most, as pictures, 3 by 3 of them in a square of `side` pixels."""
    strongest = np.argsort(-abs(symbols.astype(float)).mean((1, 2)))[:9]
    sheet, cell = Image.new("L", (side, side), 255), side // 3
    for place, channel in enumerate(sorted(strongest)):
        values = symbols[channel].astype(float)
        reach = max(float(np.quantile(abs(values), 0.98)), 1.0)
        shades = np.clip(128 + 127 * values / reach, 0, 255).astype(np.uint8)
        tile = Image.fromarray(shades).resize((cell - 3, cell - 3), Image.Resampling.NEAREST)
        sheet.paste(tile, (place % 3 * cell, place // 3 * cell))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("family.json"))
    parser.add_argument("--figure", type=Path, default=Path(__file__).with_name("family.png"))
    parser.add_argument("--photo", help="Picture of the figure; the first of the folder when not given.")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=runtime.model_ids(),
        help="Measure these; the others' rows are in the file already.",
    )
    options = parser.parse_args()
    paths = image.list_pictures(options.folder)
    kept: dict[str, Any] = {"models": {}, "noise": {}}
    if options.models:
        kept = json.loads(options.out.read_text())
        if (kept["folder"], kept["pictures"]) != (options.folder.name, len(paths)):
            parser.error(
                f"{options.out} is of {kept['pictures']} pictures of {kept['folder']}; expected {options.folder}"
            )
    models = sorted(runtime.model_ids(), key=lambda model: (model != runtime.DEFAULT_MODEL, model))
    colour = [model for model in models if runtime.open_model(model).colours == 3]
    shown = [model for model in present(models) if model in colour and not model.endswith("-denoise")]
    figure(shown, next((p for p in paths if options.photo and options.photo in p.name), paths[0]), options.figure)
    anew = options.models or models
    rows = kept["models"] | {model: of_model(model, paths) for model in models if model in anew}
    disturbed = kept["noise"] | noise([model for model in colour if model in anew], paths)
    results = {
        **head(),
        "folder": options.folder.name,
        "pictures": len(paths),
        "models": {model: rows[model] for model in models},
        "noise": {name: disturbed[name] for name in ["input", *colour]},
    }
    for model, result in results["models"].items():
        low = result["lowest"]
        print(
            f"{model:26} BD-rate against JPEG {result['bd_rate_against_jpeg']:+.1f} %, lowest {low['bpp']:.3f} bpp "
            f"{low['psnr']:.2f} dB, JPEG {low['jpeg']['bpp']:.3f} bpp {low['jpeg']['psnr']:.2f} dB"
        )
    for model, by_quality in results["noise"].items():
        print(model, json.dumps(by_quality))
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
