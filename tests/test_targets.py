"""Targets: the best picture in so many bytes, the smallest file of such a quality; by Python, gRPC and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from hourglass.client import Client
from hourglass.codec import Codec, Settings, errors, image, metrics, parse_size, quantise
from hourglass.v1 import codec_pb2 as pb
from hourglass.v1 import codec_pb2_grpc

COMMAND = [str(Path(sys.executable).with_name("compress-image"))]


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("part", [0.0, 0.05, 0.4, 0.9])
def test_size_is_reached_and_never_exceeded(photo: Path, part: float, effort: Any, codec: Codec) -> None:
    least, most = (len(codec.encode(photo, quality=q, effort=effort)) for q in (0, 100))
    target = int(least + part * (most - least))
    size = len(codec.encode(photo, target_size=target, effort=effort))
    assert 0.97 * target <= size <= target


def test_a_size_between_two_widths_is_reached(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = image.read(Path(__file__).parent / "images" / "motocross.png")[:256, :256]
    many = np.count_nonzero(codec.analyse(picture, quality=80).tensors["y"])

    def all_or_few(scaled: np.ndarray[Any, Any], widths: tuple[int, ...]) -> int:
        return len(widths) - 1 if np.count_nonzero(abs(scaled) > 0.5) > many else 0

    monkeypatch.setattr(quantise, "_width", all_or_few)  # so that the step to the next width is a large one
    sizes = [len(codec.encode(picture, quality=quality)) for quality in np.arange(70, 91, 0.5)]
    step = int(np.diff(sizes).argmax())
    target = (sizes[step] + sizes[step + 1]) // 2
    assert sizes[step] < 0.93 * target
    assert 0.97 * target <= len(codec.encode(picture, target_size=target)) <= target


def test_best_reaches_targets_too(codec: Codec) -> None:
    picture = image.read(Path(__file__).parent / "images" / "motocross.png")[:128, :128]
    assert 2910 <= len(codec.encode(picture, target_size=3000, effort="best")) <= 3000
    assert 30 <= metrics.psnr(picture, codec.decode(codec.encode(picture, target_psnr=30, effort="best"))) < 30.1
    with pytest.raises(errors.InvalidArgument, match="at quality 0"):
        codec.encode(picture, target_bpp=0.02, effort="best")


def test_a_larger_target_than_quality_100_needs(photo: Path, codec: Codec) -> None:
    best = codec.encode(photo, quality=100)
    assert codec.encode(photo, target_size=10 * len(best), fallback=False) == best
    assert codec.encode(photo, target_bpp=1000, fallback=False) == best
    assert codec.encode(photo, target_size=len(best)) == best
    # What has no loss is better, and fits.
    assert codec.read_header(codec.encode(photo, target_bpp=24)).lossless


@pytest.mark.parametrize("bpp", [0.3, 0.8])
def test_bpp(parrots: Path, bpp: float, codec: Codec) -> None:
    data = codec.encode(parrots, target_bpp=bpp)
    assert 0.97 * bpp <= metrics.bpp(len(data), 768, 512) <= bpp


@pytest.mark.parametrize("psnr", [28, 31.5, 36])
def test_psnr(photo: Path, psnr: float, codec: Codec) -> None:
    picture = image.read(photo)
    data = codec.encode(photo, target_psnr=psnr)
    reached = metrics.psnr(picture, image.read(codec.decode(data)))
    lower = codec.encode(photo, quality=max(0, codec.read_header(data).quality - 1))
    assert reached >= psnr
    assert codec.read_header(data).quality == 0 or metrics.psnr(picture, image.read(codec.decode(lower))) < psnr + 0.05


def test_impossible_targets_say_what_is_possible(parrots: Path, codec: Codec) -> None:
    least = len(codec.encode(parrots, quality=0))
    with pytest.raises(errors.InvalidArgument, match=f"target_size is 100, 100 bytes; .* this picture takes {least} b"):
        codec.encode(parrots, target_size=100)
    with pytest.raises(errors.InvalidArgument, match=r"target_bpp is 0.001, 49 bytes; at quality 0, .*, \d.\d+ bpp"):
        codec.encode(parrots, target_bpp=0.001)
    best = metrics.psnr(image.read(parrots), codec.decode(codec.encode(parrots, quality=100)))
    with pytest.raises(errors.InvalidArgument, match=f"at quality 100, the best, this picture has {best:.2f} dB"):
        codec.encode(parrots, target_psnr=70, fallback=False)
    assert np.array_equal(codec.decode(codec.encode(parrots, target_psnr=70)), image.read(parrots))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality": 50, "target_bpp": 1}, "quality and target_bpp exclude each other"),
        ({"target_bpp": 0}, "target_bpp is 0; expected a positive number"),
        ({"target_bpp": float("nan")}, "target_bpp is nan"),
        ({"target_bpp": "1"}, "target_bpp is '1'"),
        ({"target_psnr": -3}, "target_psnr is -3; expected dB"),
        ({"target_size": "much"}, "target_size is 'much'; expected bytes"),
        ({"target_size": 0}, "target_size is '0'; expected bytes"),
        ({"target_size": "5%"}, "target_size is 5%, but the picture has no source file"),
        ({"effort": "none"}, "effort is 'none'; expected one of fast, default, best"),
        ({"qualtiy": 5}, "'qualtiy' is no setting"),
    ],
)
def test_bad_settings(settings: Settings, message: str, codec: Codec, client: Client) -> None:
    """One error in the process and through a server, before any work."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    for coder in (codec, client):
        with pytest.raises(errors.InvalidArgument, match=message):
            coder.encode(pixels, **settings)


