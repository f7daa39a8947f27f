"""Training and export in small: the real loop on the test photographs, resumed, exported, used."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hourglass.codec import Codec, errors, image, metrics
from hourglass.codec.prior import gather, later
from hourglass.codec.quantise import Analysed, _width, quantise
from hourglass.codec.runtime import Hyperprior, open_model
from hourglass.codec.train import loop, prior
from hourglass.codec.train.blocks import squared_error
from hourglass.codec.train.classic import SHAPES, Classic, start_linear
from hourglass.codec.train.data import list_training, load_pieces
from hourglass.codec.train.decoders import decoder
from hourglass.codec.train.export import LARGE, average, export, halve, load_checkpoint
from hourglass.codec.train.graphs import GradientGraph, macs_per_pixel
from hourglass.codec.train.network import (
    LEAST_LOG_STEP,
    BytewiseBlock,
    FactorisedPrior,
    Filter,
    Hourglass,
    PostFilter,
    Shape,
    as_bytes,
    hats,
    post_of,
    start_from_pca,
    start_rest,
    unweave,
    weave,
)

IMAGES = Path(__file__).parent / "images"
SHAPE = Shape(
    trunk=32, latent=48, core=32, analysis_blocks=(1, 1), synthesis_blocks=(2, 1), hyper=16, features=32, hidden=32
)
WITHOUT_COARSE = replace(SHAPE, synthesis_blocks=(2, 0))
SETTINGS = loop.Settings(steps=24, prior_steps=8, batch=4, crop=64, held_out=2, rate=1e-3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small run."""
    out = tmp_path_factory.mktemp("run")
    loop.train(IMAGES, out, SETTINGS, SHAPE, None, CPU)
    return out


