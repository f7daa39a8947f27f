"""The hourglass autoencoder: analysis and synthesis transform, per-quality gains, factorised prior.

    x (B, 3, H, W) in [0, 1]
      -> space-to-depth 8 -> 1x1 -> residual blocks          1/8 resolution, `trunk` channels
      -> 2x2 stride 2 -> residual blocks                     1/16 resolution, `core` channels
      with `latent - core` channels of 16x16 pixels beside them = latent y
      -> y * gain(quality) -> round = symbols                (B, latent, H/16, W/16)
      -> symbols * inverse_gain(quality) -> blocks -> depth-to-space 2
      -> blocks -> depthwise 3x3 -> 1x1 -> depth-to-space 8, and the other channels -> depth-to-space 16
      -> sum -> clip = x_hat                                 (B, 3, H, W) in [0, 1]

The core's width bounds the quality that it can reach; the other channels, a linear transform of its residue, go on
from there. At ordinary qualities they are all zero and cost nothing.

Every layer works at 1/8 or 1/16 resolution, where a convolution is a plain matrix product and a CPU is fast.
The symbols follow the papers: y = g_a(x), x_hat = g_s(y_hat) (Ballé, Laparra, Simoncelli, "End-to-end optimized
image compression", 2017). Gains per quality: Cui et al., "Asymmetric gained deep image compression", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec.errors import InvalidArgument
from hourglass.codec.quantise import HYPER_WORTH
from hourglass.codec.train.prior import BYTE_WEIGHT, OCTAVE, WEIGHT, Mode, Prior, coded, rounded, settled

LEAST_UNIT = -59
"""Octaves of the smallest unit that a channel's symbols may have; below -60 a model is refused when it is loaded."""

LEAST_LOG_STEP = -20.0
"""Where the steps of bytes begin that only become larger."""

ZERO = 128
"""The byte that stands for 0, but for `BytewiseBlock.zeros` and inside of `PostFilter`."""

LUMA_AND_DIFFERENCES = torch.tensor([[0.25, 0.5, 0.25], [1, -1, 0], [0, -1, 1]])
"""(3, 3): what the weights of the first layer of `PostFilter` belong to, as rows of weights of R, G, B."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a network; stored in checkpoints and in the manifest."""

    trunk: int = 128  # channels at 1/8 resolution
    latent: int = 512  # channels of the code at 1/16 resolution
    core: int = 320  # those of them that the residual blocks see; the others are linear in the picture
    analysis_blocks: tuple[int, int] = (3, 2)  # residual blocks at 1/8, at 1/16
    synthesis_blocks: tuple[int, int] = (4, 0)  # residual blocks at 1/8, at 1/16
    synthesis_hidden: tuple[int, int] = (256, 128)  # channels inside these
    filters: tuple[int, ...] = (0, 2, 3)  # which of those at 1/8 are linear filters, with nothing inside
    hyper: int = 96  # channels of the hyper-latent at 1/64 resolution
    features: int = 128  # channels between hyper-synthesis and the prior's steps
    hidden: int = 160  # channels inside the prior's steps
    bytewise: bool = True  # whether these, and the blocks of the synthesis at 1/8, work on bytes
    post: int = 64  # channels inside the post-filters behind the synthesis, 0 for none
    posts: int = 5  # how many there are, each for as large a part of the qualities
    centred: bool = True  # whether symbols stand for the centre of what becomes one, learned for each level
    shifted: bool = True  # whether scales have a part of their own for each quality, step and channel
    contextual: bool = True  # whether a half of the hyper-latent is predicted from the other half
    anchors: int = 11  # qualities at which gains are learned, evenly from 0 to 100
    lambda_low: float = 0.0006  # weight of the squared error (0..255 scale) against bits per pixel at quality 0
    lambda_high: float = 0.28  # the same at quality 100; between them log-linear

    def __post_init__(self) -> None:
        if not 4 <= self.core < self.latent or self.core % 4 or self.latent % 4:
            raise InvalidArgument(
                f"core is {self.core}, latent {self.latent}; expected multiples of 4, the core smaller than the latent"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Shape:
        # What was so before there was a choice.
        before: dict[str, Any] = {"filters": (), "post": 0, "posts": 1}
        before |= dict.fromkeys(("bytewise", "centred", "shifted", "contextual"), False)
        values = before | values
        for key in ("analysis_blocks", "synthesis_blocks", "synthesis_hidden", "filters"):
            values[key] = tuple(values[key])
        return Shape(**values)


class Block(nn.Module):
    """Residual block: x + W2 silu(W1 depthwise3x3(x)). (B, C, h, w) -> (B, C, h, w).

    W2 starts at zero, so that a new network is its linear path (the PCA transform) and nothing else.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.project(self.active(x))
        return out

    def active(self, x: Tensor) -> Tensor:
        """What the projection takes: (B, C, h, w) -> (B, hidden, h, w)."""
        return F.silu(self.expand(self.depthwise(x)))


class _Bytes(torch.autograd.Function):
    """x / step, rounded and clipped to -zero..255 - zero; the gradient ignores the rounding and stops at the clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, zero: int) -> Tensor:
        x = x * (-log_step).exp().to(x.dtype)
        ctx.save_for_backward(x, log_step)
        ctx.zero = zero
        return x.round().clamp_(-zero, 255 - zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, log_step = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grad, x, -ctx.zero - 0.5, 255.5 - ctx.zero)
        places = (0, 2, 3) if log_step.dim() else (0, 1, 2, 3)
        of_step = (grad * x).sum(places, dtype=log_step.dtype).reshape(log_step.shape)
        return grad.mul_((-log_step).exp().to(x.dtype)), -of_step, None


