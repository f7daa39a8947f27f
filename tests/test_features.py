"""A picture's features know it again: compressed, resized, cut, from a file, from pixels, from a server."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hourglass.client import AsyncClient, Client
from hourglass.codec import Codec, errors, image, runtime

ROOT = Path(__file__).parent.parent
PHOTOS = sorted((ROOT / "tests" / "images").glob("*.png"))
CLASSIC = "classic-deconv"


def _versions(pixels: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """The same picture in other files."""
    picture = Image.fromarray(pixels)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=40)
    height, width = pixels.shape[:2]
    return {
        "jpeg": image.read(jpeg.getvalue()),
        "smaller": np.asarray(picture.resize((width * 2 // 3, height * 2 // 3), Image.Resampling.LANCZOS)),
        "cut": pixels[height // 16 :, width // 16 :],
        "brighter": np.clip(pixels * 1.15 + 8, 0, 255).astype(np.uint8),
    }


@pytest.mark.parametrize("model", [runtime.DEFAULT_MODEL, CLASSIC])
def test_versions_of_a_picture_are_found(model: str) -> None:
    """Of every version the nearest file is that of its original, and other photographs are not near."""
    codec = Codec(model)
    pictures = [image.load(path).pixels for path in PHOTOS]
    pictures = [p if p.ndim == 3 else np.repeat(p[..., None], 3, 2) for p in pictures]
    archive = np.stack([codec.features(codec.encode(p, fallback=False)) for p in pictures])
    assert np.allclose(np.linalg.norm(archive, axis=1), 1, atol=1e-5)
    products = archive @ archive.T
    assert (products - np.eye(len(archive))).max() < 0.85
    for number, pixels in enumerate(pictures):
        for name, version in _versions(pixels).items():
            likeness = archive @ codec.features(version)
            assert likeness.argmax() == number, name
            assert likeness[number] > 0.55, name
        for quality in (15, 90):
            assert archive[number] @ codec.features(codec.encode(pixels, quality=quality, fallback=False)) > 0.85


def test_file_and_picture_are_described_alike(codec: Codec, parrots: Path, tmp_path: Path) -> None:
    data = codec.encode(parrots)
    file = tmp_path / "parrots.hgc"
    file.write_bytes(data)
    of_file = codec.features(data)
    assert np.array_equal(of_file, codec.features(file))
    assert of_file.dtype == np.float32
    assert of_file @ codec.features(parrots) > 0.98
    assert np.array_equal(codec.features(parrots), codec.features(image.read(parrots)))


def test_features_do_not_depend_on_tiles_or_threads(parrots: Path) -> None:
    pixels = np.tile(image.read(parrots), (2, 2, 1))[:900, :1300]
    data = Codec().encode(pixels, fallback=False)
    one, two = (Codec(threads=threads).features(data) for threads in (1, 2))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 33)])
def test_tiny_pictures_have_features(codec: Codec, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    for source in (pixels, codec.encode(pixels, fallback=False)):
        features = codec.features(source)
        assert features.shape == codec.features(np.zeros((64, 64), np.uint8)).shape
        assert np.isfinite(features).all()


def test_lossless_files_have_features(codec: Codec) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[20:40, 10:50] = 200, 30, 30
    data = codec.encode(pixels)
    assert codec.read_header(data).lossless
    assert np.array_equal(codec.features(data), codec.features(pixels))


def test_damage_is_an_error(codec: Codec, parrots: Path) -> None:
    data = bytearray(codec.encode(parrots))
    data[-100] ^= 1
    with pytest.raises(errors.CorruptError):
        codec.features(bytes(data))
    with pytest.raises(errors.ImageError):
        codec.features(b"no picture")
    with pytest.raises(OSError, match="No such file"):
        codec.features("nowhere.hgc")


def test_server_describes_alike(address: str, codec: Codec, parrots: Path) -> None:
    data, pixels = codec.encode(parrots, quality=40), image.read(parrots)[:100, :200]
    with Client(address) as client, Client(address, model=CLASSIC) as classic:
        assert np.array_equal(client.features(data), codec.features(data))
        assert np.array_equal(client.features(parrots), codec.features(parrots))
        assert np.array_equal(client.features(pixels), codec.features(pixels))
        assert np.array_equal(classic.features(pixels), Codec(CLASSIC).features(pixels))
        with pytest.raises(errors.CorruptError):
            client.features(data[:-1])

    async def ask() -> NDArray[np.float32]:
        async with AsyncClient(address) as client:
            return await client.features(data)

    assert np.array_equal(asyncio.run(ask()), codec.features(data))


def test_archive_is_searched(codec: Codec, tmp_path: Path) -> None:
    """The example: what is like a picture, what is there twice; a second time from its index."""
    (tmp_path / "more").mkdir()
    for path in PHOTOS:
        (tmp_path / f"{path.stem}.hgc").write_bytes(codec.encode(path, fallback=False))
    pixels = image.read(PHOTOS[-1])
    (tmp_path / "more" / "again.hgc").write_bytes(codec.encode(pixels[8:, 8:], quality=30, fallback=False))
    (tmp_path / "broken.hgc").write_bytes(b"broken")

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, str(ROOT / "client" / "examples" / "similar.py"), str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "broken.hgc" in done.stderr
        return done.stdout.splitlines()

    first, second, *_ = run(str(PHOTOS[-1]), "--time")
    assert first.endswith(f"{PHOTOS[-1].stem}.hgc")
    assert second.endswith("again.hgc")
    index = tmp_path / ".features.npz"
    before = index.read_bytes()
    (pair,) = run("--duplicates")
    assert f"{PHOTOS[-1].stem}.hgc" in pair
    assert "again.hgc" in pair
    assert index.read_bytes()[:2000] == before[:2000]
