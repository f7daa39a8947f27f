"""Odd and broken pictures through `compress-image`, one process each: what became of them, by kind.

    python tests/bench/robust.py FOLDER...

Every file has to round trip with its meaning kept (size after orientation, grey, alpha without loss), or give one clear
line and exit code 1; none may print a traceback, leave a file behind, or take more than 2 seconds or 1 GB. Prints a
table and what fails; exits with 1 when something does.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from hourglass.codec import errors, image

SECONDS, BYTES = 2.0, 1 << 30
COMMAND = str(Path(sys.executable).with_name("compress-image"))


def run(arguments: list[str], log: Path) -> tuple[int, float, int]:
    """Exit code, seconds, and largest resident set in bytes of a command; what it says goes to `log`."""
    started = time.perf_counter()
    with log.open("wb") as out:
        actions = [(os.POSIX_SPAWN_DUP2, out.fileno(), 1), (os.POSIX_SPAWN_DUP2, out.fileno(), 2)]
        child = os.posix_spawn(COMMAND, [COMMAND, *arguments], dict(os.environ), file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - started, usage.ru_maxrss * 1024


def outcome(path: Path) -> tuple[str, list[str], float, int]:
    """What became of a file, what is wrong with that, the slower command's seconds and the larger one's bytes."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        coded, back, log = (Path(folder) / name for name in ("out.hgc", "out.png", "log"))
        status, seconds, peak = run([str(path), "-o", str(coded)], log)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("compress-image: ")]
        if "Traceback" in log.read_text(errors="replace"):
            wrong.append("traceback")
        if status:
            if status != 1 or len(said) != 1:
                wrong.append(f"exit code {status}, {len(said)} lines")
            if [entry.name for entry in Path(folder).iterdir()] != ["log"]:
                wrong.append("left a file behind")
            reason = said[0] if said else ""
            kinds = {"no picture format": "no picture format", "limit": "beyond a limit"}
            refused = next((kind for words, kind in kinds.items() if words in reason), "damaged")
            return f"refused: {refused}", wrong, seconds, peak
        decoded, slower, larger = run(["-d", str(coded), "-o", str(back)], log)
        if decoded or "Traceback" in log.read_text(errors="replace"):
            wrong.append(f"decoding exits with {decoded}: {log.read_text(errors='replace')[-200:]}")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", errors.LossWarning)
                wrong += differences(image.load(path), image.load(back))
        return "kept, loss said" if said else "kept", wrong, max(seconds, slower), max(peak, larger)


def differences(before: image.Picture, after: image.Picture) -> list[str]:
    """What two pictures do not share of what a picture means."""
    found = []
    if (before.width, before.height) != (after.width, after.height):
        found.append(f"size {before.width}x{before.height} became {after.width}x{after.height}")
    if before.grey and not after.grey:
        found.append("grey became colour")
    if (before.alpha is None) != (after.alpha is None):
        found.append("alpha came or went")
    elif before.alpha is not None and after.alpha is not None and not np.array_equal(before.alpha, after.alpha):
        found.append("alpha changed")
    if before.metadata.icc != after.metadata.icc:
        found.append("ICC profile changed")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    folders: list[Path] = parser.parse_args().folders
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".csv"]
    roots = {path: next(f for f in folders if f in path.parents) for path in files}
    results = [(path, outcome(path)) for path in files]  # one at a time: two would take each other's cores
    columns = sorted({what for _, (what, *_) in results})
    rows: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures = []
    for path, (what, wrong, seconds, peak) in results:
        below = path.relative_to(roots[path]).parts
        rows[below[0] if len(below) > 1 else roots[path].name][what] += 1
        if seconds > SECONDS:
            wrong.append(f"took {seconds:.2f} s")
        if peak > BYTES:
            wrong.append(f"took {peak / 1e6:.0f} MB")
        failures += [f"{path}: {fault}" for fault in wrong]
    print("| kind | files | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for kind, counts in sorted(rows.items()):
        print(f"| {kind} | {counts.total()} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    print(f"slowest {max(r[1][2] for r in results):.2f} s, largest {max(r[1][3] for r in results) / 1e6:.0f} MB")
    print("\n".join(failures) or "nothing fails")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