def as_bytes(x: Tensor, log_step: Tensor, zero: int) -> Tensor:
    """x (B, C, h, w) in steps, rounded to the integers that bytes hold of which `zero` stands for 0.

    The step, given by its logarithm, is learned (Esser et al., "Learned step size quantization", 2020).
    """
    out: Tensor = _Bytes.apply(x, log_step, zero)  # type: ignore[no-untyped-call]
    return out


class BytewiseBlock(Block):
    """A block with bytes before both 1x1 layers, which CPUs multiply several times as fast as floats.

    The steps of `before` are those of each channel; `zeros` are the bytes that stand for 0. Weights are integers of 7
    bits times a factor for each output. What is added to x is no byte: where another machine rounds one byte otherwise,
    a pixel changes by one grey level at most, which it would not if x had the steps of bytes.

    log_seen: the depthwise layer sees x as bytes of these steps (C, 1, 1), too; all that adds to the same x shares
    them, so that none but a cast of x is left between products of bytes. None where it sees floats, as in models
    before hourglass-9.
    """

    zeros: ClassVar = {"before": 128, "inside": 128, "active": 64}

    def __init__(self, channels: int, hidden: int, log_seen: nn.Parameter | None = None) -> None:
        super().__init__(channels, hidden)
        self.log_seen = log_seen
        self.log_steps = nn.ParameterDict(
            {
                "before": nn.Parameter(torch.zeros(channels, 1, 1)),
                "inside": nn.Parameter(torch.zeros(())),
                "active": nn.Parameter(torch.zeros(())),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = whole(self.project.weight * self.log_steps["active"].exp())
        return x + F.conv2d(self._active(x), weight, self.project.bias)

    def active(self, x: Tensor) -> Tensor:
        out: Tensor = self._active(x) * self.log_steps["active"].exp()
        return out

    def _active(self, x: Tensor) -> Tensor:
        """In steps."""
        weight = whole(self.expand.weight * self.log_before.exp())
        inside = self._bytes("inside", F.conv2d(self.before(x), weight, self.expand.bias))
        return self._bytes("active", F.silu(inside * self.log_steps["inside"].exp()))

    @property
    def log_before(self) -> Tensor:
        """(C, 1, 1): logarithms of the steps of `before`."""
        log_before: Tensor = self.log_steps["before"]
        return log_before

    def before(self, x: Tensor) -> Tensor:
        """What the expansion takes, (B, C, h, w), in steps."""
        seen = self.depthwise(x) if self.log_seen is None else filtered(x, self.depthwise, self.log_seen)
        return self._bytes("before", seen)

    def _bytes(self, name: str, x: Tensor) -> Tensor:
        return as_bytes(x, self.log_steps[name], self.zeros[name])

    @torch.no_grad()
    def fit_steps(self, x: Tensor) -> Tensor:
        """Choose the steps for what x (B, C, h, w) becomes, in place, such that bytes just hold it; `log_seen` only
        rises.

        Returns what the block makes of x in floats.
        """
        before = self.depthwise(x)
        inside = self.expand(before)
        active = F.silu(inside)
        if self.log_seen is not None:
            raise_steps(self.log_seen, x)
        for name, values in (("before", before), ("inside", inside), ("active", active)):
            log_step = self.log_steps[name]
            log_step.copy_(_fitting(values, log_step, self.zeros[name]))
        out: Tensor = x + self.project(active)
        return out


class Filter(nn.Module):
    """Residual filter: x + W depthwise3x3(x), linear. (B, C, h, w) -> (B, C, h, w).

    Most blocks of the synthesis that had a SiLU between two 1x1 layers learned to be this, see NOTES.md; it is a
    quarter of the work. Both layers work on bytes, as in `BytewiseBlock`.
    """

    def __init__(self, channels: int, log_seen: nn.Parameter) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.project = nn.Conv2d(channels, channels, 1)
        self.log_seen, self.log_before = log_seen, nn.Parameter(torch.zeros(channels, 1, 1))
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        weight = whole(self.project.weight * self.log_before.exp())
        return x + F.conv2d(self.before(x), weight, self.project.bias)

    def before(self, x: Tensor) -> Tensor:
        """What the projection takes, (B, C, h, w), in steps."""
        return as_bytes(filtered(x, self.depthwise, self.log_seen), self.log_before, ZERO)

    @torch.no_grad()
    def fit_steps(self, x: Tensor) -> Tensor:
        """As `BytewiseBlock.fit_steps`."""
        before = self.depthwise(x)
        raise_steps(self.log_seen, x)
        self.log_before.copy_(_fitting(before, self.log_before, ZERO))
        out: Tensor = x + self.project(before)
        return out

    @torch.no_grad()
    def fit(self, x: Tensor, wanted: Tensor) -> None:
        """Choose the second layer in place such that x (B, C, h, w) becomes most like `wanted` (the same shape)."""
        inputs, outputs = (v.permute(0, 2, 3, 1).flatten(0, 2).double() for v in (self.depthwise(x), wanted - x))
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        squares = inputs.T @ inputs
        squares += torch.diag(squares.diagonal() * 1e-6)
        solved = torch.linalg.solve(squares, inputs.T @ outputs).float()
        assert self.project.bias is not None
        self.project.weight.copy_(solved[:-1].T[:, :, None, None])
        self.project.bias.copy_(solved[-1])


def filtered(x: Tensor, layer: nn.Conv2d, log_seen: Tensor) -> Tensor:
    """What a depthwise layer with weights of 8 bits makes of the bytes that it sees of x."""
    weight = whole(layer.weight * log_seen.exp()[:, None], WEIGHT)
    return F.conv2d(as_bytes(x, log_seen, ZERO), weight, layer.bias, padding=1, groups=len(weight))


@torch.no_grad()
def raise_steps(log_seen: Tensor, x: Tensor) -> None:
    """Raise steps, in place, where bytes of them do not hold x (B, C, h, w)."""
    log_seen.copy_(torch.maximum(_fitting(x, log_seen, ZERO), log_seen))


def _fitting(values: Tensor, log_step: Tensor, zero: int) -> Tensor:
    """The logarithm of the steps, of the shape of `log_step`, of which bytes just hold values (B, C, h, w)."""
    reach = values.abs().amax((0, 2, 3)) if log_step.dim() else values.abs().amax().reshape(1)
    return (reach.clamp(min=1e-3) / (255 - zero)).log().reshape(log_step.shape)


def whole(weight: Tensor, largest: int = BYTE_WEIGHT) -> Tensor:
    """A weight (O, I, k, k) rounded to integers of at most `largest` times a factor for each output."""
    factor = row_factor(weight, largest)
    return rounded(weight / factor) * factor


def row_factor(weight: Tensor, largest: int = BYTE_WEIGHT) -> Tensor:
    """(O, 1, 1, 1): what `whole` divides by."""
    return weight.detach().abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12) / largest


def _blocks(count: int, channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, hidden) for _ in range(count)))


