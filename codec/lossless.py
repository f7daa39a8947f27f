"""Pixels <-> bytes without any loss, by codecs of Pillow: alpha, and pictures that the learned codec is no use for.

An area of one colour is that colour, one byte a channel. Everything else is a WebP (lossless) or PNG file. No valid
file of either is as short as a colour.
"""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hourglass.codec import vips
from hourglass.codec.errors import CorruptError
from hourglass.codec.reader import bands, pillow_of, quiet
from hourglass.codec.watch import hop

if TYPE_CHECKING:
    from PIL import Image

_STRIP, _SPACING = 24, 256
"""Rows of a strip that is looked at, and how far apart strips begin."""

_EVERY = 11
"""One row in so many is deflated."""

_SMALL = 1 << 16
"""Pixels of a picture for which PNG is tried too: WebP wins on all that are larger."""

_LITTLE = 1 << 19
"""Pixels of a picture of which to try costs next to nothing."""

_WEBP_SIDE = 16383

_ROOM = 240_000_000
"""Bytes that making a lossless WebP may take beside the picture twice: what 350 MB leave beside the libraries."""


@dataclass(frozen=True)
class _Way:
    """A way to make a lossless WebP, and the memory that it takes, in bytes a pixel beside Pillow's picture.

    least: of next to nothing. more: what noise takes beyond that; from `noise` bits a pixel on a picture counts as it.
    bend: how fast it gets there, 1 in proportion to the bits and less the faster; what comes over and over, in short
    pieces, takes few bits and much memory.
    """

    method: int
    quality: int
    least: int
    more: int
    noise: int
    bend: float

    def takes(self, bits: float) -> float:
        """Of a picture that in a hurry comes to `bits` a pixel."""
        return self.least + self.more * math.pow(min(1.0, bits / self.noise), self.bend)


_THOROUGH = _Way(6, 100, 53, 0, 1, 1)
_USUAL = _Way(4, 100, 27, 11, 6, 0.2)
"""Takes as much memory as at quality 80 and, on drawings, a fifth more time, for up to 4 % less."""
_FAR = _Way(0, 80, 14, 10, 12, 1)
"""Looks a million pixels back, as those above do."""
_NEAR = _Way(2, 20, 15, 17, 6, 0.33)
"""Looks 16 rows back, but with all of WebP's transforms, which `_FAR` is without."""

LARGE = 1 << 24
"""Pixels of a WebP above which libvips decodes it, where it is installed."""

_ALPHA = {1: "LA", 3: "RGBA"}


@hop("lossless")
def pack(colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None, thorough: bool = False) -> bytes:
    """(H, W) or (H, W, 3) uint8, and (H, W) uint8 -> bytes. thorough: take ten times as long for the last per cent."""
    from PIL import Image

    height, width = colour.shape[:2]
    parts = (colour,) if alpha is None else (colour, alpha)
    # Some rows at a time: most pictures are found not to be flat at once, and flat ones cost no memory.
    tops = range(0, height, _STRIP)
    first = all((part[0] == part[0, 0]).all() for part in parts)
    if first and all((part[top : top + _STRIP] == part[0]).all() for part in parts for top in tops):
        return b"".join(part[:1, :1].tobytes() for part in parts)
    picture = pillow_of(colour, alpha)
    ways = _webp_ways(colour, alpha, thorough)
    found = [_webp(picture, way) for way in ways]
    if ways in ([], [_FAR]) or height * width <= _SMALL:
        if picture.mode in ("L", "RGB") and (colours := picture.getcolors(256)):
            few = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=len(colours))
            parted = zip(bands(few), bands(picture), strict=True)
            if all(part.convert(picture.mode).tobytes() == original.tobytes() for part, original in parted):
                found.append(_saved(few, "PNG", optimize=True))
        found.append(_saved(picture, "PNG", optimize=True))
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
        row = np.empty(shape[1:], np.uint8)
        row[:] = flat[0] if len(data) == 1 else flat
        return np.broadcast_to(row, shape)  # a whole row: what is copied from it is copied fast
    try:
        with quiet(), Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as opened:
            if opened.size != (width, height) or getattr(opened, "n_frames", 1) != 1:
                raise CorruptError(f"picture without loss is {opened.size}; its file says {(width, height)}")
            alpha = opened.has_transparency_data
            if opened.format == "WEBP" and width * height > LARGE:
                samples = len(opened.getbands())
                rows = vips.open_rows(bytes(data), "picture without loss", (width, height), samples)
                if rows is not None:
                    chosen: Any = {(1, False): 1, (1, True): [1, 3]}.get((channels, alpha), slice(None))
                    return rows(0, height)[..., chosen]
            pixels: NDArray[np.uint8] = np.asarray(
                opened.convert({1: "L", 3: "RGB"}[channels] if not alpha else _ALPHA[channels])
            )
    except CorruptError:
        raise
    except Exception as exc:  # Pillow's plug-ins raise whatever a broken file makes them stumble over
        raise CorruptError(f"picture without loss cannot be decoded: {exc}") from exc
    return pixels


