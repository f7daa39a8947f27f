"""The ONNX graphs of a model: encoder.onnx, decoder.onnx, and prior.onnx but for the classic ones.

Encoder and decoder are traced from the network. The prior is written node by node: integer weights as int8, a branch
for each step, and nothing but operators that are exact on the integers that they get (see `prior`).
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn import functional as F

from hourglass.codec.prior import STEPS
from hourglass.codec.runtime import HYPER_STEP, STRIDE
from hourglass.codec.train import prior as integers
from hourglass.codec.train.classic import Classic
from hourglass.codec.train.decoders import OPSET, Nodes, Reduced, by_row, choose, decoder, reduced
from hourglass.codec.train.network import (
    ZERO,
    Block,
    BytewiseBlock,
    Filter,
    Hourglass,
    PostFilter,
    post_of,
    unweave,
    weave,
    whole,
)
from hourglass.codec.train.prior import (
    BYTE,
    HYPER,
    KNOWN,
    LADDER,
    PER_OCTAVE,
    WEIGHT,
    Bytewise,
    Depthwise,
    IntegerLayer,
    Prior,
    Range,
)

_INT16 = 32767
_PART = (1, "channels", "half_height", "half_width")
_FEATURES = (1, "features", "features_rows", "features_columns")


class EncoderGraph(nn.Module):
    """image (1, H, W, 3) uint8, keep (4,) int64 -> latent (1, C, 4 h, 4 w), hyper (1, Z, h, w).

    H and W are multiples of 16. keep: first and last row, first and last column (exclusive) of the latent's H/16 x W/16
    positions that are wanted; the others are only there to be seen by these. The wanted ones are padded with the last
    row and column of them, up to multiples of 4.
    """

    def __init__(self, net: Hourglass) -> None:
        super().__init__()
        analysis, hyper = net.analysis, net.hyper_analysis
        self.to_trunk, self.fine, self.coarse = copy.deepcopy(analysis.to_trunk), analysis.fine, analysis.coarse
        self.to_latent, self.to_rest = _halving(analysis.to_latent), _halving(analysis.to_rest)
        self.narrow, self.blocks = copy.deepcopy(hyper.narrow), hyper.blocks
        self.to_half, self.to_quarter = _halving(hyper.to_half), _halving(hyper.to_quarter)
        order = by_row(8)
        with torch.no_grad():
            for layer in (self.to_trunk, self.to_rest):  # samples stay 0..255: one pass over the picture less
                layer.weight.copy_(layer.weight[:, order] / 255)
            self.narrow.weight *= torch.exp2(-net.prior.log_unit / integers.OCTAVE)[:, None, None]

    def forward(self, image: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        _, height, width, _ = image.shape
        rows = image.reshape(height, width // 8, 24).permute(0, 2, 1).reshape(1, height // 8, 192, width // 8)
        d = rows.permute(0, 2, 1, 3).float()
        y = weave(self.coarse(self.to_latent(self.fine(self.to_trunk(d)))), self.to_rest(d))
        y = y[:, :, keep[0] : keep[1], keep[2] : keep[3]]
        y = _filled(_filled(y, 2, keep[1] - keep[0]), 3, keep[3] - keep[2])
        return y, self.to_quarter(self.blocks(self.to_half(F.silu(self.narrow(y)))))


def _filled(x: Tensor, axis: int, size: Tensor) -> Tensor:
    """x, of `size` along an axis, with the last row or column repeated up to a multiple of 4.

    Mostly none is missing; to select all by number would move a latent's columns one float at a time.
    """
    again = (size - 1).expand(cast("int", -size % 4))
    return torch.cat([x, x.index_select(axis, again)], axis)


def _halving(layer: nn.Conv2d) -> nn.Conv2d:
    """What space-to-depth by 2 and then a 1x1 layer do, as one convolution; for onnxruntime half the work."""
    weight = layer.weight.detach()
    one = nn.Conv2d(weight.shape[1] // 4, weight.shape[0], 2, stride=2)
    one.weight = nn.Parameter(weight.reshape(*one.weight.shape).clone())
    one.bias = layer.bias
    return one


class ClassicEncoderGraph(nn.Module):
    """image (1, H, W, colours) uint8, keep (4,) int64 -> latent (1, C, h, w) float32; for max pooling also the location
    map (1, C, h, w) int16. H, W and keep as in `EncoderGraph`, but for h and w, which may be any numbers.
    """

    def __init__(self, net: Classic) -> None:
        super().__init__()
        self.analysis = net.analysis

    def forward(self, image: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        latent, locations = self.analysis(image.permute(0, 3, 1, 2).float() / 255)
        found = (latent,) if locations is None else (latent, locations.to(torch.int16))
        return tuple(tensor[:, :, keep[0] : keep[1], keep[2] : keep[3]] for tensor in found)


class ClassicDecoderGraph(nn.Module):
    """latent (1, C, h, w) float32, dequantised, for max pooling with the location map behind it as C more channels ->
    image (1, H, W, colours) uint8 of the positions in `keep`, as in `DecoderGraph`."""

    def __init__(self, net: Classic) -> None:
        super().__init__()
        self.synthesis, self.channels = net.synthesis, net.shape.latent
        self.located = net.shape.kind == "maxpool"

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        locations = latent[:, self.channels :] if self.located else None
        image: Tensor = self.synthesis(latent[:, : self.channels], locations) * 255 + 0.5  # the cast truncates
        keep = STRIDE * keep
        return image[:, :, keep[0] : keep[1], keep[2] : keep[3]].to(torch.uint8).permute(0, 2, 3, 1)


class GradientGraph(nn.Module):
    """latent (1, C, h, w), image (1, 16 h, 16 w, 3) uint8, `hats` of the quality (1, anchors), which only post-filters
    takes -> squared error of the decoded picture, and its gradient.

    The error is summed over the samples where `inside` (1, 16 h, 16 w, 1) is 1 and not 0, on the 0..255 scale; the
    gradient has the shape of the latent. The backward pass is written out: a graph of ordinary operators, for a search
    on the encoder's side without PyTorch. Bytes are rounded and clipped as in decoder.onnx, or the error would be that
    of another picture; the gradient is that of training, which passes the rounding and stops at the clip.
    """

    def __init__(self, net: Hourglass) -> None:
        super().__init__()
        self.synthesis = net.synthesis
        posts = [_PostWeights.of(post) for post in net.synthesis.posts if isinstance(post, PostFilter)]
        self.posts = _PostWeights(*map(torch.stack, zip(*posts, strict=True))) if posts else None

    def forward(
        self, latent: Tensor, image: Tensor, inside: Tensor, quality: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        net = self.synthesis
        core, rest = unweave(latent, net.core)
        x = core
        slopes: list[Tensor] = []  # what the way back needs
        for block in net.coarse:
            assert isinstance(block, Block)
            inner = block.expand(block.depthwise(x))
            slopes.append(_silu_slope(inner))
            x = x + block.project(F.silu(inner))
        x = F.pixel_shuffle(net.from_latent(x), 2)
        backs: list[_Back] = []
        for part in net.fine:
            assert isinstance(part, BytewiseBlock | Filter)
            x, back = _through(part, x)
            backs.append(back)
        d = net.from_trunk(net.overlap(x)) + F.pixel_shuffle(net.from_rest(rest), 2)
        decoded = F.pixel_shuffle(d, 8) * 255
        wanted, counted = (value.permute(0, 3, 1, 2).float() for value in (image, inside))
        on_top: Callable[[Tensor], Tensor] | None = None  # the way back through the post-filter
        if self.posts:
            assert quality is not None
            which = post_of(quality, len(self.posts.first))
            post = _PostWeights(*(values.index_select(0, which)[0] for values in self.posts))
            added, on_top = _corrected(post, decoded.clamp(0, 255).round(), quality)
            decoded = decoded + added
        error = (decoded.clamp(0, 255) - wanted) * counted
        # As in training the gradient passes the clip: a sample beyond the range is pushed back.
        g = error * (2 * 255)
        g = F.pixel_unshuffle(g + on_top(g) if on_top else g, 8)
        of_rest = F.conv_transpose2d(F.pixel_unshuffle(g, 2), net.from_rest.weight)
        g = F.conv_transpose2d(g, net.from_trunk.weight)
        g = F.conv_transpose2d(g, net.overlap.weight, padding=1, groups=len(net.overlap.weight))
        for back in reversed(backs):
            way = g
            for weight, slope in back:
                way = F.conv_transpose2d(way, weight, padding=weight.shape[2] // 2, groups=_groups(weight)) * slope
            g = g + way
        g = F.conv_transpose2d(F.pixel_unshuffle(g, 2), net.from_latent.weight)
        for block in reversed(net.coarse):
            assert isinstance(block, Block)
            of_inner = F.conv_transpose2d(g, block.project.weight) * slopes.pop()
            of_before = F.conv_transpose2d(of_inner, block.expand.weight)
            depthwise = block.depthwise.weight
            g = g + F.conv_transpose2d(of_before, depthwise, padding=1, groups=len(depthwise))
        return error.square().sum(), weave(g, of_rest)


class _PostWeights(NamedTuple):
    """Those of a post-filter, for grey levels and rounded to what they multiply; or of several, stacked."""

    first: Tensor
    first_bias: Tensor
    middle: Tensor
    middle_bias: Tensor
    last: Tensor
    last_bias: Tensor
    log_scale: Tensor
    log_gain: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, post: PostFilter) -> _PostWeights:
        integers, factor = post.differences()  # not as operations of the graph
        biases = [layer.bias.detach() for layer in (post.first, post.middle, post.last) if layer.bias is not None]
        return cls(
            first=integers * (factor[..., None] * post.level),
            first_bias=biases[0],
            middle=whole(post.middle.weight),
            middle_bias=biases[1],
            last=whole(post.last.weight),
            last_bias=biases[2],
            log_scale=post.log_scale.detach(),
            log_gain=post.log_gain.detach(),
        )


def _corrected(post: _PostWeights, levels: Tensor, quality: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a post-filter adds to a picture of whole grey levels, (1, 3, H, W), and the way back through it."""
    reach, unit, fine = PostFilter.reach, PostFilter.unit, PostFilter.fine
    scale, gain = ((quality @ log).exp()[:, None, None, None] for log in (post.log_scale, post.log_gain))
    x = F.pixel_unshuffle(F.pad(levels, (reach,) * 4, mode="replicate"), 2)
    seen, below = _as_bytes((F.conv2d(x, post.first) + post.first_bias[:, None, None]) * (scale / unit), 0)
    inner, between = _as_bytes(F.conv2d(seen * unit, post.middle, post.middle_bias) / unit, 0)
    added, above = _as_bytes(F.conv2d(inner * unit, post.last, post.last_bias) * (gain / fine), ZERO)

    def back(g: Tensor) -> Tensor:
        g = F.conv_transpose2d(F.pixel_unshuffle(g, 2) * (above * gain), post.last)
        g = F.conv_transpose2d(g * between, post.middle)
        g = F.pixel_shuffle(F.conv_transpose2d(g * (below * scale), post.first), 2)
        for _ in range(2):  # what is repeated behind an edge falls back on it: rows, then columns
            inner, above_, below_ = g[:, :, reach:-reach], g[:, :, :reach], g[:, :, -reach:]
            edges = inner[:, :, :1] + above_.sum(2, keepdim=True), inner[:, :, -1:] + below_.sum(2, keepdim=True)
            g = torch.cat([edges[0], inner[:, :, 1:-1], edges[1]], 2).transpose(2, 3)
        return g

    return F.pixel_shuffle(added * fine, 2), back


