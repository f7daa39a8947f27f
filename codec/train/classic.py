"""The classic models: wide, narrow, wide again, the decoder the mirror of the encoder in reverse order.

    x (B, colours, H, W) in [0, 1]
      -> the logit, which mirrors the sigmoid
      -> four stages, each half the resolution and, but for the last, a PReLU           analysis
      = latent y (B, latent, H/16, W/16), with a location map for `maxpool`
      -> y * gain(quality) -> round = symbols, of which each channel has its static density
      -> symbols * inverse_gain(quality)
      -> four stages, each twice the resolution, a PReLU between them, at the end the sigmoid      synthesis
      = x_hat (B, colours, H, W) in (0, 1)

    kind      a stage of the analysis                    its mirror
    deconv    convolution with stride 2                  deconvolution
    avgpool   convolution, average pooling               average unpooling, convolution
    maxpool   as deconv, the last: convolution,          max unpooling, convolution
              max pooling

Max pooling stands at the narrow end only: a location map costs two bits for each value that is not 0, and further out
there are several values for each pixel of the picture. A value that is 0 needs no place.

Autoencoders by strided and transposed convolutions with a learned rate: Ballé, Laparra and Simoncelli, "End-to-end
optimized image compression" (2017). PReLU: He et al., "Delving deep into rectifiers" (2015); it starts as the identity
here, so that a new network is a linear transform, fitted stage by stage (`start_linear`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec.errors import InvalidArgument
from hourglass.codec.train.blocks import (
    AveragePooling,
    AverageUnpooling,
    Convolution,
    Deconvolution,
    MaxPooling,
    MaxUnpooling,
    insert_zeros,
)
from hourglass.codec.train.network import FactorisedPrior, Gains, crops_of, hats, principal
from hourglass.codec.train.prior import Mode, rounded

Kind: TypeAlias = Literal["deconv", "avgpool", "maxpool"]

MAP_BITS = 2.0
"""Bits of a location in a patch of 2x2."""


MARGIN = 0.03
"""How far 0 and 1 are drawn in before the logit."""


@dataclass(frozen=True)
class ClassicShape:
    """Sizes of a classic network; stored in checkpoints and in the manifest."""

    kind: Kind = "deconv"
    colours: int = 3  # 3, or 1 for a network of grey pictures
    channels: tuple[int, int, int] = (16, 48, 128)  # at 1/2, 1/4 and 1/8 resolution
    latent: int = 192  # channels of the code at 1/16 resolution
    kernels: tuple[int, int, int, int] = (5, 3, 3, 3)  # of the stages' convolutions, from the picture to the code
    anchors: int = 11  # qualities at which gains are learned, evenly from 0 to 100
    lambda_low: float = 0.0006  # weight of the squared error (0..255 scale) against bits per pixel at quality 0
    lambda_high: float = 0.03  # the same at quality 100; between them log-linear

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidArgument(f"kind is {self.kind!r}; expected one of {', '.join(get_args(Kind))}")
        if self.colours not in (1, 3):
            raise InvalidArgument(f"colours is {self.colours}; expected 1 or 3")
        if self.latent < 4 or self.latent % 4:
            raise InvalidArgument(f"latent is {self.latent}; expected a multiple of 4")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ClassicShape:
        return ClassicShape(**(values | {name: tuple(values[name]) for name in ("channels", "kernels")}))


SHAPES = {
    "deconv": ClassicShape(),
    "avgpool": ClassicShape("avgpool", channels=(12, 32, 64), latent=160, kernels=(3, 3, 3, 3), lambda_high=0.01),
    "maxpool": ClassicShape("maxpool", channels=(16, 48, 96), latent=128, lambda_high=0.006),
}
"""The shipped models' shapes: 2.5 to 3.3 thousand multiplications a pixel each way. A convolution before a pooling step
sees four times as many positions as one with a stride, so these have fewer channels. What pooling throws away no number
of bits brings back, so the highest quality of these is lower."""


def logit(x: Tensor) -> Tensor:
    """The inverse of the sigmoid, of a picture in [0, 1] drawn in a little so that it stays finite: in +-3.5."""
    return torch.logit(x * (1 - 2 * MARGIN) + MARGIN)


class Narrowing(nn.Module):
    """One stage of the analysis: (B, C, H, W) -> (B, D, H/2, W/2), and the location map of max pooling, or None."""

    def __init__(self, kind: Kind, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.kind = kind
        self.convolution = Convolution(channels, out, kernel, 2 if kind == "deconv" else 1)
        self.pooling = {"deconv": None, "avgpool": AveragePooling(), "maxpool": MaxPooling()}[kind]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.convolution(x)
        if self.kind == "maxpool":
            assert self.pooling is not None
            values, locations = self.pooling(x)
            return values, locations
        return (x if self.pooling is None else self.pooling(x)), None


class Widening(nn.Module):
    """The mirror of `Narrowing`: (B, D, H, W) -> (B, C, 2 H, 2 W), with the location map where that has one."""

    def __init__(self, kind: Kind, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.kind = kind
        self.unpooling = {"deconv": None, "avgpool": AverageUnpooling(), "maxpool": MaxUnpooling()}[kind]
        convolution = (
            Deconvolution(channels, out, kernel, 2) if kind == "deconv" else Convolution(channels, out, kernel)
        )
        self.convolution: Convolution | Deconvolution = convolution

    def unpooled(self, y: Tensor, locations: Tensor | None) -> Tensor:
        """What the stage's convolution gets; for a deconvolution the values with zeros between them."""
        if self.unpooling is None:
            return insert_zeros(y, 2, after=1)
        spread: Tensor = self.unpooling(y) if locations is None else self.unpooling(y, locations)
        return spread

    def forward(self, y: Tensor, locations: Tensor | None) -> Tensor:
        x: Tensor = self.convolution(y if self.kind == "deconv" else self.unpooled(y, locations))
        return x


