"""The training loop: rate + lambda(quality) * squared error, all qualities at once, resumable at any step.

First the prior alone learns on the latents of the start, which are computed once; then all learn together. The
classic models, whose prior has no network, learn all together from the start. Started
by `torchrun --nproc-per-node N`, N processes share each batch: on a CPU two processes of one thread each are faster
than one of two, and do not stall when another program takes a core.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from tqdm import tqdm

from hourglass.codec import errors
from hourglass.codec.runtime import STRIDE
from hourglass.codec.train.blocks import squared_error
from hourglass.codec.train.classic import Classic, ClassicShape, start_linear
from hourglass.codec.train.data import PIECE, Pieces, grey_of, list_training, load_pieces
from hourglass.codec.train.network import (
    Hourglass,
    Shape,
    from_lambdas,
    hats,
    present,
    start_from_pca,
    start_prior,
    start_rest,
)
from hourglass.codec.train.prior import Mode

Network: TypeAlias = "Hourglass | Classic"
AnyShape: TypeAlias = "Shape | ClassicShape"

SMOOTHED = 80
"""Quality from which on `uneven` does not count."""

ACTIVITY = 40.0
"""Mean square of the gradient, in grey levels for each pixel, at which an area counts a quarter in `uneven`."""

_OF_ITSELF = (
    "log_seen",
    "log_before",
    "log_steps.before",
    "log_steps.inside",
    "log_steps.active",
    "prior.nearer",
    "prior.scale_shift",
)
"""Ends of the names of weights that need neither principal components nor latents to start from."""

_CONTEXT = "prior.context."
"""Begin of the names of the weights of the context for the hyper-latent."""

_OF_CONTEXT = 2000
"""Crops that it learns from at first."""

_TO_FIT = 64
"""Crops that the steps of the synthesis' bytes are chosen for at first."""

QUALITIES = (0, 25, 50, 75, 100)
"""Qualities at which the held-out pictures are measured."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, beside the pictures and the network's shape."""

    steps: int = 45_000
    batch: int = 8  # crops in a step
    crop: int = 128  # pixels a side
    prior_steps: int = 4000  # steps at the beginning that train the prior alone
    post_steps: int = 0  # steps after these that train the post-filter alone, if there is one
    rate: float = 1.5e-3  # learning rate at its peak; 200 steps of warm-up, then cosine decay to 1/100
    ema: float = 0.9995  # decay of the averaged weights, which are the ones measured and shipped
    clip: float = 1.0  # largest norm of the gradient
    settle: float = 0.2  # last part of the run that sees the symbols that the encoder will choose
    precise: float = 0.03  # last part of the run in float32; before it bfloat16 where mixed precision is safe
    varied: float = 0.3  # share of crops that are made smaller, and share that are made more colourful
    noise: float = 0.0  # denoising: Gaussian noise on what goes in, of up to so many grey levels; the target is clean
    held_out: int = 16  # pieces kept apart to measure
    seed: int = 1


@dataclass
class State:
    """A run at one step: what a checkpoint holds."""

    net: Network
    ema: Network
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    latents: Pieces | None  # of the start, for the steps that train the prior alone
    side: int  # of their crops
    loss: Callable[[Network, Tensor, Tensor, Mode, float], Tensor]  # `loss_of`, or what the compiler made of it
    step: int = 0
    seconds: float = 0.0


def network_of(shape: AnyShape) -> Network:
    """A new network of a shape."""
    return Classic(shape) if isinstance(shape, ClassicShape) else Hourglass(shape)


def shape_of(values: dict[str, Any]) -> AnyShape:
    """The shape that a checkpoint holds."""
    return ClassicShape.from_dict(values) if "kind" in values else Shape.from_dict(values)


def loss_of(net: Network, x: Tensor, quality: Tensor, mode: Mode = "noise", noise: float = 0.0) -> Tensor:
    """Mean loss of pictures (B, C, H, W) at qualities (B,): bpp + lambda * squared error on the 0..255 scale.

    Each picture's loss is divided by sqrt(lambda), about its rate: so that one per cent of rate weighs the same
    at every quality, as it does in a BD-rate, and the high qualities do not drown the low ones.

    At low qualities what `uneven` finds counts too: the eye sees it in smooth areas, where the squared error is small.

    noise: largest deviation, in grey levels, of the noise that the network gets on its picture and is to leave out.
    """
    disturbed = x
    if noise:
        deviation = torch.rand(len(x), 1, 1, 1, device=x.device) * (noise / 255)
        disturbed = (x + torch.randn_like(x) * deviation).clamp(0, 1)
    x_hat, bits = net(disturbed, quality, mode)
    bpp = bits / (x.shape[2] * x.shape[3])
    error = squared_error(x, x_hat.float())
    if net.smooth:
        share = (1 - quality / SMOOTHED).clamp(min=0)
        error = error + net.smooth * share * uneven(x, x_hat.float())
    error = error * 255**2
    weight = net.weight_of_error(quality)
    loss: Tensor = ((bpp + weight * error) * (weight / 0.01).rsqrt()).mean()
    return loss


