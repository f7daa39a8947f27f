"""Search an archive of .hgc files for pictures like another one, without decoding a single picture.

    python client/examples/similar.py ARCHIVE photo.jpg        the files that are most like photo.jpg
    python client/examples/similar.py ARCHIVE --duplicates     pairs of files that are nearly the same picture
    python client/examples/similar.py ARCHIVE photo.jpg --time what decoding all pictures would have taken

The descriptions (`Codec.features`) are kept in ARCHIVE/.features.npz, so that only new and changed files are looked at
the next time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from hourglass.codec import Codec, errors

NEARLY_THE_SAME = 0.9
"""Products of descriptions from which on two pictures are taken for the same one, compressed anew, brighter or cut a
little. Of the 276 pairs of Kodak's different photographs none comes to that; the same one at half the size has 0.7."""

_INDEX = ".features.npz"


def indexed(archive: Path, codec: Codec) -> tuple[list[Path], NDArray[np.float32]]:
    """The .hgc files of a folder and its folders that `codec`'s model made, and their descriptions (N, D)."""
    index, known = archive / _INDEX, {}
    if index.exists():
        with np.load(index, allow_pickle=False) as kept:
            known = dict(zip(kept["stamps"].tolist(), kept["features"], strict=True))
    found: dict[str, NDArray[np.float32]] = {}
    paths = []
    for path in sorted(archive.rglob("*.hgc")):
        stamp = f"{path.relative_to(archive)} {path.stat().st_size} {path.stat().st_mtime_ns}"
        try:
            if codec.read_header(path).model not in (codec.model, ""):
                print(f"{path}: of another model, left out", file=sys.stderr)
                continue
            found[stamp] = known[stamp] if stamp in known else codec.features(path)
        except errors.HourglassError as exc:
            print(f"{path}: {exc}", file=sys.stderr)
        else:
            paths.append(path)
    if not found:
        raise click.UsageError(f"{archive} has no .hgc file of model {codec.model}")
    features = np.stack(list(found.values()))
    temporary = index.with_suffix(".new.npz")
    np.savez(temporary, stamps=np.array(list(found)), features=features)
    temporary.replace(index)
    return paths, features


def alike(features: NDArray[np.float32], described: NDArray[np.float32]) -> NDArray[np.float32]:
    """How alike each of (N, D) and one (D,) are, -1 to 1: (N,)."""
    product: NDArray[np.float32] = features @ described
    return product


@click.command(help=__doc__)
@click.argument("archive", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("picture", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--duplicates", is_flag=True, help="Print pairs of files that are nearly the same picture.")
@click.option("--count", default=5, show_default=True, help="Files to print.")
@click.option("--time", "timed", is_flag=True, help="Also decode all pictures, to compare the time.")
def main(archive: Path, picture: Path | None, duplicates: bool, count: int, timed: bool) -> None:
    if (picture is None) != duplicates:
        raise click.UsageError("give a picture to search for, or --duplicates")
    codec = Codec()
    codec.warm_up()
    began = time.perf_counter()
    paths, features = indexed(archive, codec)
    took = time.perf_counter() - began
    if picture is not None:
        likeness = alike(features, codec.features(picture))
        for number in np.argsort(-likeness)[:count]:
            print(f"{likeness[number]:.3f}  {paths[number]}")
    else:
        products = np.triu(features @ features.T, 1)
        pairs = np.argwhere(products >= NEARLY_THE_SAME)
        for first, second in sorted(pairs.tolist(), key=lambda pair: -products[pair[0], pair[1]]):
            print(f"{products[first, second]:.3f}  {paths[first]}  {paths[second]}")
    if timed:
        began = time.perf_counter()
        for path in paths:
            codec.decode(path)
        print(f"{len(paths)} files: {took:.2f} s to describe, {time.perf_counter() - began:.2f} s to decode")


if __name__ == "__main__":
    try:
        main()
    except errors.HourglassError as exc:
        sys.exit(f"similar.py: {exc}")
