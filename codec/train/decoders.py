"""decoder.onnx and reduced-*.onnx, written node by node: the synthesis transform with the bytes of training.

Positions come before channels from the trunk on, (1, h, w, C): so a 1x1 layer is one matrix product, bytes need no
rearrangement between layers, and depth-to-space moves whole rows of channels. The trunk is held in the steps of the
bytes that its filters see, which makes these a plain cast of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec.errors import InvalidArgument
from hourglass.codec.train.network import (
    ZERO,
    Block,
    BytewiseBlock,
    Filter,
    Hourglass,
    PostFilter,
    Synthesis,
    post_of,
    row_factor,
    unweave,
)
from hourglass.codec.train.prior import BYTE_WEIGHT, WEIGHT

OPSET = 18

_OF_RUNTIME = "com.microsoft"
"""onnxruntime's own operators."""

_GATE = 1 / 256
"""The step of the bytes that a sigmoid becomes."""

_FEW = 16
"""Outputs of a 3x3 filter that onnxruntime computes at a time, as fast as fewer."""

_SEEN = {2: 2, 4: 2, 8: 4}
"""Depthwise layers of the blocks and filters at 1/8, from the first on, that a smaller picture sees, by its scale."""

_NARROW = 96
"""Channels that a linear map makes of what a filter with many outputs sees."""

FILTERED = (2, 4)
"""The scales of smaller pictures that have post-filters."""

_PASSES, _CROPS, _CROP, _RATE = 25, 8, 64, 6e-3
"""How these learn: passes through the samples, crops in a step and their pixels a side, Adam's rate at first."""

_Part: TypeAlias = BytewiseBlock | Filter
"""What adds to the trunk."""


