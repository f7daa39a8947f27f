"""The prior: hyper-latent and what is decoded so far -> mean and scale of the next part of the latent, in integers.

All that decides which probability table a symbol is coded with must come out the same on every machine. So every
number in here is an integer carried in float32, and every partial sum stays below 2**24 in magnitude: each is exact,
and neither the order of a summation nor FMA, SIMD width, threads or kernel can change a bit. Between layers an
accumulator is multiplied by a power of two, rounded down and clipped, all exact. Training sees the same integers
(fake quantisation with straight-through gradients), so export changes nothing. Layers from bytes to bytes become
integer convolutions, which sum in 32 bits and round to the nearest.

The latent is decoded in four steps (after Li, Li and Lu, "Neural video compression with diverse contexts", 2023,
section 3.3). Channels form four groups, positions four phases by the parity of row and column; at phase p step k
codes group k XOR p. So after each step every position knows some of its channels, and every channel knows some
of its neighbours.

Units: an activation stands for integer / 2**unit. The latent enters divided by each channel's deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec.prior import FINE, STEPS
from hourglass.codec.prior import KNOWN as LARGEST_KNOWN
from hourglass.codec.prior import later as later_places
from hourglass.codec.quantise import HYPER_WORTH, NEAR, NOTHING, RARE, WORTH

EXACT = 2**24
"""Integers up to this magnitude are exact in float32."""

OCTAVE = 256
"""Logarithms of gains and deviations are integers in units of 1/OCTAVE of a factor of two."""

LADDER = 64
PER_OCTAVE = 6
LOWEST = -3.25
"""Scale i of the ladder is 2**(LOWEST + i / PER_OCTAVE), 0.105 to 152 symbols."""

BORDER = 0.6
"""From where on, about, the encoder's default effort makes a symbol of 1 of what is left of the latent."""

NEARER = 3
"""Magnitudes of symbols, from 1, that have a centre of their own at each level; larger ones share the last."""

WEIGHT = 127
"""Largest magnitude of an integer weight."""

BYTE_WEIGHT = 64
"""The same in a layer of bytes: two products of a byte and a weight fit 16 bits, where CPUs without VNNI add them."""


@dataclass(frozen=True)
class Range:
    """Integers from `low` to `high` that stand for themselves / 2**unit."""

    low: int
    high: int
    unit: int

    @property
    def reach(self) -> int:
        return max(-self.low, self.high)


BYTE = Range(0, 255, 4)
SIGNED_BYTE = Range(-128, 127, 3)
HYPER = Range(-1023, 1023, 5)
KNOWN = Range(-LARGEST_KNOWN, LARGEST_KNOWN, 6)
SIGNED = Range(-1023, 1023, 6)
HIDDEN = Range(0, 1023, 6)
COARSE = Range(0, 1023, HYPER.unit)
MEAN = Range(-16383, 16383, 9)
LOG_SCALE = Range(-8191, 8191, 8)


class _Round(torch.autograd.Function):
    """Round and clip; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        return x.round().clamp_(low, high)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def rounded(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x rounded and clipped, with a straight-through gradient."""
    out: Tensor = _Round.apply(x, low, high)  # type: ignore[no-untyped-call]
    return out


class _Requantise(torch.autograd.Function):
    """clip(floor((total + bias) * factor)), or, `nearest`, rounded to the nearest, halves to the even one; the gradient
    ignores the rounding and stops at the clip."""

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, bias: Tensor, factor: Tensor, low: float, high: float, nearest: bool
    ) -> Tensor:
        total = total if total.dtype == torch.float64 else total.float()  # bfloat16 in mixed precision
        out = (total + bias).mul_(factor)
        out = out.round_() if nearest else out.floor_()
        ctx.save_for_backward(out, factor)
        ctx.bounds = low - 0.5, high + 0.5
        return out.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        out, factor = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grad, out, *ctx.bounds).mul_(factor)
        return grad, grad.sum((0, 1, 2)), None, None, None, None