def weave(core: Tensor, rest: Tensor) -> Tensor:
    """Channels of the core (B, c, h, w) and the others (B, r, h, w) -> y (B, c + r, h, w): each quarter has both."""
    pairs = zip(core.chunk(4, 1), rest.chunk(4, 1), strict=True)
    return torch.cat([part for pair in pairs for part in pair], 1)


def unweave(y: Tensor, core: int) -> tuple[Tensor, Tensor]:
    """Inverse of `weave`."""
    quarters, count = y.chunk(4, 1), core // 4
    return torch.cat([q[:, :count] for q in quarters], 1), torch.cat([q[:, count:] for q in quarters], 1)


class Analysis(nn.Module):
    """Analysis transform g_a. (B, 3, H, W) in [0, 1], H and W multiples of 16 -> y (B, latent, H/16, W/16)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.to_trunk = nn.Conv2d(192, shape.trunk, 1)
        self.fine = _blocks(shape.analysis_blocks[0], shape.trunk, 2 * shape.trunk)
        self.to_latent = nn.Conv2d(4 * shape.trunk, shape.core, 1)
        self.coarse = _blocks(shape.analysis_blocks[1], shape.core, shape.core)
        self.to_rest = nn.Conv2d(4 * 192, shape.latent - shape.core, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.from_depth(F.pixel_unshuffle(x, 8))

    def from_depth(self, d: Tensor) -> Tensor:
        """(B, 192, H/8, W/8), the picture after space-to-depth -> y (B, latent, H/16, W/16)."""
        t = self.fine(self.to_trunk(d))
        return weave(self.coarse(self.to_latent(F.pixel_unshuffle(t, 2))), self.to_rest(F.pixel_unshuffle(d, 2)))


class HyperAnalysis(nn.Module):
    """Hyper-analysis h_a. y in units of its deviation (B, latent, h, w) -> z (B, hyper, h/4, w/4)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = 128
        self.narrow = nn.Conv2d(shape.latent, width, 1)
        self.to_half = nn.Conv2d(4 * width, width, 1)
        self.blocks = _blocks(1, width, width)
        self.to_quarter = nn.Conv2d(4 * width, shape.hyper, 1)

    def forward(self, y: Tensor) -> Tensor:
        t = F.silu(self.narrow(y))
        t = self.blocks(self.to_half(F.pixel_unshuffle(t, 2)))
        z: Tensor = self.to_quarter(F.pixel_unshuffle(t, 2))
        return z


