"""Parts of a picture, smaller pictures, what is left of a damaged file, and pictures that go from file to file by
rows.
"""

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

from hourglass.client import Client
from hourglass.codec import Codec, Limits, Metadata, Picture, View, container, errors, image, metrics, quantise
from hourglass.codec.runtime import ZOO, Hyperprior, Patch
from hourglass.codec.strips import open_strips

COMMAND = str(Path(sys.executable).with_name("compress-image"))
IMAGES = Path(__file__).parent / "images"


@pytest.fixture(scope="module")
def large() -> Picture:
    """1100x900 pixels with alpha, so that there are six tiles."""
    colour = np.pad(image.read(IMAGES / "parrots.png"), ((200, 188), (150, 182), (0, 0)), mode="reflect")
    y, x = np.mgrid[: colour.shape[0], : colour.shape[1]]
    return Picture(colour, np.clip(400 - np.hypot(y - 400, x - 500), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def data(large: Picture, codec: Codec) -> bytes:
    return codec.encode(large, quality=40)


@pytest.fixture(scope="module")
def fine(large: Picture, codec: Codec) -> bytes:
    """With channels beside the core, at which a post-filter looks across the edges of tiles."""
    return codec.encode(large, quality=95)


REGIONS = [
    (0, 0, 1100, 900),
    (100, 37, 300, 200),
    (500, 10, 30, 70),
    (511, 511, 2, 2),
    (383, 511, 2, 2),
    (384, 512, 384, 388),
    (1099, 899, 1, 1),
    (0, 450, 1100, 120),
    (460, 0, 60, 900),
]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("quality", [40, 95])
def test_a_region_is_that_part_of_the_whole(
    region: tuple[int, int, int, int], scale: int, quality: int, data: bytes, fine: bytes, codec: Codec
) -> None:
    data = data if quality == 40 else fine
    whole = codec.decode(data, scale=scale).astype(int)
    x, y, width, height = region
    part = whole[y // scale : -(-(y + height) // scale), x // scale : -(-(x + width) // scale)]
    decoded = codec.decode(data, region=region, scale=scale)
    assert decoded.shape == part.shape
    assert abs(decoded[..., :3] - part[..., :3]).max() <= 1
    assert np.array_equal(decoded[..., 3], part[..., 3])


def test_a_region_reads_and_decodes_only_what_it_needs(data: bytes, codec: Codec, tmp_path: Path) -> None:
    """Of a file whose other tiles are destroyed a region decodes all the same."""
    header = codec.read_header(data)
    begin = header.length + sum(section.length for section in header.sections[:1])
    broken = bytearray(data)
    broken[begin : begin + header.sections[1].length] = bytes(header.sections[1].length)
    (tmp_path / "broken.hgc").write_bytes(broken)
    expected = codec.decode(data, region=(0, 0, 300, 400))
    assert np.array_equal(codec.decode(tmp_path / "broken.hgc", region=(0, 0, 300, 400)), expected)
    with pytest.raises(errors.CorruptError):
        codec.decode(tmp_path / "broken.hgc", region=(300, 0, 80, 100))  # the filters look over the border


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"region": (0, 0, 1101, 900)}, "region is 1101x900 at 0,0; the picture has 1100x900"),
        ({"region": (-1, 0, 5, 5)}, "region is"),
        ({"region": (0, 0, 0, 5)}, "region is"),
        ({"region": (0, 0, 5)}, "region is"),
        ({"scale": 3}, "scale is 3; expected one of 1, 2, 4, 8"),
        ({"reigon": (0, 0, 5, 5)}, "'reigon' is no setting"),
    ],
)
def test_views_that_are_none(view: View, message: str, data: bytes, codec: Codec) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        codec.decode(data, **view)


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("quality", [10, 50, 90])
def test_a_smaller_picture_is_what_reducing_the_whole_gives(
    photo: Path, scale: int, quality: float, codec: Codec
) -> None:
    """To the eye: at least 38 dB between the two, and hardly further from the original."""
    original = image.load(photo).colour
    data = codec.encode(photo, quality=quality, fallback=False)
    small, whole = codec.decode(data, scale=scale), codec.decode(data)
    assert small.shape[:2] == (-(-whole.shape[0] // scale), -(-whole.shape[1] // scale))
    rows, columns = (size // scale * scale for size in whole.shape[:2])

    def reduced(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        shape = rows // scale, scale, columns // scale, scale, -1
        means = pixels[:rows, :columns].reshape(shape).mean((1, 3))
        return np.rint(means).astype(np.uint8)

    part = small[: rows // scale, : columns // scale].reshape(rows // scale, columns // scale, -1)
    assert metrics.psnr(reduced(whole), part) > 38
    assert metrics.psnr(reduced(original), part) > metrics.psnr(reduced(original), reduced(whole)) - 1.5 - quality / 20


def test_a_very_wide_picture(codec: Codec) -> None:
    """More tiles across than are decoded at a time: no seam, and a bound on their number."""
    row = np.tile(image.read(IMAGES / "parrots.png")[:16], (1, 50, 1))
    data = codec.encode(row, quality=50)
    tiles = len(codec.read_header(data).sections)
    assert tiles == 75
    decoded = codec.decode(data)
    assert decoded.shape == row.shape
    assert metrics.psnr(row, decoded) > 30
    part = codec.decode(data, region=(32_500, 0, 600, 16))
    assert abs(decoded[:, 32_500:33_100].astype(int) - part).max() <= 1
    small = Codec(limits=Limits(tiles=tiles - 1))
    for call in (lambda: small.decode(data), lambda: small.encode(row)):
        with pytest.raises(errors.LimitError, match=r"75 tiles; the limit is 74 \(Limits.tiles\)"):
            call()


def test_a_smaller_picture_saves_work(codec: Codec) -> None:
    """Counted, not timed: the graphs for small pictures have less than half the multiplications."""
    from hourglass.codec.train.graphs import macs_per_pixel

    whole = sum(macs_per_pixel(ZOO / codec.model / "decoder.onnx").values())
    for scale in (2, 4, 8):
        assert sum(macs_per_pixel(ZOO / codec.model / f"reduced-{scale}.onnx").values()) < whole / 2


def test_views_by_command_and_server(data: bytes, codec: Codec, client: Client, address: str, tmp_path: Path) -> None:
    file, out = tmp_path / "a.hgc", tmp_path / "out.png"
    file.write_bytes(data)
    expected = codec.decode(data, region=(100, 50, 600, 500), scale=2)
    assert np.array_equal(client.decode(data, region=(100, 50, 600, 500), scale=2), expected)
    for where in ([], ["--server", address]):
        flags = ["--region", "100,50,600,500", "--scale", "1/2"]
        subprocess.run([COMMAND, *where, "-d", *flags, "-fo", out, file], check=True, capture_output=True)
        assert np.array_equal(image.load(out).pixels, expected)
    for flags in (["--region", "1,2,3"], ["--scale", "1/3"], ["--region", "0,0,5000,1"]):
        done = subprocess.run([COMMAND, "-d", *flags, "-fo", out, file], check=False, capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("section", range(12))
def test_damage_in_a_tile_costs_that_tile(section: int, data: bytes, large: Picture, codec: Codec) -> None:
    """Sections 0 to 5 are the tiles' codes, 6 to 11 their alpha."""
    header = codec.read_header(data)
    place = header.length + sum(s.length for s in header.sections[:section])
    broken = bytearray(data)
    broken[place] ^= 0x40
    with pytest.raises(errors.CorruptError):
        codec.decode(broken)
    whole, left = codec.decode_picture(data), codec.decode_picture(broken, salvage=True)
    tile = section % 6
    y, x = tile // 3 * 512, tile % 3 * 384
    assert len(left.losses) == 1
    assert f"tile {tile}, " in left.losses[0]
    assert f"at {x},{y}, is lost: section {section}" in left.losses[0]
    assert left.alpha is not None
    assert whole.alpha is not None
    assert large.alpha is not None
    changed = (left.colour != whole.colour).any(2) | (left.alpha != whole.alpha)
    inside = np.zeros_like(changed)
    inside[y : y + 512, x : x + 384] = True
    near = np.zeros_like(changed)  # the filters of a neighbour look over its border: 7 of 8 pixels, the last one of 4
    near[max(y - 60, 0) : y + 572, max(x - 60, 0) : x + 444] = True
    assert not changed[~near].any()
    if section < 6:
        assert changed[inside].mean() > 0.9
        assert np.array_equal(left.alpha, large.alpha)
    else:
        assert np.array_equal(left.colour, whole.colour)
        assert (left.alpha[inside] == 255).all()


def test_salvage_by_command_and_server(data: bytes, address: str, client: Client, tmp_path: Path) -> None:
    cut = data[: len(data) * 2 // 3]
    (tmp_path / "cut.hgc").write_bytes(cut)
    with pytest.raises(errors.CorruptError):
        client.decode(cut)
    assert client.decode_picture(cut, salvage=True).losses
    with pytest.warns(errors.LossWarning, match="is lost"):
        client.decode(cut, salvage=True)
    for where in ([], ["--server", address]):
        out = tmp_path / f"out{len(where)}.png"
        command = [COMMAND, *where, "-d", "--salvage", "--json", "-o", out, tmp_path / "cut.hgc"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert "is lost: file ends after" in done.stderr
        assert json.loads(done.stdout)["damage"]
        assert image.load(out).width == 1100


def test_damaged_metadata_is_found_before_any_pixel_is_made(data: bytes, codec: Codec) -> None:
    """Though its section is the last: the tiles of these files are damaged too, and are not what the error names."""
    header, payloads = container.read(data)
    tiles = [(section.kind, bytes(payload)) for section, payload in zip(header.sections, payloads, strict=True)]
    front = container.Front(header.model, header.colour, header.width, header.height, header.quality)
    coded = container.write(front, [*tiles, (container.XMP, container.deflate(b"<x/>"))])
    stored = codec.encode(Picture(np.zeros((9, 9), np.uint8), metadata=Metadata(xmp=b"<x/>")))
    assert codec.read_header(stored).lossless
    for whole in (coded, stored):
        broken = bytearray(whole)
        parsed = codec.read_header(whole)
        place = parsed.length
        for section in parsed.sections:
            broken[place + section.length // 2] ^= 0x10
            place += section.length
        with pytest.raises(errors.CorruptError, match=f"of kind {container.XMP}"):
            codec.decode(broken)


def test_salvage_of_a_whole_file_says_nothing(data: bytes, codec: Codec) -> None:
    assert codec.decode_picture(data, salvage=True).losses == ()


def test_what_cannot_be_salvaged(data: bytes, codec: Codec) -> None:
    with pytest.raises(errors.CorruptError, match="header"):
        codec.decode(data[:50], salvage=True)


@pytest.mark.parametrize("grey", [False, True])
def test_by_rows_is_as_in_memory(grey: bool, large: Picture, codec: Codec, tmp_path: Path) -> None:
    """The same bytes, the same pixels; nothing needs the whole picture."""
    picture = Picture(np.ascontiguousarray(large.colour[..., 0]) if grey else large.colour)
    path = tmp_path / "large.ppm"
    path.write_bytes(image.write(picture, "PPM"))
    small = Codec(limits=Limits(pixels=1000))
    out = io.BytesIO()
    with open_strips(path) or pytest.fail("no strips") as strips:
        small.encode_strips(strips, out, quality=55)
    assert out.getvalue() == codec.encode(path, quality=55)
    header, metadata, rows = small.decode_strips(out.getvalue())
    strips_made = list(rows)
    assert (header.width, header.height, metadata.size) == (1100, 900, 0)
    decoded = codec.decode(out.getvalue())
    assert abs(np.concatenate(strips_made).astype(int) - decoded).max() <= 1
    with pytest.raises(errors.LimitError):
        small.decode(out.getvalue())


def test_best_by_rows_is_as_in_memory(
    with_tiles: Callable[..., Codec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search looks at more of what is around a tile than the transforms do, and sees the same of it."""
    for steps in ("_ANNEALED", "_TURNS", "_MOVES"):  # a few of each look at it as many do
        monkeypatch.setattr(quantise, steps, 4)
    small = with_tiles(64, threads=1)
    path = tmp_path / "column.ppm"
    path.write_bytes(image.write(image.read(IMAGES / "parrots.png")[:, 300:380], "PPM"))
    out = io.BytesIO()
    with open_strips(path) or pytest.fail("no strips") as strips:
        small.encode_strips(strips, out, quality=60, effort="best")
    assert len(small.read_header(out.getvalue()).sections) == 16  # in four bands
    assert out.getvalue() == small.encode(path, quality=60, effort="best")


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_a_very_wide_picture_by_parts_and_rows(suffix: str, with_tiles: Callable[..., Codec], tmp_path: Path) -> None:
    """More tiles across than are worked on at a time: the same bytes and pixels as in memory, two rows of tiles."""
    if suffix == "png":
        pytest.importorskip("pyvips")
    row = np.tile(image.read(IMAGES / "parrots.png")[:34], (1, 6, 1))
    path = tmp_path / f"wide.{suffix}"
    path.write_bytes(image.write(row, image.format_of(path)))
    small = with_tiles(64)  # 72 across
    tall = np.concatenate([row, row[::-1]])  # 68 rows: the second row of tiles has four
    path.write_bytes(image.write(tall, image.format_of(path)))
    out = io.BytesIO()
    with open_strips(path) or pytest.fail("no strips") as strips:
        assert strips.by_parts == (suffix != "png")
        small.encode_strips(strips, out, quality=40)
    data = out.getvalue()
    assert len(small.read_header(data).sections) == 144
    assert data == small.encode(tall, quality=40, fallback=False)
    decoded = small.decode(data).astype(int)
    assert abs(np.concatenate(list(small.decode_strips(data)[2])) - decoded).max() <= 1
    seen = np.zeros(tall.shape[:2], int)
    for x, y, part in small.decode_parts(data)[2]:
        place = np.s_[y : y + part.shape[0], x : x + part.shape[1]]
        assert abs(part - decoded[place]).max() <= 1
        seen[place] += 1
    assert (seen == 1).all()


def test_a_row_that_is_too_wide_to_be_held(tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    row = np.tile(image.read(IMAGES / "parrots.png")[:16], (1, 2, 1))
    few = Codec(limits=Limits(band_bytes=row.size - 1))
    for suffix in ("png", "ppm"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(image.write(row, image.format_of(path)))
    message = rf"{row.size} bytes would be held at a time.*\(Limits.band_bytes\); take PPM or uncompressed TIFF"
    with (
        open_strips(tmp_path / "a.png") or pytest.fail("no strips") as strips,
        pytest.raises(errors.LimitError, match=message),
    ):
        few.encode_strips(strips, io.BytesIO())
    out = io.BytesIO()
    with open_strips(tmp_path / "a.ppm") or pytest.fail("no strips") as strips:
        few.encode_strips(strips, out)
    with pytest.raises(errors.LimitError, match=message):
        few.decode_strips(out.getvalue())
    ((x, y, part),) = few.decode_parts(out.getvalue())[2]
    assert (x, y, part.shape) == (0, 0, row.shape)


def test_by_rows_has_no_targets_and_no_alpha(data: bytes, codec: Codec, tmp_path: Path) -> None:
    path = tmp_path / "a.ppm"
    path.write_bytes(image.write(np.zeros((8, 8, 3), np.uint8), "PPM"))
    with (
        open_strips(path) or pytest.fail("no strips") as strips,
        pytest.raises(errors.InvalidArgument, match="a target needs the whole picture"),
    ):
        codec.encode_strips(strips, io.BytesIO(), target_bpp=1)
    with pytest.raises(errors.InvalidArgument, match="only be decoded as a whole"):
        codec.decode_strips(data)


def test_a_large_picture_by_the_command_in_little_memory(parrots: Path, tmp_path: Path) -> None:
    """24.6 megapixels there and back; held whole, they take more than 400 MB."""
    colour = image.read(parrots)
    row = np.tile(colour, (1, 16, 1))[:, :12_000]
    with (tmp_path / "a.ppm").open("wb") as file:
        file.write(b"P6\n12000 2048\n255\n")
        for number in range(4):
            file.write(np.ascontiguousarray(np.roll(row, number * 57, axis=1)).data)
    program = (
        "import re, sys; sys.argv[0] = 'compress-image'\n"
        "from hourglass.client.cli import main\n"
        "try: main()\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr)\n"
    )
    measured: Callable[..., Any] = lambda *flags: subprocess.run(  # noqa: E731
        [sys.executable, "-c", program, *flags], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    for flags in (["a.ppm", "-q", "30"], ["-d", "a.hgc", "-o", "b.ppm"]):
        assert int(measured(*flags).stderr.split()[-1]) < 340_000  # KiB
    assert (tmp_path / "b.ppm").stat().st_size == (tmp_path / "a.ppm").stat().st_size
    header = container.read_header(tmp_path / "a.hgc")
    assert (header.width, header.height) == (12_000, 2048)


def test_only_tiles_that_have_channels_beside_the_core_work_on_them(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The neighbour of a busy tile is decoded as beside any other."""
    busy = np.random.default_rng(4).integers(0, 256, (320, 448, 3), np.uint8)
    flat = np.full_like(busy, 128)
    data = codec.encode(np.concatenate([flat, busy, flat], 1), quality=95)
    shapes = []
    synthesise = Hyperprior.synthesise

    def watched(self: Hyperprior, patch: Patch, scale: int = 1) -> NDArray[np.uint8]:
        shapes.append(patch.rest.shape[2:])
        return synthesise(self, patch, scale)

    monkeypatch.setattr(Hyperprior, "synthesise", watched)
    codec.decode(data)
    # In whatever order; the busy one with a ring on either side, which a post-filter sees.
    assert sorted(shapes) == [(1, 1), (1, 1), (20, 30)]
    shapes.clear()
    codec.decode(data, region=(0, 0, 448, 320))
    assert shapes == [(1, 1)]