def _kinds(shape: ClassicShape) -> list[Kind]:
    """The kind of each stage, from the picture to the code."""
    return ["deconv", "deconv", "deconv", "maxpool"] if shape.kind == "maxpool" else [shape.kind] * 4


class ClassicAnalysis(nn.Module):
    """x (B, colours, H, W) in [0, 1], H and W multiples of 16 -> y (B, latent, H/16, W/16) and its location map."""

    def __init__(self, shape: ClassicShape) -> None:
        super().__init__()
        sizes = [shape.colours, *shape.channels, shape.latent]
        self.stages = nn.ModuleList(
            Narrowing(kind, channels, out, kernel)
            for kind, channels, out, kernel in zip(_kinds(shape), sizes[:-1], sizes[1:], shape.kernels, strict=True)
        )
        self.bends = nn.ModuleList(nn.PReLU(size, init=1.0) for size in sizes[1:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        locations, x = None, logit(x)
        for number, stage in enumerate(self.stages):
            x, locations = stage(x)
            if number < len(self.bends):
                x = self.bends[number](x)
        return x, locations


class ClassicSynthesis(nn.Module):
    """y_hat (B, latent, h, w) and its location map -> x_hat (B, colours, 16 h, 16 w) in (0, 1)."""

    def __init__(self, shape: ClassicShape) -> None:
        super().__init__()
        sizes = [shape.colours, *shape.channels, shape.latent][::-1]
        self.stages = nn.ModuleList(
            Widening(kind, channels, out, kernel)
            for kind, channels, out, kernel in zip(
                _kinds(shape)[::-1], sizes[:-1], sizes[1:], shape.kernels[::-1], strict=True
            )
        )
        self.bends = nn.ModuleList(nn.PReLU(size, init=1.0) for size in sizes[1:-1])

    def forward(self, y: Tensor, locations: Tensor | None) -> Tensor:
        for number, stage in enumerate(self.stages):
            y = stage(y, locations if number == 0 else None)
            if number < len(self.bends):
                y = self.bends[number](y)
        return torch.sigmoid(y.float())


class Classic(nn.Module):
    """The trained whole: `analysis`, `gains`, `prior`, `synthesis`."""

    smooth = 0.0

    def __init__(self, shape: ClassicShape | None = None) -> None:
        super().__init__()
        self.shape = shape or ClassicShape()
        self.analysis = ClassicAnalysis(self.shape)
        self.gains = Gains(self.shape.anchors, self.shape.latent)
        self.prior = FactorisedPrior(self.shape.latent)
        self.synthesis = ClassicSynthesis(self.shape)

    def weight_of_error(self, quality: Tensor) -> Tensor:
        """lambda(quality): bits per pixel that one unit of squared error (0..255 scale) is worth."""
        low, high = math.log(self.shape.lambda_low), math.log(self.shape.lambda_high)
        return torch.exp(low + (high - low) * quality / 100)

    def forward(self, x: Tensor, quality: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """One training pass: (B, colours, H, W), (B,) -> x_hat of the same shape and ideal bits (B,) of each picture.

        The picture is that of rounded symbols; their bits are those of uniform noise in place of rounding, but for
        mode "round" and outside training.
        """
        y, locations = self.analysis(x)
        gain, inverse = self.gains(hats(quality, self.shape.anchors))
        with torch.autocast(x.device.type, enabled=False):
            scaled = y.float() * gain
            symbols = rounded(scaled)
            exact = mode == "round" or not torch.is_grad_enabled()
            counted = symbols if exact else scaled + torch.rand_like(scaled) - 0.5
            bits = self.prior.bits(counted, gain)
            if locations is not None:
                bits = bits + MAP_BITS * counted.abs().clamp(max=1)
        x_hat = self.synthesis(symbols * inverse, locations)
        return x_hat, bits.sum((1, 2, 3))


@torch.no_grad()
def start_linear(net: Classic, pictures: list[Tensor], generator: torch.Generator) -> None:
    """Make `net` a linear transform codec of its training pictures, in place, but for the sigmoid and max pooling.

    pictures: (colours, H, W) uint8 each. Each stage of the analysis, outermost first, gets the reduced-rank regression
    of 2x2 neighbourhoods on what its convolution sees: for a convolution with a stride their leading principal
    components. Each stage of the synthesis gets the least squares fit to what the stage that it mirrors was given.
    """
    x = crops_of(pictures, 64, 240, generator).float() / 255
    given: list[tuple[Tensor, Tensor | None]] = [(logit(x), None)]
    unit = torch.ones(x.shape[1])
    for stage in net.analysis.stages:
        unit = _fit_narrowing(stage, given[-1][0], unit)  # type: ignore[arg-type]
        given.append(stage(given[-1][0]))
    wanted = [value for value, _ in given[:-1]]
    for stage, (value, locations), target in zip(net.synthesis.stages, given[:0:-1], wanted[::-1], strict=True):
        _fit_widening(stage, value, locations, target)  # type: ignore[arg-type]
    _start_gains(net, *given[-1])


def _fit_narrowing(stage: Narrowing, x: Tensor, unit: Tensor) -> Tensor:
    """unit (C,): what one of each channel of x is worth in the picture; returns that of the stage's output."""
    convolution = stage.convolution
    kernel, stride = convolution.kernel_size[0], convolution.stride[0]
    seen = F.unfold(x, kernel, padding=kernel // 2, stride=stride)
    seen = seen.reshape(*seen.shape[:2], x.shape[2] // stride, x.shape[3] // stride)
    if stage.kind != "deconv":
        seen = F.avg_pool2d(seen, 2)
    rows, wanted = (_rows(value) for value in (seen, F.pixel_unshuffle(x * unit[:, None, None], 2)))
    middle = rows.mean(0)
    rows, wanted = rows - middle, wanted - wanted.mean(0)
    regression = _least_squares(rows, wanted)
    count = len(convolution.weight)
    if stage.kind == "maxpool":  # the larger of a component's ends wins: half of the channels are negatives
        basis, deviation = principal((rows @ regression), count // 2)
        basis, deviation = torch.cat([basis, -basis], 1), deviation.repeat(2)
    else:
        basis, deviation = principal((rows @ regression), min(count, wanted.shape[1]))
    # Divided by the roots of their deviations, strong and weak channels are within reach of one learning rate.
    scale = deviation.clamp(min=1e-3).sqrt()
    matrix = (regression @ basis).T / scale[:, None]
    known = len(matrix)
    convolution.weight.mul_(0.1)  # of channels that linear ones leave nothing to
    convolution.weight[:known] = matrix.reshape(known, *convolution.weight.shape[1:]).float()
    assert convolution.bias is not None
    convolution.bias.zero_()
    convolution.bias[:known] = -(matrix @ middle).float()
    return torch.cat([scale, torch.zeros(count - known)])


def _fit_widening(stage: Widening, y: Tensor, locations: Tensor | None, wanted: Tensor) -> None:
    """Least squares of `wanted` on what the stage's convolution sees."""
    convolution = stage.convolution
    kernel = convolution.kernel_size[0]
    count = max(8, min(len(y), 60_000 // wanted[0, 0].numel()))
    locations = None if locations is None else locations[:count]
    rows = _rows(F.unfold(stage.unpooled(y[:count], locations), kernel, padding=kernel // 2))
    targets = _rows(wanted[:count])
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    solved = _least_squares(rows, targets).float().T
    weight, bias = solved[:, :-1].reshape(len(solved), -1, kernel, kernel), solved[:, -1]
    if stage.kind == "deconv":  # which turns its kernel by 180 degrees
        weight = weight.flip(2, 3).transpose(0, 1)
    convolution.weight.copy_(weight)
    assert convolution.bias is not None
    convolution.bias.copy_(bias)


def _start_gains(net: Classic, y: Tensor, locations: Tensor | None) -> None:
    """Steps of each channel by how far one unit of it moves the picture, the same for white noise at every quality;
    densities as wide as the channels are."""
    shape = net.shape
    middle = y.mean((0, 2, 3))
    base = middle[None, :, None, None].expand(shape.latent, -1, 4, 4).clone()
    moved, size = base.clone(), y.std((0, 2, 3)).clamp(min=1e-3)
    moved[torch.arange(shape.latent), torch.arange(shape.latent), 1, 1] += size
    places = None if locations is None else torch.zeros(base.shape, dtype=torch.long)
    change = net.synthesis(moved, places) - net.synthesis(base, places)
    scale = (change.square().sum((1, 2, 3)).sqrt() / size).clamp(min=1e-4)
    quality = torch.linspace(0, 100, shape.anchors)
    step = (net.weight_of_error(quality) * 255**2 / 20 * 3 / shape.colours).rsqrt()[:, None]
    net.gains.log_gain.copy_((scale / step).log())
    net.gains.log_inverse.copy_((step / scale).log())
    net.prior.log_scale.add_(size.log())
    net.prior.mean.copy_(middle.expand_as(net.prior.mean))


def _rows(maps: Tensor) -> Tensor:
    """(B, C, h, w) or (B, C, n) -> (B h w, C)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def _least_squares(rows: Tensor, wanted: Tensor) -> Tensor:
    """The matrix M with the least |rows M - wanted|^2, slightly damped."""
    squares, products = (rows.T @ rows).double(), (rows.T @ wanted).double()
    squares += torch.eye(len(squares)) * (squares.diagonal().mean() * 1e-5)
    solved: Tensor = torch.linalg.solve(squares, products)
    return solved.float()
