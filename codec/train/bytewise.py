"""Residual blocks of a traced graph that shall work on bytes: their 1x1 layers become QLinearConv.

What a `BytewiseBlock` does in training with floats that are integers the graph does with bytes, by standard operators.
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

_GATE = np.float32(1 / 256)
"""The step of the bytes that a sigmoid becomes."""


def convert(path: Path, blocks: Mapping[str, BytewiseBlock]) -> None:
    """Change an ONNX file in place. blocks: by the name that a block has in the traced module."""
    model = onnx.load(path)
    for name, block in blocks.items():
        _Rewriter(model.graph, name).rewrite(block)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class _Rewriter:
    """The nodes of one block, and what takes their place."""

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        self.graph, self.name = graph, name
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.new: list[onnx.NodeProto] = []

    def rewrite(self, block: BytewiseBlock) -> None:
        step = {name: log_step.detach().exp() for name, log_step in block.log_steps.items()}
        depthwise, expand, sigmoid, gated, project, total = self._nodes()
        self._replace(depthwise.input[1], block.depthwise.weight / step["before"][..., None])
        assert block.depthwise.bias is not None
        zeros = block.zeros
        bias = block.depthwise.bias / step["before"].flatten() + zeros["before"]
        self._replace(depthwise.input[2], bias + 0.5)  # the cast rounds down
        clipped = self._add("Clip", depthwise.output[0], self._number(0), self._number(255))
        before = self._add("Cast", clipped, to=TensorProto.UINT8)
        inside = self._layer("expand", before, block.expand, step["before"], step["inside"], zeros["before"], 128)
        scale, zero = self._number(float(step["inside"])), self._byte(zeros["inside"])
        value = self._add("DequantizeLinear", inside, scale, zero)
        quantised = self._add("QuantizeLinear", self._add("Sigmoid", value), self._number(_GATE), self._byte(0))
        gate = self._add("DequantizeLinear", quantised, self._number(_GATE), self._byte(0))
        scale, zero = self._number(float(step["active"])), self._byte(zeros["active"])
        active = self._add("QuantizeLinear", self._add("Mul", value, gate), scale, zero)
        after = self._layer("project", active, block.project, step["active"], step["after"], zeros["active"], 128)
        scale = self._constant(step["after"].flatten().numpy())
        zero = self._constant(np.full(len(block.project.weight), zeros["after"], np.uint8))
        added = self._add("DequantizeLinear", after, scale, zero, axis=1)
        total.input[list(total.input).index(project.output[0])] = added
        gone = {node.name for node in (expand, sigmoid, gated, project)}
        kept = [node for node in self.graph.node if node.name not in gone]
        place = kept.index(total)
        unused = {*expand.input[1:], *project.input[1:]}
        tensors = [tensor for tensor in self.graph.initializer if tensor.name not in unused]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend([*kept[:place], *self.new, *kept[place:]])
        self.graph.initializer.extend(tensors)

    def _nodes(self) -> list[onnx.NodeProto]:
        path = "/" + "/".join([self.name.split(".")[0], self.name])
        nodes = {node.name: node for node in self.graph.node}
        parts = ("depthwise/Conv", "expand/Conv", "Sigmoid", "Mul", "project/Conv", "Add")
        return [nodes[f"{path}/{part}"] for part in parts]

    def _layer(
        self, name: str, x: str, layer: torch.nn.Conv2d, step: Tensor, after: Tensor, zero_in: int, zero_out: int
    ) -> str:
        """A 1x1 layer. step, after: those of the bytes that go in and come out; as zero_in, zero_out."""
        weight = layer.weight.detach() * step
        factor = row_factor(weight)
        assert layer.bias is not None
        integers = (weight / factor).round().numpy().astype(np.int8)
        bias = (layer.bias.detach() / factor.flatten()).round().numpy().astype(np.int32)
        scale = (factor.flatten() / after.flatten()).numpy().astype(np.float32)
        one = self._number(1)
        return self._add(
            "QLinearConv",
            *(x, one, self._byte(zero_in)),
            *(self._constant(integers), self._constant(scale), self._constant(np.array(0, np.int8))),
            *(one, self._byte(zero_out)),
            self._constant(bias),
            name=f"{self.name}.{name}",
        )

    def _add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{self.name}.{operator}{len(self.new)}"
        self.new.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def _constant(self, value: NDArray[Any]) -> str:
        name = f"{self.name}.c{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _number(self, value: float | np.float32) -> str:
        return self._constant(np.array(value, np.float32))

    def _byte(self, value: int) -> str:
        return self._constant(np.array(value, np.uint8))

    def _replace(self, name: str, value: Tensor) -> None:
        self.weights[name].CopyFrom(numpy_helper.from_array(value.detach().numpy(), name))
