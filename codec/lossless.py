"""Pixels <-> bytes without any loss, by codecs of Pillow: alpha, and pictures that the learned codec is no use for.

An area of one colour is that colour, one byte a channel. Everything else is a WebP (lossless) or PNG file. No valid
file of either is as short as a colour.
"""

from __future__ import annotations

import io
import zlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import CorruptError
from hourglass.codec.reader import quiet
from hourglass.codec.watch import hop

if TYPE_CHECKING:
    from PIL import Image

_STRIP, _SPACING = 24, 256
"""Rows of a strip that is looked at, and how far apart strips begin."""

_EVERY = 11
"""One row in so many is deflated."""

_SMALL = 1 << 16
"""Pixels of a picture for which PNG is tried too: WebP wins on all that are larger."""

_WEBP_SIDE = 16383

_ALPHA = {1: "LA", 3: "RGBA"}


@hop("lossless")
def pack(pixels: NDArray[np.uint8], thorough: bool = False) -> bytes:
    """(H, W) or (H, W, 2 to 4) uint8 -> bytes. thorough: take ten times as long for the last per cent."""
    from PIL import Image

    height, width = pixels.shape[:2]
    first = pixels[:1, :1]
    # Some rows at a time: most pictures are found not to be flat at once, and flat ones cost no memory.
    if all((pixels[top : top + _STRIP] == first).all() for top in range(0, height, _STRIP)):
        return first.tobytes()
    picture = Image.fromarray(pixels)
    found = []
    if max(height, width) <= _WEBP_SIDE:
        method, quality = (6, 100) if thorough else (4, 80)
        found.append(_saved(picture, "WEBP", lossless=True, exact=True, method=method, quality=quality))
    if not found or height * width <= _SMALL:
        found.append(_saved(picture, "PNG", optimize=True))
        if picture.mode in ("L", "RGB") and (colours := picture.getcolors(256)):
            few = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=len(colours))
            if np.array_equal(np.asarray(few.convert(picture.mode)), pixels):
                found.append(_saved(few, "PNG", optimize=True))
    return min(found, key=len)


@hop("lossless")
def unpack(data: bytes | memoryview, width: int, height: int, channels: int) -> NDArray[np.uint8]:
    """Inverse of `pack`. channels: of its colours, 1 or 3; alpha is as the data have it.

    Returns (H, W), (H, W, 2), (H, W, 3) or (H, W, 4) uint8. Raises `CorruptError`.
    """
    from PIL import Image

    if len(data) in (channels, channels + 1):
        flat = np.frombuffer(data, np.uint8)
        shape = (height, width) if len(data) == 1 else (height, width, len(data))
        return np.broadcast_to(flat[0] if len(data) == 1 else flat, shape)
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as opened:
            if opened.size != (width, height) or getattr(opened, "n_frames", 1) != 1:
                raise CorruptError(f"picture without loss is {opened.size}; its file says {(width, height)}")
            alpha = opened.has_transparency_data
            pixels: NDArray[np.uint8] = np.asarray(
                opened.convert({1: "L", 3: "RGB"}[channels] if not alpha else _ALPHA[channels])
            )
    except CorruptError:
        raise
    except Exception as exc:  # Pillow's plug-ins raise whatever a broken file makes them stumble over
        raise CorruptError(f"picture without loss cannot be decoded: {exc}") from exc
    return pixels


class Outlook:
    """What `pack` may come to, judged by every eleventh row, by strips of rows, and by how many rows come twice.

    On drawings and screenshots zlib on differences is at most 7 times as large as WebP, and WebP in a hurry 3 times;
    only what is nearly empty is further off.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._pixels = pixels

    @cached_property
    @hop("lossless")
    def is_nearly_empty(self) -> bool:
        """Whether there is next to nothing to store."""
        height, width = self._pixels.shape[:2]
        return self._deflated < int(height) * int(width) / 40

    @hop("lossless")
    def may_beat(self, size: int) -> bool:
        """Whether `pack` may come to `size` bytes or less."""
        if self.is_nearly_empty or self._deflated < 2 * size:
            return True
        if self._deflated > 10 * size:
            return False
        from PIL import Image

        part = self._pixels[self._rows, :_WEBP_SIDE]
        hurried = len(_saved(Image.fromarray(part), "WEBP", lossless=True, method=2, quality=20))
        return bool(hurried * self._pixels.size / part.size * self._fresh < 3.5 * size)

    @cached_property
    def _rows(self) -> list[int]:
        """A twelfth of the rows, in strips; of a small picture all."""
        height, width = self._pixels.shape[:2]
        if height * width <= _SMALL // 2:
            return list(range(height))
        return [row for top in range(0, height, _SPACING) for row in range(top, min(top + _STRIP, height))]

    @cached_property
    def _deflated(self) -> float:
        """Bytes as differences between neighbours, deflated in a hurry."""
        height, width = self._pixels.shape[:2]
        part = self._pixels[:: 1 if height * width <= _SMALL // 2 else _EVERY]
        deflated = len(zlib.compress(np.diff(part, axis=1, prepend=np.uint8(0)).tobytes(), 1))
        return float(deflated * height / len(part) * self._fresh)

    @cached_property
    def _fresh(self) -> float:
        """Share of the rows that are not the same as an earlier one, which WebP would find however far off it is."""
        rows = np.ascontiguousarray(self._pixels).reshape(len(self._pixels), -1)
        return len({zlib.crc32(row.data) for row in rows}) / len(rows)


def _saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()
