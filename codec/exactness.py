"""Proof that a prior.onnx gives the same integers on every machine; reads ONNX itself, without the onnx package.

Every value of the graph is followed with two numbers: its largest magnitude, and a grid that it is a multiple of. In
float32 an integer below 2**24 in magnitude is exact, whatever its power of two. So the graph is exact when

- every convolution has integer inputs, weights and biases, with max|x| * sum|w| + |b| < 2**24 for every output channel:
  then every partial sum is exact, in any order, with or without FMA (weights and bias of an output channel may be
  multiplied by a power of two, as all its partial sums then are);
- every convolution of bytes (QLinearConv) is such a one too, with weights so small that the sum of two products fits 16
  bits, where CPUs without instructions for it add them; its factors are powers of two, so that what is rounded to the
  nearest integer, halves to the even one, is exact;
- every product is exact: then folding it into a convolution, or an addition behind it, changes nothing;
- all other operators compare, round, clip or move values, or add two of them: one IEEE operation, the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hourglass.codec.errors import ModelError

LIMIT = 1 << 24

MANTISSA = 511
"""Inputs called `*_unit` are integers up to this times powers of two: the runtime takes them from a shipped table."""

OFFSET = 1 << 20
"""The largest magnitude of the input `level_offset`."""

FEATURES = 1023
"""The largest magnitude of the features, which go out in step 0 and come in again in the others."""

_PAIR = 32767 // (2 * 255)
"""Largest weight of a layer of bytes."""

_CAST = {1: LIMIT, 2: 255, 5: 32767}
"""Types that a graph may cast to, float, uint8 and int16, and the largest magnitude that each keeps."""

_UINT8 = 2

_DTYPES = {1: "<f4", 2: "u1", 3: "<i1", 6: "<i4", 7: "<i8"}  # of TensorProto


@dataclass(frozen=True)
class _Value:
    """What is known of a value: |x| <= reach, x a multiple of grid (0: of any power of two), a constant's elements.

    mantissa: largest odd part of an element in units of its own power of two, where that is less than reach / grid.
    scale: powers of two, one for each row of a constant, that its integers are multiplied by. low: no element is below.
    summed: it comes straight from a convolution, which an operator behind it may become a part of.
    """

    reach: float
    grid: float = 1.0
    mantissa: float = math.inf
    constant: NDArray[np.generic] | None = None
    scale: NDArray[np.float64] | None = None
    low: float = -math.inf
    summed: bool = False

    @property
    def digits(self) -> float:
        """The largest integer that an element is, apart from a power of two."""
        return min(self.mantissa, self.reach / self.grid if self.grid else math.inf)


_INPUTS = {
    "step": _Value(4),
    "width": _Value(15),
    "z": _Value(32768),
    "features_before": _Value(FEATURES),
    "known": _Value(32768),
    "quality": _Value(32),
    "hyper_unit": _Value(math.inf, 0, MANTISSA),
    "mean_unit": _Value(math.inf, 0, MANTISSA),
    "level_offset": _Value(OFFSET),
}


def bounds(model: bytes) -> dict[str, list[int]]:
    """For every convolution of a prior.onnx and every output channel: max|x| * sum|w| + |b|.

    Raises `ModelError` when the graph cannot be proved exact.
    """
    found: dict[str, list[int]] = {}
    try:
        graph = next(bytes(value) for field, value in _fields(model) if field == 7 and isinstance(value, memoryview))
        names = [_text(sub) for field, value in _fields(graph) if field == 12 for f, sub in _fields(value) if f == 1]
        outputs = dict(zip(names, _follow(graph, dict(_INPUTS), found), strict=True))
        for name, reach in {"level": 63, "mean": 32767, "features": FEATURES}.items():
            if not outputs[name].reach <= reach or outputs[name].grid < 1:
                raise ModelError(f"prior.onnx: output {name} may be other than an integer up to {reach}")
    except ModelError:
        raise
    except Exception as exc:  # whatever a file that is no ONNX makes the parser stumble over
        raise ModelError(f"prior.onnx cannot be read: {exc!r}") from exc
    return found


def _follow(graph: bytes, values: dict[str, _Value], found: dict[str, list[int]]) -> list[_Value]:
    """Go through a graph in order; the values of its outputs."""
    fields = list(_fields(graph))
    for field, value in fields:
        if field == 5:
            name, array = _tensor(value)
            if name in _INPUTS:
                raise ModelError(f"prior.onnx: input {name} has a value of its own")
            values[name] = _constant(array)
    for field, value in fields:
        if field != 1:
            continue
        node = _Node.parse(value)
        inputs = [values[name] for name in node.inputs]
        if node.operator == "If":
            branches = [_follow(branch, dict(values), found) for branch in node.graphs]
            outputs = [_union(list(pair)) for pair in zip(*branches, strict=True)]
        elif node.operator == "Conv":
            found[node.name] = _convolution(node.name, *inputs)
            scale = _scale(inputs[1])
            reach = float((np.array(found[node.name]) * scale).max())
            outputs = [_Value(reach, float(scale.min()), summed=True)]
        elif node.operator == "QLinearConv":
            found[node.name] = _convolution_of_bytes(node.name, *inputs)
            outputs = [_Value(255, low=0)]
        else:
            outputs = [_result(node, inputs)]
        values.update(zip(node.outputs, outputs, strict=True))
    names = [_text(sub) for field, value in fields if field == 12 for f, sub in _fields(value) if f == 1]
    return [values[name] for name in names]


def _convolution(name: str, x: _Value, weight: _Value, bias: _Value | None = None) -> list[int]:
    if weight.constant is None or (bias is not None and bias.constant is None):
        raise ModelError(f"prior.onnx: weights of {name} are not constant")
    if x.grid < 1 or not all(value is None or _integers(value) for value in (weight, bias)):
        raise ModelError(f"prior.onnx: {name} works on numbers that are no integers")
    if bias is not None and not np.array_equal(_scale(weight), _scale(bias)):
        raise ModelError(f"prior.onnx: weights and bias of {name} are in different units")
    return _largest(name, weight, bias, x.reach)


def _convolution_of_bytes(
    name: str,
    x: _Value,
    x_scale: _Value,
    x_zero: _Value,
    weight: _Value,
    scale: _Value,
    weight_zero: _Value,
    y_scale: _Value,
    y_zero: _Value,
    bias: _Value,
) -> list[int]:
    constants = (x_scale, x_zero, weight, scale, weight_zero, y_scale, y_zero, bias)
    if any(value.constant is None for value in constants):
        raise ModelError(f"prior.onnx: weights of {name} are not constant")
    ones, nothing = (x_scale, y_scale), (weight_zero, y_zero)
    if any((np.asarray(v.constant) != 1).any() for v in ones) or any(np.asarray(v.constant).any() for v in nothing):
        raise ModelError(f"prior.onnx: {name} scales or shifts its bytes")
    factors = np.asarray(scale.constant, np.float64)
    weights, zero = np.asarray(weight.constant).astype(np.float64), float(np.asarray(x_zero.constant).reshape(()))
    if factors.shape != (len(weights),) or (np.frexp(factors)[0] != 0.5).any() or (np.abs(np.log2(factors)) > 60).any():
        raise ModelError(f"prior.onnx: {name} scales its sums by other than a power of two for each row")
    if x.low < 0 or x.reach > 255 or x.grid < 1:
        raise ModelError(f"prior.onnx: {name} works on numbers that are no bytes")
    if np.abs(weights).max(initial=0) > _PAIR:
        raise ModelError(f"prior.onnx: {name} has weights up to {np.abs(weights).max():.0f}; exact up to {_PAIR} only")
    return _largest(name, weight, bias, max(zero, x.reach - zero))


def _largest(name: str, weight: _Value, bias: _Value | None, reach: float) -> list[int]:
    """Of each output channel, for inputs up to `reach`."""
    weights = np.asarray(weight.constant)
    # Those of bytes, which most are, are exact in a quarter of the memory.
    magnitudes = np.abs(weights, dtype=np.int16 if weights.dtype == np.int8 else np.float64)
    largest = magnitudes.reshape(len(weights), -1).sum(1, dtype=np.float64) * reach
    if bias is not None:
        largest = largest + np.abs(np.asarray(bias.constant).astype(np.float64))
    if not (largest < LIMIT).all():
        raise ModelError(f"prior.onnx: {name} may reach {largest.max():.0f}; exact below {LIMIT} only")
    whole: list[int] = largest.astype(np.int64).tolist()
    return whole


def _integers(value: _Value) -> bool:
    """Whether a constant's elements are, apart from its scale."""
    elements = np.asarray(value.constant)
    return elements.dtype.kind != "f" or bool((elements == np.rint(elements)).all())


