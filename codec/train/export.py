"""From a checkpoint to a model of the zoo: ONNX graphs, frozen integer tables, a manifest.

Each scale of the prior's ladder has a table: the symbols counted there over training pictures, smoothed by the density
that the training assumed, and then counted again on what the encoder chooses with these tables. The hyper-latent's
tables, and all of a classic model, are static, for each quality (0, 1, ... 100) and channel; these distributions are
replaced by the nearest (Kullback-Leibler) of those that are left of 255. All are frozen as integers with sum 2**16.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hourglass.codec import entropy, errors, exactness, image, metrics
from hourglass.codec.entropy import TOTAL
from hourglass.codec.pipeline import Codec
from hourglass.codec.quantise import Analysed, quantise
from hourglass.codec.runtime import PADDING, STRIDE, Hyperprior, Model, open_model
from hourglass.codec.train import graphs
from hourglass.codec.train.classic import Classic
from hourglass.codec.train.data import Pieces, grey_of
from hourglass.codec.train.decoders import FILTERED
from hourglass.codec.train.loop import Network, network_of, read, shape_of
from hourglass.codec.train.network import FactorisedPrior, Gains, Hourglass, hats
from hourglass.codec.train.prior import LADDER, OCTAVE, bits_of

TILE = 512
"""Pixels a side of a tile, which is coded by itself."""

WHOLE = 768
"""Pixels a side up to which a picture is one tile, for 0.5 to 0.1 % of its bytes; larger tiles of any picture would
take memory and win it less."""

HALO = 2
"""Positions of the latent around a tile that its analysis and synthesis look at; with 0 there are seams of 0.3 dB. To
hourglass-5 one was enough; with bytes in the synthesis one loses 0.02 dB beside borders, 0.05 at quality 90, two
nothing."""

CLASSIC_HALO = 2
"""The same for classic models: all that their convolutions reach."""

LOCATIONS = 16
"""Tables of a location map."""

REACH = 255
"""Largest magnitude that a table may hold; beyond it symbols are escaped."""

SURE_ZERO = 1e-4
"""A channel whose symbols are other than 0 more rarely than this is not coded at that quality."""

LEVEL_ZERO = 1e-3
"""The same for a level of the ladder: what is rarely other than 0 costs more time than it is worth."""

RECOUNTS = 2
"""How often the tables are counted again on what the encoder chooses with those before."""

SMOOTHING = 300.0
"""Weight of the learned density, in symbols, against the counted ones."""

LARGE = 10_000
"""Values of a tensor from which on it is kept in float16."""

MEASURED = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""Qualities at which the manifest states rate and distortion."""

_Floats = NDArray[np.float64]


def load_checkpoint(path: Path) -> tuple[Network, dict[str, Any]]:
    """The averaged network of a checkpoint, on the CPU, its gains bounded, and the checkpoint's other values."""
    try:
        values = read(path)
        net = network_of(shape_of(values["shape"]))
        net.load_state_dict(values["ema"])
    except FileNotFoundError:
        raise
    except Exception as exc:  # torch.load raises whatever the bytes make it stumble over
        raise errors.DataError(f"{path} is no checkpoint of this release: {exc}") from exc
    if isinstance(net, Hourglass):
        net.bound_gains()
    return net.eval().requires_grad_(False), values


def average(paths: Sequence[Path], out: Path, shares: Sequence[float]) -> None:
    """Write the weighted mean of the weights in some files; the other values are those of the last file.

    Of networks that were trained on from the same weights it is often better than each. Raises `InvalidArgument` for
    files of different networks, and shares that are not one positive number for each file.
    """
    if len(shares) != len(paths) or not all(0 < share < math.inf for share in shares):
        raise errors.InvalidArgument(
            f"shares are {[*shares]}; expected {len(paths)} positive numbers, one for each file"
        )
    nets, values = zip(*map(load_checkpoint, paths), strict=True)
    states = [net.state_dict() for net in nets]
    for path, state in zip(paths, states, strict=True):
        if {name: v.shape for name, v in state.items()} != {name: v.shape for name, v in states[-1].items()}:
            raise errors.InvalidArgument(f"{path} holds another network than {paths[-1]}; expected one shape")
    mean = {
        name: sum(share / sum(shares) * state[name] for state, share in zip(states, shares, strict=True))
        for name in states[-1]
    }
    keep(mean, values[-1], out)


