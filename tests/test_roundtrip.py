"""A photograph to a file and back: in the process, by gRPC and by the command, with equal bytes and pixels."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hourglass import codec as module
from hourglass.client import Client
from hourglass.codec import Code, Codec, entropy, image, metrics
from hourglass.codec.prior import Part

COMMAND = [str(Path(sys.executable).with_name("compress-image"))]


@pytest.mark.parametrize("quality", [0, 25, 50, 75, 100])
def test_quality(photo: Path, quality: float, codec: Codec, report: Callable[..., Any]) -> None:
    original = image.read(photo)
    data = codec.encode(photo, quality=quality)
    decoded = image.read(codec.decode(data))
    assert decoded.shape == original.shape
    assert decoded.dtype == np.uint8
    row = report(photo.stem, quality, len(data), original, decoded)
    # The worst that any of these photographs may become; a wrong gain or a shifted pixel costs far more.
    assert row.psnr > 21 + quality / 10
    assert row.ms_ssim > 0.8 + quality / 700
    assert row.bpp < 0.5 + quality / 25


def test_three_ways_agree(photo: Path, codec: Codec, client: Client, address: str, tmp_path: Path) -> None:
    quality = 62.5 if "l" in photo.stem else 10
    data = codec.encode(photo, quality=quality)
    pixels = codec.decode(data)

    assert client.encode(photo, quality=quality) == data
    assert client.encode(image.load(photo).pixels, quality=quality) == data  # as raw pixels
    assert np.array_equal(client.decode(data), pixels)

    for where in ([], ["--server", address]):
        file, out = tmp_path / "photo.hgc", tmp_path / "out.png"
        subprocess.run([*COMMAND, *where, "-q", str(quality), "-fo", file, photo], check=True, capture_output=True)
        assert file.read_bytes() == data
        subprocess.run([*COMMAND, *where, "-dfo", out, file], check=True, capture_output=True)
        assert np.array_equal(image.load(out).pixels, pixels)


def test_code_is_between(photo: Path, codec: Codec, client: Client) -> None:
    code = codec.analyse(photo, quality=40)
    data = codec.encode(photo, quality=40)
    height, width = image.read(photo).shape[:2]
    assert (code.width, code.height, code.quality, code.model) == (width, height, 40, codec.model)
    assert {name: tensor.dtype for name, tensor in code.tensors.items()} == dict.fromkeys("yzc", np.dtype(np.int16))
    assert code.tensors["y"].shape == (512, -(-height // 16), -(-width // 16))
    assert code.tensors["c"].shape == (1, 1, 1)  # of up to 768 pixels a side
    assert code.tensors["z"].shape == (96, -(-height // 64), -(-width // 64))
    assert codec.pack(code) == data
    assert codec.unpack(data) == code
    assert client.analyse(photo, quality=40) == code
    assert np.array_equal(codec.synthesise(code), codec.decode(data))
    assert np.array_equal(client.synthesise(code), codec.decode(data))


def test_many_qualities_from_one_pass(parrots: Path, codec: Codec) -> None:
    qualities = [0, 33.33, 100]
    assert list(codec.encode_many(parrots, qualities)) == [codec.encode(parrots, quality=q) for q in qualities]


@pytest.mark.parametrize("quality", [50, 75, 100])
def test_files_are_near_the_ideal_size(photo: Path, quality: float, codec: Codec) -> None:
    """Whole files against what the prior's tables say, and what a file has beside that: the distances of escaped
    symbols, which are few, and next to nothing else."""
    data = codec.encode(photo, quality=quality)
    decoding, tiles = codec._unpacked(data)
    ideal = sum(sum(tile.ideal_bits(decoding.model.tables).values()) for tile in tiles) / 8
    # The header, and for each tile its entry there, the symbols' checksum, the width, and the coder's last word.
    framing = codec.read_header(data).length + (4 + 1 + 4) * len(tiles)
    assert framing < 64 + 18 * (len(tiles) - 1)
    escapes = sum(_bits_of_escapes(*part, decoding.model.tables) for tile in tiles for part in tile.parts) / 8
    assert escapes < 0.004 * ideal
    assert ideal < len(data) < ideal + framing + escapes + 0.0005 * ideal


def _bits_of_escapes(symbols: NDArray[np.int16], part: Part, tables: entropy.Tables) -> int:
    """Elias gamma codes of how far symbols are outside of their tables."""
    bits = 0
    for table in np.unique(part.tables):
        entries = len(tables.frequencies_of(table)) - 1
        if entries:
            at = symbols[part.tables == table].astype(int) - tables.first[table]
            distances = np.concatenate([-2 * at[at < 0] - 1, 2 * (at[at >= entries] - entries)]) + 1
            bits += sum(2 * int(distance).bit_length() - 1 for distance in distances)
    return bits


def test_sources_of_one_picture_give_one_file(parrots: Path) -> None:
    data = module.encode(parrots)
    assert module.encode(str(parrots)) == data
    assert module.encode(parrots.read_bytes()) == data
    assert module.encode(np.asarray(Image.open(parrots).convert("RGB"))) == data
    with Image.open(parrots) as opened:
        assert module.encode(opened) == data
    assert np.array_equal(module.decode(data), module.decode(memoryview(bytearray(data))))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 40), (40, 1), (16, 16), (17, 31), (511, 769)])
def test_odd_sizes(width: int, height: int, parrots: Path, codec: Codec, client: Client) -> None:
    original = np.pad(image.read(parrots), ((0, 300), (0, 0), (0, 0)), mode="reflect")[:height, :width]
    data = codec.encode(original, quality=80)
    decoded = codec.decode(data)
    assert decoded.shape == (height, width, 3)
    assert metrics.psnr(original, decoded) > 28
    assert client.encode(original, quality=80) == data
    assert np.array_equal(client.decode(data), decoded)


def test_greyscale_stays_grey(codec: Codec) -> None:
    path = Path(__file__).parent / "images" / "girl-grey.png"
    grey = np.asarray(Image.open(path))
    data = codec.encode(path, quality=60)
    decoded = codec.decode(data)
    assert decoded.shape == grey.shape
    assert np.square(decoded.astype(float) - grey).mean() < 40
    assert codec.encode(grey, quality=60) == data
    assert codec.analyse(path).grey
    assert np.array_equal(codec.synthesise(codec.unpack(data)), decoded)


def test_size_rises_with_quality(photo: Path, codec: Codec) -> None:
    sizes = [len(data) for data in codec.encode_many(photo, range(0, 101, 4))]
    assert sizes == sorted(set(sizes))


def test_threads_do_not_change_a_file(photo: Path, codec: Codec) -> None:
    data = codec.encode(photo)
    for threads in (1, 2, 3):
        other = Codec(threads=threads)
        assert other.encode(photo) == data
        difference = codec.decode(data).astype(int) - other.decode(data)
        assert abs(difference).max() <= 1


def test_many_threads_share_a_codec(codec: Codec) -> None:
    from concurrent.futures import ThreadPoolExecutor

    photos = sorted((Path(__file__).parent / "images").glob("*.png")) * 4
    alone = [codec.encode(photo) for photo in photos]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(Codec().encode, photos)) == alone


def test_command_report_is_true(parrots: Path, tmp_path: Path, codec: Codec) -> None:
    file = tmp_path / "p.hgc"
    done = subprocess.run(
        [*COMMAND, "--json", "--metrics", "-q", "35", "-o", file, parrots], check=True, capture_output=True, text=True
    )
    row = json.loads(done.stdout)
    fields = "input output model width height bytes_in bytes_out bpp ratio lossless psnr ms_ssim seconds"
    assert list(row) == [*fields.split(), "location_share", "damage"]
    size = file.stat().st_size
    assert (row["input"], row["output"], row["model"]) == (str(parrots), str(file), codec.model)
    assert (row["width"], row["height"]) == (768, 512)
    assert (row["bytes_in"], row["bytes_out"]) == (parrots.stat().st_size, size)
    assert row["bpp"] == pytest.approx(size * 8 / 768 / 512)
    assert row["ratio"] == pytest.approx(768 * 512 * 3 / size)
    decoded = codec.decode(file)
    assert row["psnr"] == pytest.approx(metrics.psnr(image.read(parrots), decoded))
    assert row["ms_ssim"] == pytest.approx(metrics.ms_ssim(image.read(parrots), decoded))
    assert 0 < row["seconds"] < 60


def test_stdin_to_stdout(parrots: Path, codec: Codec) -> None:
    packed = subprocess.run([*COMMAND, "-"], input=parrots.read_bytes(), capture_output=True, check=True)
    assert packed.stdout == codec.encode(parrots)
    unpacked = subprocess.run([*COMMAND, "-d", "-"], input=packed.stdout, capture_output=True, check=True)
    assert np.array_equal(image.read(io.BytesIO(unpacked.stdout).getvalue()), codec.decode(packed.stdout))


def test_quality_is_that_of_the_file(parrots: Path, codec: Codec) -> None:
    """12.4999 is stored as 12.5, where other tables begin: the code must be coded with those."""
    code = codec.analyse(parrots, quality=12.5)
    near = Code(code.model, 12.4999, code.width, code.height, code.tensors)
    assert codec.unpack(codec.pack(near)) == near == code


def test_order_of_tensors_does_not_matter(parrots: Path, codec: Codec) -> None:
    code = codec.analyse(parrots)
    turned = Code(code.model, code.quality, code.width, code.height, dict(reversed(code.tensors.items())))
    assert codec.unpack(codec.pack(turned)) == turned == code


def test_a_code_is_read_only(parrots: Path, codec: Codec) -> None:
    with pytest.raises(ValueError, match="read-only"):
        codec.analyse(parrots).tensors["y"][0, 0, 0] = 5


@pytest.mark.parametrize("quality", [np.int64(50), np.float32(50), 50])
def test_numpy_numbers_are_numbers(quality: float, parrots: Path, codec: Codec) -> None:
    assert codec.encode(parrots, quality=quality) == codec.encode(parrots, quality=50.0)


def test_equal_codes_differ_in_nothing(parrots: Path, codec: Codec) -> None:
    code = codec.analyse(parrots)
    for name, tensor in code.tensors.items():
        changed = tensor.copy()
        changed[0, 0, 0] += 1
        assert code != Code(code.model, code.quality, code.width, code.height, {**code.tensors, name: changed})
    assert code != Code(code.model, code.quality + 1, code.width, code.height, code.tensors)
    assert code != "code"