def _scale(value: _Value) -> NDArray[np.float64]:
    """Of each row of a constant."""
    if value.scale is not None:
        return value.scale
    return np.ones(len(np.asarray(value.constant)))


def _result(node: _Node, inputs: list[_Value]) -> _Value:
    first = inputs[0]
    match node.operator:
        case "Slice" | "DepthToSpace" | "SpaceToDepth":
            return replace(first, constant=None, scale=None)
        case "Identity":
            return first
        case "Cast":
            # To bytes it rounds down what has a fraction: that, too, is the same everywhere.
            bytes_of = node.to == _UINT8 and first.low >= 0 and first.reach <= _CAST[_UINT8]
            unfit = first.grid < 1 or first.reach > _CAST.get(node.to, 0) or node.to == _UINT8
            if unfit and not bytes_of:
                raise ModelError(f"prior.onnx: {node.name} may not keep what it casts")
            return replace(first, grid=max(first.grid, 1.0), summed=False)
        case "Concat":
            return _union(inputs)
        case "Floor":
            reach = math.ceil(first.reach) if math.isfinite(first.reach) else math.inf
            return _Value(reach, low=math.floor(first.low) if math.isfinite(first.low) else -math.inf)
        case "Clip":
            low, high = (float(np.asarray(value.constant)) for value in inputs[1:])
            if not low <= 0 <= high or not (low.is_integer() and high.is_integer()):
                raise ModelError(f"prior.onnx: {node.name} clips to {low}..{high}; expected integers around 0")
            return _Value(min(max(-low, high), first.reach), min(first.grid, 1.0), low=max(low, first.low))
        case "Add":
            reach, grid = first.reach + inputs[1].reach, min(first.grid, inputs[1].grid)
            # It may be folded into a convolution.
            if (grid and reach / grid >= LIMIT) or (not grid and any(value.summed for value in inputs)):
                raise ModelError(f"prior.onnx: the sum {node.name} may reach {reach:.0f}; exact below {LIMIT} only")
            return _Value(reach, grid)
        case "Mul" if first.constant is not None and inputs[1].constant is not None:
            factor = inputs[1].constant.astype(np.float64)
            rows = len(first.constant) if first.constant.ndim else 0
            fits = factor.shape == (rows, *[1] * (first.constant.ndim - 1)) and first.scale is None
            within = (factor >= 2.0**-60).all() and (factor <= 2.0**60).all()
            if not fits or not within or (np.frexp(factor)[0] != 0.5).any():
                raise ModelError(f"prior.onnx: {node.name} scales constants by other than a power of two for each row")
            reach, grid = first.reach * float(factor.max()), first.grid * float(factor.min())
            return _Value(reach, grid, constant=first.constant, scale=factor.reshape(-1))
        case "Mul":
            if first.digits * inputs[1].digits >= LIMIT:
                raise ModelError(f"prior.onnx: the product {node.name} may need more than 24 bits")
            grid = first.grid * inputs[1].grid
            return _Value(first.reach * inputs[1].reach, grid, first.digits * inputs[1].digits)
        case "Equal" | "Less":
            return _Value(1)
    raise ModelError(f"prior.onnx: operator {node.operator} is not known to be exact")