def _webp_ways(colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None, thorough: bool) -> list[_Way]:
    """The ways that there is memory for; the smallest file of them is taken."""
    height, width = colour.shape[:2]
    if max(height, width) > _WEBP_SIDE:
        return []
    samples = (1 if colour.ndim == 2 else 3) + (alpha is not None)
    # Pillow has four bytes a pixel, or one, and WebP is given four of all that is grey.
    room = _ROOM / (height * width) + samples - {1: 5, 2: 8}.get(samples, 4)
    if thorough and _THOROUGH.least <= room:
        return [_THOROUGH]
    if _USUAL.least + _USUAL.more < room:
        return [_USUAL]
    if room < _FAR.least:
        return []
    bits = hurried_bits(colour, alpha)
    if _USUAL.takes(bits) <= room:
        return [_USUAL]
    return [way for way in (_FAR, _NEAR) if way.takes(bits) <= room]


def hurried_bits(colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> float:
    """Bits a pixel that a lossless WebP, made in a hurry, of a twelfth of the rows takes; noise has 8 a sample."""
    rows = [row for row in range(len(colour)) if row % (12 * _STRIP) < _STRIP]
    part = pillow_of(colour[rows], None if alpha is None else alpha[rows])
    return 8 * len(_hurried(part)) / (part.width * part.height)


class Outlook:
    """What `pack` may come to, judged by a row of every eleven, by strips of rows, and by what comes twice.

    Which rows are looked at depends on all of the picture, so that none can be made to look good or bad at them. On
    drawings and screenshots zlib on differences is at most 7 times as large as WebP; WebP in a hurry, less what comes
    twice, at most 1.3 times. Only what is nearly empty is further off, and little pictures may be.
    """

    def __init__(self, colour: NDArray[np.uint8], alpha: NDArray[np.uint8] | None = None) -> None:
        self._colour, self._alpha = colour, alpha
        self._height, self._width = map(int, colour.shape[:2])

    @cached_property
    @hop("lossless")
    def is_nearly_empty(self) -> bool:
        """Whether there is next to nothing to store."""
        return self._deflated < self._height * self._width / 40

    @hop("lossless")
    def may_beat(self, size: int) -> bool:
        """Whether `pack` may come to `size` bytes or less."""
        if self.is_nearly_empty or self._deflated < 2 * size:
            return True
        deflated = self._deflated * min(1, self._new / self._fresh)
        if not 2 * size <= deflated <= 10 * size:
            return deflated < 2 * size
        part = self._taken(self._strips)[:, :_WEBP_SIDE]
        colour, alpha = (part, None) if self._alpha is None else (part[..., :-1], part[..., -1])
        colour = colour[..., 0] if colour.ndim > self._colour.ndim else colour
        hurried = len(_hurried(pillow_of(colour, alpha)))
        share = part.shape[0] * part.shape[1] / (self._height * self._width)
        few = self._height * self._width <= _LITTLE
        return bool(hurried / share * min(self._fresh, self._new) < (3.5 if few else 1.5) * size)

    def _taken(self, rows: list[int] | slice) -> NDArray[np.uint8]:
        """Some rows of colour and alpha in one array."""
        if self._alpha is None:
            return self._colour[rows]
        return np.dstack((self._colour[rows], self._alpha[rows]))

    def _chosen(self, number: int, choices: int) -> int:
        """One of so many, by chance, but the same for the same picture."""
        return zlib.crc32(number.to_bytes(4, "little"), self._seed) % choices

    @cached_property
    def _strips(self) -> list[int]:
        """A twelfth of the rows, in strips; of a small picture all."""
        if self._height * self._width <= _SMALL // 2:
            return list(range(self._height))
        tops = range(0, self._height, _SPACING)
        starts = [top + self._chosen(top, max(min(_SPACING, self._height - top) - _STRIP, 0) + 1) for top in tops]
        return [row for start in starts for row in range(start, min(start + _STRIP, self._height))]

    @cached_property
    def _deflated(self) -> float:
        """Bytes as differences between neighbours, deflated in a hurry."""
        every = 1 if self._height * self._width <= _SMALL // 2 else _EVERY
        tops = range(0, self._height, every)
        part = self._taken([top + self._chosen(top, min(every, self._height - top)) for top in tops])
        deflated = len(zlib.compress(np.diff(part, axis=1, prepend=np.uint8(0)).tobytes(), 1))
        return float(deflated * self._height / len(part) * self._fresh)

    @cached_property
    def _new(self) -> float:
        """Share of the content that is not the same as something before it, far off, shifted sideways or not.

        WebP finds such a thing a million pixels back, zlib 32 kB. Of a photograph everything is new.
        """
        count, most = self._height * self._width, 1 << 21
        if max(self._height, self._width) > _WEBP_SIDE or count > LARGE:
            return 1.0
        if count <= most:
            keys = _landmarks(self._taken(slice(None)))
            return len(_firsts(keys)) / len(keys) if len(keys) else 1.0
        rows, new, total = most // 2 // self._width, 0, 0
        for half in (0, 1):  # of each a stretch, in whose second half there is enough to look back to
            start = half * self._height // 2 + self._chosen(half, self._height // 2 - rows + 1)
            keys = _landmarks(self._taken(slice(start, start + rows)))
            new += int((_firsts(keys) >= len(keys) // 2).sum())
            total += len(keys) - len(keys) // 2
        return new / total if total else 1.0

    @cached_property
    def _checksums(self) -> list[int]:
        """Of each row."""
        rows = np.ascontiguousarray(self._colour).reshape(self._height, -1)
        found = [zlib.crc32(row.data) for row in rows]
        if self._alpha is None:
            return found
        alpha = np.ascontiguousarray(self._alpha)
        return [zlib.crc32(row.data, before) for row, before in zip(alpha, found, strict=True)]

    @cached_property
    def _seed(self) -> int:
        return zlib.crc32(np.array(self._checksums, "<u4").data)

    @cached_property
    def _fresh(self) -> float:
        """Share of the rows that are not the same as an earlier one, which WebP would find however far off it is."""
        return len(set(self._checksums)) / self._height


def _firsts(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(n,) -> (m,): where each different key is for the first time. NumPy's own `unique` loads its masked arrays."""
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    return order[np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))]


def _landmarks(part: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(h, w) or (h, w, c) uint8 -> (n,) uint64: checksums of 16 pixels at places that the pixels there choose.

    So the same content has the same places, wherever it lies. A place is where two neighbours differ, and about one
    such in 256 to 1024 is taken.
    """
    step = 1 if part.ndim == 2 else part.shape[2]
    flat, length = np.ascontiguousarray(part).reshape(-1), 16 * step
    end = flat.size - length - 7
    if end <= 0:
        return np.empty(0, np.uint64)

    def mixed(places: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        near = flat[places] * np.uint8(157) ^ flat[1:][places]
        return (near * np.uint8(59) ^ flat[9:][places]) * np.uint8(203)

    # Of few colours not every value is there: the one is taken that is as frequent as of many it would be.
    some = np.arange(0, end, 29)
    some = some[flat[some] != flat[some + step]]
    counts = np.bincount(mixed(some), minlength=256)
    present = np.flatnonzero(counts)
    if not len(present):
        return np.empty(0, np.uint64)
    chosen = present[np.abs(counts[present] - len(some) / 256).argmin()]
    found = []
    for start in range(0, end, 1 << 16):  # what fits into a core's cache
        block = slice(start, min(start + (1 << 16), end))
        same = mixed(block) == chosen
        same &= flat[block] != flat[step:][block]
        found.append(start + np.flatnonzero(same))
    at = np.concatenate(found)
    if len(at) > 1 << 12:  # a quarter tells as much
        quarter = (flat[at + 2] * np.uint8(91) ^ flat[at + 13]) * np.uint8(77) >> 6
        at = at[quarter == np.bincount(quarter).argmax()]
    windows = np.lib.stride_tricks.sliding_window_view(flat, 8)
    keys = np.zeros(len(at), np.uint64)
    for place in range(0, length, 8):
        keys ^= np.ascontiguousarray(windows[at + place]).view(np.uint64)[:, 0]
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _webp(picture: Image.Image, way: _Way) -> bytes:
    return _saved(picture, "WEBP", lossless=True, exact=True, method=way.method, quality=way.quality)


def _hurried(picture: Image.Image) -> bytes:
    return _saved(picture, "WEBP", lossless=True, method=2, quality=20)


def _saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()