def test_log_tells_the_run(run: Path) -> None:
    (row,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert row["step"] == 24
    assert [point["quality"] for point in row["held_out"]] == list(loop.QUALITIES)
    rates, psnr = ([point[name] for point in row["held_out"]] for name in ("bpp", "psnr"))
    assert rates == sorted(rates)
    assert psnr[-1] > psnr[0]


def test_resumed_run_is_the_same_run(run: Path, tmp_path: Path) -> None:
    """Stopped after 10 steps and started again, a run ends with the very weights of one that was not stopped."""
    stopped = replace(SETTINGS, steps=10)
    pieces, held_out = load_pieces(list_training(IMAGES), 64, CPU).split(2)
    state = loop.fresh(SETTINGS, SHAPE, pieces, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda _, step: REAL_RATE(SETTINGS, step))
        patch.setattr(loop, "is_mixed", lambda _, step: REAL_MIXED(SETTINGS, step))
        patch.setattr(loop, "mode_of", lambda _, step: REAL_MODE(SETTINGS, step))
        loop.run(state, stopped, pieces, held_out, tmp_path)
    loop.train(IMAGES, tmp_path, SETTINGS, SHAPE, None, CPU)
    whole, _ = load_checkpoint(run / "checkpoint.pt")
    resumed, values = load_checkpoint(tmp_path / "checkpoint.pt")
    assert values["step"] == 24
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


REAL_RATE, REAL_MIXED, REAL_MODE = loop.learning_rate, loop.is_mixed, loop.mode_of


def test_checkpoint_of_another_shape_is_refused(run: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="give the same shape or another --out"):
        loop.train(IMAGES, run, SETTINGS, replace(SHAPE, trunk=16), None, CPU)


def test_training_lowers_the_loss() -> None:
    """A network whose last layer was made wrong is mostly mended by 40 steps, on a picture that they do not see."""
    settings = replace(SETTINGS, steps=100_000)
    pieces, held_out = load_pieces(list_training(IMAGES), 64, CPU).split(2)
    state = loop.fresh(settings, SHAPE, pieces, CPU)
    x = held_out.pixels.permute(0, 3, 1, 2).float() / 255
    quality = torch.tensor([30.0, 70.0])

    def loss() -> float:
        torch.manual_seed(5)
        return float(loop.loss_of(state.net, x, quality).detach())

    best = loss()
    with torch.no_grad():
        state.net.synthesis.from_trunk.weight.mul_(0.7)
    worse = loss()
    state.step = 200  # behind the warm-up
    for _ in range(40):
        loop.step(state, settings, pieces)
    assert loss() - best < 0.3 * (worse - best)


def test_pca_start_is_a_transform_codec() -> None:
    """With zeroed blocks and as many channels as samples, synthesis inverts analysis; with fewer, nearly."""
    names = ("lighthouse", "motocross")
    pictures = [torch.from_numpy(image.read(IMAGES / f"{name}.png").copy()).permute(2, 0, 1) for name in names]
    x = pictures[1][None, :, :160, :160].float() / 255
    errors_by_width = []
    for trunk, core, latent in ((192, 640, 768), (128, 256, 320), (64, 40, 64)):
        net = Hourglass(Shape(trunk=trunk, core=core, latent=latent, analysis_blocks=(1, 1), synthesis_blocks=(1, 1)))
        start_from_pca(net, pictures, torch.Generator().manual_seed(1))
        start_rest(net, pictures, torch.Generator().manual_seed(1))
        with torch.no_grad():
            back = net.synthesis(net.analysis(x), hats(torch.zeros(1), net.shape.anchors))
        errors_by_width.append(-10 * float(torch.log10((back - x).square().mean())))
    assert errors_by_width[0] > 80
    assert errors_by_width[0] > errors_by_width[1] > 35
    assert errors_by_width[1] > errors_by_width[2] > 22


def test_weaving() -> None:
    """Each quarter of the channels has its share of the core first, then of the others."""
    core, rest = torch.arange(8.0).reshape(1, 8, 1, 1), torch.arange(100.0, 104).reshape(1, 4, 1, 1)
    woven = weave(core, rest)
    assert woven.flatten().tolist() == [0, 1, 100, 2, 3, 101, 4, 5, 102, 6, 7, 103]
    assert all(torch.equal(a, b) for a, b in zip(unweave(woven, 8), (core, rest), strict=True))


def test_a_wider_network_starts_as_the_narrow_one(run: Path) -> None:
    """The weights of a file, spread over a wider latent: the same picture at first, and more channels to go on with."""
    pieces, _ = load_pieces(list_training(IMAGES), 64, CPU).split(2)
    wide = loop.fresh(SETTINGS, replace(SHAPE, latent=64), pieces, CPU, run / "checkpoint.pt").net
    narrow, _ = load_checkpoint(run / "checkpoint.pt")
    x = torch.from_numpy(image.read(IMAGES / "motocross.png")[:128, :192].copy()).permute(2, 0, 1)[None].float() / 255
    quality = torch.tensor([60.0])
    with torch.no_grad():
        core = [net.synthesis.core_to_depth(unweave(net.analysis(x), 32)[0]) for net in (narrow, wide)]
        (a, bits), (b, wider_bits) = (net.code(net.analysis(x), quality, "round") for net in (narrow, wide))
    assert torch.allclose(*core, atol=1e-5)
    assert 0.95 * float(bits) < float(wider_bits) < 2 * float(bits)
    assert float((b - x).square().mean()) < 1.05 * float((a - x).square().mean())


def test_a_wider_filter_starts_as_the_narrow_one(tmp_path: Path) -> None:
    """Its new channels, which nothing looks at yet, are filters of their own, or they would learn nothing."""
    narrow = _with_strong_filter()
    torch.save({"shape": SHAPE.as_dict(), "ema": narrow.state_dict()}, tmp_path / "narrow.pt")
    wide = Hourglass(replace(SHAPE, post=SHAPE.post + 24))
    names = {f"synthesis.posts.{name}" for name in wide.synthesis.posts.state_dict()}
    assert names <= loop._start_from(wide, tmp_path / "narrow.pt")
    x, weights = torch.rand(1, 3, 64, 96), hats(torch.tensor([40.0]), SHAPE.anchors)
    with torch.no_grad():
        corrected = narrow.synthesis.corrected(x, weights)
        assert float((corrected - x).abs().mean()) > 1 / 255
        assert torch.equal(wide.synthesis.corrected(x, weights), corrected)
        for post in wide.synthesis.posts:
            assert isinstance(post, PostFilter)
            assert not post.middle.weight[: SHAPE.post, SHAPE.post :].any()
            for layer in (post.first, post.middle):
                assert (layer.weight[SHAPE.post :].flatten(1).std(1) > 0).all()


@pytest.mark.parametrize("posts", [1, 2])
def test_more_filters_start_as_those_of_the_same_qualities(posts: int, tmp_path: Path) -> None:
    """Of a file with fewer of them, or, as it once was, with one that had no number."""
    few = _with_strong_filter(replace(SHAPE, posts=posts))
    weights, shape = few.state_dict(), few.shape.as_dict()
    if posts == 1:
        weights = {name.replace("synthesis.posts.0.", "synthesis.post."): value for name, value in weights.items()}
        del shape["posts"]
    told = {"settings": {}, "step": 0, "seconds": 0.0}
    torch.save(told | {"shape": shape, "ema": weights}, tmp_path / "few.pt")
    many = Hourglass(replace(SHAPE, posts=4))
    assert loop._start_from(many, tmp_path / "few.pt") == many.state_dict().keys()
    read, _ = load_checkpoint(tmp_path / "few.pt")
    assert isinstance(read, Hourglass)
    x = torch.rand(1, 3, 64, 96)
    for quality in (93.0, 8.0, 49.0, 51.0):
        of_quality = hats(torch.tensor([quality]), SHAPE.anchors)
        with torch.no_grad():
            wanted = few.synthesis.corrected(x, of_quality)
            assert float((wanted - x).abs().mean()) > 1 / 255
            assert torch.equal(many.synthesis.corrected(x, of_quality), wanted)
            assert torch.equal(read.synthesis.corrected(x, of_quality), wanted)


def test_each_quality_has_its_filter() -> None:
    """An even part of the qualities each; the first of a part belongs to it, and 100 to the last."""
    quality = torch.tensor([0, 19.99, 20, 39, 40, 59, 60, 79, 80, 81, 100])
    assert post_of(hats(quality, 11), 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    synthesis = _with_strong_filter().synthesis
    x = torch.rand(5, 3, 32, 32)
    qualities = torch.tensor([85.0, 5, 65, 25, 45])
    with torch.no_grad():
        together = synthesis.corrected(x, hats(qualities, 11))
        for picture, quality, found in zip(x, qualities, together, strict=True):
            post, levels = synthesis.posts[int(quality / 20)], (picture[None] * 255).round()
            wanted = (picture + post(levels, hats(quality[None], 11))[0] / 255).clamp(0, 1)
            assert torch.allclose(found, wanted, atol=1e-6)


def test_gains_start_where_an_error_is_worth_as_much(run: Path, tmp_path: Path) -> None:
    """A network for other lambdas does at each of them what the one that it starts from did, and beyond goes on."""
    narrow, _ = load_checkpoint(run / "checkpoint.pt")
    assert isinstance(narrow, Hourglass)
    with torch.no_grad():
        for gains in (narrow.gains, narrow.hyper_gains):
            gains.log_gain += torch.linspace(0, 1, 11)[:, None] ** 2
    values = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(values | {"ema": narrow.state_dict()}, tmp_path / "weights.pt")
    low, high = SHAPE.lambda_low, SHAPE.lambda_high
    shape = replace(SHAPE, lambda_low=low * 3, lambda_high=high * 2)
    pieces = load_pieces(list_training(IMAGES), 64, CPU)
    wide = loop.fresh(SETTINGS, shape, pieces, CPU, tmp_path / "weights.pt").net
    assert isinstance(wide, Hourglass)
    x = pieces.pixels[:1, :64, :64].permute(0, 3, 1, 2).float() / 255
    for anchor in (0, 4, 8):  # between anchors what is linear is so over other stretches
        quality = torch.tensor([10.0 * anchor])
        same = 100 * torch.log(wide.weight_of_error(quality) / low) / math.log(high / low)
        ours, theirs = (net.gains(hats(q, 11))[0] for net, q in ((wide, quality), (narrow, same)))
        assert torch.allclose(ours, theirs, rtol=1e-4)
        ours, theirs = (net(x, q, "round")[1] for net, q in ((wide, quality), (narrow, same)))
        assert float(ours.detach()) == pytest.approx(float(theirs), rel=0.01)
    steps = narrow.gains.log_gain.diff(dim=0)[-1] * (math.log(2) / math.log(high / low) * 10)
    assert torch.allclose(wide.gains.log_gain[-1], narrow.gains.log_gain[-1] + steps, atol=1e-4)


def test_average(run: Path, tmp_path: Path) -> None:
    """Of the same weights twice these; of others their weighted mean; of other networks none."""
    one = run / "checkpoint.pt"
    net, values = load_checkpoint(one)
    torch.manual_seed(3)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn_like(weight)
    moved = other.state_dict()
    torch.save({**values, "ema": moved, "step": 77}, tmp_path / "other.pt")
    average([one, tmp_path / "other.pt"], tmp_path / "mean.pt", [3, 1])
    mean, kept = load_checkpoint(tmp_path / "mean.pt")
    assert kept["step"] == 77
    for name, value in mean.state_dict().items():
        assert torch.allclose(value, 0.75 * net.state_dict()[name] + 0.25 * moved[name], atol=1e-6)
    with pytest.raises(errors.InvalidArgument, match="expected 2 positive numbers"):
        average([one, one], tmp_path / "no.pt", [1, 0])
    wide = Hourglass(replace(SHAPE, latent=64))
    torch.save({**values, "shape": wide.shape.as_dict(), "ema": wide.state_dict()}, tmp_path / "wide.pt")
    with pytest.raises(errors.InvalidArgument, match=r"checkpoint\.pt holds another network than .*wide\.pt"):
        average([one, tmp_path / "wide.pt"], tmp_path / "no.pt", [1, 1])
    assert not (tmp_path / "no.pt").exists()


def test_large_weights_are_kept_in_half_the_bytes(tmp_path: Path) -> None:
    """What is kept is what was exported, bit for bit, and next to what was trained; of the prior it is that."""
    net = Hourglass(Shape(trunk=32, latent=64, core=32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kept = halve(net)
    torch.save({"shape": net.shape.as_dict(), "ema": kept}, tmp_path / "kept.pt")
    loaded, _ = load_checkpoint(tmp_path / "kept.pt")
    for name, value in loaded.state_dict().items():
        of_prior = name.startswith("prior.")
        assert (kept[name].dtype == torch.float16) == (value.numel() >= LARGE and not of_prior)
        assert value.dtype == torch.float32
        assert torch.equal(value, net.state_dict()[name])
        assert not of_prior or torch.equal(value, before[name])
        assert torch.allclose(value, before[name], rtol=2**-11, atol=2**-25)
    assert any(value.dtype == torch.float16 for value in kept.values())
    assert any(value.numel() >= LARGE for name, value in before.items() if name.startswith("prior."))


def test_steps_between_blocks_count_where_it_is_smooth() -> None:
    """An error that is the same everywhere has none; blocks that are off by one have four for each pair of neighbours,
    of their means and along their borders; where the picture has detail that counts little."""
    smooth = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64)
    detail = smooth + 0.3 * (torch.arange(64) % 2) - 0.15
    blocks = 0.01 * ((torch.arange(64)[:, None] // 8 + torch.arange(64) // 8) % 2)
    grain = 0.01 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2)
    assert float(loop.uneven(smooth, smooth + 0.1)) < 1e-9
    found = float(loop.uneven(smooth, smooth + blocks))
    assert found == pytest.approx(4 * 0.01**2, rel=0.4)
    assert float(loop.uneven(detail, detail + blocks)) < found / 100
    assert float(loop.uneven(smooth, smooth + grain)) < found / 100


def test_the_encoders_choices() -> None:
    """Symbols that cost more than they are worth go one step towards 0; cheap or large ones stay."""
    level = torch.tensor([6.0, 6.0, 40.0, 6.0])
    assert prior.chosen(torch.tensor([0.51, 0.95, 1.6, 5.51]), level).tolist() == [0, 1, 2, 6]
    assert prior.chosen(torch.tensor([-0.51, -0.95, -1.6, -5.51]), level).tolist() == [0, -1, -2, -6]


def test_the_encoders_choices_of_the_hyper_latent() -> None:
    """As of the latent, by the bits of each channel's own density at the quality's gain; the rate is that of these
    symbols, and both the density and the hyper-latent learn from it."""
    density = FactorisedPrior(2)
    with torch.no_grad():
        density.log_scale[:, 0] = -2.0  # its symbols are nearly all 0, the other channel's are spread out
        density.log_scale[:, 1] = 3.0
    values = torch.tensor([0.6, 0.95, 5.6, -0.6, -0.95]).expand(1, 2, 1, 5)
    chosen = density.chosen(values, torch.ones(1, 2, 1, 1))
    assert chosen[0, :, 0].tolist() == [[0, 1, 6, 0, -1], [1, 1, 6, -1, -1]]

    net = Hourglass(SHAPE)
    y = torch.randn(2, SHAPE.latent, 8, 8)
    quality = torch.tensor([20.0, 70.0])
    _, bits, _ = net.entropy(y, quality, "settle")
    bits.sum().backward()
    with torch.no_grad():
        _, exact, _ = net.entropy(y, quality, "settle")
    assert torch.allclose(bits, exact)
    for learns in (net.hyper_prior.log_scale, net.hyper_analysis.to_quarter.weight):
        assert learns.grad is not None
        assert float(learns.grad.abs().sum()) > 0


def test_gains_that_are_next_to_none_are_bounded(run: Path, tmp_path: Path) -> None:
    """A checkpoint with a gain that no unit of the prior holds is loaded with one that it does; the others stay."""
    net, values = load_checkpoint(run / "checkpoint.pt")
    assert isinstance(net, Hourglass)
    before = [table.clone() for table in (net.gains.log_gain, net.gains.log_inverse)]
    net.gains.log_gain[2, 5], net.gains.log_inverse[2, 5] = -45.0, 44.0
    torch.save({**values, "ema": net.state_dict()}, tmp_path / "fallen.pt")
    loaded, _ = load_checkpoint(tmp_path / "fallen.pt")
    assert isinstance(loaded, Hourglass)
    octaves = float(loaded.gains.log_gain[2, 5]) / math.log(2) + float(net.prior.log_unit[5]) / prior.OCTAVE
    assert octaves == pytest.approx(-59, abs=1e-4)
    assert float(loaded.gains.log_gain[2, 5] + loaded.gains.log_inverse[2, 5]) == pytest.approx(-1, abs=1e-4)
    for table, kept in zip((loaded.gains.log_gain, loaded.gains.log_inverse), before, strict=True):
        changed = (table != kept).nonzero().tolist()
        assert changed == [[2, 5]]


def test_gains_do_not_fall_without_end_in_training() -> None:
    pieces, _ = load_pieces(list_training(IMAGES), 64, CPU).split(2)
    state = loop.fresh(SETTINGS, SHAPE, pieces, CPU)
    assert isinstance(state.net, Hourglass)
    gains = state.net.gains.log_gain
    with torch.no_grad():
        gains[:, 5] = -60.0  # so low that the next step's gradient would be no number
    state.step = SETTINGS.prior_steps
    for _ in range(2):
        loop.step(state, SETTINGS, pieces)
    assert bool((gains >= state.net.least_gain()).all())
    assert gains.grad is not None
    assert float(gains.grad.abs().sum()) > 0  # the second step was not lost


def test_prior_is_a_distribution() -> None:
    net = Hourglass(SHAPE)
    edges = torch.arange(-400.0, 401.0)[None, None, :, None].repeat(1, SHAPE.hyper, 1, 1)
    p = net.hyper_prior.cumulative((edges - 0.5) / 3, (edges + 0.5) / 3)
    assert torch.allclose(p.sum(2), torch.ones(1, SHAPE.hyper, 1), atol=1e-4)
    assert (p >= 0).all()
    for level in range(prior.LADDER):
        scale = 2 ** (prior.LOWEST + level / prior.PER_OCTAVE)
        reach = 10 * math.ceil(scale)
        symbols = torch.arange(-reach, reach + 1).float()
        q = torch.exp2(-prior.bits_of(symbols, torch.tensor(float(level))))
        assert float(q.sum()) == pytest.approx(1, abs=1e-3)
        deviation = float((q * symbols.square()).sum().sqrt())
        assert scale < 1 or deviation == pytest.approx(math.hypot(scale, 1 / math.sqrt(12)), rel=0.02)


def test_every_element_is_coded_once_and_sees_neighbours() -> None:
    x = torch.randn(2, 8, 12, 16)
    parts = prior.split(x)
    assert [part.shape for part in parts] == [(2, 4, 6, 16)] * 4
    assert torch.equal(prior.join(parts), x)
    assert torch.equal(prior.join(parts[:1]), x * (prior.join([torch.ones_like(parts[0])])))
    known = prior.join([torch.ones_like(part) for part in parts[:1]])
    assert (known.sum(3) == 4).all()  # after one step every position knows a quarter of its channels


def test_channels_are_left_out_as_by_the_encoder() -> None:
    """For latents whose last channels hold more and more, the width that the encoder takes, from the least to all."""
    widths, found = (3, 6, 12), set()
    generator = torch.Generator().manual_seed(3)
    for strength in (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2):
        fall = torch.where(torch.arange(12) < 6, strength, strength / 2) * torch.where(torch.arange(12) < 3, 20, 1)
        latents = torch.randn(4, 8, 10, 48, generator=generator) * fall.repeat(4)
        kept = prior.coded(latents, widths)
        assert kept.shape == (4, 1, 1, 48)
        for latent, row in zip(latents, kept[:, 0, 0].reshape(4, 4, 12), strict=True):
            width = widths[_width(latent.permute(2, 0, 1).numpy(), widths)]
            assert torch.equal(row, (torch.arange(12) < width).float().expand(4, 12))
            found.add(width)
    assert found == {3, 6, 12}


def test_means_are_those_of_a_file() -> None:
    """Whole 1/16 of a symbol; a channel that is left out is 0, takes no bits and no later step sees it."""
    torch.manual_seed(2)
    net = Hourglass(SHAPE)
    with torch.no_grad():
        for step in net.prior.steps:
            step.mean.weight.normal_(std=40)
    y = torch.randn(1, SHAPE.latent, 8, 8)
    y[:, :, 0] *= 30
    kept = torch.ones(1, 1, 1, SHAPE.latent)
    kept[..., 5] = kept[..., 40] = 0
    scaled, gain, hyper = y.permute(0, 2, 3, 1), torch.ones(1, 1, 1, SHAPE.latent), torch.randn(1, 2, 2, SHAPE.hyper)
    weights = hats(torch.tensor([30.0]), SHAPE.anchors)
    with torch.no_grad():
        means = [mean for _, _, mean, _ in net.prior.walk(scaled, gain, hyper, weights, "settle")]
        assert float(torch.stack(means).abs().max()) > 0
        assert all(torch.equal(16 * mean, (16 * mean).round()) for mean in means)
        whole, bits = net.prior(scaled, gain, hyper, weights, "settle")
        part, fewer = net.prior(scaled, gain, hyper, weights, "settle", kept)
        scaled = scaled.clone()
        scaled[..., 5] += 7  # what is left out is not looked at
        again, same = net.prior(scaled, gain, hyper, weights, "settle", kept)
    assert not part[..., [5, 40]].any()
    assert whole[..., [5, 40]].any()
    assert float(fewer) < float(bits)
    assert torch.equal(part, again)
    assert torch.equal(fewer, same)


def test_centroids() -> None:
    """A symbol stands for its magnitude less what its level and that say; both have the gradient of that."""
    torch.manual_seed(4)
    net = Hourglass(SHAPE).prior
    assert net.nearer is not None
    with torch.no_grad():
        net.nearer.uniform_(-0.4, 0.4)
    symbols = (3 * torch.randn(2, 5, 7, 8)).round().requires_grad_()
    level = torch.randint(prior.LADDER, symbols.shape).float()
    weight = torch.randn_like(symbols)
    found = net.centred(symbols, level)
    of_table, of_symbols = torch.autograd.grad((found * weight).sum(), (net.nearer, symbols))
    assert torch.equal(of_symbols, weight)
    expected, grad = symbols.detach().clone(), torch.zeros_like(of_table)
    for place in np.ndindex(*symbols.shape):
        symbol, row = int(symbols[place]), int(level[place])
        if symbol:
            column, sign = min(abs(symbol), 3) - 1, np.sign(symbol)
            expected[place] -= sign * round(16 * float(net.nearer[row, column].detach())) / 16
            grad[row, column] -= sign * weight[place]
    assert torch.equal(found, expected)
    assert torch.allclose(of_table, grad, atol=1e-5)


def test_stillness() -> None:
    """By how much less than the mean moves the symbols made of a logistic density move the other way."""
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for level in (0, 6, 12, 20, 40):
        scale = 2 ** (prior.LOWEST + level / prior.PER_OCTAVE) * math.sqrt(3) / math.pi
        rest = scale * torch.logit(uniform)

        def symbol(x: torch.Tensor) -> torch.Tensor:
            return x.sign() * (x.abs() + 1 - prior.BORDER).floor()

        moved = (symbol(rest + 0.01) - symbol(rest - 0.01)).mean() / 0.02
        assert float(prior.stillness()[level]) == pytest.approx(1 - float(moved), abs=0.01)


@pytest.mark.parametrize(("level", "share"), [(0, 0.99), (6, 0.9), (40, 0.0)])
def test_means_learn_from_the_picture_where_symbols_are_0(level: int, share: float) -> None:
    net = Hourglass(SHAPE).prior
    for step in net.steps:
        with torch.no_grad():
            step.scale.weight.zero_()
            step.scale.bias.fill_(prior.LOWEST + level / prior.PER_OCTAVE)
            step.mean.bias.fill_(0.0)
            step.mean.weight.zero_()
    hats, gain = torch.eye(SHAPE.anchors)[:1], torch.ones(1, 1, 1, SHAPE.latent)
    shape = (1, 4, 4, SHAPE.latent)
    y_hat, _ = net(torch.full(shape, 0.1), gain, torch.zeros(1, 1, 1, SHAPE.hyper), hats, "settle")
    y_hat.sum().backward()
    biases = torch.cat([step.mean.bias.grad for step in net.steps])
    assert float(biases.mean()) / 4 == pytest.approx(share, abs=0.02)  # each is added at four positions


def test_a_step_without_a_finite_gradient_is_lost() -> None:
    net = Hourglass(SHAPE)
    for bad in (math.nan, math.inf):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        net.synthesis.from_trunk.bias.grad[3] = bad  # type: ignore[index]
        loop._clip(net, 1.0)
        assert all(not parameter.grad.any() for parameter in net.parameters() if parameter.grad is not None)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    loop._clip(net, 2.0)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None))
    assert norm == pytest.approx(2, rel=1e-3)


def test_rounding_passes_gradients() -> None:
    x = torch.tensor([0.4, 1.6, -7.0], requires_grad=True)
    y = prior.rounded(x, -2, 2)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert y.tolist() == [0, 2, -2]
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


@pytest.fixture(scope="module")
def net(run: Path) -> Hourglass:
    """What the run came to, and centroids, shifts of the scales and a context as a longer one has them."""
    net, _ = load_checkpoint(run / "checkpoint.pt")
    assert isinstance(net, Hourglass)
    assert net.prior.nearer is not None
    assert net.prior.scale_shift is not None
    with torch.no_grad():
        net.prior.nearer.copy_(torch.linspace(0.3, -0.1, net.prior.nearer.numel()).reshape(net.prior.nearer.shape))
        net.prior.scale_shift.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(2))
        assert net.prior.context is not None
        for layer in (net.prior.context.mean, net.prior.context.scale):
            layer.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return net


@pytest.fixture(scope="module")
def zoo(net: Hourglass, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    pieces = load_pieces(list_training(IMAGES), 16, CPU)
    export(net, pieces, "small-1", folder, {"steps": SETTINGS.steps}, [IMAGES / "motocross.png"])
    return folder


def test_exported_model_works(zoo: Path) -> None:
    codec = Codec("small-1", zoo=zoo)
    picture = image.read(IMAGES / "lighthouse.png")
    sizes = []
    for quality in (0, 50, 100):
        data = codec.encode(picture, quality=quality)
        sizes.append(len(data))
        assert metrics.psnr(picture, codec.decode(data)) > 20
    assert sizes == sorted(set(sizes))
    assert [p.name for p in zoo.iterdir()] == ["small-1"]


def test_exported_graphs_are_the_network(net: Hourglass, zoo: Path) -> None:
    """Latents equal but for float rounding, pixels within one grey level, and the rate that the training counted."""
    codec, model = Codec("small-1", zoo=zoo), open_model("small-1", zoo)
    picture = image.read(IMAGES / "motocross.png")[:75, :117]
    padded = np.pad(picture, ((0, 5), (0, 11), (0, 0)), mode="edge")  # whole positions
    x = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        y = F.pad(net.analysis(x), (0, 0, 0, 3), mode="replicate")  # whole ones of the hyper-latent
        found = model.analyse(picture, 0, 0, 117, 75)
        assert np.allclose(found["y"], y[0], atol=1e-4)
        assert np.allclose(found["z"], net.hyper(y)[0], atol=1e-4)

        whole = image.read(IMAGES / "motocross.png")[:128, :128]
        y = net.analysis(torch.from_numpy(whole).permute(2, 0, 1)[None].float() / 255)
        decoded, bits = net.code(y, torch.tensor([70.0]), "round")
    data = codec.encode(whole, quality=70, effort="fast")
    pixels = (decoded[0].permute(1, 2, 0) * 255 + 0.5).floor().numpy()
    difference = abs(codec.decode(data) - pixels)
    assert difference.mean() < 0.3
    assert len(data) * 8 == pytest.approx(float(bits), rel=0.1)


def test_exported_centroids(net: Hourglass, zoo: Path) -> None:
    """What the synthesis gets is mean and symbol, and of that what the network takes off at its level."""
    model = open_model("small-1", zoo)
    picture = np.ascontiguousarray(image.read(IMAGES / "motocross.png")[:128, :192])
    analysed = Analysed(model, picture, model.analyse(picture, 0, 0, 192, 128))
    shift = net.prior.shift()
    assert isinstance(model, Hyperprior)
    assert shift is not None
    seen = set()
    for quality in (40.0, 100.0):
        symbols = quantise(analysed, quality, "default")
        for chosen, part in symbols.parts:
            if part.step is None:
                continue
            assert part.mean is not None
            found = gather(symbols.latent, part.step) - 16 * chosen - part.mean
            assert not found[chosen == 0].any()
            for place in np.argwhere(chosen).tolist():
                at = tuple(place)
                level = model.level_tables.tolist().index(part.tables[at])
                size = min(abs(int(chosen[at])), 3)
                seen.add(size)
                assert found[at] == -np.sign(chosen[at]) * float(shift[level, size - 1])
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("quality", [0.0, 57.21, 100.0])
def test_exported_context(net: Hourglass, zoo: Path, quality: float) -> None:
    """Half of the hyper-latent is coded with the means and at the levels that the network predicts from the other half,
    and the steps get what the two stand for together."""
    model = open_model("small-1", zoo)
    assert isinstance(model, Hyperprior)
    picture = np.ascontiguousarray(image.read(IMAGES / "motocross.png")[:192, :256])
    tensors = model.analyse(picture, 0, 0, 256, 192)
    symbols = quantise(Analysed(model, picture, tensors), quality, "default")
    (first, _), (second, part) = symbols.parts[:2]
    dark = later(3, 4)
    z = symbols.tensors["z"]
    assert np.array_equal(z[:, ~dark], first)
    assert np.array_equal(z[:, dark], second)
    assert part.mean is not None
    with torch.no_grad():
        weights = hats(torch.tensor([quality]), net.shape.anchors)
        gain, _ = net.hyper_gains(weights)
        known = np.where(dark, 0, z) / gain[0].numpy()
        mean, scale = net.prior.context(  # type: ignore[misc]
            torch.from_numpy(np.rint(known * 32)).permute(1, 2, 0)[None].float(), (weights * 32).round()
        )
    per_unit = gain[0].numpy()
    mean = mean[0].permute(2, 0, 1).numpy() * per_unit / 32  # 1/16 symbols, from 1/512 units
    level = 6 * (scale[0].permute(2, 0, 1).numpy() / 256 + np.log2(per_unit) + 3.25)
    level = np.clip(np.rint(level), 0, 63).astype(int)[:, dark]
    assert np.abs(part.mean - mean[:, dark]).max() <= 1 + 0.004 * np.abs(mean).max()  # gains are of 9 bits in a file
    assert (part.tables == model.level_tables[level]).mean() > 0.97
    assert len(np.unique(part.mean)) > 5
    assert len(np.unique(part.tables)) > 2


def test_context_sees_one_colour_only() -> None:
    """What is at the later positions changes nothing that is expected there; what is at the others does."""
    torch.manual_seed(3)
    net = Hourglass(SHAPE)
    context = net.prior.context
    assert context is not None
    for layer in (context.mean, context.scale):
        torch.nn.init.normal_(layer.weight, std=0.1)
    z = torch.randn(1, SHAPE.hyper, 4, 6) * 3
    dark = torch.from_numpy(later(4, 6))
    weights = hats(torch.tensor([40.0]), SHAPE.anchors)

    def expected(z: Tensor) -> Tensor:
        gain = torch.ones(1, 1, 1, SHAPE.hyper)
        scaled = z.permute(0, 2, 3, 1)
        found, _, where = net.prior.hyper(scaled, gain, scaled.round(), weights, "round")
        assert torch.equal(where, dark)
        return (found - found.floor())[:, dark]  # that of the mean: symbols are whole

    same, other = torch.where(dark, z + 5, z), torch.where(dark, z, z + 2)
    assert torch.equal(expected(z), expected(same))
    assert not torch.equal(expected(z), expected(other))


def test_context_is_fitted_at_the_start(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a network without one: it says better what comes than the density that knows no neighbours."""
    monkeypatch.setattr(loop, "fit_context", partial(loop.fit_context, count=300))  # takes a minute otherwise
    values = torch.load(run / "checkpoint.pt", weights_only=True)
    bare = {name: value for name, value in values["ema"].items() if not name.startswith("prior.context.")}
    start = tmp_path / "bare.pt"
    torch.save(values | {"shape": values["shape"] | {"contextual": False}, "ema": bare}, start)
    pieces = load_pieces(list_training(IMAGES), 128, CPU)
    net = loop.fresh(replace(SETTINGS, crop=128), SHAPE, pieces, CPU, start).net
    assert isinstance(net, Hourglass)
    assert torch.equal(net.analysis.to_trunk.weight, bare["analysis.to_trunk.weight"])
    crops = pieces.crops(40, 128, torch.Generator().manual_seed(9)) / 255
    quality = torch.full((len(crops),), 60.0)
    with torch.no_grad():
        z = net.hyper(net.analysis(crops))
        _, bits = net.hyper_entropy(z, hats(quality, SHAPE.anchors), "settle")
        net.prior.context = None
        _, alone = net.hyper_entropy(z, hats(quality, SHAPE.anchors), "settle")
    assert float(bits.sum()) < float(alone.sum())


def test_exported_scales(net: Hourglass, zoo: Path) -> None:
    """Tables are those of the network's levels, with what these have of their own at each quality, step and channel."""
    model = open_model("small-1", zoo)
    picture = np.ascontiguousarray(image.read(IMAGES / "motocross.png")[:128, :192])
    analysed = Analysed(model, picture, model.analyse(picture, 0, 0, 192, 128))
    assert isinstance(model, Hyperprior)
    assert net.prior.scale_shift is not None
    y = torch.from_numpy(analysed.tensors["y"])[None]
    shift = net.prior.scale_shift.clone()
    for quality in (3.0, 57.21, 100.0):
        parts = [part for part in quantise(analysed, quality, "default").parts if part[1].step is not None]
        alike, without = [], []
        for wanted, shifted in ((alike, shift), (without, torch.zeros_like(shift))):
            with torch.no_grad():
                net.prior.scale_shift.copy_(shifted)
                for (_, part), (_, level) in zip(parts, net.symbols(y, torch.tensor([quality])), strict=True):
                    tables = model.level_tables[level[0].permute(2, 0, 1).numpy().astype(int)]
                    kept = len(part.tables) // 4
                    tables = tables.reshape(4, -1, *tables.shape[1:])[:, :kept].reshape(part.tables.shape)
                    coded = part.tables > 0
                    wanted.append((tables == part.tables)[coded].mean())
        net.prior.scale_shift.data.copy_(shift)
        assert min(alike) > 0.95  # a symbol chosen otherwise changes what later steps know
        assert max(without) < 0.6


def test_gradient_graph_is_the_gradient(net: Hourglass, zoo: Path) -> None:
    """The written-out backward pass, against PyTorch's own, both with bytes rounded and clipped as they are decoded."""
    assert [type(part) for part in net.synthesis.fine] == [Filter, BytewiseBlock]
    picture = image.read(IMAGES / "motocross.png")[:64, :128]
    x = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    latent = net.analysis(x / 255).detach().requires_grad_(True)
    error = (net.synthesis(latent, hats(torch.tensor([40.0]), net.shape.anchors)) * 255 - x).square().sum()
    (expected,) = torch.autograd.grad(error, latent)
    value, slope = open_model("small-1", zoo).error_slope(latent[0].detach().numpy(), 40.0, picture)
    assert value == pytest.approx(float(error.detach()), rel=1e-4)
    assert np.allclose(slope, expected[0], rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


def _with_strong_filter(shape: Shape = SHAPE) -> Hourglass:
    """An untrained network whose post-filters change a picture by some grey levels, each in another way."""
    torch.manual_seed(4)
    net = Hourglass(shape)
    with torch.no_grad():
        latent = torch.randn(1, SHAPE.latent, 8, 8)
        net.synthesis.fit_steps(latent)
        deviation = net.synthesis.to_depth(latent).std()
        for layer in (net.synthesis.from_trunk, net.synthesis.from_rest):
            layer.weight *= 0.2 / deviation
        net.synthesis.from_trunk.bias.fill_(0.5)  # type: ignore[union-attr]
        for post in net.synthesis.posts:
            assert isinstance(post, PostFilter)
            post.last.weight.normal_(std=0.3)
            post.log_scale.uniform_(-0.5, 0.5)
    return net.eval()


@pytest.mark.parametrize("shape", [SHAPE, WITHOUT_COARSE])
def test_gradient_passes_the_post_filter(shape: Shape) -> None:
    """As above, for a filter that does much, with edges, clips and the quality between two anchors.

    In double precision: in float32 the order of a CPU's sums decides how some bytes are rounded.
    """
    net = _with_strong_filter(shape).double()
    latent = torch.randn(1, SHAPE.latent, 4, 8).double().requires_grad_(True)
    picture = torch.randint(0, 256, (1, 64, 128, 3), dtype=torch.uint8)
    inside = torch.ones(1, 64, 128, 1, dtype=torch.uint8)
    weights = hats(torch.tensor([37.0]), SHAPE.anchors).double()
    decoded = net.synthesis(latent, weights)
    plain = F.pixel_shuffle(net.synthesis.to_depth(latent), 8)
    assert 3 < 255 * float((decoded - plain).detach().abs().mean()) < 60
    error = (decoded * 255 - picture.permute(0, 3, 1, 2)).square().sum()
    (expected,) = torch.autograd.grad(error, latent)
    with torch.no_grad():
        value, slope = GradientGraph(net)(latent, picture, inside, weights)
    assert float(value) == pytest.approx(float(error.detach()), rel=1e-9)
    assert torch.allclose(slope, expected, rtol=1e-9, atol=float(expected.abs().max()) * 1e-9)


def test_post_filter_sees_no_mean() -> None:
    """Whatever the colour of a picture, the correction is the same: the rounded weights of each colour sum up to 0."""
    post = PostFilter(24, 11)
    with torch.no_grad():
        post.last.weight.normal_(std=0.3)
        integers, factor = post.differences()
        assert factor.shape == (24, 1, 1)
        assert torch.equal(integers, integers.round())
        assert 60 <= float(integers.abs().max()) <= 64
        assert not integers.reshape(24, 3, 36).sum(2).any()
        dark = torch.randint(0, 100, (1, 3, 32, 48)).float()
        weights = hats(torch.tensor([55.0]), 11)
        found = post(dark, weights)
        assert float(found.std()) > 1
        assert torch.equal(found, post(dark + torch.tensor([3.0, 90.0, 155.0])[:, None, None], weights))


@pytest.mark.parametrize(("quality", "shape"), [(8.0, SHAPE), (20.0, SHAPE), (93.0, SHAPE), (50.0, WITHOUT_COARSE)])
def test_decoder_corrects_as_in_training(quality: float, shape: Shape) -> None:
    """decoder.onnx with a filter that does much, whole and parts of it, whose surroundings it sees, against PyTorch."""
    net = _with_strong_filter(shape)
    latent, weights = torch.randn(1, SHAPE.latent, 6, 8), hats(torch.tensor([quality]), SHAPE.anchors)
    with torch.no_grad():
        wanted = (net.synthesis(latent, weights)[0].permute(1, 2, 0) * 255).round().numpy()
    core, rest = (part.numpy() for part in unweave(latent, SHAPE.core))
    session = ort.InferenceSession(decoder(net).SerializeToString(), providers=["CPUExecutionProvider"])

    def decoded(y0: int, y1: int, x0: int, x1: int) -> NDArray[np.float32]:
        ring = rest[:, :, max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
        keep = np.array([y0, y1, x0, x1])
        (pixels,) = session.run(None, {"core": core, "rest": ring, "keep": keep, "quality": weights.numpy()})
        return np.asarray(pixels[0], np.float32)

    whole = decoded(0, 6, 0, 8)
    assert whole.shape == wanted.shape
    assert np.abs(whole - wanted).mean() < 0.3
    for y0, y1, x0, x1 in ((0, 6, 0, 4), (2, 4, 3, 8), (0, 1, 0, 1), (3, 6, 2, 3)):
        part = whole[16 * y0 : 16 * y1, 16 * x0 : 16 * x1]
        assert np.abs(decoded(y0, y1, x0, x1) - part).mean() < 0.01


def test_one_of_the_filters_is_counted(tmp_path: Path) -> None:
    """A picture has one quality, so more filters are no more work."""
    counts = []
    for posts in (1, 5):
        onnx.save(decoder(_with_strong_filter(replace(SHAPE, posts=posts))), tmp_path / "decoder.onnx")
        counts.append(macs_per_pixel(tmp_path / "decoder.onnx"))
    assert sum(counts[0].values()) == sum(counts[1].values())
    hidden = SHAPE.post
    last = sum(count for name, count in counts[1].items() if name.endswith("last"))
    assert last == 2 * 12 * 12 * hidden / 8  # 12 samples of two groups of 4 pixels, from 3x4 groups


def test_post_filter_learns_alone() -> None:
    """`post_steps`: it takes away some of the error, and nothing else changes."""
    settings = replace(SETTINGS, steps=100_000, prior_steps=0, post_steps=100_000, crop=64, rate=3e-3)
    pieces, held_out = load_pieces(list_training(IMAGES), 64, CPU).split(2)
    state = loop.fresh(settings, SHAPE, pieces, CPU)
    x, quality = held_out.pixels.permute(0, 3, 1, 2).float() / 255, torch.tensor([20.0, 60.0])
    before = copy.deepcopy(state.net.state_dict())
    state.step = 200  # behind the warm-up
    first = float(loop.post_loss_of(state.net, x, quality).detach())
    assert first == pytest.approx(1, abs=0.02)  # what is beyond white and black is clipped
    for _ in range(40):
        loop.step(state, settings, pieces)
    assert float(loop.post_loss_of(state.net, x, quality).detach()) < first - 0.01
    changed = {name for name, value in state.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("synthesis.posts.") for name in changed)


def test_bytes_of_a_filter() -> None:
    """What fits is off by half a step at most; what does not is clipped and has no gradient; the step has that of what
    the rounding and the clip do to the value."""
    torch.manual_seed(3)
    log_seen = torch.nn.Parameter(torch.full((4, 1, 1), LEAST_LOG_STEP))
    own, other = Filter(4, log_seen), BytewiseBlock(4, 6, log_seen)
    with torch.no_grad():
        for parameter in (own.project.weight, own.project.bias):
            parameter.normal_()
        x = torch.randn(2, 4, 5, 7)
        exact = own.fit_steps(x)
        assert torch.equal(exact, x + own.project(own.depthwise(x)))
        assert torch.allclose(log_seen.exp().flatten() * 127, x.abs().amax((0, 2, 3)))
        for parameter in (other.project.weight, other.project.bias):
            parameter.normal_()
        wide = x * torch.tensor([2.0, 0.5, 1, 1])[:, None, None]
        of_block = other.fit_steps(wide)  # they share it: it holds both
        assert torch.equal(of_block, wide + other.project(F.silu(other.expand(other.depthwise(wide)))))
        assert 0 < float((other(wide) - of_block).abs().max()) < 0.1 * float((of_block - wide).abs().max())
        expected = x.abs().amax((0, 2, 3)) * torch.tensor([2.0, 1, 1, 1])
        assert torch.allclose(own.log_seen.exp().flatten() * 127, expected)
        assert 0 < float((own(x) - exact).abs().max()) < 0.1 * float((exact - x).abs().max())
    log_step = torch.tensor(math.log(0.01), requires_grad=True)
    values = torch.tensor([-0.701, -0.5062, 0.004, 1.2349, 1.912, 2.5]).reshape(1, 6, 1, 1).requires_grad_(True)
    found = as_bytes(values, log_step, 64)
    assert found.flatten().tolist() == [-64, -51, 0, 123, 191, 191]
    (found * log_step.exp()).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert log_step.grad is not None
    assert torch.allclose(values.grad.flatten(), torch.tensor([0.0, 1, 1, 1, 1, 0]))
    expected_grad = 0.01 * (-64 + (-51 + 50.62) + (0 - 0.4) + (123 - 123.49) + (191 - 191.2) + 191)
    assert float(log_step.grad) == pytest.approx(expected_grad, rel=1e-3)


def test_filters_take_the_place_of_blocks(tmp_path: Path) -> None:
    """From weights with blocks a network with filters starts as what is most like them: the same but for bytes where
    these are linear, and no step is learned anew."""
    torch.manual_seed(5)
    old = Hourglass(replace(SHAPE, filters=()))
    pieces = load_pieces(list_training(IMAGES), 64, CPU)
    generator = torch.Generator().manual_seed(2)
    start_from_pca(old, [piece.permute(2, 0, 1) for piece in pieces.pixels], generator)
    x = pieces.crops(8, 64, generator) / 255
    with torch.no_grad():
        latent = old.analysis(x)
        t = F.pixel_shuffle(old.synthesis.from_latent(old.synthesis.coarse(unweave(latent, 32)[0])), 2)
        for block in old.synthesis.fine:
            assert isinstance(block, BytewiseBlock)
            block.expand.weight *= 0.01  # so small that a SiLU is half of what it gets
            block.project.weight.normal_(std=10)
            for name, value in (("before", 0.01), ("inside", 1e-4), ("active", 1e-4)):
                block.log_steps[name].fill_(math.log(value))
            assert float((block(t) - t).square().mean()) > 0.01 * float(t.square().mean())
    values = {"shape": old.shape.as_dict(), "ema": old.state_dict(), "settings": {}, "step": 0, "seconds": 0.0}
    torch.save(values, tmp_path / "old.pt")
    settings = replace(SETTINGS, prior_steps=0)
    new = loop.fresh(settings, replace(SHAPE, filters=(0,)), pieces, CPU, tmp_path / "old.pt").net
    assert isinstance(new, Hourglass)
    assert [type(part) for part in new.synthesis.fine] == [Filter, BytewiseBlock]
    with torch.no_grad():
        wanted, found = (net.synthesis.core_to_depth(unweave(latent, 32)[0]) for net in (old, new))
        plain = old.synthesis.from_trunk(old.synthesis.overlap(t))
    assert float((found - wanted).square().mean()) < 0.02 * float((plain - wanted).square().mean())


def test_model_id_is_permanent(run: Path, zoo: Path) -> None:
    net, _ = load_checkpoint(run / "checkpoint.pt")
    with pytest.raises(errors.InvalidArgument, match="a model id is permanent"):
        export(net, load_pieces(list_training(IMAGES), 16, CPU), "small-1", zoo, {}, [])


def test_two_processes_are_one_run(tmp_path: Path) -> None:
    """torchrun: each takes half of every batch, one of them logs and saves, and another run goes on from there."""
    small = ["--latent", "32", "--trunk", "16", "--batch", "4", "--crop", "64", "--prior-steps", "1", "--threads", "1"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = ["-m", "hourglass.codec.train", "run", str(IMAGES), "--out", str(tmp_path), *small]
    for steps, how in (("2", two), ("4", [])):
        command = [sys.executable, *how, *own, "--steps", steps]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"step {steps}  loss" in done.stderr + done.stdout
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]


def test_data_errors(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="no pictures in"):
        list_training(tmp_path)
    with pytest.raises(errors.InvalidArgument, match=r"index\.csv"):
        list_training(tmp_path, "free")
    (tmp_path / "index.csv").write_text("file,tier\na.png,free\nb.png,research\n")
    assert list_training(tmp_path, "free") == [tmp_path / "a.png"]
    with pytest.raises(errors.InvalidArgument, match="no picture of at least 4096x4096"):
        load_pieces(list_training(IMAGES), 4096, CPU)
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    with pytest.raises(errors.DataError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "no.pt")


def test_commands(tmp_path: Path) -> None:
    def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hourglass.codec.train", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = python("run", IMAGES, "--out", tmp_path / "run", "--crop", "50")
    assert (done.returncode, done.stderr) == (1, "error: --crop is 50; expected a multiple of 64\n")
    (tmp_path / "empty").mkdir()
    done = python("run", tmp_path / "empty", "--out", tmp_path / "run2")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no pictures in")


@pytest.mark.parametrize("kind", ["deconv", "avgpool", "maxpool"])
def test_classic_networks_train_and_ship(kind: str, tmp_path: Path) -> None:
    """From pictures to a model: a start that is no noise, a step that learns, a grey network out of it, a denoiser."""
    shape = replace(SHAPES[kind], channels=(8, 16, 24), latent=32)
    settings = replace(SETTINGS, steps=12, prior_steps=0)
    loop.train(IMAGES, tmp_path / "colour", settings, shape, None, CPU)
    (row,) = [json.loads(line) for line in (tmp_path / "colour" / "log.jsonl").read_text().splitlines()]
    assert row["held_out"][-1]["psnr"] > 19
    weights = tmp_path / "colour" / "checkpoint.pt"
    grey = replace(shape, colours=1)
    loop.train(IMAGES, tmp_path / "grey", replace(settings, steps=2, noise=20.0), grey, None, CPU, weights)
    net, values = load_checkpoint(tmp_path / "grey" / "checkpoint.pt")
    assert isinstance(net, Classic)
    assert (net.shape, values["settings"]["noise"]) == (grey, 20.0)
    with pytest.raises(errors.InvalidArgument, match="holds a network of shape"):
        loop.train(IMAGES, tmp_path / "wrong", settings, replace(shape, latent=36), None, CPU, weights)
    pieces = load_pieces(list_training(IMAGES), 16, CPU)
    names = {"small-c": "colour", "small-c-grey": "grey"}
    for model, run in names.items():
        own, _ = load_checkpoint(tmp_path / run / "checkpoint.pt")
        twin = "small-c-grey" if run == "colour" else None
        export(own, pieces, model, tmp_path / "zoo", {"steps": 12}, [IMAGES / "motocross.png"], twin)
    codec = Codec("small-c", zoo=tmp_path / "zoo")
    for path, model in ((IMAGES / "motocross.png", "small-c"), (IMAGES / "girl-grey.png", "small-c-grey")):
        data = codec.encode(path, quality=90, fallback=False)
        assert codec.read_header(data).model == model
        assert metrics.psnr(image.load(path).pixels, codec.decode(data)) > 17


def test_sigmoid_start_is_linear() -> None:
    """The stages undo each other, so that a new network, without rounding, gives back its picture, but for what 32
    channels cannot hold."""
    pieces = load_pieces(list_training(IMAGES), 64, CPU)
    pictures = [p[:h, :w].permute(2, 0, 1) for p, (h, w) in zip(pieces.pixels, pieces.sizes.tolist(), strict=True)]
    torch.manual_seed(0)
    net = Classic(replace(SHAPES["deconv"], channels=(12, 48, 128), latent=192))
    random = copy.deepcopy(net)
    start_linear(net, pictures, torch.Generator().manual_seed(0))
    x = pictures[0][None, :, :64, :64].float() / 255
    with torch.no_grad():
        errors_ = [float(squared_error(x, one.synthesis(*one.analysis(x)))) for one in (net, random)]
    assert errors_[0] < 0.002 < 0.01 < errors_[1]
