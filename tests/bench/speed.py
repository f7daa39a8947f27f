"""Speed, memory and cold start, beside AVIF speed 6 and WebP method 6 in the same run.

    python tests/bench/speed.py FOLDER [--out speed.json] [--repeat 6]

The pictures are mosaics of the photographs in FOLDER: 768x512, 2 and 12 megapixels. Encoding goes from a PPM file to a
compressed file, decoding back to a PPM file, so that no other codec's work is measured. Each row is the median of
interleaved repetitions in one process that may use one core or two. Peak memory and cold start are those of the whole
command, `compress-image`, in a new process, its modules compiled before, as pip leaves them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from head import head
from PIL import Image

from hourglass.codec import Codec, image
from hourglass.codec.image import list_pictures
from hourglass.codec.runtime import DEFAULT_MODEL
from hourglass.codec.watch import watching

SIZES = {"768x512": (768, 512), "2 MP": (1632, 1224), "12 MP": (4000, 3000)}
COMMAND = str(Path(sys.executable).with_name("compress-image"))

RIVALS: dict[str, dict[str, Any]] = {
    "AVIF speed 6": {"format": "AVIF", "quality": 60, "subsampling": "4:4:4", "speed": 6},
    "WebP method 6": {"format": "WEBP", "quality": 75, "method": 6},
}
"""Settings in common use, beside Hourglass at quality 50; the sizes of the files are in the results."""


def mosaic(paths: list[Path], width: int, height: int) -> image.Pixels:
    pictures = [image.read(path) for path in paths]
    pictures = [p if p.shape[1] >= p.shape[0] else p.transpose(1, 0, 2) for p in pictures]
    side, tall = min(p.shape[1] for p in pictures), min(p.shape[0] for p in pictures)
    columns, rows = -(-width // side), -(-height // tall)
    cut = [pictures[i % len(pictures)][:tall, :side] for i in range(columns * rows)]
    tiled = np.concatenate([np.concatenate(cut[r * columns : (r + 1) * columns], 1) for r in range(rows)])
    return np.ascontiguousarray(tiled[:height, :width])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(source: Path, folder: Path, repeat: int) -> dict[str, Any]:
    """Seconds of every coder on one PPM file, and Hourglass's hops, on the cores that this process may use."""
    codec, out = Codec(), folder / "decoded.ppm"

    def encode() -> None:
        (folder / "own").write_bytes(codec.encode(source))

    def decode() -> None:
        out.write_bytes(image.write(codec.decode(folder / "own"), "PPM"))

    work: dict[tuple[str, str], Callable[[], object]] = {
        ("Hourglass", "encode"): encode,
        ("Hourglass", "decode"): decode,
    }
    for name, options in RIVALS.items():
        file = folder / options["format"]
        threads = {"max_threads": len(os.sched_getaffinity(0))} if options["format"] == "AVIF" else {}

        def encode_rival(
            file: Path = file, options: dict[str, Any] = options, threads: dict[str, int] = threads
        ) -> None:
            Image.open(source).save(file, **options, **threads)

        def decode_rival(file: Path = file) -> None:
            Image.open(file).convert("RGB").save(out)

        work |= {(name, "encode"): encode_rival, (name, "decode"): decode_rival}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for turn in range(repeat + 1):
        for key, call in work.items():
            took = seconds(call)
            if turn:  # the first loads libraries and sessions
                times[key].append(took)
    files = {"Hourglass": folder / "own"} | {name: folder / options["format"] for name, options in RIVALS.items()}
    result: dict[str, Any] = {name: {"bytes": file.stat().st_size} for name, file in files.items()}
    for (name, way), taken in times.items():
        result[name][way] = statistics.median(taken)
    result["hops"] = hops(codec, source, folder / "own", repeat)
    return result


