"""Write the README's tables anew from the committed results: `python tests/bench/readme.py`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
README = BENCH.parent.parent / "README.md"


def quality(kodak: dict[str, Any]) -> list[str]:
    rows = ["| quality | bits per pixel | PSNR, dB | MS-SSIM |", "|---|---|---|---|"]
    return rows + [
        f"| {p['quality']:g} | {p['bpp']:.3f} | {p['psnr']:.2f} | {p['ms_ssim']:.4f} |"
        for p in kodak["curves"][kodak["model"]]
    ]


def rivals(kodak: dict[str, Any], others: dict[str, Any]) -> list[str]:
    rows = ["| rival | Kodak, PSNR | other photographs, PSNR | Kodak, MS-SSIM | other photographs, MS-SSIM |"]
    rows.append("|---|---|---|---|---|")
    for name in kodak["bd_rate_psnr"]:
        rates = [results[key][name] for key in ("bd_rate_psnr", "bd_rate_ms_ssim") for results in (kodak, others)]
        rows.append(f"| {name} | " + " | ".join(f"{rate:+.1f} %" for rate in rates) + " |")
    return rows


def effort(results: dict[str, Any]) -> list[str]:
    kodak, others = results["folders"]
    rival = "AVIF speed 6"
    heads = ["effort", "encode, seconds a megapixel"]
    heads += [f"{folder}, against {other}" for folder in ("Kodak", "other photographs") for other in ("default", rival)]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seconds in results["seconds_a_megapixel"].items():
        rates = [row["bd_rate_psnr"][name][against] for row in (kodak, others) for against in ("default", rival)]
        cells = [f"{rate:+.1f} %" if rate else "" for rate in rates]
        rows.append(f"| `{name}` | {seconds:.2g} | {' | '.join(cells)} |")
    return rows


def speed(results: dict[str, Any]) -> list[str]:
    names = ("Hourglass", "AVIF speed 6", "WebP method 6")
    rows = ["| picture | cores | encode | AVIF s6 | WebP m6 | decode | AVIF s6 | WebP m6 |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for row in results["rows"]:
        cells = [
            f"{row['pixels'] / 1e6 / row[name][way]:.{0 if way == 'decode' and name != 'Hourglass' else 1}f}"
            for way in ("encode", "decode")
            for name in names
        ]
        rows.append(f"| {row['picture']} | {row['cores']} | {' | '.join(cells)} |")
    return rows


def present(models: Iterable[str]) -> list[str]:
    """Of ids, the flagship's first, that one and those of classic models; earlier flagships are in the JSON only."""
    return [model for number, model in enumerate(models) if not number or model.startswith("classic-")]


def family(results: dict[str, Any]) -> list[str]:
    heads = ["model", "code, channels and stride", "kMAC a pixel, each way", "quality 0", "quality 50", "quality 100"]
    heads += ["JPEG, no smaller than quality 0", "BD-rate against JPEG"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in present(results["models"]):
        model = results["models"][name]
        code = " + ".join(f"{tensor} {channels}, {stride}" for tensor, (channels, stride) in model["code"].items())
        work = model["kmac_per_pixel"]
        points = [p for p in model["curve"] if p["quality"] in (0, 50, 100)]
        cells = [f"{p['bpp']:.3f} bpp, {p['psnr']:.2f} dB, {p['ms_ssim']:.3f}" for p in points]
        jpeg = model["lowest"]["jpeg"]
        rows.append(
            f"| `{name}` | {code} | {work['analysis']:.1f}, {work['synthesis'] + work.get('prior', 0):.1f} | "
            f"{' | '.join(cells)} | {jpeg['bpp']:.3f} bpp, {jpeg['psnr']:.2f} dB | "
            f"{model['bd_rate_against_jpeg']:+.0f} % |"
        )
    return rows


def noise(results: dict[str, Any]) -> list[str]:
    noisy = results["noise"]
    sigmas = ("0", *noisy["input"])
    rows = ["| model | quality | " + " | ".join(f"noise {sigma}" for sigma in sigmas) + " |"]
    rows.append("|---|---|" + "---|" * len(sigmas))
    rows.append(
        "| the noisy picture itself | | | " + " | ".join(f"{psnr:.1f}" for psnr in noisy["input"].values()) + " |"
    )
    for name in present(results["models"]):
        for quality, values in noisy.get(name, {}).items():  # of the models for colour
            cells = [f"{values[sigma]['psnr']:.1f} ({values[sigma]['bpp']:.2f} bpp)" for sigma in sigmas]
            rows.append(f"| `{name}` | {quality} | {' | '.join(cells)} |")
    return rows


CODES = {
    "raw pixels": "raw pixels",
    "PCA": "PCA",
    "plain": "code of a plain autoencoder",
    "distorted": "code, distorted in, clean out",
    "feature": "code, and two distortions agree",
    "feature, fully connected head": "the same code, fully connected head",
}


def digits_labels(results: dict[str, Any]) -> list[str]:
    counts = results["settings"]["labels"]
    rows = ["| features | numbers | " + " | ".join(f"{count} labels" for count in counts) + " |"]
    rows.append("|---|---|" + "---|" * len(counts))
    for name, label in CODES.items():
        found = [row for row in results["classification"] if row["features"] == name]
        cells = [f"{row['mean']:.1f} ± {row['deviation']:.1f} %" for row in found]
        rows.append(f"| {label} | {found[0]['numbers']} | {' | '.join(cells)} |")
    return rows


def digits_clusters(results: dict[str, Any]) -> list[str]:
    rows = ["| clusters of | NMI | purity |", "|---|---|---|"]
    for row in results["clusters"]:
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['deviation']:.3f}" for key in ("nmi", "purity")]
        rows.append(f"| {CODES[row['features']]} | {' | '.join(cells)} |")
    return rows


def digits_samples(results: dict[str, Any]) -> list[str]:
    rows = ["| pictures | Fréchet distance | to the nearest training digit |", "|---|---|---|"]
    return rows + [
        f"| {row['pictures']} | {row['frechet']:.2f} | {row['nearest']:.3f} |" for row in results["generation"]
    ]


def tables() -> dict[str, list[str]]:
    """The lines of each table."""
    kodak, others, efforts, speeds, models, digits = (
        json.loads((BENCH / f"{n}.json").read_text())
        for n in ("rd", "rd-photos2", "effort", "speed", "family", "digits")
    )
    return {
        "quality": quality(kodak),
        "rivals": rivals(kodak, others),
        "effort": effort(efforts),
        "speed": speed(speeds),
        "family": family(models),
        "noise": noise(models),
        "digits-labels": digits_labels(digits),
        "digits-clusters": digits_clusters(digits),
        "digits-samples": digits_samples(digits),
    }


def main() -> None:
    text = README.read_text()
    for name, lines in tables().items():
        block = "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])
        text, count = re.subn(f"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md has {count} places for the table {name}; expected one")
    README.write_text(text)


if __name__ == "__main__":
    main()
