"""Write the README's tables anew from the committed results: `python tests/bench/readme.py`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
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
    digits = json.loads((BENCH / "digits.json").read_text())
    kodak, others, speeds = (json.loads((BENCH / f"{n}.json").read_text()) for n in ("rd", "rd-photos2", "speed"))
    return {"quality": quality(kodak), "rivals": rivals(kodak, others), "speed": speed(speeds)} | {
        f"digits-{part.__name__.removeprefix('digits_')}": part(digits)
        for part in (digits_labels, digits_clusters, digits_samples)
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
