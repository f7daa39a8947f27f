"""From a checkpoint to a model of the zoo: two ONNX graphs, frozen integer tables, a manifest.

The factorised prior's tables are static: for each quality (0, 1, ... 100) and channel the distribution of its
symbols, counted over training pictures and smoothed by the learned density; then all 101 x latent distributions
are replaced by the nearest (Kullback-Leibler) of at most 255 shared ones, frozen as integers with sum 2**16.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from tqdm import tqdm

from hourglass.codec import errors, image, metrics
from hourglass.codec.entropy import TOTAL, Tables
from hourglass.codec.pipeline import Codec
from hourglass.codec.train.data import Pieces
from hourglass.codec.train.network import STRIDE, Hourglass, Shape

REACH = 255
"""Largest magnitude that a table may hold; beyond it symbols are escaped."""

SURE_ZERO = 1e-4
"""A channel whose symbols are other than 0 more rarely than this is not coded at that quality."""

SMOOTHING = 300.0
"""Weight of the learned density, in symbols, against the counted ones."""

MEASURED = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""Qualities at which the manifest states rate and distortion."""

_Floats = NDArray[np.float64]


class EncoderGraph(nn.Module):
    """image (1, H, W, 3) uint8, H and W multiples of 16 -> latent (1, C, H/16, W/16) float32."""

    def __init__(self, net: Hourglass) -> None:
        super().__init__()
        self.analysis = copy.deepcopy(net.analysis)
        with torch.no_grad():
            self.analysis.to_trunk.weight /= 255  # samples stay 0..255: one pass over the picture less

    def forward(self, image: Tensor) -> Tensor:
        _, height, width, _ = image.shape
        d = image.reshape(1, height // 8, 8, width // 8, 8, 3).permute(0, 5, 2, 4, 1, 3)
        return self.analysis.from_depth(d.reshape(1, 192, height // 8, width // 8).float())


class DecoderGraph(nn.Module):
    """latent (1, C, h, w) float32 -> image (1, 16 h, 16 w, 3) uint8."""

    def __init__(self, net: Hourglass) -> None:
        super().__init__()
        self.synthesis = copy.deepcopy(net.synthesis)
        last = self.synthesis.from_trunk
        with torch.no_grad():
            last.weight *= 255
            assert last.bias is not None
            last.bias.mul_(255).add_(0.5)  # the cast below truncates

    def forward(self, latent: Tensor) -> Tensor:
        d = self.synthesis.to_depth(latent).clamp(0, 255).to(torch.uint8)
        _, _, h, w = d.shape
        return d.reshape(1, 3, 8, 8, h, w).permute(0, 4, 2, 5, 3, 1).reshape(1, 8 * h, 8 * w, 3)


def load_checkpoint(path: Path) -> tuple[Hourglass, dict[str, Any]]:
    """The averaged network of a checkpoint, on the CPU, and the checkpoint's other values."""
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        net = Hourglass(Shape.from_dict(values["shape"]))
        net.load_state_dict(values["ema"])
    except FileNotFoundError:
        raise
    except Exception as exc:  # torch.load raises whatever the bytes make it stumble over
        raise errors.DataError(f"{path} is no checkpoint of this release: {exc}") from exc
    return net.eval().requires_grad_(False), values


def export(
    net: Hourglass, pieces: Pieces, model_id: str, zoo: Path, training: dict[str, Any], measure_on: Iterable[Path]
) -> Path:
    """Write model `model_id` into `zoo`, whole or not at all; an id is permanent, so one that exists is refused.

    pieces: pictures to count symbols on. training: facts for the manifest. measure_on: pictures whose real files
    give the manifest's figures.
    """
    target = zoo / model_id
    if target.exists():
        raise errors.InvalidArgument(f"model {model_id!r} exists in {zoo}; a model id is permanent: choose a new one")
    zoo.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=zoo, prefix=".new-") as temporary:
        folder = Path(temporary) / model_id
        folder.mkdir()
        write_graphs(net, folder)
        np.savez_compressed(folder / "tables.npz", allow_pickle=False, **freeze(net, pieces))
        manifest: dict[str, Any] = {
            "id": model_id,
            "code": {"name": "y", "channels": net.shape.latent, "stride": STRIDE},
            "code_shape": "y: (channels, ceil(height / stride), ceil(width / stride)) int16",
            "quality": {"lowest": 0, "highest": 100, "step": 0.01},
            "network": net.shape.as_dict(),
            "training": training,
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())},
        }
        _write_json(manifest, folder / "manifest.json")
        manifest["measured"] = measure(Codec(model_id, zoo=Path(temporary)), list(measure_on))
        _write_json(manifest, folder / "manifest.json")
        shutil.move(folder, target)
    return target