class Nodes:
    """Nodes and constants of one graph (or a part of it) in the making."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{self.prefix}{operator}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def constant(self, value: NDArray[Any]) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def branch(
        self, outputs: Sequence[str], shape: Sequence[int | str], element: int = TensorProto.FLOAT
    ) -> onnx.GraphProto:
        """These nodes as one of the graphs that `choose` takes."""
        values = [helper.make_tensor_value_info(name, element, shape) for name in outputs]
        return helper.make_graph(self.nodes, f"branch{self.prefix}", [], values, self.constants)

    def chosen(self, index: str, branches: Sequence[onnx.GraphProto], prefix: str) -> list[str]:
        """The outputs of `choose`, whose nodes become some of these."""
        graph = choose(index, branches, prefix)
        self.nodes += graph.node
        self.constants += graph.initializer
        return [output.name for output in graph.output]


def choose(index: str, branches: Sequence[onnx.GraphProto], prefix: str, first: int = 0) -> onnx.GraphProto:
    """A graph that does what branch number `index`, int64, does, where `branches` are those from number `first` on;
    the first of them for smaller numbers, the last for larger ones."""
    if len(branches) == 1:
        return branches[0]
    nodes, half = Nodes(f"{prefix}."), len(branches) // 2
    early = nodes.add("Less", index, nodes.constant(np.array(first + half, np.int64)))
    before = choose(index, branches[:half], f"{prefix}a", first)
    after = choose(index, branches[half:], f"{prefix}b", first + half)
    outputs = [f"{prefix}.{number}" for number in range(len(before.output))]
    nodes.nodes.append(helper.make_node("If", [early], outputs, then_branch=before, else_branch=after))
    like = before.output[0].type.tensor_type
    return nodes.branch(outputs, [d.dim_param or d.dim_value for d in like.shape.dim], like.elem_type)


class Reduced(nn.Module):
    """What stands for the synthesis where a picture is decoded at 1/2, 1/4 or 1/8 of its size.

    In the place of all that adds to the trunk and of what follows `fit` puts one linear 3x3 filter. It sees the trunk
    and the bytes that the first of the filters and blocks have behind their depthwise layers; with many outputs a
    linear map of these to fewer channels. posts: the post-filters, if there are any here, which learn a little more.
    """

    def __init__(self, synthesis: Synthesis, scale: int) -> None:
        super().__init__()
        self.synthesis, self.scale, self.side = synthesis, scale, 8 // scale
        samples, trunk = 3 * self.side**2, synthesis.overlap.out_channels  # samples: at a position at 1/8 resolution
        self.seen = [part for part in synthesis.fine if isinstance(part, _Part)][: _SEEN[scale]]
        inputs = (1 + len(self.seen)) * trunk
        narrow = min(_NARROW, inputs)
        self.narrow = nn.Conv2d(inputs, narrow, 1, bias=False) if samples >= _FEW else None
        self.head = nn.Conv2d(narrow if self.narrow else inputs, samples, 3)
        self.posts = copy.deepcopy(synthesis.posts) if scale in FILTERED else nn.ModuleList()

    def features(self, core: Tensor) -> Tensor:
        """core (1, c, h, w) -> the trunk and the bytes, (1, (1 + n) t, 2 h, 2 w)."""
        t = F.pixel_shuffle(self.synthesis.from_latent(self.synthesis.coarse(core)), 2)
        return torch.cat([t, *(part.before(t) * _step(part) for part in self.seen)], 1)

    def forward(self, latent: Tensor) -> Tensor:
        """A dequantised latent (1, C, h, w) -> the picture (1, 3, H, W) in grey levels, without a post-filter."""
        core, rest = unweave(latent, self.synthesis.core)
        x = self.features(core)
        d: Tensor = self.head(F.pad(self.narrow(x) if self.narrow else x, (1, 1, 1, 1), mode="replicate"))
        small = F.pixel_shuffle(d[:, by_row(self.side).argsort()], self.side)
        more = F.avg_pool2d(F.pixel_shuffle(self.synthesis.rest_to_depth(rest), 8), self.scale)
        return ((small + more) * 255).round().clamp(0, 255)

    @torch.no_grad()
    def fit(self, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the filter the one with the least squared error from the means of what the synthesis makes of
        dequantised latents, each (1, C, h, w) with the `hats` of its quality, (1, anchors); then the post-filters.
        """
        pairs = []
        for latent, _ in samples[:: 3 * len(self.seen)]:  # a filter that sees more takes longer with each
            core, _ = unweave(latent, self.synthesis.core)
            wanted = F.avg_pool2d(F.pixel_shuffle(self.synthesis.core_to_depth(core), 8), self.scale)
            pairs.append((self.features(core), F.pixel_unshuffle(wanted, self.side)[0][by_row(self.side)].flatten(1)))
        solved = self._solve(pairs)
        if self.narrow:
            self.narrow.weight.copy_(_directions(solved, [x for x, _ in pairs], len(self.narrow.weight)))
            solved = self._solve([(self.narrow(x), wanted) for x, wanted in pairs])
        assert self.head.bias is not None
        self.head.weight.copy_(solved[:, :-1].reshape(self.head.weight.shape))
        self.head.bias.copy_(solved[:, -1])
        for number, post in enumerate(self.posts):
            assert isinstance(post, PostFilter)
            own = [sample for sample in samples if int(post_of(sample[1], len(self.posts))) == number]
            self._learn(post, own or samples)

    @torch.enable_grad()
    def _learn(self, post: PostFilter, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adam, its rate falling as a cosine, on the squared error from the means of the full picture."""
        with torch.no_grad():
            pairs = [
                torch.cat([self(latent), F.avg_pool2d(255 * self.synthesis(latent, weights), self.scale)])
                for latent, weights in samples
            ]
        side = min(_CROP, *(min(pair.shape[2:]) // 2 * 2 for pair in pairs))
        steps = max(1, _PASSES * len(samples))
        optimiser = torch.optim.Adam(post.requires_grad_(True).parameters(), lr=_RATE, betas=(0.9, 0.98))
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            chosen = torch.randint(len(samples), (_CROPS,), generator=generator).tolist()
            crops = []
            for number in chosen:
                pair = pairs[number]
                y, x = (int(torch.randint((size - side) // 2 + 1, (), generator=generator)) for size in pair.shape[2:])
                crops.append(pair[:, :, 2 * y : 2 * y + side, 2 * x : 2 * x + side])
            seen, aim = torch.stack(crops, 1)
            error = seen + post(seen, torch.cat([samples[number][1] for number in chosen])) - aim
            optimiser.zero_grad()
            error.square().mean().backward()
            optimiser.step()
            falling.step()
        post.requires_grad_(False)

    @staticmethod
    def _solve(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(samples, 9 C + 1): the 3x3 filter, and its bias, from (1, C, h, w), whose edge is repeated, to
        (samples, h w)."""
        inputs, outputs = 9 * pairs[0][0].shape[1] + 1, len(pairs[0][1])
        squares, products = torch.zeros(inputs, inputs).double(), torch.zeros(inputs, outputs).double()
        for x, wanted in pairs:
            a = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3)[0].double()
            a = torch.cat([a, torch.ones_like(a[:1])])
            squares += a @ a.T
            products += a @ wanted.double().T
        squares += torch.eye(inputs) * squares.diagonal().mean() * 1e-8
        solved: Tensor = torch.linalg.solve(squares, products).float().T
        return solved