def keep(weights: dict[str, Any], values: dict[str, Any], path: Path) -> None:
    """Write weights as a file that `load_checkpoint` takes, with what a checkpoint's values tell of their training."""
    told = {name: values[name] for name in ("shape", "settings", "step", "seconds")}
    torch.save(told | {"ema": weights}, path)


@torch.no_grad()
def halve(net: Network) -> dict[str, Tensor]:
    """Round the large weights of a network to what float16 holds, in place; all of its values, those in float16.

    They take half the bytes then, and the graphs made of them compress. Not those of the prior: where a weight is half
    way between two integers that would choose another one, and its graph holds the integers.
    """
    values: dict[str, Tensor] = net.state_dict()
    large = {name for name, value in values.items() if value.numel() >= LARGE and not name.startswith("prior.")}
    rounded = {name: values[name].half() for name in large}
    for name, value in rounded.items():
        values[name].copy_(value)
    return values | rounded


def export(
    net: Network,
    pieces: Pieces,
    model_id: str,
    zoo: Path,
    training: dict[str, Any],
    measure_on: Iterable[Path],
    grey: str | None = None,
) -> Path:
    """Write model `model_id` into `zoo`, whole or not at all; an id is permanent, so one that exists is refused.

    pieces: pictures to count symbols on. training: facts for the manifest. measure_on: pictures whose real files
    give the manifest's figures. grey: id of the classic model that codes grey pictures in this one's place.
    """
    target = zoo / model_id
    if target.exists():
        raise errors.InvalidArgument(f"model {model_id!r} exists in {zoo}; a model id is permanent: choose a new one")
    zoo.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=zoo, prefix=".new-") as temporary:
        folder = Path(temporary) / model_id
        folder.mkdir()
        if isinstance(net, Classic):
            graphs.write_classic(net, folder)
            numbers, facts = freeze_classic(net, pieces), _classic_facts(net, grey)
        else:
            graphs.write(net, folder, dequantised(net, pieces))
            numbers, facts = freeze(net, pieces), _facts(net, folder)
        np.savez_compressed(folder / "tables.npz", allow_pickle=False, **numbers)
        manifest: dict[str, Any] = {
            "id": model_id,
            "format": 2,
            **facts,
            "code_shape": "each tensor: (channels, ceil(height / stride), ceil(width / stride)) int16",
            "quality": {"lowest": 0, "highest": 100, "step": 0.01},
            "network": net.shape.as_dict(),
            "kmac_per_pixel": graphs.kmacs(folder),
            "training": training,
            "sha256": {},
        }
        for turn in range(RECOUNTS + 1):
            manifest["sha256"] = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.iterdir())
                if path.name != "manifest.json"
            }
            _write_json(manifest, folder / "manifest.json")
            if turn < RECOUNTS:
                numbers |= recount(open_model(model_id, Path(temporary), 1), pieces)
                np.savez_compressed(folder / "tables.npz", allow_pickle=False, **numbers)
        manifest["measured"] = measure(Codec(model_id, zoo=Path(temporary)), list(measure_on))
        _write_json(manifest, folder / "manifest.json")
        shutil.move(folder, target)
    return target


def _facts(net: Hourglass, folder: Path) -> dict[str, Any]:
    """What only the manifest of a hyperprior model says."""
    return {
        "family": "hyperprior",
        "code": [
            {"name": "y", "channels": net.shape.latent, "stride": STRIDE},
            {"name": "z", "channels": net.shape.hyper, "stride": PADDING},
            {"name": "c", "channels": 1, "stride": TILE, "whole": WHOLE},
        ],
        "halo": HALO,
        "edge": STRIDE,
        "lone_rest": True,
        "filtered": max(FILTERED),
        "widths": net.widths,
        "exactness": exactness.bounds((folder / "prior.onnx").read_bytes()),
    }


def _classic_facts(net: Classic, grey: str | None) -> dict[str, Any]:
    """What only the manifest of a classic model says."""
    names = ["y", "l"] if net.shape.kind == "maxpool" else ["y"]
    return {
        "family": "classic",
        "code": [{"name": name, "channels": net.shape.latent, "stride": STRIDE} for name in names],
        "halo": CLASSIC_HALO,
        "side": TILE,
        **({"grey": grey} if grey else {}),
    }


