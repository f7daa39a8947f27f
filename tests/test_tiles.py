"""Large pictures in tiles: coded one by one, on several threads, and no seam where they meet."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hourglass.codec import Code, Codec, container, errors, image, metrics, runtime
from hourglass.codec.container import Front
from hourglass.codec.crew import Crew
from hourglass.codec.tiles import Grid, Tile

IMAGES = Path(__file__).parent / "images"
SIDE = 512


@pytest.fixture(scope="module")
def large() -> NDArray[np.uint8]:
    """588 x 828 pixels: a photograph, mirrored, so that its only edges are its own."""
    photo = image.read(IMAGES / "parrots.png")
    return np.pad(photo, ((38, 38), (30, 30), (0, 0)), mode="reflect")


@pytest.mark.parametrize("side", [64, 128, 512, 1024])
def test_every_tile_has_pixels(side: int) -> None:
    for size in (*range(1, 3000, 7), *range(500, 600), 2**24 - 1, 2**24):
        grid = Grid(size, 1, side)
        assert grid.tile_width <= side
        assert grid.tile_width % 64 == 0
        assert 1 <= grid.tile(0, grid.across - 1).width <= grid.tile_width


def test_tiles_cover_a_picture_once() -> None:
    seen = np.zeros((2100, 1030), int)
    grid = Grid(1030, 2100, SIDE)
    assert len(grid) == 15
    assert (grid.tile_width, grid.tile_height) == (384, 448)  # no sliver of 6 pixels
    for number, tile in enumerate(grid.tiles()):
        assert tile.number == number
        seen[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("quality", [5, 50, 100])
def test_large_picture(quality: float, large: NDArray[np.uint8], codec: Codec) -> None:
    data = codec.encode(large, quality=quality)
    header = codec.read_header(data)
    assert [section.kind for section in header.sections] == [container.CODE] * 4
    code = codec.analyse(large, quality=quality)
    assert code.tensors["c"].shape == (1, 2, 2)
    assert codec.pack(code) == data
    assert codec.unpack(data) == code
    decoded = codec.decode(data)
    assert np.array_equal(codec.synthesise(code), decoded)
    alone = Codec(threads=1)
    assert alone.encode(large, quality=quality) == data
    assert abs(alone.decode(data).astype(int) - decoded).max() <= 1
    assert metrics.psnr(large, decoded) > 24 + quality / 10


def test_small_pictures_are_one_tile(large: NDArray[np.uint8], with_tiles: Callable[..., Codec]) -> None:
    """Up to `whole` pixels a side; from one more on as many as any other picture has."""
    codec = with_tiles(128, whole=300)
    for height, width, down, across in ((300, 300, 1, 1), (1, 300, 1, 1), (64, 301, 1, 3), (301, 40, 3, 1)):
        picture = large[:height, :width]
        data = codec.encode(picture, quality=30, fallback=False)
        assert len(codec.read_header(data).sections) == down * across
        code = codec.unpack(data)
        assert code.tensors["c"].shape == (1, down, across)
        assert code == codec.analyse(picture, quality=30)
        assert codec.pack(code) == data
        decoded = codec.decode(data)
        assert np.array_equal(codec.synthesise(code), decoded)
        part = codec.decode(data, region=(0, height // 2, width, 1))
        assert abs(part.astype(int) - decoded[height // 2 : height // 2 + 1]).max() <= 1
        assert metrics.psnr(picture, decoded) > 27
    files = [coder.encode(large[:300, :300], quality=30) for coder in (codec, with_tiles(128))]
    assert len(files[0]) < len(files[1]) - 8 * 18  # of each tile but one its entry in the header and the checksum


def test_no_seams(large: NDArray[np.uint8], with_tiles: Callable[..., Codec]) -> None:
    """Beside the borders of tiles a picture is as good as one that was coded whole, to 0.05 dB.

    On average over qualities: at each of them other symbols are chosen there, which is worth some 0.05 dB up or down.
    Tiles smaller than those of the model, because along a single border chance is stronger than a seam would be.
    """
    tiled, whole = with_tiles(SIDE // 2), with_tiles(4 * SIDE)
    grid = Grid(large.shape[1], large.shape[0], SIDE // 2)
    assert (grid.across, grid.down) == (4, 3)
    rows, columns = (
        range(size, size * count, size)
        for size, count in ((grid.tile_height, grid.down), (grid.tile_width, grid.across))
    )
    border = np.zeros(large.shape[:2], bool)
    for row in rows:
        border[row - 16 : row + 16] = True
    for column in columns:
        border[:, column - 16 : column + 16] = True

    def step(picture: NDArray[np.uint8]) -> float:
        """Mean square of the jump from the last sample of a tile to the first one of the next."""
        p = picture.astype(float)
        jumps = [np.square(p[row] - p[row - 1]).mean() for row in rows]
        return float(np.mean(jumps + [np.square(p[:, column] - p[:, column - 1]).mean() for column in columns]))

    worse = []
    for quality in (10, 30, 50, 70, 90):
        pictures = [coder.decode(coder.encode(large, quality=quality)) for coder in (tiled, whole)]
        assert not np.array_equal(*pictures)  # the other one really was coded whole
        errors_there = [np.square(picture.astype(float) - large)[border].mean() for picture in pictures]
        worse.append(10 * np.log10(errors_there[0] / errors_there[1]))
        assert abs(step(pictures[0]) - step(pictures[1])) < 0.05 * step(large)  # no jump that the picture has not
    assert np.mean(worse) < 0.05
    assert max(worse) < 0.2


@pytest.mark.parametrize("quality", [10, 50, 80])
@pytest.mark.parametrize("size", [(480, 720), (500, 600), (449, 737)])
def test_edges_are_as_good_as_the_rest(size: tuple[int, int], quality: float, parrots: Path, codec: Codec) -> None:
    """What ends in the middle of the code's 64 pixels is as good at its end as where the picture goes on there."""
    whole = image.read(parrots)
    picture = np.ascontiguousarray(whole[: size[0], : size[1]])
    decoded = codec.decode(codec.encode(picture, quality=quality, fallback=False)).astype(float)
    beside = codec.decode(codec.encode(whole, quality=quality, fallback=False))[: size[0], : size[1]].astype(float)
    for edge in (np.s_[-16:], np.s_[:, -16:]):
        worse = np.square(decoded - picture)[edge].mean() / np.square(beside - picture)[edge].mean()
        assert 10 * np.log10(worse) < 1


