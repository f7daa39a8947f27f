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

_GATE = 1 / 256
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
        self.new: list[onnx.NodeProto] = []

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
        clipped = self._add("Clip", depthwise.output[0], self._number(0), self._number(255))
        before = self._add("Cast", clipped, to=TensorProto.UINT8)
        inside = self._convolve("expand", before, block.expand, step["before"], step["inside"], "before", "inside")
        value = self._add("DequantizeLinear", inside, *self._unit(step["inside"], zeros["inside"]))
        gate = self._add("QuantizeLinear", self._add("Sigmoid", value), *self._unit(_GATE, 0))
        gate = self._add("DequantizeLinear", gate, *self._unit(_GATE, 0))
        active = self._add(
            "QuantizeLinear", self._add("Mul", value, gate), *self._unit(step["active"], zeros["active"])
        )
        if with_projection:
            after = self._convolve("project", active, block.project, step["active"], step["after"], "active", "after")
            scale, zero = step["after"].flatten(), np.full(len(block.project.weight), zeros["after"], np.uint8)
            units = self._constant(scale.numpy()), self._constant(zero)
            self._add("DequantizeLinear", after, *units, name=result, axis=1)
        else:
            self._add("DequantizeLinear", active, *self._unit(step["active"], zeros["active"]), name=result)

        unused = {name for node in gone for name in node.input}
        kept = [node for node in self.graph.node if node.name not in {node.name for node in gone}]
        tensors = [tensor for tensor in self.graph.initializer if tensor.name not in unused]
        place = kept.index(depthwise) + 1
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend([*kept[:place], *self.new, *kept[place:]])
        self.graph.initializer.extend(tensors)

    def _layer_of(self, name: str) -> onnx.NodeProto:
        weight = f"{self.name}.{name}.weight"
        return next(node for node in self.graph.node if weight in node.input)

    def _convolve(
        self, name: str, x: str, layer: torch.nn.Conv2d, step: Tensor, after: Tensor, before_name: str, after_name: str
    ) -> str:
        """A 1x1 layer. step, after: of the bytes that go in and come out, called so."""
        weight, zeros = layer.weight.detach() * step, BytewiseBlock.zeros
        factor = row_factor(weight)
        assert layer.bias is not None
        integers = (weight / factor).round().numpy().astype(np.int8)
        bias = (layer.bias.detach() / factor.flatten()).round().numpy().astype(np.int32)
        scale = (factor.flatten() / after.flatten()).numpy().astype(np.float32)
        of_weight = self._constant(integers), self._constant(scale), self._constant(np.array(0, np.int8))
        units = self._unit(1.0, zeros[before_name]), self._unit(1.0, zeros[after_name])
        return self._add(
            "QLinearConv", x, *units[0], *of_weight, *units[1], self._constant(bias), name=f"{self.name}.{name}"
        )

    def _add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{self.name}.{operator}{len(self.new)}"
        self.new.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output

    def _constant(self, value: NDArray[Any]) -> str:
        name = f"{self.name}.c{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _number(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _unit(self, step: float | Tensor, zero: int) -> tuple[str, str]:
        """The step of bytes, and which of them stands for 0."""
        return self._number(float(step)), self._constant(np.array(zero, np.uint8))

    def _replace(self, name: str, value: Tensor) -> None:
        (tensor,) = (tensor for tensor in self.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(value.detach().numpy(), name))