def write_graphs(net: Hourglass, folder: Path) -> None:
    """encoder.onnx and decoder.onnx, for pictures of any size."""
    latent = net.shape.latent
    with warnings.catch_warnings():
        # torch is pinned; its newer exporter needs a further package and cannot keep H and W free here.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        for name, graph, sample, names, axes in (
            ("encoder", EncoderGraph(net), torch.zeros(1, 64, 96, 3, dtype=torch.uint8), ("image", "latent"), (1, 2)),
            ("decoder", DecoderGraph(net), torch.zeros(1, latent, 4, 6), ("latent", "image"), (2, 3)),
        ):
            torch.onnx.export(
                graph.eval(),
                (sample,),
                str(folder / f"{name}.onnx"),
                input_names=[names[0]],
                output_names=[names[1]],
                dynamic_axes={names[0]: {axes[0]: "height", axes[1]: "width"}},
                opset_version=18,
                dynamo=False,
            )


@torch.no_grad()
def freeze(net: Hourglass, pieces: Pieces, count: int = 300) -> dict[str, NDArray[Any]]:
    """The arrays of tables.npz: tables, their index by quality and channel, and the logarithms of the gains."""
    latents = []
    for pixels, size in tqdm(list(zip(pieces.pixels[:count], pieces.sizes[:count], strict=True)), desc="analysing"):
        height, width = (int(side) // STRIDE * STRIDE for side in size)
        x = pixels[:height, :width].permute(2, 0, 1)[None].float() / 255
        latents.append(net.analysis(x)[0].flatten(1))
    y = torch.cat(latents, 1).sort(1).values  # (C, N)
    distributions = np.concatenate([_distribution(net, y, quality) for quality in tqdm(range(101), desc="counting")])
    sure = 1 - distributions[:, REACH] < SURE_ZERO
    index = np.zeros(len(distributions), np.uint8)
    index[~sure], centres = _share(distributions[~sure], 255)
    first, start, frequencies = [0], [0, 1], [np.array([TOTAL])]  # table 0 is the sure zero
    for centre in centres:
        low, entries = _to_integers(centre)
        first.append(low)
        frequencies.append(entries)
        start.append(start[-1] + len(entries))
    tables = Tables(np.array(first, np.int32), np.array(start, np.int32), np.concatenate(frequencies).astype(np.uint32))
    return {
        "first": tables.first,
        "start": tables.start,
        "frequencies": tables.frequencies,
        "index": index.reshape(101, -1),
        "log_gain": net.gains.log_gain.numpy(),
        "log_inverse": net.gains.log_inverse.numpy(),
    }


def _distribution(net: Hourglass, y: Tensor, quality: int) -> _Floats:
    """P(symbol = -REACH..REACH, and beyond) for each channel: (C, 2 REACH + 2). y: (C, N), each row sorted."""
    gain, _ = net.gains(torch.tensor([float(quality)]))
    gain = gain.reshape(-1, 1)
    edges = (torch.arange(-REACH, REACH + 2) - 0.5) / gain  # (C, 2 REACH + 2)
    counts = torch.searchsorted(y, edges).diff(dim=1).double()
    smooth = net.prior.cumulative(edges[:, :-1, None], edges[:, 1:, None])[..., 0].double()
    inside = (counts + SMOOTHING * smooth) / (y.shape[1] + SMOOTHING)
    beyond = (1 - inside.sum(1, keepdim=True)).clamp(min=0)
    return np.asarray(torch.cat([inside, beyond], 1))


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
    entries = np.maximum(1, np.rint(np.append(probabilities, escape) * TOTAL)).astype(np.int64)
    entries[entries.argmax()] += TOTAL - entries.sum()
    return low - REACH, entries


def measure(codec: Codec, pictures: list[Path]) -> list[dict[str, float]]:
    """Mean bpp of real files and mean PSNR, MS-SSIM of 8-bit pictures, one row for each of `MEASURED`."""
    rows = []
    for quality in tqdm(MEASURED, desc="measuring"):
        bpp, psnr, ms_ssim = [], [], []
        for path in pictures:
            pixels = image.read(path)
            data = codec.encode(pixels, quality=quality)
            decoded = codec.decode(data)
            bpp.append(metrics.bpp(len(data), pixels.shape[1], pixels.shape[0]))
            psnr.append(metrics.psnr(pixels, decoded))
            ms_ssim.append(metrics.ms_ssim(pixels, decoded))
        means = {"bpp": np.mean(bpp), "psnr": np.mean(psnr), "ms_ssim": np.mean(ms_ssim)}
        rows.append({"quality": float(quality)} | {name: round(float(value), 4) for name, value in means.items()})
    return rows


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