def _union(values: list[_Value]) -> _Value:
    return _Value(
        max(value.reach for value in values),
        min(value.grid for value in values),
        low=min(value.low for value in values),
        summed=any(value.summed for value in values),
    )


def _constant(array: NDArray[np.generic]) -> _Value:
    if array.dtype.kind != "f":
        reach = max(int(array.max(initial=0)), -int(array.min(initial=0)))
        return _Value(float(reach), 1.0, math.inf, array)
    if array.size == 1 and math.isfinite(number := abs(float(array.reshape(())))):
        # As below, without the cost of calling NumPy for each of hundreds.
        fraction, power = math.frexp(number)
        digits = int(math.ldexp(fraction, 24))
        digits //= (digits & -digits) or 1
        return _Value(number, min(1.0, math.ldexp(1.0, power - digits.bit_length())), float(max(digits, 1)), array)
    numbers = np.abs(array.astype(np.float64)).reshape(-1)
    if not np.isfinite(numbers).all():
        raise ModelError("prior.onnx: a constant is not finite")
    fractions, exponents = np.frexp(numbers[numbers > 0])
    odd = np.ldexp(fractions, 24).astype(np.int64)
    odd //= odd & -odd
    bits = np.frexp(odd.astype(np.float64))[1]
    grid = float(np.ldexp(1.0, int((exponents - bits).min(initial=0))))
    return _Value(float(numbers.max(initial=0)), grid, float(odd.max(initial=1)), array)