def _directions(solved: Tensor, features: list[Tensor], count: int) -> Tensor:
    """(count, C, 1, 1): a linear map of C channels to those directions that a 3x3 filter makes most of.

    solved: (samples, 9 C + 1). features: (1, C, h, w) each. Reduced-rank regression.
    """
    x = torch.cat([x[0].flatten(1) for x in features], 1).double()
    values, vectors = torch.linalg.eigh(x @ x.T / x.shape[1])
    deviations = values.clamp(min=float(values.max()) * 1e-9).sqrt()
    weight = solved[:, :-1].double().reshape(len(solved), len(x), 9).permute(0, 2, 1).flatten(0, 1)
    _, _, directions = torch.linalg.svd(weight @ vectors * deviations, full_matrices=False)
    found: Tensor = (directions[:count] / deviations @ vectors.T).float()[:, :, None, None]
    return found


def decoder(net: Hourglass) -> onnx.ModelProto:
    """decoder.onnx: dequantised latents -> image (1, H, W, 3) uint8 of the positions in `keep`.

    core (1, c, h, w) float32. keep (4,) int64: first and last row, first and last column (exclusive) of the positions
    that are wanted, 16x16 pixels each. rest (1, r, h', w') float32 of these alone, or zeros (1, r, 1, 1) where it is
    all zero, which saves its work. With post-filters, rest of one more row and column on each side, where core has
    them, which they look at; and quality (1, anchors) float32, the `hats` that they depend on.

    Raises `InvalidArgument` for a network that sees floats there.
    """
    synthesis, graph = net.synthesis, _Decoder(net.synthesis)
    t, seen = graph.trunk(), graph.ring() if synthesis.posts else "keep"
    wanted = graph.fine(seen)
    for number, own in enumerate(graph.parts):
        left, is_middle = len(graph.parts) - number, number == len(graph.parts) // 2
        t, wanted = graph.part(f"fine.{number}", own, t, wanted, left if is_middle else None)
    overlap, kernel = synthesis.overlap, synthesis.overlap.weight * graph.step[:, None]
    first = graph.add("Transpose", t, perm=[0, 3, 1, 2])
    x = graph.convolve("overlap", first, kernel, _bias(overlap), overlap.groups, pad=1)
    x = graph.add("Transpose", graph.cut(x, wanted, (2, 3)), perm=[0, 2, 3, 1])
    order = by_row(8)
    weight, bias = synthesis.from_trunk.weight[order, :, 0, 0], synthesis.from_trunk.bias
    assert bias is not None
    d = graph.product("from_trunk", x, 255 * weight.T, 255 * bias[order])
    rest = synthesis.from_rest.weight.reshape(192, 2, 2, -1)[order]
    return graph.finished(d, rest, 8, seen, synthesis.posts)


