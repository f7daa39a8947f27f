"""Measures of pictures and of codecs: psnr, ms_ssim, bpp, compression_ratio, bd_rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import InvalidArgument

__all__ = ["bd_rate", "bpp", "compression_ratio", "ms_ssim", "psnr"]

_Plane: TypeAlias = NDArray[np.float32]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB over all samples of two uint8 pictures of one shape; inf when equal."""
    _same_shape(a, b)
    # int32 holds a squared difference; the mean adds up in float64.
    mse = float(np.square(a.astype(np.int32) - b).mean())
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Multi-scale structural similarity of two uint8 pictures, (H, W, C) or (H, W), mean over channels; 1 when equal.

    Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment", 2003: five scales,
    Gaussian window of 11 taps with deviation 1.5, K1 = 0.01, K2 = 0.03. A picture with a side below 176 pixels has
    no room for five windows; it is measured on the scales that fit, with their weights scaled up to sum 1. With a
    side below 11 there is none: the window is then cut to the picture.
    """
    _same_shape(a, b)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])
    side = min(a.shape[:2])
    scales = max(1, min(5, int(np.log2(max(1, side / 11))) + 1))
    weights = weights[:scales] / weights[:scales].sum()
    values = []
    for x, y in zip(_planes(a), _planes(b), strict=True):
        product = 1.0
        for scale, weight in enumerate(weights):
            luminance, contrast = _ssim(x, y)
            similarity = luminance if scale == scales - 1 else contrast
            product *= max(similarity, 0.0) ** float(weight)
            x, y = _halve(x), _halve(y)
        values.append(product)
    return float(np.mean(values))


def _planes(picture: NDArray[np.uint8]) -> list[_Plane]:
    channels = picture[..., None] if picture.ndim == 2 else picture
    return [channels[..., channel].astype(np.float32) for channel in range(channels.shape[2])]


def bpp(byte_count: int, width: int, height: int) -> float:
    """Bits per pixel of a file."""
    return byte_count * 8 / (width * height)


def compression_ratio(byte_count: int, width: int, height: int) -> float:
    """How many times smaller the file is than the raw 24-bit pixels."""
    return width * height * 3 / byte_count


def bd_rate(
    rate: Sequence[float], quality: Sequence[float], anchor_rate: Sequence[float], anchor_quality: Sequence[float]
) -> float:
    """Bjøntegaard delta rate in per cent: how much more (+) or less (-) rate than the anchor at equal quality.

    Bjøntegaard, VCEG-M33, 2001, with log rate as a PCHIP function of quality, integrated over the common range of
    quality. Rates and qualities (dB) may be in any order; every curve needs two points or more.

    Raises `InvalidArgument` when the curves share no range of quality.
    """
    curves = [_curve(rate, quality), _curve(anchor_rate, anchor_quality)]
    low, high = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if not low < high:
        raise InvalidArgument(
            f"curves share no range of quality: {min(quality)}..{max(quality)} against "
            f"{min(anchor_quality)}..{max(anchor_quality)}"
        )
    at = np.linspace(low, high, 1001)
    difference = _pchip(*curves[0], at) - _pchip(*curves[1], at)
    mean = float(((difference[1:] + difference[:-1]) / 2).mean())
    return float((np.exp(mean) - 1) * 100)


def _same_shape(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InvalidArgument(f"pictures are {a.shape} {a.dtype} and {b.shape} {b.dtype}; expected equal shapes, uint8")


def _ssim(x: _Plane, y: _Plane) -> tuple[float, float]:
    """Mean SSIM, and mean of its contrast-structure part alone."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = _blur(x), _blur(y)
    vx, vy, cov = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    contrast = (2 * cov + c2) / (vx + vy + c2)
    ssim = contrast * (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return float(ssim.mean(dtype=np.float64)), float(contrast.mean(dtype=np.float64))


def _blur(x: _Plane) -> _Plane:
    """Gaussian window of 11 taps along both axes, only where it fits whole."""
    for axis in (0, 1):
        taps = min(11, x.shape[axis])
        window = np.exp(-0.5 * ((np.arange(taps) - (taps - 1) / 2) / 1.5) ** 2)
        weights = (window / window.sum()).astype(np.float32)
        length = x.shape[axis] - taps + 1
        pieces = [x[i : i + length] if axis == 0 else x[:, i : i + length] for i in range(taps)]
        total: _Plane = pieces[0] * weights[0]
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            total += piece * weight
        x = total
    return x


def _halve(x: _Plane) -> _Plane:
    """Mean of 2x2 pixels; a last odd row or column is left out."""
    h, w = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    x = x[:h, :w]
    return np.asarray((x[0::2, 0::2] + x[1::2, 0::2] + x[0::2, 1::2] + x[1::2, 1::2]) / 4, np.float32)


_Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _curve(rate: Sequence[float], quality: Sequence[float]) -> _Curve:
    """Points in order of quality, log rate; where two have one quality the cheaper one counts."""
    if len(rate) != len(quality) or len(rate) < 2 or min(rate) <= 0:
        raise InvalidArgument(
            f"a curve has {len(rate)} rates and {len(quality)} qualities; expected two or more of each, rates above 0"
        )
    cheapest: dict[float, float] = {}
    for r, q in zip(rate, quality, strict=True):
        cheapest[q] = min(r, cheapest.get(q, r))
    q_sorted = sorted(cheapest)
    return np.array(q_sorted), np.log([cheapest[q] for q in q_sorted])


def _pchip(x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Monotone cubic interpolation (Fritsch and Butland, 1984) with the usual one-sided three-point ends."""
    h, slope = np.diff(x), np.diff(y) / np.diff(x)
    if len(x) == 2:
        return np.interp(at, x, y)
    d = np.zeros_like(y)
    inside = slope[1:] * slope[:-1] > 0
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        d[1:-1] = np.where(inside, (w1 + w2) / (w1 / slope[:-1] + w2 / slope[1:]), 0.0)
    d[0] = _end_slope(h[0], h[1], slope[0], slope[1])
    d[-1] = _end_slope(h[-1], h[-2], slope[-1], slope[-2])
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    t = (at - x[i]) / h[i]
    return np.asarray(
        y[i] * (1 + 2 * t) * (1 - t) ** 2
        + d[i] * h[i] * t * (1 - t) ** 2
        + y[i + 1] * t * t * (3 - 2 * t)
        + d[i + 1] * h[i] * t * t * (t - 1)
    )


def _end_slope(h0: float, h1: float, s0: float, s1: float) -> float:
    d = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
    if d * s0 <= 0:
        return 0.0
    return 3 * s0 if s0 * s1 <= 0 and abs(d) > 3 * abs(s0) else d