@dataclass(frozen=True)
class _Node:
    operator: str
    name: str
    inputs: list[str]
    outputs: list[str]
    graphs: list[bytes]
    to: int

    @staticmethod
    def parse(data: memoryview | int) -> _Node:
        texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
        graphs, to = [], 0
        for field, value in _fields(data):
            if field in texts:
                texts[field].append(_text(value))
            elif field == 5:
                attribute = dict(_fields(value))
                if isinstance(branch := attribute.get(6), memoryview):
                    graphs.append(bytes(branch))
                if _text(attribute.get(1, 0)) == "to" and isinstance(kind := attribute.get(3), int):
                    to = kind
        return _Node(texts[4][0], (texts[3] or texts[2])[0], texts[1], texts[2], graphs, to)


def _tensor(data: memoryview | int) -> tuple[str, NDArray[np.generic]]:
    dims, dtype, name, raw = [], 0, "", b""
    for field, value in _fields(data):
        if field == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 2 and isinstance(value, int):
            dtype = value
        elif field == 8:
            name = _text(value)
        elif field == 9:
            raw = bytes(value)
    return name, np.frombuffer(raw, _DTYPES[dtype]).reshape(dims)


def _text(value: memoryview | int) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else ""


def _fields(data: bytes | memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
    """Field number and value of each field of a protobuf message: bytes, or an integer."""
    view, place = memoryview(data), 0  # type: ignore[arg-type]
    end = len(view)
    while place < end:
        key, place = _varint(view, place)
        match key & 7:
            case 2:
                length, place = _varint(view, place)
                if place + length > end:
                    raise ValueError("a field is longer than the file")
                yield key >> 3, view[place : place + length]
                place += length
            case 0:
                value, place = _varint(view, place)
                yield key >> 3, value
            case 1 | 5 as kind:
                size = 8 if kind == 1 else 4
                yield key >> 3, view[place : place + size]
                place += size
            case _:
                raise ValueError("unknown kind of field")


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    if (byte := view[place]) < 128:  # most are of one byte
        return byte, place + 1
    value, shift = 0, 0
    while True:
        byte = view[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7


def _varints(view: memoryview) -> Iterator[int]:
    place = 0
    while place < len(view):
        value, place = _varint(view, place)
        yield value
