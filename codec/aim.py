"""The search for a quality: the best file of a size, or the smallest of a PSNR."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from hourglass.codec.errors import InvalidArgument
from hourglass.codec.quantise import Effort

_TOLERANCE = 0.01
"""How near a target a search must come: 1 % of a size, 0.01 dB."""


@dataclass(frozen=True)
class Attempt:
    """A file at one quality, and the figure that is aimed at."""

    quality: float
    data: bytes
    figure: float


def aim(attempt: Callable[[float, Effort], Attempt], effort: Effort, wanted: float, *, below: bool) -> Attempt:
    """Search over quality for the attempt whose figure, which rises with quality, is as near `wanted` as can be.

    below: the figure may not be above `wanted`; else it may not be below. Ends within _TOLERANCE or at neighbouring
    qualities. Where even quality 0 (or 100) is on the wrong side, that comes back. The slow effort begins where a
    faster one ends.
    """
    if effort != "best":
        return _search(lambda quality: attempt(quality, effort), wanted, below=below)
    near = _search(lambda quality: attempt(quality, "default"), wanted, below=below).quality
    return _search(lambda quality: attempt(quality, effort), wanted, below=below, near=near)


def _search(attempt: Callable[[float], Attempt], wanted: float, *, below: bool, near: float | None = None) -> Attempt:
    low, high = (0.0, 100.0) if near is None else (max(near - 1, 0.0), min(near + 1, 100.0))
    at_low, at_high = attempt(low), attempt(high)
    while at_low.figure > wanted and low > 0:
        high, at_high = low, at_low
        low = max(2 * low - near, 0.0) if near else 0.0
        at_low = attempt(low)
    while at_high.figure < wanted and high < 100:
        low, at_low = high, at_high
        high = min(2 * high - near, 100.0) if near else 100.0
        at_high = attempt(high)
    if at_low.figure >= wanted:
        return at_low
    if at_high.figure <= wanted:
        return at_high
    best = at_low if below else at_high
    for turn in itertools.count():
        if abs(best.figure - wanted) <= _TOLERANCE or high - low < 0.015:
            break
        part = (wanted - at_low.figure) / (at_high.figure - at_low.figure)
        if turn % 3 == 2:
            part = 0.5  # secants can creep along a bent curve
        quality = round(low + (high - low) * min(max(part, 0.02), 0.98), 2)
        quality = min(max(quality, low + 0.01), high - 0.01)
        tried = attempt(quality)
        if (tried.figure <= wanted) if below else (tried.figure < wanted):
            low, at_low = quality, tried
        else:
            high, at_high = quality, tried
        best = at_low if below else at_high
    return best


def parse_size(value: int | str, source: int | None) -> int:
    """Bytes: a number, or text as "40000", "40k", "1.5M", or "5%" of `source`, the bytes of the source file.

    k and M are 1000 and 1000000. Raises `InvalidArgument`.
    """
    text = str(value).strip()
    factors = {"%": (source or 0) / 100, "k": 1e3, "K": 1e3, "M": 1e6}
    if text.endswith("%") and source is None:
        raise InvalidArgument(f"target_size is {text}, but the picture has no source file; give it in bytes")
    try:
        bytes_ = float(text[:-1]) * factors[text[-1]] if text[-1:] in factors else float(text)
    except ValueError:
        bytes_ = 0.0
    if not 1 <= bytes_ < 2**62:
        raise InvalidArgument(f'target_size is {text!r}; expected bytes, 1 to 2**62, as 40000, "40k", "1.5M" or "5%"')
    return int(bytes_)