class _Favoured(torch.autograd.Function):
    """x as it is; its gradient times 1 + share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return torch.addcmul(grad, grad, share), None


class _Centred(torch.autograd.Function):
    """`Prior.centred`. The symbols' gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, symbols: Tensor, level: Tensor, nearer: Tensor) -> Tensor:
        flat = symbols.reshape(-1)
        places = flat.round().nonzero()[:, 0]
        few, (levels, sizes) = flat[places], nearer.shape
        which = level.reshape(-1)[places].long() * sizes + few.abs().round().long().clamp(max=sizes) - 1
        ctx.save_for_backward(places, which, few.sign())
        ctx.shape = levels, sizes
        out = flat.clone()
        out[places] -= few.sign() * nearer.flatten()[which]
        return out.reshape(symbols.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        places, which, sign = ctx.saved_tensors
        of_table = torch.zeros(math.prod(ctx.shape), dtype=grad.dtype, device=grad.device)
        of_table.index_add_(0, which, grad.reshape(-1)[places] * -sign)
        return grad, None, of_table.reshape(ctx.shape)


class IntegerLayer(nn.Module):
    """Weighted sums of integers, then a power of two, rounding and clipping to `after`; (B, h, w, C) throughout.

    The trained weight (C', ...) is real; the exponent of each output channel is the largest that keeps the integer
    weights within `largest` and max|x| * sum|w| + |b| below EXACT. nearest: how it rounds, see `_Requantise`.
    """

    largest = WEIGHT
    nearest = False

    def __init__(self, shape: tuple[int, ...], before: Range, after: Range) -> None:
        super().__init__()
        self.before, self.after, self.outputs = before, after, shape[0]
        self.fan_in = math.prod(shape[1:])
        self.weight = nn.Parameter(torch.randn(shape) * math.sqrt(2 / self.fan_in))
        self.bias = nn.Parameter(torch.zeros(shape[0]))

    def exponents(self) -> Tensor:
        """(C',): the integer weight is round(weight * 2**exponent)."""
        size = self.weight.detach().abs().reshape(len(self.bias), -1)
        room = (0.75 * EXACT / self.before.reach - 0.5 * self.fan_in) / size.sum(1).clamp(min=1e-9)
        most = torch.minimum(self.largest / size.amax(1).clamp(min=1e-9), room)
        # A byte that stands for 0 has 128 in its place, which the accumulator must hold as well.
        finest = 12 if self.after == SIGNED_BYTE else 14
        return (torch.frexp(most).exponent - 1).clamp(max=finest).to(most.dtype)

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias as integers, and what the accumulator is multiplied by; before a floor, the bias holds the
        rounding."""
        exponent = self.exponents()
        weight = self.weight * torch.exp2(exponent).reshape(-1, *[1] * (self.weight.dim() - 1))
        weight = rounded(weight)
        shift = exponent + (self.before.unit - self.after.unit)
        bias = rounded(self.bias * torch.exp2(exponent + self.before.unit), -0.2 * EXACT, 0.2 * EXACT)
        if not self.nearest:
            bias = bias + torch.exp2(shift - 1).floor()
        return weight, bias, torch.exp2(-shift)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, factor = self.integers()
        total = self.total(x, weight)
        out: Tensor = _Requantise.apply(total, bias, factor, self.after.low, self.after.high, self.nearest)  # type: ignore[no-untyped-call]
        return out


class Pointwise(IntegerLayer):
    """1x1 convolution: (B, h, w, C) -> (B, h, w, C')."""

    def __init__(self, inputs: int, outputs: int, before: Range, after: Range) -> None:
        super().__init__((outputs, inputs), before, after)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Bytewise(Pointwise):
    """1x1 convolution from bytes to bytes, which CPUs multiply several times as fast as floats."""

    largest = BYTE_WEIGHT
    nearest = True


class PerPhase(IntegerLayer):
    """1x1 convolution with weights of its own for each phase: (B, h, w, C) -> (B, h/2, w/2, C'), phase by phase."""

    def __init__(self, inputs: int, outputs: int, before: Range, after: Range) -> None:
        super().__init__((outputs, inputs), before, after)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        parts = [F.linear(x[:, p // 2 :: 2, p % 2 :: 2], part) for p, part in enumerate(weight.chunk(4))]
        return torch.cat(parts, 3)


class Depthwise(IntegerLayer):
    """Depthwise convolution with zero padding: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, channels: int, kernel: int, before: Range, after: Range) -> None:
        super().__init__((channels, 1, kernel, kernel), before, after)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=len(weight)).permute(0, 2, 3, 1)


class Spatial(IntegerLayer):
    """Convolution with zero padding: (B, h, w, C) -> (B, h, w, C')."""

    def __init__(self, inputs: int, outputs: int, kernel: int, before: Range, after: Range) -> None:
        super().__init__((outputs, inputs, kernel, kernel), before, after)

    def total(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=weight.shape[2] // 2).permute(0, 2, 3, 1)


def enlarge(x: Tensor) -> Tensor:
    """Depth to space by 2, phase by phase: (B, h, w, 4 C) -> (B, 2 h, 2 w, C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)


def group_of(step: int, phase: int) -> int:
    """The channel group (a quarter, in order) that `step` codes at `phase` (2 * row parity + column parity)."""
    return step ^ phase


_ORDER = [4 * phase + group_of(step, phase) for step in range(STEPS) for phase in range(4)]
_BACK = [_ORDER.index(place) for place in range(16)]


def split(x: Tensor) -> tuple[Tensor, ...]:
    """(B, h, w, C) -> for each step the elements that it codes: (B, h/2, w/2, C), phase by phase."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, 4, c // 4).permute(0, 1, 3, 2, 4, 5, 6)
    x = x.reshape(b, h // 2, w // 2, 16, c // 4).index_select(3, torch.tensor(_ORDER, device=x.device))
    return x.reshape(b, h // 2, w // 2, STEPS, c).unbind(3)


def by_step(x: Tensor) -> tuple[Tensor, ...]:
    """(B, 1, 1, C), a number for each channel -> for each step those of the elements that it codes, (B, 1, 1, C)."""
    return split(x.expand(-1, 2, 2, -1))


def join(parts: Sequence[Tensor]) -> Tensor:
    """Inverse of `split`; zeros for the parts that are missing at the end."""
    b, h, w, c = parts[0].shape
    missing = [parts[0].new_zeros(b, h, w, c)] * (STEPS - len(parts))
    x = torch.stack([*parts, *missing], 3).reshape(b, h, w, 16, c // 4)
    x = x.index_select(3, torch.tensor(_BACK, device=x.device)).reshape(b, h, w, 2, 2, 4, c // 4)
    return x.permute(0, 1, 3, 2, 4, 5, 6).reshape(b, 2 * h, 2 * w, c)


class HyperContext(nn.Module):
    """The hyper-latent at the positions of a chessboard's one colour -> mean, log scale at those of the other.

    Known (B, h, w, Z) in HYPER units, 0 where unknown, and quality (B, anchors) in 1/32; both results are integers,
    (B, h, w, Z), of use where nothing is known.
    """

    def __init__(self, hyper: int, anchors: int, hidden: int = 128) -> None:
        super().__init__()
        self.spatial = Spatial(hyper, hidden, 3, HYPER, COARSE)
        self.deepen = Pointwise(hidden + anchors, hidden, COARSE, HIDDEN)
        self.mean = Pointwise(hidden, hyper, HIDDEN, MEAN)
        self.scale = Pointwise(hidden, hyper, HIDDEN, LOG_SCALE)
        for layer in (self.mean, self.scale):
            nn.init.normal_(layer.weight, std=1e-3)

    def forward(self, known: Tensor, hats: Tensor) -> tuple[Tensor, Tensor]:
        b, h, w, _ = known.shape
        seen = torch.cat([self.spatial(known), hats[:, None, None].expand(b, h, w, -1)], 3)
        hidden = self.deepen(seen)
        return self.mean(hidden), self.scale(hidden)


class Step(nn.Module):
    """One step: hyper features (B, h, w, F), known latent (B, h, w, C) -> mean, log scale (B, h/2, w/2, C) each.

    Both as integers, for the elements that the step codes, phase by phase. Step 0 knows nothing yet.

    bytewise: what goes in and the hidden channels are bytes.
    """

    def __init__(self, latent: int, features: int, hidden: int, bytewise: bool, step: int) -> None:
        super().__init__()
        self.step = step
        signed, inside = (SIGNED_BYTE, BYTE) if bytewise else (SIGNED, HIDDEN)
        inner = Bytewise if bytewise else Pointwise
        if step:
            self.spatial = Depthwise(latent, 3, KNOWN, signed)
            self.direct = Depthwise(latent, 3, KNOWN, MEAN)
            nn.init.normal_(self.spatial.weight, std=0.2)
            nn.init.zeros_(self.direct.weight)
        self.mix = inner(features + latent if step else features, hidden, signed, inside)
        self.deepen = inner(hidden, hidden, inside, inside)
        self.mean = PerPhase(hidden, latent, inside, MEAN)
        self.scale = PerPhase(hidden, latent, inside, LOG_SCALE)
        for layer in (self.mean, self.scale):
            nn.init.normal_(layer.weight, std=1e-3)

    def forward(self, features: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        if known is not None:
            features = torch.cat([features, self.spatial(known)], 3)
        hidden = self.deepen(self.mix(features))
        mean: Tensor = self.mean(hidden)
        if known is not None:
            mean = mean + split(self.direct(known))[self.step]
        return mean, self.scale(hidden)


Mode: TypeAlias = Literal["round", "noise", "settle"]
"""How the latent becomes symbols.

round: plainly. noise: for training; the rate sees uniform noise in place of rounding, while picture and context see
rounding with a straight-through gradient (Minnen and Singh, "Channel-wise autoregressive entropy models", 2020).
settle: the same, but picture and context see the symbols that the encoder's default effort chooses, and the scales
learn from these; the last part of a training.
"""


@torch.no_grad()
def settled(rest: Tensor, bits: Callable[[Tensor], Tensor], worth: float) -> Tensor:
    """Symbols that the encoder's default effort makes of what is left of a latent: rounded, or one nearer to 0.

    bits: what symbols of that shape take, each. worth: bits that one squared step of error is worth.
    """
    symbols = rest.round()
    nearer = symbols - symbols.sign()
    saved = bits(symbols) - bits(nearer)
    worse = (rest - nearer).square_() - (rest - symbols).square_()
    return torch.where((saved > worth * worse) & (symbols.abs() <= NEAR), nearer, symbols)


def chosen(rest: Tensor, level: Tensor, worth: float = WORTH) -> Tensor:
    """`settled` for the latent less its mean, at levels of the ladder."""
    return settled(rest, lambda symbols: bits_of(symbols, level), worth)


@torch.no_grad()
def coded(scaled: Tensor, widths: Sequence[int]) -> Tensor:
    """Which channels of a latent times gain (B, h, w, C) the encoder codes, 1 or 0, (B, 1, 1, C).

    widths: how many of each quarter there may be, ascending. The smallest that loses next to nothing is taken, see
    `quantise`.
    """
    sizes = scaled.abs().reshape(*scaled.shape[:3], 4, -1)
    some = sizes > 0.5
    worth = (((2 * sizes - 1) * WORTH - RARE).clamp(min=0) * some).sum((1, 2, 3))
    lost = torch.stack([worth[:, width:].sum(1) for width in widths], 1)
    first = (lost <= NOTHING * some.sum((1, 2, 3, 4))[:, None]).int().argmax(1)
    width = torch.tensor(widths, device=scaled.device)[first]
    kept = torch.arange(sizes.shape[4], device=scaled.device) < width[:, None]
    return kept.repeat(1, 4)[:, None, None].to(scaled.dtype)


def bits_of(x: Tensor, level: Tensor) -> Tensor:
    """Ideal code length in bits of a symbol less its mean at a level of the ladder, under a logistic density.

    The tables of a shipped model are counted per level and know its true shape.
    """
    rate = _steepness(level)
    x = x.abs()
    p = torch.sigmoid((0.5 - x) * rate) - torch.sigmoid((-0.5 - x) * rate)
    return -torch.log2(p.clamp(min=1e-9))


def in_symbols(mean: Tensor, log_scale: Tensor, ratio: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of MEAN and LOG_SCALE -> mean in symbols, whole 1/FINE of these as in a file, and level of the ladder.

    ratio: symbols per unit. log_ratio: its base-2 logarithm, with what the scales have of their own.
    """
    mean = rounded(mean * (ratio * (FINE / 2**MEAN.unit))) / FINE
    level = log_scale * (PER_OCTAVE / 2**LOG_SCALE.unit) + (log_ratio - LOWEST) * PER_OCTAVE
    return mean, rounded(level, 0, LADDER - 1)


def quantised(rest: Tensor, level: Tensor, mode: Mode, worth: float) -> Tensor:
    """Symbols of what is left of a latent less its mean, at levels of the ladder, with a straight-through gradient."""
    if mode != "settle":
        return rounded(rest)
    return rest + (chosen(rest, level, worth) - rest).detach()


def coded_bits(rest: Tensor, symbols: Tensor, level: Tensor, mode: Mode) -> Tensor:
    """Ideal code length in bits of each element: of what is left of a latent, its symbols, their levels."""
    if mode == "noise":
        return bits_of(rest + torch.rand_like(rest) - 0.5, level)
    own = bits_of(symbols.detach(), level)
    if mode == "settle" and torch.is_grad_enabled():
        # The value stays that of the symbols' bits; the latent's gradient is the noise's.
        noisy = bits_of(rest + torch.rand_like(rest) - 0.5, level.detach())
        own = own + noisy - noisy.detach()
    return own


def _steepness(level: Tensor) -> Tensor:
    """1 / s of the logistic density whose deviation is the scale at a level of the ladder."""
    return torch.exp2(level * (-1 / PER_OCTAVE) + (math.log2(math.pi / math.sqrt(3)) - LOWEST))


def stillness() -> Tensor:
    """(LADDER,): how little symbols change with the mean, for each level of the ladder.

    1 less the density, under the same logistic, at the borders between symbols: near 1 where nearly all are 0, and 0
    where they are spread out, so that what the mean gains its symbol loses.
    """
    rate = _steepness(torch.arange(LADDER))
    borders = torch.sigmoid((torch.arange(2000)[:, None] + BORDER) * rate)
    return (1 - 2 * (rate * borders * (1 - borders)).sum(0)).clamp(min=0)


class Prior(nn.Module):
    """The whole prior, in integers. `log_unit` (C,): OCTAVE * log2 of each latent channel's deviation.

    bytewise: see `Step`. centred: see the method. shifted: whether the scales have a part that depends on quality, step
    and channel alone, which costs nothing: the decoder adds it to what a channel's gain adds. contextual: see `hyper`.
    """

    def __init__(
        self,
        latent: int,
        hyper: int,
        anchors: int,
        features: int,
        hidden: int,
        bytewise: bool,
        centred: bool,
        shifted: bool,
        contextual: bool,
    ) -> None:
        super().__init__()
        self.register_buffer("log_unit", torch.zeros(latent))
        self.log_unit: Tensor
        self.anchors, self.bytewise = anchors, bytewise
        middle = features // 2
        self.widen = Pointwise(hyper + anchors, 4 * middle, HYPER, HIDDEN)
        self.spread = Depthwise(middle, 3, HIDDEN, SIGNED)
        self.widen2 = Pointwise(middle, 4 * features, SIGNED, HIDDEN)
        self.spread2 = Depthwise(features, 3, HIDDEN, SIGNED_BYTE if bytewise else SIGNED)
        self.steps = nn.ModuleList(Step(latent, features, hidden, bytewise, step) for step in range(STEPS))
        self.nearer = nn.Parameter(torch.zeros(LADDER, NEARER)) if centred else None
        # In octaves, the elements of a step in its own order.
        self.scale_shift = nn.Parameter(torch.zeros(anchors, STEPS, latent)) if shifted else None
        self.context = HyperContext(hyper, anchors) if contextual else None
        self.register_buffer("still", stillness(), persistent=False)
        self.still: Tensor

    def hyper(
        self, scaled: Tensor, gain: Tensor, first: Tensor, hats: Tensor, mode: Mode
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The hyper-latent of a prior with a context, which says what to expect at the chessboard's later colour.

        scaled (B, h, w, Z): hyper-latent times gain. gain (B, 1, 1, Z). first: the symbols of the first colour, and
        whatever at the other. Returns the dequantised hyper-latent times gain, the bits of each element at the later
        colour, of no use at the first, and which positions these are, (h, w).
        """
        assert self.context is not None
        later = torch.from_numpy(later_places(*scaled.shape[1:3])).to(scaled.device)
        known = torch.where(later[..., None], 0, first / gain).detach()
        mean, log_scale = self.context(
            rounded(known * 2**HYPER.unit, HYPER.low, HYPER.high), (hats * 2**HYPER.unit).round()
        )
        mean, level = in_symbols(mean, log_scale, gain, torch.log2(gain))
        rest = scaled - mean
        symbols = quantised(rest, level, mode, HYPER_WORTH)
        bits = coded_bits(rest, symbols, level, mode)
        return torch.where(later[..., None], symbols + mean, first), bits, later

    def features(self, z_hat: Tensor, hats: Tensor) -> Tensor:
        """Hyper-synthesis: dequantised hyper-latent (B, h/4, w/4, Z), quality (B, anchors) -> (B, h, w, F)."""
        b, h, w, _ = z_hat.shape
        z = torch.cat([z_hat, hats[:, None, None].expand(b, h, w, -1)], 3)
        middle = self.spread(enlarge(self.widen(z)))
        out: Tensor = self.spread2(enlarge(self.widen2(middle)))
        return out

    def forward(
        self, scaled: Tensor, gain: Tensor, z_hat: Tensor, hats: Tensor, mode: Mode, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent times gain (B, h, w, C), the gain (B, 1, 1, C) -> the same dequantised, and ideal bits (B,).

        z_hat (B, h/4, w/4, Z): dequantised hyper-latent. hats (B, anchors): quality. kept (B, 1, 1, C): 0 for channels
        that are left out, which are 0 and take no bits; by default none is.
        """
        masks = by_step(torch.ones_like(gain) if kept is None else kept)
        bits = scaled.new_zeros(len(scaled))
        parts = []
        steps = self.walk(scaled, gain, z_hat, hats, mode, kept)
        for (rest, symbols, mean, level), mask in zip(steps, masks, strict=True):
            own = coded_bits(rest, symbols, level, mode)
            bits = bits + (own * mask).sum((1, 2, 3))
            if torch.is_grad_enabled():
                # The straight-through gradient takes from the mean what it gives the symbol, but a 0 stays a 0: there
                # the mean is all that the picture has, and can learn from it.
                share = self.still[level.long()] * (symbols.detach().abs() < 0.5)
                mean = _Favoured.apply(mean, share)  # type: ignore[no-untyped-call]
            parts.append((self.centred(symbols, level) + mean) * mask)
        return join(parts), bits

    def shift(self) -> Tensor | None:
        """(LADDER, NEARER): how much nearer to 0 than a symbol of magnitude 1, 2, ... is what it stands for at each
        level, in whole 1/FINE symbols; None where that is the symbol itself."""
        return None if self.nearer is None else rounded(self.nearer * FINE, -127, 127)

    def centred(self, symbols: Tensor, level: Tensor) -> Tensor:
        """What symbols (any shape) stand for, at levels (the same): the centroid of what becomes one, learned.

        A steep distribution has more of it towards 0. The context sees the symbols as they are.
        """
        if (shift := self.shift()) is None:
            return symbols
        out: Tensor = _Centred.apply(symbols, level, shift / FINE)  # type: ignore[no-untyped-call]
        return out

    def walk(
        self, scaled: Tensor, gain: Tensor, z_hat: Tensor, hats: Tensor, mode: Mode, kept: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The steps as they follow each other in the decoder: latent less its mean, symbols, mean, level of the ladder.

        Each is (B, h/2, w/2, C), phase by phase, the first three in symbols. Means are whole 1/FINE symbols, as in a
        file: else what a channel without symbols learns to say by means of less than that is lost there.
        """
        features = self.features(rounded(z_hat * 2**HYPER.unit, HYPER.low, HYPER.high), (hats * 2**HYPER.unit).round())
        ratios = by_step(gain * torch.exp2(self.log_unit / OCTAVE))  # symbols per unit
        masks = by_step(torch.ones_like(gain) if kept is None else kept)
        log_ratios = [torch.log2(ratio) for ratio in ratios]
        if self.scale_shift is not None:
            shifts = (hats @ self.scale_shift.flatten(1)).reshape(len(hats), STEPS, 1, 1, -1).unbind(1)
            log_ratios = [ratio + shift for ratio, shift in zip(log_ratios, shifts, strict=True)]
        known: list[Tensor] = []
        for step, part, ratio, log_ratio, mask in zip(
            self.steps, split(scaled), ratios, log_ratios, masks, strict=True
        ):
            mean, log_scale = step(features, join(known) if known else None)
            mean, level = in_symbols(mean, log_scale, ratio, log_ratio)
            rest = part - mean
            symbols = quantised(rest, level, mode, WORTH)
            # Detached: the straight-through gradient of what the steps to come know is worse than none.
            seen = (symbols + mean).detach() * mask
            known.append(rounded(seen * (2**KNOWN.unit / ratio), KNOWN.low, KNOWN.high))
            yield rest, symbols, mean, level