_Back: TypeAlias = list[tuple[Tensor, Tensor]]
"""The way back through a block or filter, by layers: the weight, and what the gradient is multiplied by before it."""


def _through(part: BytewiseBlock | Filter, x: Tensor) -> tuple[Tensor, _Back]:
    """What a block or filter makes of x, (1, C, h, w), and the way back."""
    assert part.log_seen is not None
    seen, before = part.log_seen.exp(), part.log_before.exp()
    depthwise = whole(part.depthwise.weight * seen[:, None], WEIGHT)
    inner, slope = _as_bytes(x / seen, ZERO)
    back = [(depthwise, slope / seen)]
    inner = F.conv2d(inner, depthwise, part.depthwise.bias, padding=1, groups=len(depthwise))
    inner, slope = _as_bytes(inner / before, ZERO)
    slope, step = slope / before, before
    if isinstance(part, BytewiseBlock):
        expand = whole(part.expand.weight * before)
        back.append((expand, slope))
        steps = {name: part.log_steps[name].exp() for name in ("inside", "active")}
        inner, slope = _as_bytes(F.conv2d(inner, expand, part.expand.bias) / steps["inside"], part.zeros["inside"])
        value = inner * steps["inside"]
        inner, unclipped = _as_bytes(F.silu(value) / steps["active"], part.zeros["active"])
        slope, step = slope * unclipped * _silu_slope(value) / steps["active"], steps["active"]
    project = whole(part.project.weight * step)
    back.append((project, slope))
    return x + F.conv2d(inner, project, part.project.bias), back[::-1]