@pytest.mark.parametrize(
    ("text", "source", "bytes_"),
    [("40k", None, 40_000), ("1.5M", None, 1_500_000), ("5%", 2000, 100), (77, 1, 77), (" 12 ", None, 12)],
)
def test_sizes_as_text(text: int | str, source: int | None, bytes_: int) -> None:
    assert parse_size(text, source) == bytes_


@pytest.mark.parametrize(
    "settings", [{"target_size": "2%"}, {"target_bpp": 0.4}, {"target_psnr": 33}, {"effort": "fast"}]
)
def test_three_ways_agree(
    settings: Settings, parrots: Path, codec: Codec, client: Client, address: str, tmp_path: Path
) -> None:
    data = codec.encode(parrots, **settings)
    assert client.encode(parrots, **settings) == data
    assert codec.pack(client.analyse(parrots, **settings)) == data
    flags = [str(word) for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    for where in ([], ["--server", address]):
        out = tmp_path / "out.hgc"
        subprocess.run([*COMMAND, *where, *flags, "-fo", out, parrots], check=True, capture_output=True)
        assert out.read_bytes() == data


def test_command_says_what_is_possible(parrots: Path, tmp_path: Path) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *flags, "-o", tmp_path / "out.hgc", parrots]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--target-size", "50")
    assert (done.returncode, done.stdout) == (2, "")
    assert "at quality 0, the smallest, this picture takes" in done.stderr
    assert run("--target-size", "40k", "-q", "3").returncode == 2
    assert run("--target-psnr", "400").returncode == 2
    assert run("--effort", "none").returncode == 2
    assert run("-d", "--target-bpp", "1").returncode == 2
    assert list(tmp_path.iterdir()) == []
    done = run("--target-size", "20k", "--json")
    assert 19_400 <= json.loads(done.stdout)["bytes_out"] <= 20_000


def test_unknown_effort_of_a_request(address: str, parrots: Path) -> None:
    request = pb.EncodeRequest(image_file=parrots.read_bytes())
    request.effort = 77  # type: ignore[assignment]
    with grpc.insecure_channel(address) as channel:
        stub: Any = codec_pb2_grpc.CodecServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError, match="effort is 77; expected a value of Effort"):
            stub.Encode(request)


def test_best_knows_what_is_beside_a_tile(parrots: Path, codec: Codec) -> None:
    """Two tiles: searched as if each ended in nothing, they are 1 to 2 % larger at equal quality, and not smaller."""
    picture = image.read(parrots)[128:256, 128:768]
    default, best = (
        [
            (len(data), metrics.psnr(picture, image.read(codec.decode(data))))
            for data in (codec.encode(picture, quality=q, effort=effort) for q in (50, 70, 90))
        ]
        for effort in ("default", "best")
    )
    assert metrics.bd_rate(*zip(*best, strict=True), *zip(*default, strict=True)) < -2


def test_best_is_smaller_at_equal_quality(photo: Path, codec: Codec) -> None:
    """Bits and error of the three efforts, at one exchange rate: what is saved is worth more than what is lost."""
    picture = image.read(photo)[:128, :128]
    curves = {
        effort: [
            (len(data), metrics.psnr(picture, image.read(codec.decode(data))))
            for data in (codec.encode(picture, quality=q, effort=effort) for q in (20, 40, 60, 80))
        ]
        for effort in ("fast", "default", "best")
    }
    columns = {effort: list(zip(*points, strict=True)) for effort, points in curves.items()}
    assert metrics.bd_rate(*columns["default"], *columns["fast"]) < 0.2
    assert metrics.bd_rate(*columns["best"], *columns["default"]) < -1.5