def test_targets(large: NDArray[np.uint8], codec: Codec) -> None:
    assert 29_100 <= len(codec.encode(large, target_size=30_000)) <= 30_000
    assert metrics.psnr(large, codec.decode(codec.encode(large, target_psnr=32))) >= 32


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_crew(threads: int, codec: Codec) -> None:
    tiles = Grid(2048, 64, SIDE).tiles()
    crew = Crew(runtime.open_model(codec.model), threads)
    assert crew.each(tiles, lambda tile, model: (tile.number, model.id)) == [(n, codec.model) for n in range(4)]
    with crew.at_work() as submit:
        first = submit(tiles[0], lambda tile, _: tile.x)
        behind = submit(tiles[1], lambda tile, _: first.result() + tile.x)
        assert behind.result() == SIDE


def test_a_crew_drops_what_has_not_begun(codec: Codec) -> None:
    tiles, crew = Grid(4096, 64, SIDE).tiles(), Crew(runtime.open_model(codec.model), 2)
    finished = []

    def work(tile: Tile, _: runtime.Model) -> None:
        if tile.number == 1:
            raise errors.CorruptError("damaged")
        time.sleep(0.3)
        finished.append(tile.number)

    def go() -> None:
        with crew.at_work() as submit:
            [submit(tile, work) for tile in tiles][1].result()

    with pytest.raises(errors.CorruptError, match="damaged"):
        go()
    assert sorted(finished) in ([0], [0, 2])  # what had begun was waited for


def test_missing_tile(large: NDArray[np.uint8], codec: Codec) -> None:
    data = codec.encode(large, quality=0)
    header, payloads = container.read(data)
    sections = [(container.CODE, bytes(payload)) for payload in payloads]
    front = Front(header.model, header.colour, header.width, header.height, header.quality)
    damaged = container.write(front, sections[:-1])
    with pytest.raises(errors.ContainerError, match=r"file has 3 tiles; model .* has 4"):
        codec.decode(damaged)
    turned = container.write(front, sections[::-1])
    with pytest.raises(errors.CorruptError):
        codec.decode(turned)


def test_width_that_is_none(codec: Codec) -> None:
    header, (payload,) = container.read(codec.encode(image.read(IMAGES / "motocross.png")[:32, :32]))
    wrong, front = bytearray(payload), Front(header.model, header.colour, 32, 32, header.quality)
    wrong[4] = 77
    data = container.write(front, [(container.CODE, bytes(wrong))])
    with pytest.raises(errors.ContainerError, match="tile 0 has width 77"):
        codec.decode(data)
    wrong[4] = (payload[4] + 1) % 3
    data = container.write(front, [(container.CODE, bytes(wrong))])
    with pytest.raises(errors.CorruptError):
        codec.decode(data)


def test_code_with_symbols_where_none_are_coded(codec: Codec) -> None:
    code = codec.analyse(image.read(IMAGES / "motocross.png"), quality=0)
    assert code.tensors["c"][0, 0, 0] < 512
    tensors = {name: tensor.copy() for name, tensor in code.tensors.items()}
    tensors["y"][511, 0, 0] = 1
    with pytest.raises(errors.CodeError, match="channels that are coded, and symbols in other ones"):
        codec.pack(Code(code.model, code.quality, code.width, code.height, tensors))
    tensors["c"][:] = 7
    with pytest.raises(errors.CodeError, match="c of tile 0 is 7; expected one of"):
        codec.synthesise(Code(code.model, code.quality, code.width, code.height, tensors))


def test_symbols_checksum_is_of_the_coded_channels(codec: Codec) -> None:
    """As FORMAT.md says, of the first channels of each quarter."""
    picture = image.read(IMAGES / "motocross.png")[:70, :130]
    _, (payload,) = container.read(codec.encode(picture, quality=20))
    code = codec.unpack(codec.encode(picture, quality=20))
    count = int(code.tensors["c"][0, 0, 0]) // 4
    y = np.concatenate([quarter[:count] for quarter in np.split(code.tensors["y"], 4)])
    crc = zlib.crc32(code.tensors["z"].astype("<i2").tobytes(), zlib.crc32(y.astype("<i2").tobytes()))
    assert int.from_bytes(payload[:4], "little") == crc
