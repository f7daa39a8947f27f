"""Rows of a picture file by libvips, which holds little of it. The only user of pyvips, which the extra `large` has."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import ImageError

Fetch: TypeAlias = Callable[[int, int], NDArray[np.uint8]]
"""First row, how many -> (rows, W, samples) uint8. From top to bottom. Raises `ImageError`."""

_FEW = 1 << 18
"""Bytes of rows that libvips is asked for at once, one row at least: it keeps many times as much in memory."""

# Rows come one after the other from a decoder that works alone: more threads only take memory. Read when libvips loads.
os.environ.setdefault("VIPS_CONCURRENCY", "1")


def open_rows(source: str | bytes, name: str, size: tuple[int, int], samples: int) -> Fetch | None:
    """Rows of an 8-bit picture of this width and height, from a path or bytes. name: of it, for messages.

    None where libvips is not installed, cannot read the file, or finds another kind of picture in it.
    """
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: pyvips without its library
        return None
    options = {"access": "sequential", "fail_on": "error"}
    try:
        if isinstance(source, str):
            picture = pyvips.Image.new_from_file(source, revalidate=True, **options)
        else:
            picture = pyvips.Image.new_from_buffer(source, "", **options)
        if (picture.width, picture.height, picture.bands, picture.format) != (*size, samples, "uchar"):
            return None
        region = pyvips.Region.new(picture)
    except pyvips.Error:  # a kind of file that only Pillow reads, or none
        return None
    width = size[0]
    rows = max(1, _FEW // (width * samples))

    def fetch(y: int, count: int) -> NDArray[np.uint8]:
        part = np.empty((count, width, samples), np.uint8)
        try:
            for at in range(0, count, rows):
                few = min(rows, count - at)
                part[at : at + few].reshape(-1)[:] = np.frombuffer(region.fetch(0, y + at, width, few), np.uint8)
        except pyvips.Error as exc:
            raise ImageError(f"{name} cannot be decoded as a picture: {' '.join(str(exc).split())}") from exc
        return part

    return fetch
