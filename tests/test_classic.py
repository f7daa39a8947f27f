"""The classic models of the zoo: each encodes and decodes, colour and grey, and its files mean the same everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from hourglass.client import Client
from hourglass.client.cli import main
from hourglass.codec import Codec, errors, image, metrics, runtime
from hourglass.codec.train.export import load_checkpoint

IMAGES = Path(__file__).parent / "images"
WEIGHTS = Path(runtime.__file__).parent / "train" / "weights"
CLASSICS = [model for model in runtime.model_ids() if model.startswith("classic-")]
COLOUR = [model for model in CLASSICS if not model.endswith("-grey")]
GREY = [model for model in CLASSICS if model.endswith("-grey")]

Pixels = NDArray[np.uint8]


def _picture(grey: bool = False) -> Pixels:
    """Of a size that is no multiple of any stride, and more than a tile wide."""
    pixels = image.read(IMAGES / "lighthouse.png")
    pixels = np.concatenate([pixels, pixels[:, ::-1]], 1)[:187, :541]
    return pixels[..., 1].copy() if grey else pixels


def test_the_family_is_there() -> None:
    kinds = {"classic-deconv", "classic-avgpool", "classic-maxpool"}
    assert set(CLASSICS) == kinds | {f"{kind}-grey" for kind in kinds} | {"classic-deconv-denoise"}


@pytest.mark.parametrize("model", runtime.model_ids())
@pytest.mark.parametrize("grey", [False, True])
def test_every_model_round_trips(model: str, grey: bool) -> None:
    """Colour and grey, by file and by code; sizes rise and errors fall with quality."""
    codec, picture = Codec(model), _picture(grey)
    codec.warm_up()
    if model in GREY and not grey:
        with pytest.raises(errors.InvalidArgument, match=f"model '{model}' codes grey pictures only"):
            codec.encode(picture)
        return
    sizes, psnr = [], []
    for quality in (0, 50, 100):
        data = codec.encode(picture, quality=quality, fallback=False)
        decoded = codec.decode(data)
        assert decoded.shape == picture.shape
        code = codec.unpack(data)
        assert code == codec.analyse(picture, quality=quality)
        assert codec.pack(code) == data
        assert np.array_equal(codec.synthesise(code), decoded)
        sizes.append(len(data))
        psnr.append(metrics.psnr(picture, decoded))
    assert sizes == sorted(set(sizes))
    assert psnr == sorted(psnr)
    assert psnr[0] > 20


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("model", runtime.model_ids())
def test_command_and_server_have_every_model(model: str, grey: bool, address: str, tmp_path: Path) -> None:
    """The command, the server and the codec make the same files and pictures with it."""
    if model in GREY and not grey:
        return
    picture = _picture(grey)
    path = tmp_path / "photo.png"
    path.write_bytes(image.write(image.load(picture), "PNG"))
    for arguments in (["--model", model, "--no-fallback", str(path)], ["-d", "-f", str(path.with_suffix(".hgc"))]):
        told = CliRunner().invoke(main, arguments)
        assert told.exit_code == 0, told.output
    data = path.with_suffix(".hgc").read_bytes()
    codec = Codec(model)
    assert data == codec.encode(picture, fallback=False)
    decoded = image.load(path).pixels
    assert np.array_equal(decoded, codec.decode(data))
    assert decoded.shape == picture.shape
    with Client(address, model=model) as client:
        assert client.encode(picture, fallback=False) == data
        assert np.array_equal(client.decode(data), decoded)
        code = client.analyse(picture)
        assert code == codec.analyse(picture)
        assert np.array_equal(client.synthesise(code), decoded)
        assert np.array_equal(client.features(data), codec.features(data))


@pytest.mark.parametrize("model", [model for model in COLOUR if f"{model}-grey" in GREY])
def test_grey_pictures_choose_the_grey_model(model: str) -> None:
    codec, picture = Codec(model), _picture(grey=True)
    assert codec.read_header(codec.encode(picture, fallback=False)).model == f"{model}-grey"
    assert codec.analyse(picture).model == f"{model}-grey"
    told = codec.encode(picture, fallback=False, grey_model=False)
    assert codec.read_header(told).model == model
    assert codec.decode(told).shape == picture.shape


@pytest.mark.parametrize("model", CLASSICS)
def test_symbols_do_not_depend_on_the_machine(model: str) -> None:
    """A file is the same symbols under any number of threads, and those that were encoded."""
    picture = _picture(model in GREY)
    data = Codec(model, threads=1).encode(picture, quality=70, fallback=False)
    assert Codec(threads=1).unpack(data) == Codec(threads=2).unpack(data) == Codec(model).analyse(picture, quality=70)


@pytest.mark.parametrize("model", CLASSICS)
def test_onnx_is_the_network(model: str) -> None:
    """Symbols equal on 99.99 % of elements, pixels within one grey level, whatever onnxruntime optimises."""
    net, _ = load_checkpoint(WEIGHTS / f"{model}.pt")
    own = runtime.open_model(model)
    picture = _picture(model in GREY)
    height, width = picture.shape[:2]
    padding = [(0, -height % 16), (0, -width % 16)] + [(0, 0)] * (picture.ndim - 2)
    padded = np.pad(picture, padding, mode="edge").reshape(-(-height // 16) * 16, -(-width // 16) * 16, -1)
    x = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    gain, inverse = own.gain(60)[:, None, None], own.inverse_gain(60)
    with torch.no_grad():
        latent, locations = net.analysis(x)
        wanted = (latent[0].numpy() * gain).round()
        found = own.analyse(picture, 0, 0, width, height)
        assert (np.rint(found["y"] * gain) == wanted).mean() >= 0.9999
        if locations is not None:
            assert (found["l"] == locations[0].numpy()).mean() >= 0.9999
        coded = torch.from_numpy(wanted * inverse[: len(wanted), None, None])[None]
        expected = (net.synthesis(coded, locations)[0].permute(1, 2, 0) * 255).round().numpy()
    given = coded.numpy() if locations is None else np.concatenate([coded.numpy(), locations.numpy()], 1)
    folder = runtime.ZOO / model
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(folder / "decoder.onnx", options, providers=["CPUExecutionProvider"])
        keep = np.array([0, padded.shape[0] // 16, 0, padded.shape[1] // 16], np.int64)
        (pixels,) = session.run(None, {"latent": given.astype(np.float32), "keep": keep})
        assert abs(pixels[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("model", CLASSICS)
def test_tiles_have_no_seams(model: str) -> None:
    """A picture of many tiles is what one tile would be, to a grey level: the halo is all that the filters reach."""
    picture = np.tile(image.read(IMAGES / "motocross.png"), (3, 3, 1))[:600, :700]
    picture = picture[..., 1].copy() if model in GREY else picture
    codec = Codec(model)
    code = codec.analyse(picture, quality=80, effort="fast")
    own = runtime.open_model(model)
    height, width = picture.shape[:2]
    found = own.analyse(picture, 0, 0, width, height)
    assert (np.rint(found["y"] * own.gain(80)[:, None, None]) == code.tensors["y"]).mean() > 0.9999
    latents = [code.tensors["y"] * own.inverse_gain(80)[: own.latent.channels, None, None]]
    if "l" in code.tensors:
        latents.append(code.tensors["l"].astype(np.float32))
    core = np.concatenate(latents).astype(np.float32)[None]
    whole = own.synthesise(runtime.Patch(core, core[:, :0], (0, core.shape[2], 0, core.shape[3]), 50.0))[
        :height, :width
    ]
    decoded = codec.synthesise(code)
    assert abs(whole.reshape(decoded.shape).astype(int) - decoded).max() <= 1
    region = codec.decode(codec.pack(code), region=(300, 250, 200, 100))
    assert abs(region.astype(int) - decoded[250:350, 300:500]).max() <= 1


def test_location_map_is_part_of_the_code(tmp_path: Path) -> None:
    """0 to 3 where a value is, 0 where none is; its share of the bits is said; a code with a wrong map is refused."""
    codec = Codec("classic-maxpool")
    picture = _picture()
    code = codec.analyse(picture, quality=80)
    values, places = code.tensors["y"], code.tensors["l"]
    assert values.shape == places.shape
    assert set(np.unique(places)) == {0, 1, 2, 3}
    assert not places[values == 0].any()
    bits = codec.tensor_bits(codec.pack(code))
    assert set(bits) == {"y", "l"}
    assert 0.8 < bits["l"] / np.count_nonzero(values) <= 2.01
    assert sum(bits.values()) / 8 == pytest.approx(len(codec.pack(code)), rel=0.03)
    for place, value, what in (((0, 0, 0), 7, "outside"), (tuple(np.argwhere(values == 0)[0]), 1, "sure zero")):
        wrong = places.copy()
        wrong[place] = value
        with pytest.raises(errors.CodeError, match=r"location|sure zero"):
            codec.pack(type(code)(code.model, code.quality, code.width, code.height, {"y": values, "l": wrong})), what
    path = tmp_path / "photo.png"
    path.write_bytes(image.write(image.load(picture), "PNG"))
    for arguments in (
        ["--model", "classic-maxpool", "--no-fallback", str(path)],
        ["-l", str(path.with_suffix(".hgc"))],
    ):
        told = CliRunner().invoke(main, ["--json", "-f", *arguments])
        assert told.exit_code == 0, told.output
        share = json.loads(told.stdout)["location_share"]
        assert 0.05 < share < 0.6
        told = CliRunner().invoke(main, ["-f", *arguments])
        assert f"locations {share:.0%}" in told.stdout


def test_flagship_has_no_locations(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(image.write(image.load(_picture()), "PNG"))
    told = CliRunner().invoke(main, ["--json", str(path)])
    assert json.loads(told.stdout)["location_share"] is None


def test_denoiser_leaves_noise_out() -> None:
    """Noise of 25 grey levels: 3 dB nearer to the clean picture than the plain model is, at the same quality."""
    clean = image.read(IMAGES / "parrots.png")
    noise = np.random.default_rng(1).normal(0, 25, clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    reached: dict[str, Any] = {}
    for model in ("classic-deconv", "classic-deconv-denoise"):
        codec = Codec(model)
        reached[model] = metrics.psnr(clean, codec.decode(codec.encode(noisy, quality=100, fallback=False)))
    assert reached["classic-deconv-denoise"] > reached["classic-deconv"] + 3