class PostFilter(nn.Module):
    """What is added to a decoded picture to make it more like its original: three layers on groups of 2x2 pixels.

    Behind a synthesis that is next to linear this is where edges and textures are told apart: it removes ringing, see
    NOTES.md. The first layer (3x3) sees bytes, whole grey levels, and nothing of their mean: the weights of each colour
    sum up to 0. What it and the second (1x1) give is cut off below 0, which is all that is not linear here. The quality
    decides how strong the one is in front of the other, and how strong the correction is.

    All three multiply bytes by integers of 7 bits. The last one (3x3) gives the correction in bytes, too.
    """

    level: ClassVar = 1 / 12  # what a grey level counts for the first layer
    unit: ClassVar = 1 / 16  # what the bytes between layers count
    fine: ClassVar = 1 / 4  # what the bytes of the correction count, in grey levels
    reach: ClassVar = 4  # pixels around, that a group's correction depends on

    def __init__(self, hidden: int, anchors: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(12, hidden, 3)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = nn.Conv2d(hidden, 12, 3)
        self.log_scale = nn.Parameter(torch.zeros(anchors))  # of what the first layer gives
        self.log_gain = nn.Parameter(torch.full((anchors,), 1.4))  # grey levels of what the last layer gives
        nn.init.uniform_(self.first.bias, -0.2, 0.2)  # type: ignore[arg-type]
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, levels: Tensor, weights: Tensor) -> Tensor:
        """levels (B, 3, H, W), 0..255, whole numbers, and `hats` (B, anchors) -> the correction (B, 3, H, W)."""
        active, gain = self.active(levels, weights)
        found = F.conv2d(active, whole(self.last.weight), self.last.bias) * gain
        return F.pixel_shuffle(as_bytes(found / self.fine, found.new_zeros(()), ZERO) * self.fine, 2)

    def active(self, levels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer takes, (B, hidden, H / 2 + 2, W / 2 + 2), and the gain of what it gives, (B, 1, 1, 1)."""
        x = F.pixel_unshuffle(F.pad(levels, (self.reach,) * 4, mode="replicate"), 2)
        scale, gain = ((weights @ log).exp()[:, None, None, None] for log in (self.log_scale, self.log_gain))
        integers, factor = self.differences()
        assert self.first.bias is not None
        bias = self.first.bias[:, None, None]
        active = self._active((F.conv2d(x, integers) * (factor * self.level) + bias) * scale)
        return self._active(F.conv2d(active, whole(self.middle.weight), self.middle.bias)), gain

    def _active(self, x: Tensor) -> Tensor:
        """x from 0 on, as bytes hold it."""
        return as_bytes(x / self.unit, x.new_zeros(()), 0) * self.unit

    def differences(self) -> tuple[Tensor, Tensor]:
        """The first layer's weights for R, G and B, integers (hidden, 12, 3, 3) of which those of one colour sum up to
        0, and what they count, (hidden, 1, 1).

        They are rounded such that every partial sum is the nearest, which keeps the whole one.
        """
        with torch.autocast(self.first.weight.device.type, enabled=False):
            colours = LUMA_AND_DIFFERENCES.to(self.first.weight)
            weight = torch.einsum("oicyx,ij->ojcyx", self.first.weight.reshape(-1, 3, 4, 3, 3), colours).flatten(2)
            weight = weight - weight.mean(2, keepdim=True)
            largest = weight.detach().abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
            factor = largest / (BYTE_WEIGHT - 1)  # rounding may add one
            exact = weight / factor
            integers = F.pad(exact.detach().cumsum(2).round(), (1, 0)).diff(dim=2)
            return (exact + (integers - exact).detach()).reshape(self.first.weight.shape), factor


class Synthesis(nn.Module):
    """Synthesis transform g_s. y_hat (B, latent, h, w) -> (B, 3, 16 h, 16 w) in [0, 1].

    Behind it there may be post-filters, one for each part of the qualities.

    The clip passes gradients straight through: a pixel beyond the range is pushed back by the error that remains.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.core = shape.core
        self.coarse = _blocks(shape.synthesis_blocks[1], shape.core, shape.synthesis_hidden[1])
        self.from_latent = nn.Conv2d(shape.core, 4 * shape.trunk, 1)
        self.fine = self._fine(shape)
        self.overlap = nn.Conv2d(shape.trunk, shape.trunk, 3, padding=1, groups=shape.trunk)
        self.from_trunk = nn.Conv2d(shape.trunk, 192, 1)
        self.from_rest = nn.Conv2d(shape.latent - shape.core, 4 * 192, 1, bias=False)
        self.posts = nn.ModuleList(
            PostFilter(shape.post, shape.anchors) for _ in range(shape.posts if shape.post else 0)
        )
        nn.init.dirac_(self.overlap.weight, shape.trunk)
        nn.init.zeros_(self.overlap.bias)  # type: ignore[arg-type]

    @staticmethod
    def _fine(shape: Shape) -> nn.Sequential:
        count, hidden = shape.synthesis_blocks[0], shape.synthesis_hidden[0]
        if not shape.bytewise:
            return _blocks(count, shape.trunk, hidden)
        log_seen = nn.Parameter(torch.full((shape.trunk, 1, 1), LEAST_LOG_STEP)) if shape.filters else None
        return nn.Sequential(
            *(
                Filter(shape.trunk, log_seen)
                if log_seen is not None and number in shape.filters
                else BytewiseBlock(shape.trunk, hidden, log_seen)
                for number in range(count)
            )
        )

    def forward(self, y_hat: Tensor, weights: Tensor) -> Tensor:
        """weights: `hats` of the quality, (B, anchors)."""
        return self.corrected(F.pixel_shuffle(self.to_depth(y_hat), 8), weights)

    def corrected(self, x: Tensor, weights: Tensor) -> Tensor:
        """A picture (B, 3, H, W) as the transform makes it -> what it becomes."""
        if self.posts:
            # bfloat16, of mixed precision, does not tell grey levels apart.
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x + self.correction(rounded(_within(x) * 255), weights) / 255
        return _within(x)

    def correction(self, levels: Tensor, weights: Tensor) -> Tensor:
        """What the post-filter of each picture's quality adds to it, see `PostFilter`."""
        which = post_of(weights, len(self.posts))
        places = [(which == number).nonzero()[:, 0] for number in range(len(self.posts))]
        parts = [post(levels[own], weights[own]) for post, own in zip(self.posts, places, strict=True) if len(own)]
        return torch.cat(parts)[torch.cat(places).argsort()]

    def to_depth(self, y_hat: Tensor) -> Tensor:
        """y_hat -> (B, 192, 2 h, 2 w): the picture before the clip and depth-to-space."""
        core, rest = unweave(y_hat, self.core)
        return self.core_to_depth(core) + self.rest_to_depth(rest)

    def core_to_depth(self, core: Tensor) -> Tensor:
        t = F.pixel_shuffle(self.from_latent(self.coarse(core)), 2)
        d: Tensor = self.from_trunk(self.overlap(self.fine(t)))
        return d

    @torch.no_grad()
    def fit_steps(self, y_hat: Tensor) -> None:
        """Choose the steps of what works on bytes, in place, see `BytewiseBlock.fit_steps`."""
        t = F.pixel_shuffle(self.from_latent(self.coarse(unweave(y_hat, self.core)[0])), 2)
        for part in self.fine:
            if isinstance(part, BytewiseBlock | Filter):
                t = part.fit_steps(t)

    @torch.no_grad()
    def fit_filters(self, other: Synthesis, y_hat: Tensor) -> None:
        """Make the filters, in place, most like the blocks of another synthesis that is else the same."""
        t = wanted = F.pixel_shuffle(self.from_latent(self.coarse(unweave(y_hat, self.core)[0])), 2)
        for own, block in zip(self.fine, other.fine, strict=True):
            assert isinstance(block, Block)
            wanted = block(wanted)
            if isinstance(own, Filter):
                own.depthwise.load_state_dict(block.depthwise.state_dict())
                own.fit(t, wanted)
                t = own.fit_steps(t)
            elif isinstance(own, BytewiseBlock) and own.log_seen is not None:
                raise_steps(own.log_seen, t)
                t = own(t)

    def rest_to_depth(self, rest: Tensor) -> Tensor:
        return F.pixel_shuffle(self.from_rest(rest), 2)


def _within(x: Tensor) -> Tensor:
    """x clipped to [0, 1], with a straight-through gradient."""
    return x + (x.clamp(0, 1) - x).detach()


def hats(quality: Tensor, anchors: int) -> Tensor:
    """quality (B,) in [0, 100] -> (B, anchors), the weights of linear interpolation between anchors."""
    place = quality.clamp(0, 100)[:, None] / 100 * (anchors - 1)
    return (1 - (place - torch.arange(anchors, device=quality.device)).abs()).clamp(min=0)


def post_of(weights: Tensor, posts: int) -> Tensor:
    """`hats` of qualities (B, anchors) -> which of the post-filters is theirs, (B,)."""
    anchors = weights.shape[1]
    place = weights @ torch.arange(anchors, dtype=weights.dtype, device=weights.device)
    return (place * (posts / (anchors - 1))).long().clamp(max=posts - 1)


def present(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file by the names that they have today: once there was a single post-filter."""
    before = "synthesis.post."
    return {
        f"synthesis.posts.0.{name.removeprefix(before)}" if name.startswith(before) else name: value
        for name, value in weights.items()
    }


def from_lambdas(old: Shape, new: Shape) -> Tensor:
    """(anchors of new, anchors of old): what makes of values learned at the qualities of `old` those at the qualities
    of `new`, where an error is worth as much; beyond the last one they go on as between the last two."""
    low, high = math.log(old.lambda_low), math.log(old.lambda_high)
    wanted = torch.linspace(math.log(new.lambda_low), math.log(new.lambda_high), new.anchors)
    place = (wanted - low) / (high - low) * (old.anchors - 1)
    first = place.floor().clamp(0, old.anchors - 2)
    part = (place - first)[:, None]
    pair = F.one_hot(first.long(), old.anchors), F.one_hot(first.long() + 1, old.anchors)
    return pair[0] * (1 - part) + pair[1] * part


class Gains(nn.Module):
    """Per-channel gain for each quality, applied after the analysis transform, and its learned inverse.

    log gain is piecewise linear in quality between `anchors` learned points.
    """

    def __init__(self, anchors: int, channels: int) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(anchors, channels))
        self.log_inverse = nn.Parameter(torch.zeros(anchors, channels))

    def forward(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """`hats` (B, anchors) -> gain and inverse gain, each (B, channels, 1, 1)."""
        gain, inverse = (weights @ self.log_gain).exp(), (weights @ self.log_inverse).exp()
        return gain[..., None, None], inverse[..., None, None]


class FactorisedPrior(nn.Module):
    """A density for each channel of z, the same at every position: a mixture of `parts` logistics.

    The probability of a symbol q under gain g is F((q + 1/2) / g) - F((q - 1/2) / g), with F the channel's
    cumulative distribution in units of z; so one density serves every quality.
    """

    def __init__(self, channels: int, parts: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parts, channels))
        self.mean = nn.Parameter(torch.zeros(parts, channels))
        spread = torch.linspace(-2.5, 0.7, parts)[:, None]
        self.log_scale = nn.Parameter(spread.repeat(1, channels))

    def cumulative(self, lower: Tensor, upper: Tensor, held: bool = False) -> Tensor:
        """P(lower < y < upper), shapes (B, C, h, w) the same shape. held: the density does not learn."""
        total = torch.zeros_like(lower)
        parts = self.weight.softmax(0), self.mean, self.log_scale
        for weight, mean, log_scale in zip(*(part.detach() if held else part for part in parts), strict=True):
            rate = (-log_scale).exp()[:, None, None]
            centre = mean[:, None, None]
            a, b = (lower - centre) * rate, (upper - centre) * rate
            # sigmoid(b) - sigmoid(a) loses all digits in the upper tail: mirror it into the lower one.
            sign = torch.where(a + b > 0, -1.0, 1.0)
            part = (torch.sigmoid(sign * b) - torch.sigmoid(sign * a)).abs()
            total = total + weight[:, None, None] * part
        return total

    def bits(self, symbols: Tensor, gain: Tensor, held: bool = False) -> Tensor:
        """Ideal code length in bits of each (noisy or integer) symbol; shapes (B, C, h, w) and (B, C, 1, 1).

        held: see `cumulative`.
        """
        p = self.cumulative((symbols - 0.5) / gain, (symbols + 0.5) / gain, held)
        return -torch.log2(p.clamp(min=1e-9))

    def chosen(self, values: Tensor, gain: Tensor) -> Tensor:
        """Symbols that the encoder's default effort makes of values times gain (B, C, h, w); gain (B, C, 1, 1)."""
        return settled(values, lambda symbols: self.bits(symbols, gain), HYPER_WORTH)


class Hourglass(nn.Module):
    """The trained whole: `analysis`, `gains`, `prior`, `synthesis`.

    smooth: weight, at quality 0, of the steps of the error in smooth areas against the squared error.
    """

    smooth = 5.0

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        self.analysis = Analysis(self.shape)
        self.hyper_analysis = HyperAnalysis(self.shape)
        self.gains = Gains(self.shape.anchors, self.shape.latent)
        self.hyper_gains = Gains(self.shape.anchors, self.shape.hyper)
        self.hyper_prior = FactorisedPrior(self.shape.hyper)
        self.prior = Prior(
            self.shape.latent,
            self.shape.hyper,
            self.shape.anchors,
            self.shape.features,
            self.shape.hidden,
            self.shape.bytewise,
            self.shape.centred,
            self.shape.shifted,
            self.shape.contextual,
        )
        self.synthesis = Synthesis(self.shape)

    @property
    def widths(self) -> list[int]:
        """How many channels of each quarter of the latent may be coded: a few, the core, all; ascending."""
        core = self.shape.core // 4
        return sorted({core * 3 // 5, core, self.shape.latent // 4} - {0})

    def least_gain(self) -> Tensor:
        """(latent,): the logarithm of the least gain of each channel that the prior's units hold."""
        return (LEAST_UNIT * OCTAVE - self.prior.log_unit) * (math.log(2) / OCTAVE)

    @torch.no_grad()
    def bound_gains(self) -> None:
        """Raise gains of the latent that are next to none, in place, to `least_gain`.

        The inverse of such a gain falls by as much as it rises, so that what the two make of a value together stays.
        """
        rise = (self.least_gain() - self.gains.log_gain).clamp(min=0)
        self.gains.log_gain.add_(rise)
        self.gains.log_inverse.sub_(rise)

    def weight_of_error(self, quality: Tensor) -> Tensor:
        """lambda(quality): bits per pixel that one unit of squared error (0..255 scale) is worth."""
        low, high = math.log(self.shape.lambda_low), math.log(self.shape.lambda_high)
        return torch.exp(low + (high - low) * quality / 100)

    def forward(self, x: Tensor, quality: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """One training pass: (B, 3, H, W), (B,) -> x_hat (B, 3, H, W) and ideal bits (B,) of each picture."""
        return self.code(self.analysis(x), quality, mode)

    def code(self, y: Tensor, quality: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Latent (B, latent, h, w), h and w multiples of 4 -> x_hat and ideal bits (B,)."""
        y_hat, bits, inverse = self.entropy(y, quality, mode)
        return self.synthesis(y_hat * inverse, hats(quality, self.shape.anchors)), bits

    def hyper(self, y: Tensor) -> Tensor:
        """Hyper-latent (B, hyper, h/4, w/4)."""
        z: Tensor = self.hyper_analysis(y * torch.exp2(-self.prior.log_unit / OCTAVE)[:, None, None])
        return z

    def entropy(self, y: Tensor, quality: Tensor, mode: Mode, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise and count: latent -> dequantised y * gain, ideal bits (B,), inverse gain.

        frozen: the gains of the latent do not learn.
        """
        weights = hats(quality, self.shape.anchors)
        gain, inverse = self.gains(weights)
        if frozen:
            gain = gain.detach()
        z = self.hyper(y).float()
        with torch.autocast(y.device.type, enabled=False):
            z_hat, bits = self.hyper_entropy(z, weights, mode)
            scaled = y.float() * gain
        scaled, gain, z_hat = map(_channels_last, (scaled, gain, z_hat))
        kept = coded(scaled, self.widths) if mode == "settle" else None
        y_hat, more = self.prior(scaled, gain, z_hat, weights, mode, kept)
        return y_hat.permute(0, 3, 1, 2), bits + more, inverse

    def hyper_entropy(self, z: Tensor, weights: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """Hyper-latent (B, hyper, h, w), quality as `hats` -> the same dequantised, and ideal bits (B,)."""
        gain, _ = self.hyper_gains(weights)
        z = z * gain
        if mode == "settle":
            symbols = z + (self.hyper_prior.chosen(z, gain) - z).detach()
            own = self.hyper_prior.bits(symbols.detach(), gain.detach())
            if torch.is_grad_enabled():
                # The value stays that of the symbols' bits; the hyper-latent's gradient is the noise's.
                noisy = self.hyper_prior.bits(z + torch.rand_like(z) - 0.5, gain, held=True)
                own = own + noisy - noisy.detach()
        else:
            symbols = rounded(z)
            own = self.hyper_prior.bits(z + torch.rand_like(z) - 0.5 if mode == "noise" else symbols, gain)
        if self.prior.context is not None:
            scaled, per_unit, first = map(_channels_last, (z, gain, symbols))
            found, others, later = self.prior.hyper(scaled, per_unit, first, weights, mode)
            symbols = found.permute(0, 3, 1, 2)
            own = torch.where(later, others.permute(0, 3, 1, 2), own)
        return symbols / gain, own.sum((1, 2, 3))

    def symbols(self, y: Tensor, quality: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step of the prior the symbols chosen for a latent and their levels, both (B, h/2, w/2, latent)."""
        weights = hats(quality, self.shape.anchors)
        gain, _ = self.gains(weights)
        z_hat, _ = self.hyper_entropy(self.hyper(y), weights, "settle")
        scaled, gain, z_hat = map(_channels_last, (y * gain, gain, z_hat))
        kept = coded(scaled, self.widths)
        for _, symbols, _, level in self.prior.walk(scaled, gain, z_hat, weights, "settle", kept):
            yield symbols.round(), level


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@torch.no_grad()
def start_prior(net: Hourglass, latents: Tensor) -> None:
    """Give the prior its units, the deviations of latents (N, h, w, latent), and the hyper-latent its first gains."""
    deviation = torch.stack([part.float().std(correction=0) for part in latents.flatten(0, 2).T])
    net.prior.log_unit.copy_((deviation.clamp(min=1e-4).log2() * OCTAVE).round())
    net.hyper_gains.log_gain.copy_(
        torch.linspace(0, 1.5, net.shape.anchors)[:, None].expand_as(net.hyper_gains.log_gain)
    )


@torch.no_grad()
def start_from_pca(net: Hourglass, pictures: list[Tensor], generator: torch.Generator) -> None:
    """Make `net` the linear transform codec of its training pictures, in place.

    `pictures` are (3, H, W) uint8. Stage one takes the leading principal components of 8x8 patches, stage two
    those of 2x2 neighbourhoods of them; both are divided by the square root of their deviation, which keeps
    strong and weak channels within reach of one learning rate. The synthesis is the transpose.
    """
    shape = net.shape
    x = F.pixel_unshuffle(crops_of(pictures, 32, 4000, generator).double() / 255, 8)  # (N, 192, 4, 4)
    flat = x.permute(0, 2, 3, 1).reshape(-1, 192)
    mean = flat.mean(0)
    basis, deviation = principal(flat - mean, shape.trunk)
    scale = deviation.clamp(min=1e-3).sqrt()
    t = ((flat - mean) @ basis).reshape(-1, 4, 4, shape.trunk).permute(0, 3, 1, 2)
    pairs = F.pixel_unshuffle(t, 2).permute(0, 2, 3, 1).reshape(-1, 4 * shape.trunk)
    basis2, deviation2 = principal(pairs, shape.core)
    shuffled = _dealt(shape.core)
    basis2, deviation2 = basis2[:, shuffled], deviation2[shuffled]
    scale2 = deviation2.clamp(min=1e-3).sqrt()
    unscale = scale.repeat_interleave(4)  # pixel_unshuffle keeps the four copies of a channel together

    analysis, synthesis = net.analysis, net.synthesis
    _put(analysis.to_trunk, basis.T / scale[:, None], -(mean @ basis) / scale)
    _put(analysis.to_latent, (basis2.T * unscale) / scale2[:, None])
    _put(synthesis.from_latent, (basis2 / unscale[:, None]) * scale2)
    _put(synthesis.from_trunk, basis * scale, mean)
    _put_gains(net, torch.arange(shape.latent).reshape(4, -1)[:, : shape.core // 4].flatten(), scale2)


@torch.no_grad()
def start_rest(net: Hourglass, pictures: list[Tensor], generator: torch.Generator) -> None:
    """Fit the channels beside the core, in place, to what the core leaves of `pictures`, (3, H, W) uint8 each.

    The residue of 16x16 patches is regressed on the patches; the leading principal components of what the regression
    explains become the synthesis (reduced-rank regression).
    """
    shape, device = net.shape, net.gains.log_gain.device
    count = shape.latent - shape.core
    net.synthesis.from_rest.weight.zero_()
    gain, inverse = net.gains(hats(torch.tensor([100.0], device=device), shape.anchors))
    patches: list[Tensor] = []
    residues: list[Tensor] = []
    for _ in range(60):
        x = F.pixel_unshuffle(crops_of(pictures, 64, 50, generator).to(device).float() / 255, 8)
        left = x - net.synthesis.to_depth(net.analysis.from_depth(x) * gain * inverse)
        for values, kept in ((x, patches), (left, residues)):
            kept.append(F.pixel_unshuffle(values, 2)[:, :, 1:3, 1:3].permute(0, 2, 3, 1).reshape(-1, 4 * 192).double())
    x, left = torch.cat(patches), torch.cat(residues)
    mean = x.mean(0)
    x -= mean
    covariance = x.T @ x / len(x)
    covariance += 1e-7 * torch.eye(len(covariance), device=device)
    regression = torch.linalg.solve(covariance, x.T @ left / len(x))  # (768 of the patch, 768 of its residue)
    basis, deviation = principal(x @ regression, count)
    shuffled = _dealt(count)
    basis, scale = basis[:, shuffled], deviation[shuffled].clamp(min=1e-3).sqrt()
    matrix = (regression @ basis).T / scale[:, None]
    _put(net.analysis.to_rest, matrix, -(matrix @ mean))
    net.synthesis.from_rest.weight.copy_((basis * scale).float()[:, :, None, None])
    _put_gains(net, torch.arange(shape.latent).reshape(4, -1)[:, shape.core // 4 :].flatten(), scale)


def crops_of(pictures: list[Tensor], side: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, side, side) uint8 from random places."""
    crops = []
    for _ in range(count):
        picture = pictures[int(torch.randint(len(pictures), (1,), generator=generator))]
        top = int(torch.randint(picture.shape[1] - side + 1, (1,), generator=generator))
        left = int(torch.randint(picture.shape[2] - side + 1, (1,), generator=generator))
        crops.append(picture[:, top : top + side, left : left + side])
    return torch.stack(crops)


def _dealt(count: int) -> Tensor:
    """An order of channels that are sorted by strength: dealt to the four quarters, so that all have strong ones."""
    return torch.arange(count).reshape(-1, 4).T.flatten()


def _put(layer: nn.Conv2d, matrix: Tensor, bias: Tensor | None = None) -> None:
    layer.weight.zero_()
    middle = layer.kernel_size[0] // 2
    layer.weight[:, :, middle, middle] = matrix.float()
    assert layer.bias is not None
    layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias.float())


def _put_gains(net: Hourglass, channels: Tensor, scale: Tensor) -> None:
    """Give channels that were divided by `scale` the step that is right for white noise at every quality."""
    device = net.gains.log_gain.device
    quality = torch.linspace(0, 100, net.shape.anchors, device=device)
    step = (net.weight_of_error(quality) * 255**2 / 20).rsqrt()[:, None]
    net.gains.log_gain[:, channels] = (scale / step).log().float()
    net.gains.log_inverse[:, channels] = (step / scale).log().float()


def principal(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading principal directions of (N, D) rows: (D, count) orthonormal columns, (count,) deviations."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order], values[order].clamp(min=0).sqrt()