def hops(codec: Codec, source: Path, file: Path, repeat: int) -> dict[str, float]:
    """Median seconds of each hop of encode and decode, summed over the cores, and of what lies around them: reading and
    writing the picture, and smaller pictures beside reducing the whole one.
    """
    picture, data = image.load(source), file.read_bytes()
    size = picture.width // 8, picture.height // 8
    around: dict[str, Callable[[], object]] = {
        "read the picture": lambda: image.load(source),
        "write the picture": lambda: image.write(picture, "PPM"),
        "decode at 1/8": lambda: codec.decode(data, scale=8),
        "decode and reduce to 1/8": lambda: Image.fromarray(codec.decode(data)).resize(size, Image.Resampling.BOX),
    }
    taken: dict[str, list[float]] = {}
    for _ in range(repeat):
        for way, call in (("encode", lambda: codec.encode(picture)), ("decode", lambda: codec.decode(data))):
            with watching() as parts:
                call()
            for name, took in parts.items():
                taken.setdefault(f"{way}: {name}", []).append(took)
        for name, work in around.items():
            taken.setdefault(name, []).append(seconds(work))
    return {name: statistics.median(values) for name, values in taken.items()}


def command(arguments: list[str | Path]) -> tuple[float, float]:
    """Seconds and peak megabytes of one command in a new process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen([COMMAND, *arguments], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"compress-image ended with {process.returncode}")
    return took, usage.ru_maxrss / 1024


def child(cores: int, source: Path, folder: Path, repeat: int) -> dict[str, Any]:
    """`measure` in a process that may use `cores` cores."""
    program = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])
import speed
from pathlib import Path
print(json.dumps(speed.measure(Path({str(source)!r}), Path({str(folder)!r}), {repeat})))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--repeat", type=int, default=6, help="turns at 2 MP; 4 times as many at 768x512, half at 12")
    options = parser.parse_args()
    rows, memory = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        turns = dict(zip(SIZES, (4 * options.repeat, options.repeat, max(3, options.repeat // 2)), strict=True))
        for name, (width, height) in SIZES.items():
            source = folder / "source.ppm"
            source.write_bytes(image.write(mosaic(list_pictures(options.folder), width, height), "PPM"))
            for cores in range(1, min(2, len(os.sched_getaffinity(0))) + 1):
                measured = child(cores, source, folder, turns[name])
                rows.append({"picture": name, "pixels": width * height, "cores": cores, **measured})
                show(rows[-1])
            file = folder / "photo.hgc"
            command([source, "-fo", file])  # leaves compiled modules, where nothing has
            runs = [command([source, "-fo", file]) for _ in range(3)]
            back = [command(["-d", file, "-fo", folder / "back.ppm"]) for _ in range(3)]
            memory[name] = {
                "encode_seconds": statistics.median(took for took, _ in runs),
                "decode_seconds": statistics.median(took for took, _ in back),
                "encode_megabytes": max(peak for _, peak in runs),
                "decode_megabytes": max(peak for _, peak in back),
            }
            print(f"compress-image, {name}, new process:", {k: round(v, 2) for k, v in memory[name].items()})
    results = {
        **head(DEFAULT_MODEL),
        "rows": rows,
        "command": memory,
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['picture']}, {row['cores']} core(s), MP/s:")
    for name in ("Hourglass", *RIVALS):
        speeds = {way: row["pixels"] / 1e6 / row[name][way] for way in ("encode", "decode")}
        ratio = {way: row[name][way] / row["Hourglass"][way] for way in speeds}
        bpp = row[name]["bytes"] * 8 / row["pixels"]
        print(
            f"  {name:<14} {bpp:.3f} bpp   encode {speeds['encode']:7.2f}   decode {speeds['decode']:7.2f}"
            f"   Hourglass is {ratio['encode']:.2f} x and {ratio['decode']:.3f} x as fast"
        )
    print("  " + ", ".join(f"{name} {1000 * took:.0f} ms" for name, took in row["hops"].items()))


if __name__ == "__main__":
    main()