def uneven(x: Tensor, x_hat: Tensor) -> Tensor:
    """How much the error of x_hat (B, C, H, W) steps from one 8x8 block to the next where x is smooth: (B,).

    Two squared steps for each pair of neighbours: of the means of the blocks, and, along the border between them, of
    the means of the samples on either side; each counts as much as the less smooth of the two is smooth.
    """
    error = x_hat - x
    mean = F.avg_pool2d(error, 8)
    slope = x.detach().mean(1, keepdim=True)
    across, down = (
        F.pad(step.square(), pad)
        for step, pad in ((slope.diff(dim=3), (0, 1, 0, 0)), (slope.diff(dim=2), (0, 0, 0, 1)))
    )
    smooth = (1 + F.avg_pool2d(across + down, 8) * (255**2 / ACTIVITY)).square().reciprocal()
    total = x.new_zeros(len(x))
    for axis in (2, 3):
        pairs = mean.shape[axis] - 1
        weight = torch.minimum(smooth.narrow(axis, 0, pairs), smooth.narrow(axis, 1, pairs))
        kernel = (1, 8) if axis == 2 else (8, 1)
        lines = F.avg_pool2d(error, kernel)  # means along the borders of blocks
        places = torch.arange(8, error.shape[axis], 8, device=x.device)
        border = lines.index_select(axis, places) - lines.index_select(axis, places - 1)
        total = total + (weight * (mean.diff(dim=axis).square() + border.square())).mean((1, 2, 3))
    return total


def rate_of(net: Hourglass, y: Tensor, quality: Tensor, mode: Mode = "noise") -> Tensor:
    """The rate's part of `loss_of` for latents (B, latent, h, w), of which only the prior learns."""
    _, bits, _ = net.entropy(y, quality, mode, frozen=True)
    bpp = bits / (y.shape[2] * y.shape[3] * STRIDE**2)
    return (bpp * (net.weight_of_error(quality) / 0.01).rsqrt()).mean()


def post_loss_of(net: Hourglass, x: Tensor, quality: Tensor) -> Tensor:
    """Squared error of pictures (B, 3, H, W) that are decoded from the encoder's choices, as a part of what it is
    without the post-filter, which alone learns."""
    weights = hats(quality, net.shape.anchors)
    with torch.no_grad():
        y_hat, _, inverse = net.entropy(net.analysis(x), quality, "settle")
        decoded = F.pixel_shuffle(net.synthesis.to_depth(y_hat * inverse), 8).float()
        before = squared_error(x, decoded)
    return (squared_error(x, net.synthesis.corrected(decoded, weights)) / before.clamp(min=0.5 / 255**2)).mean()