def _groups(weight: Tensor) -> int:
    """Of a layer that is depthwise or has no groups."""
    return len(weight) if weight.shape[1] == 1 else 1


def _as_bytes(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """x, in steps, as bytes hold it of which `zero` stands for 0, and 1 where it was not clipped."""
    low, high = -zero, 255 - zero
    return x.round().clamp(low, high), ((x > low - 0.5) & (x < high + 0.5)).float()


def _silu_slope(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s + x * s * (1 - s)


def write(net: Hourglass, folder: Path, samples: list[tuple[Tensor, Tensor]]) -> None:
    """encoder.onnx, prior.onnx, decoder.onnx, reduced-2.onnx, -4, -8 and gradient.onnx, for pictures of any size.

    samples: dequantised latents, each (1, C, h, w) with the `hats` of its quality, to fit the reduced ones to.
    """
    image, latent = torch.zeros(1, 64, 128, 3, dtype=torch.uint8), torch.zeros(1, net.shape.latent, 4, 8)
    pixels, positions = {1: "height", 2: "width"}, {2: "rows", 3: "columns"}
    full = {"keep": torch.tensor([0, 4, 0, 8])}
    _trace(EncoderGraph(net), {"image": image} | full, folder / "encoder.onnx", {"image": pixels}, ["latent", "hyper"])
    onnx.save(decoder(net), folder / "decoder.onnx")
    for scale in (2, 4, 8):
        small = Reduced(net.synthesis, scale)
        small.fit(samples)
        onnx.save(reduced(small), folder / f"reduced-{scale}.onnx")
    both = {"latent": latent, "image": image, "inside": image[..., :1]}
    if net.synthesis.posts:
        both["quality"] = torch.zeros(1, net.shape.anchors)
    free = {"latent": positions, "image": pixels, "inside": pixels}
    _trace(GradientGraph(net), both, folder / "gradient.onnx", free, ["error", "slope"])
    onnx.save(prior(net.prior, net.widths), folder / "prior.onnx")


def write_classic(net: Classic, folder: Path) -> None:
    """encoder.onnx and decoder.onnx of a classic model, for pictures of any size."""
    located = net.shape.kind == "maxpool"
    image = torch.zeros(1, 64, 128, net.shape.colours, dtype=torch.uint8)
    latent = torch.zeros(1, net.shape.latent * (2 if located else 1), 4, 8)
    full = {"keep": torch.tensor([0, 4, 0, 8])}
    pixels, positions = {"image": {1: "height", 2: "width"}}, {"latent": {2: "rows", 3: "columns"}}
    outputs = ["latent", "locations"] if located else ["latent"]
    _trace(ClassicEncoderGraph(net), {"image": image} | full, folder / "encoder.onnx", pixels, outputs)
    _trace(ClassicDecoderGraph(net), {"latent": latent} | full, folder / "decoder.onnx", positions, ["image"])


def _trace(
    graph: nn.Module, samples: dict[str, Tensor], path: Path, axes: dict[str, dict[int, str]], outputs: list[str]
) -> None:
    with warnings.catch_warnings():
        # torch is pinned; its newer exporter needs a further package and cannot keep H and W free here.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", message="Constant folding", category=UserWarning)  # of how a border is made
        torch.onnx.export(
            graph.eval(),
            tuple(samples.values()),
            str(path),
            input_names=list(samples),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )


class _Nodes(Nodes):
    """What the prior is made of."""

    def clip(self, x: str, low: float, high: float) -> str:
        return self.add("Clip", x, self.number(low), self.number(high))

    def convolve(
        self, name: str, x: str, weight: Tensor, bias: Tensor | None, factor: Tensor, **attributes: Any
    ) -> str:
        """Convolution with integer weights (O, I, k, k), stored as int8, and bias, stored as int32.

        factor (O,): powers of two that each output channel is multiplied by. They go into the weights, which keeps
        every partial sum exact and saves a pass over the result.
        """

        def scaled(value: Tensor, dtype: type[np.signedinteger[Any]]) -> str:
            as_float = self.add("Cast", self.constant(_exact(value, dtype)), to=TensorProto.FLOAT)
            scale = factor.detach().numpy().astype(np.float32).reshape(-1, *[1] * (value.dim() - 1))
            return self.add("Mul", as_float, self.constant(scale))

        inputs = [x, scaled(weight, np.int8)]
        if bias is not None:
            inputs.append(scaled(bias, np.int32))
        return self.add("Conv", *inputs, name=self.prefix + name, **attributes)

    def requantise(self, total: str, after: Range) -> str:
        """Clip and round down; in this order onnxruntime makes one operator of the convolution and the clip."""
        return self.add("Floor", self.clip(total, after.low, after.high))

    def layer(self, name: str, x: str, layer: IntegerLayer | _Narrow, group: int = 1) -> str:
        """A pointwise or depthwise layer. group: its inputs are in so many groups, each with outputs of its own."""
        weight, bias, factor = layer.integers()
        attributes: dict[str, Any] = {"group": group}
        if weight.dim() == 4:  # depthwise
            pad = weight.shape[2] // 2
            attributes = {"group": len(weight), "pads": [pad] * 4}
        else:
            weight = weight[:, :, None, None]
        return self.requantise(self.convolve(name, x, weight, bias, factor, **attributes), layer.after)

    def signed_bytes(self, name: str, x: str, layer: Depthwise | _Narrow) -> str:
        """A depthwise layer to `SIGNED_BYTE`, larger by 128: float32 from 0 to 255, still with its fractions."""
        weight, bias, factor = layer.integers()
        pad = weight.shape[2] // 2
        total = self.convolve(name, x, weight, bias + ZERO / factor, factor, group=len(weight), pads=[pad] * 4)
        return self.clip(total, 0, BYTE.high)

    def bytewise(self, name: str, x: str, layer: IntegerLayer | _Narrow, zero: int) -> str:
        """A layer from bytes to bytes. zero: the byte that stands for 0 in what goes in.

        onnxruntime sums in 32-bit integers, multiplies by the channel's factor, a power of two, in float32, and rounds
        to the nearest even integer.
        """
        weight, bias, factor = layer.integers()
        one, scale = self.number(1), factor.detach().numpy().astype(np.float32)
        of_x = x, one, self.constant(np.array(zero, np.uint8))
        of_weight = _exact(weight[:, :, None, None], np.int8), scale, np.array(0, np.int8)
        of_y = one, self.constant(np.array(0, np.uint8)), self.constant(_exact(bias, np.int32))
        return self.add("QLinearConv", *of_x, *map(self.constant, of_weight), *of_y, name=self.prefix + name)

    def depthwise_part(self, name: str, x: str, layer: Depthwise | _Narrow, step: int) -> str:
        """What a 3x3 depthwise layer gives for the elements that `step` codes, and only these."""
        weight, bias, factor = layer.integers()
        size = len(weight) // 4
        parts = []
        for p in range(4):
            g = integers.group_of(step, p) * size
            bounds = (np.array([g]), np.array([g + size]), np.array([1]))
            group = self.add("Slice", x, *(self.constant(a.astype(np.int64)) for a in bounds))
            # Rows 2 i + p // 2 and columns 2 j + p % 2 are the centres: a stride of 2 from a shifted padding.
            pads = [1 - p // 2, 1 - p % 2, p // 2, p % 2]
            own = slice(g, g + size)
            centres: dict[str, Any] = {"group": size, "strides": [2, 2], "pads": pads}
            parts.append(self.convolve(f"{name}.{p}", group, weight[own], bias[own], factor[own], **centres))
        return self.requantise(self.add("Concat", *parts, axis=1), layer.after)

    def enlarge(self, x: str) -> str:
        return self.add("DepthToSpace", x, blocksize=2, mode="DCR")

    def rounded(self, x: str, limit: int) -> str:
        """floor(x + 1/2), clipped to -limit..limit."""
        return self.clip(self.add("Floor", self.add("Add", x, self.number(0.5))), -limit, limit)


def _exact(value: Tensor, dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    array: NDArray[Any] = value.detach().numpy()
    converted = array.astype(dtype)
    if (converted != array).any():
        raise ValueError(f"not integers that fit {dtype.__name__}")
    return converted


def prior(net: Prior, widths: list[int]) -> onnx.ModelProto:
    """prior.onnx: what is decoded so far -> tables and means of the elements that `step` codes.

    There is a branch for each step and each of `widths`; with width n only the first n channels of each quarter of the
    latent exist, c = 4 n in all. With a context for the hyper-latent there is a step in front, HYPER_STEP, which gives
    levels and means of that, (1, Z, h/4, w/4), from what is known of it; of the inputs below it looks at z, quality,
    and the three that are units or offsets.

    Inputs, all integers (in float32 but for z, known, step and width):
      step (): 0 to 3, or HYPER_STEP. width (): 0, 1, ... an index into `widths`.
      z (1, Z, h/4, w/4) int16: symbols of the hyper-latent, with a context 1/16 symbols. hyper_unit (Z, 1, 1): HYPER
        units for each of these.
      quality (1, anchors, 1, 1): weights of the anchors, in 0..32.
      features_before: `features` as step 0 gave them; (1, F, 1, 1) zeros at step 0.
      known (1, c, h, w) int16: the latent so far in KNOWN units, 0 where unknown; h and w multiples of 4.
      mean_unit (c, 1, 1): 1/16 symbols per MEAN unit, and level_offset (c, 1, 1), in the order of the step.
    Outputs:
      level (1, c, h/2, w/2) uint8, phase by phase: 0..63, the scale of the ladder.
      mean (1, c, h/2, w/2) int16, phase by phase: 1/16 symbols.
      features (1, F, h, w): what hyper-synthesis makes of z and quality, the same at every step.

    The `_unit`s are integers of at most 9 bits times powers of two.
    """
    main = _Nodes("")
    channels = net.widen.fan_in - net.anchors
    features = "features"
    kept = _Nodes("kept.")
    first = main.add("Equal", "step", main.constant(np.array(0, np.int64)))
    keep = kept.branch([kept.add("Identity", "features_before")], _FEATURES)
    compute = _hyper_synthesis(net, channels)
    main.nodes.append(helper.make_node("If", [first], [features], then_branch=compute, else_branch=keep))
    if net.bytewise:
        features = main.add("Cast", main.clip(features, 0, BYTE.high), to=TensorProto.UINT8)
    known = main.clip(main.add("Cast", "known", to=TensorProto.FLOAT), KNOWN.low, KNOWN.high)
    by_step = [
        choose("width", [_branch(step, width, features, known) for width in widths], f"step{step.step}")
        for step in net.steps
        if isinstance(step, integers.Step)
    ]
    if net.context is not None:
        by_step.append(_hyper_context(net.context))  # HYPER_STEP
    for output, name in zip(main.chosen("step", by_step, "steps"), ("raw_mean", "raw_level"), strict=True):
        main.add("Identity", output, name=name)
    mean = main.rounded(main.add("Mul", "raw_mean", "mean_unit"), _INT16)
    main.add("Cast", mean, to=TensorProto.INT16, name="mean")
    level = main.add("Add", main.add("Mul", "raw_level", main.number(PER_OCTAVE)), "level_offset")
    level = main.add("Floor", main.add("Mul", level, main.number(1 / integers.OCTAVE)))
    main.add("Cast", main.clip(level, 0, LADDER - 1), to=TensorProto.UINT8, name="level")
    entries = [
        ("step", TensorProto.INT64, ()),
        ("width", TensorProto.INT64, ()),
        ("z", TensorProto.INT16, (1, channels, "z_height", "z_width")),
        ("hyper_unit", TensorProto.FLOAT, (channels, 1, 1)),
        ("quality", TensorProto.FLOAT, (1, net.anchors, 1, 1)),
        ("features_before", TensorProto.FLOAT, (1, net.spread2.outputs, "features_height", "features_width")),
        ("known", TensorProto.INT16, (1, "channels", "height", "width")),
        *((name, TensorProto.FLOAT, ("channels", 1, 1)) for name in ("mean_unit", "level_offset")),
    ]
    graph = helper.make_graph(
        main.nodes,
        "prior",
        [helper.make_tensor_value_info(*entry) for entry in entries],
        [
            helper.make_tensor_value_info("level", TensorProto.UINT8, _PART),
            helper.make_tensor_value_info("mean", TensorProto.INT16, _PART),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, (1, net.spread2.outputs, "rows", "columns")),
        ],
        main.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def _of_z(nodes: _Nodes) -> str:
    """z in HYPER units."""
    return nodes.rounded(nodes.add("Mul", nodes.add("Cast", "z", to=TensorProto.FLOAT), "hyper_unit"), HYPER.high)


def _with_quality(nodes: _Nodes, name: str, x: str, channels: int, layer: IntegerLayer) -> str:
    """A pointwise layer that sees x, of `channels`, and behind it the quality, which is the same everywhere."""
    weight, bias, factor = layer.integers()
    from_x = nodes.convolve(f"{name}.z", x, weight[:, :channels, None, None], bias, factor)
    from_quality = nodes.convolve(f"{name}.quality", "quality", weight[:, channels:, None, None], None, factor)
    return nodes.requantise(nodes.add("Add", from_x, from_quality), layer.after)


def _hyper_context(context: integers.HyperContext) -> onnx.GraphProto:
    """What is known of z, and quality -> mean and scale of the rest of it."""
    nodes = _Nodes("context.")
    weight, bias, factor = context.spatial.integers()
    seen = nodes.requantise(
        nodes.convolve("spatial", _of_z(nodes), weight, bias, factor, pads=[1] * 4), context.spatial.after
    )
    hidden = _with_quality(nodes, "deepen", seen, context.spatial.outputs, context.deepen)
    return nodes.branch([nodes.layer("mean", hidden, context.mean), nodes.layer("scale", hidden, context.scale)], _PART)


def _hyper_synthesis(net: Prior, channels: int) -> onnx.GraphProto:
    """z and quality -> features."""
    nodes = _Nodes("hyper.")
    wide = _with_quality(nodes, "widen", _of_z(nodes), channels, net.widen)
    middle = nodes.layer("spread", nodes.enlarge(wide), net.spread)
    wide = nodes.enlarge(nodes.layer("widen2", middle, net.widen2))
    if net.bytewise:
        features = nodes.add("Floor", nodes.signed_bytes("spread2", wide, net.spread2))
    else:
        features = nodes.layer("spread2", wide, net.spread2)
    return nodes.branch([features], _FEATURES)


class _Narrow:
    """A layer of the prior for the first `width` channels of each quarter of the latent; the others are zero.

    It answers `integers()` as the layer does. before: the layer in front, where it is the inputs that are fewer: they
    stand behind the features, and what the missing ones would be for zeros goes into the bias.
    """

    def __init__(self, layer: IntegerLayer, width: int, latent: int, before: IntegerLayer | None = None) -> None:
        weight, bias, factor = layer.integers()
        kept = torch.arange(latent).reshape(4, -1)[:, :width].flatten()
        if before:
            other = weight.shape[1] - latent
            _, start, scale = before.integers()
            start = (start * scale).floor().clamp(before.after.low, before.after.high)
            start[kept] = 0
            bias = bias + weight[:, other:] @ start
            weight = weight[:, torch.cat([torch.arange(other), other + kept])]
        else:
            weight, bias, factor = weight[kept], bias[kept], factor[kept]
        self._integers = weight, bias, factor
        self.after = layer.after

    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._integers


def _branch(step: integers.Step, width: int, features: str, known: str) -> onnx.GraphProto:
    number, latent = step.step, step.mean.outputs
    nodes, bytewise = _Nodes(f"step{number}.{width}."), isinstance(step.mix, Bytewise)
    hidden = features
    mix: IntegerLayer | _Narrow = step.mix
    if number:
        narrow = _Narrow(step.spatial, width, latent)
        if bytewise:
            spatial = nodes.add("Cast", nodes.signed_bytes("spatial", known, narrow), to=TensorProto.UINT8)
        else:
            spatial = nodes.layer("spatial", known, narrow)
        hidden, mix = nodes.add("Concat", features, spatial, axis=1), _Narrow(step.mix, width, latent, step.spatial)
    if bytewise:
        hidden = nodes.bytewise("deepen", nodes.bytewise("mix", hidden, mix, ZERO), step.deepen, 0)
    else:
        hidden = nodes.layer("deepen", nodes.layer("mix", hidden, mix), step.deepen)
    phases = nodes.add("SpaceToDepth", hidden, blocksize=2)
    if bytewise:
        phases = nodes.add("Cast", phases, to=TensorProto.FLOAT)
    mean = nodes.layer("mean", phases, _Narrow(step.mean, width, latent), group=4)
    if number:
        direct = nodes.depthwise_part("direct", known, _Narrow(step.direct, width, latent), number)
        mean = nodes.add("Add", mean, direct)
    return nodes.branch([mean, nodes.layer("scale", phases, _Narrow(step.scale, width, latent), group=4)], _PART)


class PriorGraph(nn.Module):
    """The same integers as prior.onnx from the trained layers, in the precision of its inputs; the tests compare.

    It computes the features itself, at every step.
    """

    def __init__(self, net: Prior) -> None:
        super().__init__()
        self.net = net

    @torch.no_grad()
    def forward(self, step: int, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inputs of prior.onnx but `step` -> level, mean (1, C, h/2, w/2)."""
        net = self.net

        def last(x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

        z = (last(inputs["z"] * inputs["hyper_unit"]) + 0.5).floor().clamp(-HYPER.high, HYPER.high)
        quality = inputs["quality"][:, :, 0, 0]
        if step == HYPER_STEP:
            assert net.context is not None
            mean, scale = net.context(z, quality)
        else:
            known = last(inputs["known"]).clamp(KNOWN.low, KNOWN.high)
            mean, scale = net.steps[step](net.features(z, quality), known if step else None)
        mean, scale = mean.permute(0, 3, 1, 2), scale.permute(0, 3, 1, 2)
        mean = (mean * inputs["mean_unit"] + 0.5).floor().clamp(-_INT16, _INT16)
        level = ((scale * PER_OCTAVE + inputs["level_offset"]) / integers.OCTAVE).floor().clamp(0, LADDER - 1)
        return level, mean


def kmacs(folder: Path) -> dict[str, float]:
    """Thousands of multiplications with additions for each pixel: analysis, prior (all its steps) where there is one,
    synthesis."""
    names = {"analysis": "encoder.onnx", "prior": "prior.onnx", "synthesis": "decoder.onnx"}
    present = {name: folder / file for name, file in names.items() if (folder / file).exists()}
    return {name: round(sum(macs_per_pixel(path).values()) / 1000, 3) for name, path in present.items()}


def macs_per_pixel(path: Path) -> dict[str, float]:
    """Multiplications with additions for each pixel of the picture, counted from the shapes in an ONNX file.

    All matrix products and convolutions of the graph; of a prior.onnx, which runs once for each step, the sum of its
    steps at full width; of a decoder.onnx those of one post-filter, as the others have as many. Returned by
    name of the layer.
    """
    model = onnx.load(path)
    if not any(entry.name == "step" for entry in model.graph.input):
        _take_branches(model.graph, {"post": 0})
        return _macs(model)
    widths = sorted({_width(branch) for branch in _branches(model.graph)} - {0})
    channels = dict.fromkeys(range(STEPS), 4 * widths[-1])
    if any(branch.name == "branchcontext." for branch in _branches(model.graph)):
        (hyper,) = (entry.type.tensor_type.shape.dim[1] for entry in model.graph.input if entry.name == "z")
        channels[HYPER_STEP] = hyper.dim_value
    counts: dict[str, float] = {}
    for step, of_step in channels.items():
        taken = onnx.ModelProto()
        taken.CopyFrom(model)
        _take_branches(taken.graph, {"step": step, "width": len(widths) - 1})
        counts |= _macs(taken, of_step)
    return counts


def _branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """All graphs inside a graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from _branches(attribute.g)


def _width(branch: onnx.GraphProto) -> int:
    """Channels of each quarter that a branch is for; 0 where it is for none in particular."""
    parts = branch.name.split(".")
    return int(parts[1]) if len(parts) > 2 else 0


def _take_branches(graph: onnx.GraphProto, index: dict[str, int]) -> None:
    """Replace every `If` by the branch that is taken when these values are as in `index`, in place."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    conditions = {node.output[0]: node for node in graph.node if node.op_type in ("Equal", "Less")}
    nodes = []
    for node in graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        condition = conditions[node.input[0]]
        value, bound = index[condition.input[0]], int(constants[condition.input[1]])
        taken = value == bound if condition.op_type == "Equal" else value < bound
        (branch,) = (a.g for a in node.attribute if a.name == ("then_branch" if taken else "else_branch"))
        _take_branches(branch, index)
        nodes += [*branch.node]
        nodes += [
            helper.make_node("Identity", [inner.name], [outer])
            for inner, outer in zip(branch.output, node.output, strict=True)
        ]
        graph.initializer.extend(branch.initializer)
    del graph.node[:]
    graph.node.extend(nodes)


def _in_standard_operators(graph: onnx.GraphProto) -> None:
    """In place; of the same products and shapes: the inference of shapes knows no operators of onnxruntime's own."""
    nodes = []
    for node in graph.node:
        sums = f"{node.name}.sums"
        if node.op_type == "MatMulIntegerToFloat":
            nodes.append(helper.make_node("MatMulInteger", node.input[:2], [sums], name=node.name))
            node = helper.make_node("Cast", [sums], node.output, to=TensorProto.FLOAT)
        elif node.op_type == "QLinearConv" and node.domain:
            nodes.append(helper.make_node("Transpose", node.input[:1], [f"{node.name}.first"], perm=[0, 3, 1, 2]))
            kept = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "channels_last"}
            inputs = [f"{node.name}.first", *node.input[1:]]
            nodes.append(helper.make_node("QLinearConv", inputs, [sums], name=node.name, **kept))
            node = helper.make_node("Transpose", [sums], node.output, perm=[0, 2, 3, 1])
        elif node.op_type in ("QLinearSigmoid", "QLinearMul"):
            node = helper.make_node("Identity", node.input[:1], node.output)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _macs(model: onnx.ModelProto, channels: int = 0) -> dict[str, float]:
    side = 256
    strides = {"image": 1, "latent": 16, "core": 16, "rest": 16, "known": 16, "features_before": 16, "z": 64}
    fixed = {"keep": np.array([0, side // 16] * 2), "rest_end": np.array(1 << 31)}
    graph = model.graph
    _in_standard_operators(graph)
    for entry in list(graph.input):
        if entry.name in fixed:
            graph.initializer.append(numpy_helper.from_array(fixed[entry.name], entry.name))
            graph.input.remove(entry)
        for dimension in entry.type.tensor_type.shape.dim:
            if dimension.dim_param == "channels":
                dimension.dim_value = channels
            elif dimension.dim_param:
                dimension.dim_value = side // strides[entry.name]
    options = ort.SessionOptions()
    options.log_severity_level = 3  # what it leaves out once it knows the sizes needs no warning
    # With sizes fixed, onnxruntime computes every shape; it fuses nothing that would change a count.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "fixed.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(options.optimized_model_filepath)).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.value_info, *graph.output]
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    counts: dict[str, float] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            weight, output = shapes[node.input[1]], shapes[node.output[0]]
            counts[node.name] = float(np.prod(output)) * float(np.prod(weight[1:])) / side**2
        elif node.op_type == "QLinearConv":
            weight, output = shapes[node.input[3]], shapes[node.output[0]]
            counts[node.name] = float(np.prod(output)) * float(np.prod(weight[1:])) / side**2
        elif node.op_type == "ConvTranspose":
            weight, given = shapes[node.input[1]], shapes[node.input[0]]
            counts[node.name] = float(np.prod(given)) * float(np.prod(weight[1:])) / side**2
        elif node.op_type in ("MatMulInteger", "MatMul", "Gemm"):
            assert not any(a.name.startswith("trans") and a.i for a in node.attribute)
            weight, output = shapes[node.input[1]], shapes[node.output[0]]
            counts[node.name] = float(np.prod(output)) * weight[0] / side**2
    return counts