def reduced(small: Reduced) -> onnx.ModelProto:
    """reduced-2.onnx, -4, -8: what decoder.onnx takes -> image (1, H / scale, W / scale, 3) uint8.

    Those that have no post-filters take no quality, and of rest what is wanted alone.
    """
    graph = _Decoder(small.synthesis)
    seen, side = graph.ring() if small.posts else "keep", small.side
    t, wanted = graph.trunk(), graph.fine(seen)
    floats = [
        graph.add("DequantizeLinear", graph.before(f"fine.{number}", own, t), graph.number(1), graph.zero(ZERO))
        for number, own in enumerate(small.seen)
    ]
    features = graph.add("Concat", t, *floats, axis=3)
    steps = torch.cat([graph.step, *map(_step, small.seen)])
    weight, bias = 255 * small.head.weight, 255 * _bias(small.head)
    samples = len(weight)
    # A ring around what is wanted, which the filter sees; where the patch ends, its edge is repeated.
    if small.narrow:
        x = graph.product("narrow", features, (small.narrow.weight * steps)[:, :, 0, 0].T, None)
        d = graph.bordered(graph.add("Transpose", x, perm=[0, 3, 1, 2]), (2, 3))
        d = graph.convolve("head", d, weight, bias)
        d = graph.add("Transpose", d, perm=[0, 2, 3, 1])
    else:
        # onnxruntime computes _FEW outputs at a time: with fewer it is a 1x1 layer with those of all its nine places,
        # moved there and summed.
        matrix = (weight * steps).permute(1, 2, 3, 0).reshape(len(steps), 9 * samples)
        d = graph.moved(graph.bordered(graph.product("head", features, matrix, None), (1, 2)), samples, bias)
    rest = small.synthesis.from_rest.weight.reshape(3, side, small.scale, side, small.scale, 4, -1).mean((2, 4))
    rest = rest.reshape(3 * side**2, 2, 2, -1)[by_row(side)]
    return graph.finished(graph.cut(d, wanted, (1, 2)), rest, side, seen, small.posts)


