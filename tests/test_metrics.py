"""The measures, against independent ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator
from scipy.signal import convolve2d

from hourglass.codec import errors, image, metrics

PARROTS = Path(__file__).parent / "images" / "parrots.png"


@pytest.fixture(scope="module")
def pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    picture = image.read(PARROTS)[:200, :220]
    noise = np.random.default_rng(3).normal(0, 12, picture.shape)
    return picture, np.clip(picture + noise, 0, 255).astype(np.uint8)


def test_psnr(pair: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    a, b = pair
    mse = ((a.astype(float) - b) ** 2).mean()
    assert metrics.psnr(a, b) == pytest.approx(10 * np.log10(255**2 / mse))
    assert metrics.psnr(a, a) == np.inf
    zero, full = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert metrics.psnr(zero, full) == 0


def test_ms_ssim(pair: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    """A plain evaluation of the paper's formulas with a two-dimensional window in float64."""
    grid = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(grid, grid) / grid.sum() ** 2

    def blur(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(convolve2d(v, window, mode="valid"), np.float64)

    channels = []
    for channel in range(3):
        x, y = (p[:, :, channel].astype(np.float64) for p in pair)
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my = blur(x), blur(y)
            cs = (2 * (blur(x * y) - mx * my) + 58.5225) / (blur(x * x) - mx**2 + blur(y * y) - my**2 + 58.5225)
            full = cs * (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025)
            product *= (full if scale == 4 else cs).mean() ** weight
            h, w = x.shape[0] // 2, x.shape[1] // 2
            x, y = (p[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3)) for p in (x, y))
        channels.append(product)
    assert metrics.ms_ssim(*pair) == pytest.approx(np.mean(channels), abs=5e-5)  # ours works in float32
    assert metrics.ms_ssim(pair[0], pair[0]) == pytest.approx(1)


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (11, 11), (100, 175)])
def test_ms_ssim_of_small_pictures(size: tuple[int, int]) -> None:
    a = np.random.default_rng(1).integers(0, 255, (*size, 3)).astype(np.uint8)
    assert metrics.ms_ssim(a, a) == pytest.approx(1)
    assert metrics.ms_ssim(a, 255 - a) < 0.9


def test_sizes() -> None:
    assert metrics.bpp(1000, 100, 80) == 1.0
    assert metrics.compression_ratio(1000, 100, 80) == 24.0


def test_bd_rate_is_the_integral_between_curves() -> None:
    rate_a, psnr_a = [0.1, 0.25, 0.5, 1.0, 1.8], [26.0, 29.1, 31.6, 34.9, 38.2]
    rate_b, psnr_b = [0.12, 0.3, 0.7, 1.4], [25.5, 29.0, 32.4, 36.1]
    a, b = PchipInterpolator(psnr_a, np.log(rate_a)), PchipInterpolator(psnr_b, np.log(rate_b))
    low, high = 26.0, 36.1
    mean = quad(lambda q: float(a(q) - b(q)), low, high, limit=200)[0] / (high - low)
    assert metrics.bd_rate(rate_a, psnr_a, rate_b, psnr_b) == pytest.approx((np.exp(mean) - 1) * 100, abs=0.02)
    assert metrics.bd_rate(rate_a[::-1], psnr_a[::-1], rate_b, psnr_b) < 0


def test_bd_rate_of_a_scaled_curve() -> None:
    rate, psnr = [0.1, 0.3, 0.9], [25.0, 30.0, 35.0]
    assert metrics.bd_rate([r * 0.8 for r in rate], psnr, rate, psnr) == pytest.approx(-20)
    assert metrics.bd_rate(rate[:2], psnr[:2], rate, psnr) == pytest.approx(0, abs=2)


def test_bad_arguments() -> None:
    with pytest.raises(errors.InvalidArgument, match="no range of quality"):
        metrics.bd_rate([1, 2], [20, 21], [1, 2], [30, 31])
    with pytest.raises(errors.InvalidArgument, match="1 rates and 1 qualities"):
        metrics.bd_rate([1], [20], [1, 2], [30, 31])
    with pytest.raises(errors.InvalidArgument, match="expected equal shapes"):
        metrics.psnr(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8))