def learning_rate(settings: Settings, step: int) -> float:
    if step < 200:
        return settings.rate * (step + 1) / 200
    done = (step - 200) / max(1, settings.steps - 200)
    return settings.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(
    folder: Path,
    out: Path,
    settings: Settings,
    shape: AnyShape,
    tier: str | None,
    device: torch.device,
    start: Path | None = None,
    compiled: bool = False,
) -> None:
    """Train in folder `out`, from its checkpoint where there is one, and leave a checkpoint and log.jsonl there.

    start: a file of weights; those that fit replace the start from principal components. compiled: fuse the step's
    small operations by torch.compile, which takes minutes and a C++ compiler first.
    """
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    out.mkdir(parents=True, exist_ok=True)
    paths = list_training(folder, tier)
    pieces, held_out = load_pieces(paths, settings.crop, device).split(settings.held_out)
    if not len(pieces) or not len(held_out):
        raise errors.InvalidArgument(
            f"{len(pieces)} pieces to train on, {len(held_out)} of {PIECE}x{PIECE} pixels to hold out; both are needed"
        )
    checkpoint = out / "checkpoint.pt"
    state = fresh(settings, shape, pieces, device, start)
    if compiled:
        state.loss = torch.compile(loss_of)
    if checkpoint.exists():
        _load(state, checkpoint)
    if _rank() == 0:
        print(f"{len(paths)} pictures, {len(pieces)} pieces + {len(held_out)} held out; step {state.step} on {device}")
    run(state, settings, pieces, held_out, out)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def fresh(
    settings: Settings, shape: AnyShape, pieces: Pieces, device: torch.device, start: Path | None = None
) -> State:
    """A run at step 0: the PCA start of these pieces, or the weights in `start`, and their latents to learn from."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    net = network_of(shape)
    pictures = [
        piece[:height, :width].permute(2, 0, 1)
        for piece, (height, width) in zip(pieces.pixels.cpu(), pieces.sizes.tolist(), strict=True)
    ]
    latents, side = None, settings.crop
    if isinstance(net, Classic):
        if start:
            start_classic(net, start)
        else:
            start_linear(net, [grey_of(p) if net.shape.colours == 1 else p for p in pictures], generator)
        net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        taken = (
            _start_from(net, start) | _filters_from(net, start, pieces, settings.crop, generator) if start else set()
        )
        missing = net.state_dict().keys() - taken
        whole = all(name.endswith(_OF_ITSELF) or name.startswith(("synthesis.posts.", _CONTEXT)) for name in missing)
        if not whole:
            start_from_pca(net, pictures, generator)
            if start:
                _start_from(net, start)
            if not {"analysis.to_rest.weight", "synthesis.from_rest.weight"} <= taken:
                start_rest(net, pictures, generator)
        net = net.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Context reaches further than a transform: where there are pieces for it, the prior learns on larger crops.
        side = 2 * settings.crop if (pieces.sizes >= 2 * settings.crop).all(1).any() else settings.crop
        if not whole or settings.prior_steps:
            latents = latents_of(net, pieces, side)
        if latents and not whole:
            start_prior(net, latents.pixels)
            if start:
                _start_from(net, start)  # also what the latents would give
        if "synthesis.fine.0.log_seen" not in taken:
            net.synthesis.fit_steps(_dequantised(net, pieces.crops(_TO_FIT, settings.crop, generator) / 255))
        if start and any(name.startswith(_CONTEXT) for name in missing):
            fit_context(net, pieces, settings.crop, generator)
        side //= STRIDE
    torch.manual_seed(settings.seed + _rank())  # each process has noise of its own
    ema = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.Adam(net.parameters(), lr=settings.rate, fused=True)
    return State(net, ema, optimiser, generator, latents, side, loss_of)


@torch.no_grad()
def _dequantised(net: Hourglass, x: Tensor) -> Tensor:
    """What the synthesis gets of pictures (B, 3, H, W), at qualities from 0 to 100."""
    quality = torch.linspace(0, 100, len(x), device=x.device)
    y_hat, _, inverse = net.entropy(net.analysis(x), quality, "settle")
    return y_hat * inverse


def fit_context(
    net: Hourglass, pieces: Pieces, crop: int, generator: torch.Generator, count: int = _OF_CONTEXT
) -> None:
    """Train the context for the hyper-latent alone, in place, on what a network that has learned makes of some crops.

    A picture has few positions of the hyper-latent: with all the rest it would learn too slowly. count: of crops; it
    takes twice as many steps.
    """
    context = net.prior.context
    assert context is not None
    with torch.no_grad():
        crops = (pieces.crops(1, crop, generator) for _ in tqdm(range(count), desc="hyper-latents"))
        z = torch.cat([net.hyper(net.analysis(x / 255)) for x in crops])
        context.scale.bias.copy_(z.std((0, 2, 3)).clamp(min=1e-4).log2())
    optimiser = torch.optim.Adam(context.parameters(), lr=2e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 2 * count)
    for number in tqdm(range(2 * count), desc="context"):
        some = torch.randint(len(z), (32,), generator=generator)
        quality = 100 * torch.rand(32, generator=generator).to(z.device)
        mode: Mode = "noise" if number < count else "settle"
        _, bits = net.hyper_entropy(z[some.to(z.device)], hats(quality, net.shape.anchors), mode)
        bits.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        falling.step()
        net.zero_grad()


def _filters_from(net: Hourglass, path: Path, pieces: Pieces, crop: int, generator: torch.Generator) -> set[str]:
    """Where a network has filters and a file blocks in their place, fit them to these; the names of the weights."""
    values = read(path)
    other = network_of(shape_of(values["shape"]))
    if not isinstance(other, Hourglass) or not net.shape.filters or other.shape.filters:
        return set()
    other.load_state_dict(values["ema"])
    x = pieces.crops(_TO_FIT, crop, generator).cpu() / 255
    net.synthesis.fit_filters(other.synthesis, _dequantised(other, x))
    return {f"synthesis.fine.{name}" for name in net.synthesis.fine.state_dict()}


def read(path: Path) -> dict[str, Any]:
    """What a file of weights or a checkpoint holds, on the CPU, its averaged weights by the names of today."""
    values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return values | {"ema": present(values["ema"])}


def start_classic(net: Classic, path: Path) -> None:
    """Take the weights of a file, in place; a grey network those of a colour one, as if its picture were coloured.

    Raises `InvalidArgument` for a file of another shape.
    """
    values = read(path)
    shape, weights = shape_of(values["shape"]), {name: value.float() for name, value in values["ema"].items()}
    first, last = "analysis.stages.0.convolution.weight", "synthesis.stages.3.convolution."
    if isinstance(shape, ClassicShape) and shape.colours == 3 and net.shape.colours == 1:
        weights[first] = weights[first].sum(1, keepdim=True)
        axis = 1 if shape.kind != "avgpool" else 0  # transposed convolutions have the output second
        weights[last + "weight"] = weights[last + "weight"].mean(axis, keepdim=True)
        weights[last + "bias"] = weights[last + "bias"].mean(0, keepdim=True)
        shape = replace(shape, colours=1)
    if shape != net.shape:
        raise errors.InvalidArgument(f"{path} holds a network of shape {values['shape']}; asked for {net.shape}")
    net.load_state_dict(weights)


def _start_from(net: Hourglass, path: Path) -> set[str]:
    """Take the weights of a file that fit; of a narrower latent its core, as the first channels of each quarter; of
    narrower blocks of the synthesis and of narrower post-filters what they have.

    The others keep their start; inputs that the file's layers did not have begin with zero weights. Returns the names
    of those taken.
    """
    values = read(path)
    _at_lambdas(values, net.shape)
    own, weights, narrow = net.state_dict(), dict(values["ema"]), values["shape"]["latent"]
    old_shape = Shape.from_dict(values["shape"])
    of_post = re.compile(r"(synthesis\.posts\.)(\d+)(\..*)")
    for found in filter(None, map(of_post.fullmatch, own if old_shape.post else ())):
        number = int(found[2]) * old_shape.posts // net.shape.posts  # the one of the same qualities
        weights[found[0]] = values["ema"][found[1] + str(number) + found[3]]
    hidden = {
        "synthesis.fine.": (old_shape.synthesis_hidden[0], net.shape.synthesis_hidden[0]),
        "synthesis.posts.": (old_shape.post, net.shape.post),
    }
    wider, core = net.shape.latent - narrow, values["shape"].get("core", narrow)
    source, places = (torch.arange(n).reshape(4, -1)[:, : core // 4].flatten() for n in (narrow, net.shape.latent))
    taken = {}
    for name in own.keys() & weights.keys():
        value, target = weights[name], own[name].cpu().clone()
        if value.shape == target.shape:
            taken[name] = value.float()
            continue
        taken_from, index, fits = [], [], value.dim() == target.dim()
        for old, new in zip(value.shape, target.shape, strict=False):
            broader = any(name.startswith(part) and (old, new) == sizes for part, sizes in hidden.items() if old < new)
            grown = new > old >= narrow and not broader
            fits = fits and (new == old or broader or (grown and new - old == wider))
            before = torch.arange(old - narrow if grown else old)
            taken_from.append(torch.cat([before, len(before) + source]) if grown else before)
            index.append(torch.cat([before, len(before) + places]) if grown else before)
        if fits:
            if value.dim() > 1 and target.shape[1] > value.shape[1] and not name.startswith("gains."):
                target[index[0]] = 0
            target[torch.meshgrid(*index, indexing="ij")] = value[torch.meshgrid(*taken_from, indexing="ij")].float()
            taken[name] = target
    net.load_state_dict(taken, strict=False)
    print(f"{len(taken)} of {len(own)} tensors start from {path}")
    return {*taken}


def _at_lambdas(values: dict[str, Any], shape: Shape) -> None:
    """Change the weights of a file that belong to qualities, in place, to what they are for the lambdas of `shape`."""
    weights, old = values["ema"], Shape.from_dict(values["shape"])
    if (old.lambda_low, old.lambda_high) == (shape.lambda_low, shape.lambda_high):
        return
    moved = from_lambdas(old, shape)
    for name in weights:
        if re.search(r"gains\.log_(gain|inverse)$|^synthesis\.posts\.\d+\.log_(scale|gain)$", name):
            weights[name] = moved @ weights[name].float()
    if (wide := weights.get("prior.widen.weight")) is not None:
        of_quality = wide[:, -moved.shape[1] :].float() @ moved.T
        weights["prior.widen.weight"] = torch.cat([wide[:, : -moved.shape[1]].float(), of_quality], 1)


@torch.no_grad()
def latents_of(net: Hourglass, pieces: Pieces, smallest: int) -> Pieces:
    """The latents (N, h, w, latent) float16, in the place of pixels, of the pieces of `smallest` pixels a side."""
    large = (pieces.sizes >= smallest).all(1)
    latents = []
    for batch in pieces.pixels[large].split(8):  # type: ignore[no-untyped-call]
        x = batch.permute(0, 3, 1, 2).float() / 255
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda or _has_fast_bfloat16()):
            latents.append(net.analysis(x).permute(0, 2, 3, 1).half())
    return Pieces(torch.cat(latents), pieces.sizes[large] // STRIDE)


def run(state: State, settings: Settings, pieces: Pieces, held_out: Pieces, out: Path) -> None:
    """Go on from `state` to the last step, with progress on the terminal, a log and checkpoints in `out`."""
    shown = _rank() == 0
    bar = tqdm(
        total=settings.steps, initial=state.step, unit="step", mininterval=1, dynamic_ncols=True, disable=not shown
    )
    started = saved = time.monotonic()
    base, first = state.seconds, state.step
    # Since the last row, summed on the device: to look at it at every step would make a GPU wait for the CPU.
    losses, counted = torch.zeros((), device=pieces.pixels.device), 0
    while state.step < settings.steps:
        losses += step(state, settings, pieces)
        counted += 1
        now = time.monotonic()
        state.seconds = base + now - started
        bar.update()
        last = state.step == settings.steps
        if shown and (state.step % 1000 == 0 or last):
            row = {
                "step": state.step,
                "seconds": round(state.seconds),
                "loss": round(float(losses) / counted, 4),
                "steps_per_second": round((state.step - first) / (now - started), 2),
                "held_out": measure(state.ema, held_out),
            }
            losses.zero_()
            counted = 0
            _report(row, settings, out)
        if shown and (last or now - saved > 300):
            _save(state, settings, out / "checkpoint.pt")
            saved = now
    bar.close()


def is_mixed(settings: Settings, step: int) -> bool:
    """Whether a step works in bfloat16 where that is safe; the last part of a run does not."""
    return step < settings.steps * (1 - settings.precise)


@cache
def _has_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for it; without them a convolution takes ten times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mode_of(settings: Settings, step: int) -> Mode:
    return "settle" if step >= settings.steps * (1 - settings.settle) else "noise"


def step(state: State, settings: Settings, pieces: Pieces) -> Tensor:
    """One step of the optimiser and of the averaged weights; the loss."""
    device = pieces.pixels.device
    for group in state.optimiser.param_groups:
        group["lr"] = learning_rate(settings, state.step)
    latents = state.latents if state.step < settings.prior_steps else None
    own = slice(_rank(), None, _world())
    if latents is not None:
        crops = latents.crops(settings.batch, state.side, state.generator, own, mirror=False)
    elif settings.varied:
        crops = pieces.varied(settings.batch, settings.crop, state.generator, own, settings.varied)
    else:
        crops = pieces.crops(settings.batch, settings.crop, state.generator, own)
    if isinstance(state.net, Classic) and state.net.shape.colours == 1:
        crops = grey_of(crops)
    crops = crops.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(settings.batch, generator=state.generator)
    part = torch.rand(settings.batch, generator=state.generator)
    quality = ((order + part) * (100 / settings.batch))[own].to(device)  # of 8 crops one from each eighth of the range
    mixed = is_mixed(settings, state.step) and (device.type != "cpu" or _has_fast_bfloat16())
    mode = mode_of(settings, state.step)
    context: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext()
    with context:
        if latents is not None and isinstance(state.net, Hourglass):
            loss = rate_of(state.net, crops, quality, mode)
        elif isinstance(state.net, Hourglass) and state.step < settings.prior_steps + settings.post_steps:
            loss = post_loss_of(state.net, crops / 255, quality)
        else:
            loss = state.loss(state.net, crops / 255, quality, mode, settings.noise)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    _share_gradients(state.net)
    _clip(state.net, settings.clip)
    state.optimiser.step()
    if isinstance(state.net, Hourglass):
        _hold_gains(state.net)
    _average(state, settings)
    state.step += 1
    return loss.detach()


def _share_gradients(net: Network) -> None:
    """Mean of the gradients over all processes, in one exchange."""
    if _world() == 1:
        return
    if isinstance(net, Hourglass) and any(p.grad is not None for p in net.synthesis.posts.parameters()):
        for parameter in net.synthesis.posts.parameters():
            if parameter.grad is None:  # no crop of this process has a quality of this filter
                parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= _world()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):  # type: ignore[no-untyped-call]
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def _clip(net: Network, largest: float) -> None:
    """Scale the gradients to a norm of at most `largest`; where one is not finite, all become 0 and the step is lost.

    All on the device: to look at the norm would make a GPU wait.
    """
    lost = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(net.parameters(), largest))
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.masked_fill_(lost, 0)


@torch.no_grad()
def _hold_gains(net: Hourglass) -> None:
    """The gain of a channel that a quality does not use goes on falling, until its gradient is no number any more."""
    net.gains.log_gain.clamp_(min=net.least_gain())


@torch.no_grad()
def _average(state: State, settings: Settings) -> None:
    decay = min(settings.ema, (1 + state.step) / (10 + state.step))
    averaged, current = ([p.detach() for p in net.parameters()] for net in (state.ema, state.net))
    torch._foreach_lerp_(averaged, current, 1 - decay)


@torch.no_grad()
def measure(net: Network, held_out: Pieces) -> list[dict[str, float]]:
    """Ideal bpp and PSNR with the symbols chosen, 8-bit pictures, one row for each of `QUALITIES`."""
    x = held_out.pixels.permute(0, 3, 1, 2).float() / 255
    if isinstance(net, Classic) and net.shape.colours == 1:
        x = grey_of(x)
    rows = []
    for quality in QUALITIES:
        x_hat, bits = net(x, torch.full((len(x),), float(quality), device=x.device), "settle")
        x_hat = (x_hat * 255).round() / 255
        mse = F.mse_loss(x_hat, x, reduction="none").mean((1, 2, 3))
        psnr = float((-10 * torch.log10(mse)).mean())
        bpp = float(bits.sum()) / x[:, 0].numel()
        rows.append({"quality": quality, "bpp": round(bpp, 4), "psnr": round(psnr, 3)})
    return rows


def _report(row: dict[str, Any], settings: Settings, out: Path) -> None:
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
    left = (settings.steps - row["step"]) / row["steps_per_second"]
    curve = "  ".join(f"{r['bpp']:.3f}→{r['psnr']:.2f}" for r in row["held_out"])
    tqdm.write(
        f"step {row['step']}  loss {row['loss']:.4f}  {curve}  "
        f"{row['steps_per_second']:.1f} steps/s  {left / 60:.0f} min left"
    )


def _save(state: State, settings: Settings, path: Path) -> None:
    """Write a checkpoint to a temporary file and rename it: a run that is killed leaves the last whole one."""
    values = {
        "shape": state.net.shape.as_dict(),
        "settings": asdict(settings),
        "step": state.step,
        "seconds": state.seconds,
        "net": state.net.state_dict(),
        "ema": state.ema.state_dict(),
        "optimiser": state.optimiser.state_dict(),
        "generator": state.generator.get_state(),
        "noise": torch.get_rng_state(),
        "noise_cuda": torch.cuda.get_rng_state_all(),  # empty without CUDA
    }
    temporary = path.with_suffix(".tmp")
    torch.save(values, temporary)
    temporary.replace(path)


def _load(state: State, path: Path) -> None:
    values = torch.load(path, map_location="cpu", weights_only=True)
    if shape_of(values["shape"]) != state.net.shape:
        raise errors.InvalidArgument(
            f"{path} holds a network of shape {values['shape']}, asked for {state.net.shape.as_dict()}; "
            "give the same shape or another --out folder"
        )
    state.net.load_state_dict(values["net"])
    state.ema.load_state_dict(values["ema"])
    state.optimiser.load_state_dict(values["optimiser"])
    state.generator.set_state(values["generator"])
    if _rank():
        torch.manual_seed(hash((_rank(), values["step"])))
    else:
        torch.set_rng_state(values["noise"])
    if len(values["noise_cuda"]) == torch.cuda.device_count():  # else the run moved to another kind of machine
        torch.cuda.set_rng_state_all(values["noise_cuda"])
    state.step, state.seconds = values["step"], values["seconds"]