class _Decoder(Nodes):
    """step: (t, 1, 1), what the trunk is divided by."""

    def __init__(self, synthesis: Synthesis, prefix: str = "") -> None:
        super().__init__(prefix)
        self.parts = [part for part in synthesis.fine if isinstance(part, _Part)]
        seen = [part.log_seen for part in self.parts]
        if not seen or seen[0] is None or len(seen) < len(synthesis.fine):
            raise InvalidArgument("the synthesis does not see bytes; such a network is exported no more")
        self.synthesis = synthesis
        self.step = seen[0].detach().exp()

    def whole_numbers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def fine(self, ends: str) -> str:
        """Ends of rows and columns, (4,), at 1/8 resolution."""
        return self.add("Mul", ends, self.whole_numbers(2))

    def ring(self) -> str:
        """(4,): `keep` with one more row and column of positions on each side, where core has them."""
        size = self.add("Gather", self.add("Shape", "core"), self.whole_numbers(2, 2, 3, 3))
        wider = self.add("Add", "keep", self.whole_numbers(-1, 1, -1, 1))
        return self.add("Max", self.add("Min", wider, size), self.whole_numbers(0))

    def convolve(self, name: str, x: str, weight: Tensor, bias: Tensor, groups: int = 1, pad: int = 0) -> str:
        """(1, C, h, w) -> (1, C', h', w'), with zeros of `pad` positions around."""
        inputs = (x, self.constant(_array(weight)), self.constant(_array(bias)))
        return self.add("Conv", *inputs, name=name, group=groups, pads=[pad] * 4)

    def product(self, name: str, x: str, matrix: Tensor, bias: Tensor | None) -> str:
        """(1, h, w, C) and (C, C') -> (1, h, w, C')."""
        out = self.add("MatMul", x, self.constant(_array(matrix)), name=name)
        return out if bias is None else self.add("Add", out, self.constant(_array(bias)))

    def cut(self, x: str, ends: str, axes: tuple[int, int]) -> str:
        """Rows ends[0] to ends[1] (exclusive) and columns ends[2] to ends[3], which lie along `axes`."""
        first, last = (self.add("Gather", ends, self.whole_numbers(*places)) for places in ((0, 2), (1, 3)))
        return self.add("Slice", x, first, last, self.whole_numbers(*axes))

    def bordered(self, x: str, axes: tuple[int, int]) -> str:
        """One more row and column on each side, along `axes`: the edge is repeated."""
        pads = np.zeros((2, 4), np.int64)
        pads[:, list(axes)] = 1
        return self.add("Pad", x, self.constant(pads.flatten()), mode="edge")

    def moved(self, places: str, samples: int, bias: Tensor) -> str:
        """(1, h + 2, w + 2, 9 n), what a 3x3 filter makes at each of its places -> (1, h, w, n), what it gives."""
        total = self.constant(_array(bias))
        for place in range(9):
            row, column = divmod(place, 3)
            # A negative end counts from behind; none does where the last row or column is in it.
            ends = (row - 2 if row < 2 else 1 << 31), (column - 2 if column < 2 else 1 << 31)
            first = self.whole_numbers(row, column, place * samples)
            last = self.whole_numbers(*ends, (place + 1) * samples)
            total = self.add("Add", total, self.add("Slice", places, first, last, self.whole_numbers(1, 2, 3)))
        return total

    def trunk(self) -> str:
        """core -> what the blocks at 1/8 resolution add to, (1, 2 h, 2 w, t), in steps."""
        x = "core"
        for number, block in enumerate(self.synthesis.coarse):
            assert isinstance(block, Block)
            name, first = f"coarse.{number}", block.depthwise
            seen = self.convolve(f"{name}.depthwise", x, first.weight, _bias(first), first.groups, pad=1)
            inside = self.convolve(f"{name}.expand", seen, block.expand.weight, _bias(block.expand))
            active = self.add("Mul", inside, self.add("Sigmoid", inside))
            x = self.add("Add", x, self.convolve(f"{name}.project", active, block.project.weight, _bias(block.project)))
        layer, channels = self.synthesis.from_latent, len(self.step)
        assert layer.bias is not None
        # Four positions of all channels, one row after the other.
        weight = (layer.weight.reshape(channels, 2, 2, -1) / self.step[..., None]).permute(3, 1, 2, 0).flatten(1)
        bias = (layer.bias.reshape(channels, 2, 2) / self.step).permute(1, 2, 0).flatten()
        y = self.product("from_latent", self.add("Transpose", x, perm=[0, 2, 3, 1]), weight, bias)
        two = self.whole_numbers(2)
        size = [self.add("Mul", count, two) for count in self.size(y)]
        whole = self.add("Concat", self.whole_numbers(1), *size, self.whole_numbers(channels), axis=0)
        return self.add("Reshape", self.doubled(y, channels), whole)

    def size(self, x: str) -> list[str]:
        """(1, h, w, C) -> h, w, each (1,)."""
        return [self.add("Shape", x, start=axis, end=axis + 1) for axis in (1, 2)]

    def doubled(self, y: str, channels: int) -> str:
        """Depth-to-space by 2, (1, h, w, 4 C), one row of positions after the other -> (h, 2, w, 2 C)."""
        rows = self.add("Concat", *self.size(y), self.whole_numbers(2), self.whole_numbers(2 * channels), axis=0)
        return self.add("Transpose", self.add("Reshape", y, rows), perm=[0, 2, 1, 3])

    def part(self, name: str, own: _Part, t: str, wanted: str, left: int | None = None) -> tuple[str, str]:
        """A block or filter, and the ends of what is wanted in what it gives.

        left: what the wanted positions look at no more is left out from here on, where so many are to come, with this
        one. Once: it moves the floats of t.
        """
        before = self.before(name, own, t)
        if left is not None:
            kept = self.add("Add", wanted, self.whole_numbers(-left, left, -left, left))
            kept = self.add("Max", kept, self.whole_numbers(0))
            t, before = self.cut(t, kept, (1, 2)), self.cut(before, kept, (1, 2))
            wanted = self.add("Sub", wanted, self.add("Gather", kept, self.whole_numbers(0, 0, 2, 2)))
        inner, step, zero = self._inner(name, own, before)
        trunk, (integers, factor) = self.step.flatten(), _integers(own.project.weight * step)
        # A matrix product, a cast, a scale and a bias in one: three passes over the floats less.
        inputs = (
            self.constant(_int8(integers[:, :, 0, 0].T)),
            self.number(1),
            self.constant(_array(factor / trunk)),
            self.zero(zero),
            "",
            self.constant(_array(_bias(own.project) / trunk)),
        )
        added = self.add("MatMulIntegerToFloat", inner, *inputs, name=f"{name}.project", domain=_OF_RUNTIME)
        return self.add("Add", t, added), wanted

    def before(self, name: str, own: _Part, t: str) -> str:
        """The bytes behind the depthwise layer, (1, h, w, t)."""
        seen = self.add("QuantizeLinear", t, self.number(1), self.zero(ZERO))
        weight = own.depthwise.weight * self.step[:, None]
        attributes = {"group": len(weight), "pads": [1] * 4}
        return self._bytes(f"{name}.depthwise", seen, weight, _bias(own.depthwise), _step(own), WEIGHT, **attributes)

    def _inner(self, name: str, own: _Part, before: str) -> tuple[str, Tensor, int]:
        """The bytes that the projection of a block or filter takes, (1, h, w, inside); their steps, (inside, 1, 1) or
        (), and which of them stands for 0."""
        if isinstance(own, Filter):
            return before, _step(own), ZERO
        steps, zeros = {key: value.detach().exp() for key, value in own.log_steps.items()}, own.zeros
        weight = own.expand.weight * steps["before"]
        inside = self._bytes(f"{name}.expand", before, weight, _bias(own.expand), steps["inside"], BYTE_WEIGHT)
        value = self.number(float(steps["inside"])), self.zero(zeros["inside"])
        gate = self.number(_GATE), self.zero(0)
        sigmoid = self.add("QLinearSigmoid", inside, *value, *gate, domain=_OF_RUNTIME)
        after = self.number(float(steps["active"])), self.zero(zeros["active"])
        active = self.add("QLinearMul", inside, *value, sigmoid, *gate, *after, domain=_OF_RUNTIME)
        return active, steps["active"], zeros["active"]

    def _bytes(
        self, name: str, x: str, weight: Tensor, bias: Tensor, after: Tensor, largest: int, **attributes: Any
    ) -> str:
        """A convolution of bytes, weight (O, I, k, k) in their steps, to bytes of steps `after`, (O, 1, 1) or ()."""
        integers, factor = _integers(weight, largest)
        scale = _array(factor / after.flatten())
        constants: list[NDArray[Any]] = [_int8(integers), scale, np.array(0, np.int8)]
        inputs = self.number(1), self.zero(ZERO), *map(self.constant, constants), self.number(1), self.zero(ZERO)
        whole_bias = self.constant(np.rint(_array(bias / factor)).astype(np.int32))
        attributes |= {"name": name, "domain": _OF_RUNTIME, "channels_last": 1}
        return self.add("QLinearConv", x, *inputs, whole_bias, **attributes)

    def zero(self, value: int) -> str:
        """The byte that stands for 0."""
        return self.constant(np.array(value, np.uint8))

    def with_rest(self, d: str, rest: Tensor) -> str:
        """d (1, 2 h', 2 w', n), grey levels, and what rest adds -> (h', 2, w', 2 n).

        rest: weights (n, 2, 2, r).
        """
        samples = len(rest)
        weight = 255 * rest.permute(3, 1, 2, 0).flatten(1)  # (r, 4 positions of all samples, one row after the other)
        added = self.product("from_rest", self.add("Transpose", "rest", perm=[0, 2, 3, 1]), weight, None)
        added = self.doubled(added, samples)  # (h', 2, w', 2 n), or (1, 2, 1, 2 n)
        two, both, minus = self.whole_numbers(2), self.whole_numbers(2 * samples), self.whole_numbers(-1)
        across = self.add("Div", self.size(d)[1], two)
        paired = self.add("Reshape", d, self.add("Concat", minus, two, across, both, axis=0))
        return self.add("Add", paired, added)

    def finished(self, d: str, rest: Tensor, side: int, seen: str, posts: nn.ModuleList) -> onnx.ModelProto:
        """The model: d (1, 2 h', 2 w', 3 side^2), grey levels of the positions in `seen`, and what rest adds -> image
        (1, H, W, 3) of those in `keep`, which are fewer with post-filters alone.

        rest: weights (3 side^2, 2, 2, r). Channels are `by_row`.
        """
        total, size = self.with_rest(d, rest), self.size(d)
        filters = [post for post in posts if isinstance(post, PostFilter)]
        if filters:
            self.corrected(self.lines(total, size, side, 3 * side), seen, filters, 2 * side)
        else:
            levels = self.add("QuantizeLinear", total, self.number(1), self.zero(0))
            self.lines(levels, size, side, 3 * side, "image")
        return self.model(rest.shape[-1], filters[0].log_gain.numel() if filters else 0)

    def corrected(self, d: str, seen: str, posts: Sequence[PostFilter], side: int) -> None:
        """The output: d (1, H, W, 3), grey levels of the positions in `seen`, and what the post-filter of the quality
        adds to those in `keep`. side: pixels of a position."""
        number, reach = self.whole_numbers, PostFilter.reach
        # What is wanted, and as much around as the filter looks at; where there is nothing the edge is repeated.
        first = self.add("Gather", seen, number(0, 0, 2, 2))
        ends = self.add("Mul", self.add("Sub", "keep", first), number(side))
        size = self.add("Gather", self.add("Shape", d), number(1, 1, 2, 2))
        near = self.add("Add", ends, number(-reach, reach, -reach, reach))
        near = self.add("Max", self.add("Min", near, size), number(0))
        levels = self.cut(self.add("QuantizeLinear", d, self.number(1), self.zero(0)), near, (1, 2))
        missing = self.add("Sub", number(reach), self.add("Abs", self.add("Sub", ends, near)))
        before, behind = (self.add("Gather", missing, number(*places)) for places in ((0, 2), (1, 3)))
        pads = self.add("Concat", number(0), before, number(0, 0), behind, number(0), axis=0)
        x = self.add("Pad", levels, pads, mode="edge")
        anchors = posts[0].log_gain.numel()
        place = self.add("MatMul", "quality", self.constant(np.arange(anchors, dtype=np.float32)))
        place = self.add("Mul", place, self.number(len(posts) / (anchors - 1)))
        self.add("Squeeze", self.add("Cast", place, to=TensorProto.INT64), name="post")
        # Weights that a graph chooses are no constants to onnxruntime, which makes its layers half as fast again.
        branches = [_Decoder(self.synthesis, f"post{n}.").correction(post, x) for n, post in enumerate(posts)]
        (added,) = self.chosen("post", branches, "posts")
        added = self.add("DequantizeLinear", added, self.number(PostFilter.fine), self.zero(ZERO))
        levels = self.add("Add", self.cut(d, ends, (1, 2)), added)
        self.add("QuantizeLinear", levels, self.number(1), self.zero(0), name="image")

    def correction(self, post: PostFilter, x: str) -> onnx.GraphProto:
        """x, bytes (1, H + 8, W + 8, 3) -> what a post-filter adds, bytes (1, H, W, 3).

        onnxruntime copies what one place of a kernel sees at a time, and computes _FEW outputs as fast as fewer, or
        faster. So pixels become groups of 2x2 first, two at a time by a layer that only moves them, and the last layer
        has four outputs that are nothing.
        """
        scale, gain = (
            self.add("Exp", self.add("MatMul", "quality", self.constant(_array(values))))
            for values in (post.log_scale, post.log_gain)
        )
        unit, fine = self.number(post.unit), self.number(post.fine)
        # Four R, four G, four B of a group.
        moved = _together(torch.eye(12).reshape(12, 3, 2, 2), 2, 2), torch.ones(24), torch.zeros(24)
        x = self._requantised(f"{self.prefix}pairs", x, 1, moved, (self.number(1), 0), [2, 4])
        x = self.add("Reshape", x, self.whole_numbers(0, 0, -1, 12))
        integers, factor = post.differences()
        values = integers, factor.flatten(), _bias(post.first)
        after = self.add("Squeeze", self.add("Div", unit, scale)), 0
        x = self._requantised(f"{self.prefix}first", x, post.level, values, after)
        values = *_integers(post.middle.weight), _bias(post.middle)
        x = self._requantised(f"{self.prefix}middle", x, post.unit, values, (unit, 0))
        # The upper row of a group and nothing, 8 bytes, which are moved as one; then the lower one.
        integers, factor = _integers(post.last.weight)
        steps = _by_halves(factor).clamp(min=float(factor.min()))  # biases are divided by it
        values = _by_halves(integers), steps, _by_halves(_bias(post.last))
        after = self.add("Squeeze", self.add("Div", fine, gain)), ZERO
        x = self._requantised(f"{self.prefix}last", x, post.unit, values, after)
        added = self.lines(x, self.size(x), 2, 6, wide=8)
        return self.branch([added], (1, "height", "width", 3), TensorProto.UINT8)

    def lines(self, x: str, size: list[str], count: int, length: int, name: str = "", wide: int = 0) -> str:
        """Positions (size[0], size[1]) that have `count` lines of `length` samples each -> a picture (1, H, W, 3).

        wide: samples that a line has in x, where that are more; those behind the first `length` are left out.
        """
        number = self.whole_numbers
        parts = self.add("Concat", *size, number(count), number(wide or length), axis=0)
        lines = self.add("Transpose", self.add("Reshape", x, parts), perm=[0, 2, 1, 3])
        if wide:
            lines = self.add("Slice", lines, number(0), number(length), number(3))
        height, width = (self.add("Mul", n, number(k)) for n, k in zip(size, (count, length // 3), strict=True))
        shape = self.add("Concat", number(1), height, width, number(3), axis=0)
        return self.add("Reshape", lines, shape, name=name)

    def _requantised(
        self,
        name: str,
        x: str,
        before: float,
        layer: tuple[Tensor, Tensor, Tensor],
        after: tuple[str, int],
        strides: Sequence[int] = (1, 1),
    ) -> str:
        """A convolution of bytes from 0 on, (1, h, w, C), to bytes, without padding.

        before, after: the step of either, and which of the latter stands for 0. layer: integers (O, C, k, k'), what
        they count (O,), bias (O,).
        """
        integers, factor, bias = layer
        constants: list[NDArray[Any]] = [_int8(integers), _array(factor), np.array(0, np.int8)]
        whole_bias = self.constant(np.rint(_array(bias / (before * factor))).astype(np.int32))
        inputs = x, self.number(before), self.zero(0), *map(self.constant, constants), after[0], self.zero(after[1])
        attributes: dict[str, Any] = {"name": name, "domain": _OF_RUNTIME, "channels_last": 1, "strides": [*strides]}
        return self.add("QLinearConv", *inputs, whole_bias, **attributes)

    def model(self, others: int, anchors: int = 0) -> onnx.ModelProto:
        """Of all nodes so far. others: channels of rest. anchors: of the quality, 0 where it is no input."""
        entries = [
            ("core", TensorProto.FLOAT, (1, self.synthesis.core, "rows", "columns")),
            ("rest", TensorProto.FLOAT, (1, others, "rest_rows", "rest_columns")),
            ("keep", TensorProto.INT64, (4,)),
        ]
        if anchors:
            entries.append(("quality", TensorProto.FLOAT, (1, anchors)))
        image = helper.make_tensor_value_info("image", TensorProto.UINT8, (1, "height", "width", 3))
        inputs = [helper.make_tensor_value_info(*entry) for entry in entries]
        graph = helper.make_graph(self.nodes, "decoder", inputs, [image], self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_OF_RUNTIME, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model)
        return model


def _integers(weight: Tensor, largest: int = BYTE_WEIGHT) -> tuple[Tensor, Tensor]:
    """Integer weights (O, I, k, k) as training has them, and what the sums of each output are worth, (O,)."""
    factor = row_factor(weight, largest)
    return (weight.detach() / factor).round(), factor.flatten()


def _together(kernel: Tensor, count: int, step: int) -> Tensor:
    """A kernel (O, C, k, k') for one place -> (count x O, C, k, k' + (count - 1) step) for places `step` apart."""
    places = [F.pad(kernel, (step * n, step * (count - 1 - n))) for n in range(count)]
    return torch.cat(places)


def _by_halves(values: Tensor) -> Tensor:
    """(12, ...), those of the samples (3, 2, 2) of a group -> (16, ...): upper row, two zeros, lower row, two zeros."""
    rows = values.reshape(3, 2, 2, *values.shape[1:]).permute(1, 2, 0, *range(3, values.dim() + 2))
    halves = rows.reshape(2, 6, *values.shape[1:])
    return torch.cat([halves, torch.zeros_like(halves[:, :2])], 1).flatten(0, 1)


def _step(own: _Part) -> Tensor:
    """(t, 1, 1): the steps of the bytes behind the depthwise layer."""
    return own.log_before.detach().exp()


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias.detach()


def _int8(integers: Tensor) -> NDArray[np.int8]:
    return np.ascontiguousarray(integers.detach().numpy(), np.int8)


def _array(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().numpy(), np.float32)


def by_row(side: int) -> Tensor:
    """Order of the channels (3, side, side) of space-to-depth that has pixels side by side: (side, side, 3)."""
    return torch.arange(3 * side**2).reshape(3, -1).T.flatten()
