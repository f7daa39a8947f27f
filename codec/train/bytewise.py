"""Residual blocks of a traced graph that shall work on bytes: their 1x1 layers become QLinearConv and
MatMulIntegerToFloat.

What a `BytewiseBlock` does in training with floats that are integers the graph does with bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hourglass.codec.train.network import BytewiseBlock, row_factor

_OF_RUNTIME = "com.microsoft"
"""onnxruntime's own operators."""

_GATE = 1 / 256
"""The step of the bytes that a sigmoid becomes."""


def convert(path: Path, blocks: Mapping[str, BytewiseBlock]) -> None:
    """Change an ONNX file in place. blocks: by the name that a block has in the traced module."""
    model = onnx.load(path)
    for name, block in blocks.items():
        _Rewriter(model.graph, name).rewrite(block)
    if blocks:
        model.opset_import.append(helper.make_opsetid(_OF_RUNTIME, 1))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _integers(
    layer: torch.nn.Conv2d, step: Tensor
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
    """Integer weights (O, I, 1, 1) for bytes of a step; what the sums of each output are worth, and its bias, (O,)."""
    weight = layer.weight.detach() * step
    factor = row_factor(weight)
    assert layer.bias is not None
    return (weight / factor).round().numpy().astype(np.int8), factor.flatten().numpy(), layer.bias.detach().numpy()


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


class _Rewriter(Nodes):
    """The nodes of one block, and what takes their place."""

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        super().__init__(f"{name}.")
        self.graph, self.name = graph, name

    def rewrite(self, block: BytewiseBlock) -> None:
        """Also of a block without its projection: of that it gives what this would take."""
        step, zeros = {name: log_step.detach().exp() for name, log_step in block.log_steps.items()}, block.zeros
        depthwise, expand = self._layer_of("depthwise"), self._layer_of("expand")
        (sigmoid,) = (n for n in self.graph.node if n.op_type == "Sigmoid" and expand.output[0] in n.input)
        (gated,) = (n for n in self.graph.node if n.op_type == "Mul" and sigmoid.output[0] in n.input)
        with_projection = any(tensor.name == f"{self.name}.project.weight" for tensor in self.graph.initializer)
        gone = [expand, sigmoid, gated, *([self._layer_of("project")] if with_projection else [])]
        result = gone[-1].output[0]

        assert block.depthwise.bias is not None
        self._replace(depthwise.input[1], block.depthwise.weight / step["before"][..., None])
        bias = block.depthwise.bias / step["before"].flatten() + zeros["before"]
        self._replace(depthwise.input[2], bias + 0.5)  # the cast rounds down
        clipped = self.add("Clip", depthwise.output[0], self.number(0), self.number(255))
        before = self.add("Cast", clipped, to=TensorProto.UINT8)
        behind_cast = len(self.nodes)
        if expand.input[0] != depthwise.output[0]:  # a part of it is cut out in between: of the bytes, which are fewer
            (cut,) = (node for node in self.graph.node if depthwise.output[0] in node.input and node.op_type == "Slice")
            cut.input[0], before = before, expand.input[0]
        inside = self._bytes_of(before, block.expand, step["before"], float(step["inside"]))
        value = self.add("DequantizeLinear", inside, *self._unit(step["inside"], zeros["inside"]))
        gate = self.add("QuantizeLinear", self.add("Sigmoid", value), *self._unit(_GATE, 0))
        gate = self.add("DequantizeLinear", gate, *self._unit(_GATE, 0))
        active = self.add("QuantizeLinear", self.add("Mul", value, gate), *self._unit(step["active"], zeros["active"]))
        if with_projection:
            self._product(active, block.project, step["active"], zeros["active"], result)
        else:
            self.add("DequantizeLinear", active, *self._unit(step["active"], zeros["active"]), name=result)

        names, unused = {node.name for node in gone}, {name for node in gone for name in node.input}
        tensors = [tensor for tensor in self.graph.initializer if tensor.name not in unused]
        nodes = []
        for node in self.graph.node:
            if node.name == expand.name:
                nodes += self.nodes[behind_cast:]
            if node.name not in names:
                nodes.append(node)
            if node.name == depthwise.name:
                nodes += self.nodes[:behind_cast]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend([*tensors, *self.constants])

    def _layer_of(self, name: str) -> onnx.NodeProto:
        weight = f"{self.name}.{name}.weight"
        return next(node for node in self.graph.node if weight in node.input)

    def _bytes_of(self, x: str, layer: torch.nn.Conv2d, step: Tensor, after: float) -> str:
        """The 1x1 layer to what is inside a block. step, after: of the bytes that go in and come out."""
        integers, factor, bias = _integers(layer, step)
        of_x, of_y = (self._unit(1.0, BytewiseBlock.zeros[name]) for name in ("before", "inside"))
        scale, whole_bias = factor / np.float32(after), np.rint(bias / factor).astype(np.int32)
        constants = (integers, scale, np.array(0, np.int8))
        weight, worth, none = map(self.constant, constants)
        return self.add(
            "QLinearConv", x, *of_x, weight, worth, none, *of_y, self.constant(whole_bias), name=f"{self.name}.expand"
        )

    def _product(self, x: str, layer: torch.nn.Conv2d, step: Tensor, zero: int, result: str) -> None:
        """A 1x1 layer to floats: what is added to the trunk stays as fine as that is."""
        integers, factor, bias = _integers(layer, step)
        last = self.add("Transpose", x, perm=[0, 2, 3, 1])
        weight = self.constant(np.ascontiguousarray(integers[:, :, 0, 0].T))
        one, none = self._unit(1.0, zero)
        # MatMulInteger, Cast, Mul and Add in one: three passes over the floats less, a twentieth of synthesis's time.
        inputs = (last, weight, one, self.constant(factor), none, "", self.constant(bias))
        sums = self.add("MatMulIntegerToFloat", *inputs, name=f"{self.name}.project", domain=_OF_RUNTIME)
        self.add("Transpose", sums, name=result, perm=[0, 3, 1, 2])

    def _unit(self, step: float | Tensor, zero: int) -> tuple[str, str]:
        """The step of bytes, and which of them stands for 0."""
        return self.number(float(step)), self.constant(np.array(zero, np.uint8))

    def _replace(self, name: str, value: Tensor) -> None:
        (tensor,) = (tensor for tensor in self.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(value.detach().numpy(), name))