@torch.no_grad()
def dequantised(net: Hourglass, pieces: Pieces, count: int = 450) -> list[tuple[Tensor, Tensor]]:
    """What the synthesis gets, (1, C, h, w) and `hats` (1, anchors) each, of pieces at qualities from everywhere."""
    found = []
    for number in torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).long().tolist():
        height, width = (int(side) // PADDING * PADDING for side in pieces.sizes[number])
        if height and width:
            y = net.analysis(pieces.pixels[number, :height, :width].permute(2, 0, 1)[None].float() / 255)
            quality = torch.tensor([100 * (number * 0.618 % 1)])
            y_hat, _, inverse = net.entropy(y, quality, "settle")
            found.append((y_hat * inverse, hats(quality, net.shape.anchors)))
    return found


@torch.no_grad()
def freeze(net: Hourglass, pieces: Pieces, count: int = 300) -> dict[str, NDArray[Any]]:
    """The arrays of tables.npz: tables and which of them is used where, gains, and the prior's integer units."""
    counts, hyper = _count(net, pieces, count)
    levels = np.stack([_ladder_distribution(row, level) for level, row in enumerate(counts)])
    coded = 1 - levels[:, REACH] >= LEVEL_ZERO
    index, centres = _static(net.hyper_gains, net.hyper_prior, hyper, 255 - int(coded.sum()))
    index[index > 0] += int(coded.sum())
    level_tables = np.zeros(LADDER, np.uint8)
    level_tables[coded] = 1 + np.arange(coded.sum())
    tables = _frozen([_to_integers(distribution) for distribution in [*levels[coded], *centres]])
    log_gain, log_hyper_gain = net.gains.log_gain.numpy(), net.hyper_gains.log_gain.numpy()
    octaves = OCTAVE / np.log(2)
    numbers = tables | {
        "level_tables": level_tables,
        "hyper_tables": index,
        "log_gain": log_gain,
        "log_inverse": net.gains.log_inverse.numpy(),
        "log_hyper_gain": log_hyper_gain,
        "latent_exponent": np.rint(log_gain * octaves + net.prior.log_unit.numpy()).astype(np.int32),
        "hyper_exponent": np.rint(log_hyper_gain * octaves).astype(np.int32),
        "mantissa": np.rint(256 * np.exp2(np.arange(OCTAVE) / OCTAVE)).astype(np.uint16),
    }
    if (shift := net.prior.shift()) is not None:
        numbers["nearer"] = shift.numpy().astype(np.int8)
    if net.prior.scale_shift is not None:
        numbers["scale_shift"] = np.rint(net.prior.scale_shift.numpy() * OCTAVE).astype(np.int16)
    return numbers


@torch.no_grad()
def freeze_classic(net: Classic, pieces: Pieces, count: int = 300) -> dict[str, NDArray[Any]]:
    """`freeze` for a classic model: the latent's tables for each quality, those of its location map, gains."""
    latents, maps = [], []
    for pixels, size in tqdm(list(zip(pieces.pixels[:count], pieces.sizes[:count], strict=True)), desc="analysing"):
        height, width = (int(side) // STRIDE * STRIDE for side in size)
        picture = pixels[:height, :width].permute(2, 0, 1)[None]
        picture = grey_of(picture) if net.shape.colours == 1 else picture
        latent, locations = net.analysis(picture.float() / 255)
        latents.append(latent[0].flatten(1))
        if locations is not None:
            places = torch.arange(4)[:, None, None]
            maps.append(((locations[0].flatten(1) == places) & (latents[-1].abs() > 0.5)).sum(2).T)
    index, centres = _static(net.gains, net.prior, torch.cat(latents, 1).sort(1).values, 255 - LOCATIONS)
    entries = [_to_integers(distribution) for distribution in centres]
    numbers = {
        "symbol_tables": index,
        "log_gain": net.gains.log_gain.numpy(),
        "log_inverse": net.gains.log_inverse.numpy(),
    }
    if maps:
        counts = torch.stack(maps).sum(0).double().numpy() + 1
        which, places_ = _share(counts / counts.sum(1, keepdims=True), LOCATIONS)
        numbers["location_tables"] = (which + len(entries)).astype(np.uint8)
        entries += [(0, _whole(np.append(place, 1 / TOTAL))) for place in places_]
    return _frozen(entries) | numbers


def _static(gains: Gains, prior: FactorisedPrior, values: Tensor, count: int) -> tuple[NDArray[np.uint8], _Floats]:
    """Tables that depend on quality and channel alone: which, (101, C), 0 for sure zeros, and their distributions.

    values: (C, N) before the gain, each row sorted. count: of distributions, at most.
    """
    rows = np.concatenate(
        [_distribution(gains, prior, values, quality) for quality in tqdm(range(101), desc="counting")]
    )
    sure = 1 - rows[:, REACH] < SURE_ZERO
    index = np.zeros(len(rows), np.uint8)
    index[~sure], centres = _share(rows[~sure], count)
    return index.reshape(101, -1), centres


def _frozen(tables: list[tuple[int, NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """Tables, first symbol and frequencies each, as `entropy.Tables` has them, behind table 0, the sure zero."""
    entries = [np.array([TOTAL]), *(frequencies for _, frequencies in tables)]
    return {
        "first": np.array([0, *(first for first, _ in tables)], np.int32),
        "start": np.cumsum([0, *map(len, entries)]).astype(np.int32),
        "frequencies": np.concatenate(entries).astype(np.uint32),
    }


@torch.no_grad()
def _count(net: Hourglass, pieces: Pieces, count: int) -> tuple[_Floats, Tensor]:
    """How often each symbol -REACH..REACH, or one beyond, comes at each level, (LADDER, 2 REACH + 2); and the
    hyper-latent's values (Z, N), each row sorted."""
    counts = torch.zeros(LADDER * (2 * REACH + 2), dtype=torch.int64)
    hyper = []
    generator = torch.Generator().manual_seed(1)
    for pixels, size in tqdm(list(zip(pieces.pixels[:count], pieces.sizes[:count], strict=True)), desc="analysing"):
        height, width = (int(side) // PADDING * PADDING for side in size)
        if not height or not width:
            continue
        y = net.analysis(pixels[:height, :width].permute(2, 0, 1)[None].float() / 255)
        hyper.append(net.hyper(y)[0].flatten(1))
        qualities = 100 * (torch.arange(4) + torch.rand(4, generator=generator)) / 4
        for symbols, level in net.symbols(y.expand(4, -1, -1, -1), qualities):
            entry = torch.where(symbols.abs() > REACH, REACH + 1, symbols) + REACH
            places = level.long() * (2 * REACH + 2) + entry.long()
            counts += torch.bincount(places.flatten(), minlength=len(counts))
    if not hyper:
        raise errors.InvalidArgument(f"no picture of {PADDING}x{PADDING} pixels or more to count symbols on")
    return counts.reshape(LADDER, -1).double().numpy(), torch.cat(hyper, 1).sort(1).values


def _ladder_distribution(counts: _Floats, level: int) -> _Floats:
    """The distribution of symbols at one level: counted, symmetric, smoothed by the density of the training."""
    symbols = torch.arange(-REACH, REACH + 1).float()
    smooth = torch.exp2(-bits_of(symbols, torch.full_like(symbols, level))).double().numpy()
    smooth = np.append(smooth, max(0.0, 1 - smooth.sum()))
    inside = (counts[:-1] + counts[-2::-1]) / 2
    both = np.append(inside, counts[-1])
    total: _Floats = (both + SMOOTHING * smooth) / (both.sum() + SMOOTHING)
    return total


def _distribution(gains: Gains, prior: FactorisedPrior, values: Tensor, quality: int) -> _Floats:
    """P(symbol = -REACH..REACH, and beyond) for each channel: (C, 2 REACH + 2). values: (C, N), each row sorted."""
    gain, _ = gains(hats(torch.tensor([float(quality)]), len(gains.log_gain)))
    gain = gain.reshape(-1, 1)
    edges = (torch.arange(-REACH, REACH + 2) - 0.5) / gain  # (C, 2 REACH + 2)
    counts = torch.searchsorted(values, edges).diff(dim=1).double()
    smooth = prior.cumulative(edges[:, :-1, None], edges[:, 1:, None])[..., 0].double()
    inside = (counts + SMOOTHING * smooth) / (values.shape[1] + SMOOTHING)
    beyond = (1 - inside.sum(1, keepdim=True)).clamp(min=0)
    return np.asarray(torch.cat([inside, beyond], 1))


def recount(model: Model, pieces: Pieces, count: int = 300) -> dict[str, NDArray[Any]]:
    """The frequencies of a model's tables, counted again on the symbols that its encoder chooses with them."""
    tables = model.tables
    counts = [np.zeros(len(tables.frequencies_of(table))) for table in range(len(tables))]
    generator = np.random.default_rng(1)
    pictures = list(zip(pieces.pixels[:count].numpy(), pieces.sizes[:count].tolist(), strict=True))
    for pixels, (height, width) in tqdm(pictures, desc="recounting"):
        picture = np.ascontiguousarray(pixels[:height, :width])
        picture = _grey(picture) if model.colours == 1 else picture
        analysed = Analysed(model, picture, model.analyse(picture, 0, 0, width, height))
        for part in range(4):
            quality = round(float(25 * (part + generator.random())), 2)
            for symbols, coded in quantise(analysed, quality, "default").parts:
                for table, counted in entropy.count(symbols, coded.tables, tables):
                    counts[table] += counted
    ladder = set(model.level_tables.tolist()) if isinstance(model, Hyperprior) else set()
    frequencies = []
    for table, total in enumerate(counts):
        if len(total) > 1:
            if table in ladder:  # symmetric
                total[:-1] = (total[:-1] + total[-2::-1]) / 2
            smooth = tables.frequencies_of(table) / TOTAL
            entries = _whole((total + SMOOTHING * smooth) / (total.sum() + SMOOTHING))
            frequencies.append(entries.astype(np.uint32))
        else:
            frequencies.append(tables.frequencies_of(table))
    return {"frequencies": np.concatenate(frequencies)}


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (H, W): the luma."""
    return np.asarray(grey_of(torch.from_numpy(pixels).permute(2, 0, 1))[0])


def _share(distributions: _Floats, count: int) -> tuple[NDArray[np.intp], _Floats]:
    """k-means under Kullback-Leibler divergence: for each row its centre's number from 1, and the centres."""
    entropy = -(distributions * np.log(distributions + 1e-12)).sum(1)
    order = np.argsort(entropy)
    nearest = np.empty(len(order), np.intp)
    nearest[order] = np.arange(len(order)) * count // max(len(order), 1)
    for _ in tqdm(range(25), desc="sharing tables"):
        sums = np.zeros((count, distributions.shape[1]))
        np.add.at(sums, nearest, distributions)
        used = np.bincount(nearest, minlength=count) > 0
        centres = sums[used] / np.bincount(nearest, minlength=count)[used, None]
        logs = np.log(centres + 1e-9).astype(np.float32)
        nearest = (distributions.astype(np.float32) @ -logs.T).argmin(1)
        count = len(centres)
    excess = -(distributions * np.log(centres[nearest] + 1e-12)).sum() / entropy.sum() - 1
    print(f"{len(distributions)} distributions share {count} tables: {excess:+.2%} rate")
    return nearest + 1, centres


def _to_integers(distribution: _Floats) -> tuple[int, NDArray[np.int64]]:
    """First symbol and frequencies (escape last), positive with sum TOTAL, without the rare ends."""
    kept = np.flatnonzero(distribution[:-1] * TOTAL >= 0.25)
    low, high = int(kept[0]), int(kept[-1])
    probabilities = distribution[low : high + 1]
    escape = max(1 - probabilities.sum(), 1 / TOTAL)
    return low - REACH, _whole(np.append(probabilities, escape))


def _whole(probabilities: _Floats) -> NDArray[np.int64]:
    """Positive integers with sum TOTAL."""
    entries: NDArray[np.int64] = np.maximum(1, np.rint(probabilities * TOTAL)).astype(np.int64)
    entries[entries.argmax()] += TOTAL - entries.sum()
    return entries


def measure(codec: Codec, pictures: list[Path]) -> list[dict[str, float]]:
    """Mean bpp of real files and mean PSNR, MS-SSIM of 8-bit pictures, one row for each of `MEASURED`.

    For a model of grey pictures these are made grey first.
    """
    rows = []
    grey = next(model for model in codec.models() if model.id == codec.model).manifest["network"].get("colours") == 1
    for quality in tqdm(MEASURED, desc="measuring"):
        bpp, psnr, ms_ssim = [], [], []
        for path in pictures:
            pixels = _grey(image.read(path)) if grey else image.read(path)
            data = codec.encode(pixels, quality=quality, fallback=False)
            decoded = codec.decode(data)
            bpp.append(metrics.bpp(len(data), pixels.shape[1], pixels.shape[0]))
            psnr.append(metrics.psnr(pixels, decoded))
            ms_ssim.append(metrics.ms_ssim(pixels, decoded))
        means = {"bpp": np.mean(bpp), "psnr": np.mean(psnr), "ms_ssim": np.mean(ms_ssim)}
        rows.append({"quality": float(quality)} | {name: round(float(value), 4) for name, value in means.items()})
    return rows


def _write_json(value: Any, path: Path) -> None:
    """Indented, with each list of numbers on one line."""
    text = json.dumps(value, indent=2)
    path.write_text(re.sub(r"\[[-\d.,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
