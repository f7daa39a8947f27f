"""The blocks of the classic networks against PyTorch's own, ONNX's, and their formulas."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from hourglass.codec import errors
from hourglass.codec.train import blocks

torch.manual_seed(0)

DECONVOLUTIONS = [
    (size, kernel, stride, padding, more)
    for size, kernel, stride in itertools.product((1, 2, 5), (1, 3, 5), (1, 2, 3))
    for padding, more in itertools.product(range(kernel // 2 + 1), range(stride))
    if blocks.deconvolved_size(size, kernel, stride, padding, more) > 0
]


def _onnx(operator: str, inputs: dict[str, NDArray[Any]], **attributes: Any) -> NDArray[Any]:
    """What onnxruntime makes of one operator."""
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    values = [helper.make_tensor_value_info(name, kinds[v.dtype], v.shape) for name, v in inputs.items()]
    node = helper.make_node(operator, list(inputs), ["out"], **attributes)
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], operator, values, [output]), opset_imports=[helper.make_opsetid("", 18)]
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, inputs)[0]
    return result


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "more"), DECONVOLUTIONS)
def test_deconvolution_is_zeros_between_and_an_odd_kernel(
    size: int, kernel: int, stride: int, padding: int, more: int
) -> None:
    """(H - 1) s - 2 p + k + op; the same values from zeros inserted and a convolution, PyTorch and ONNX."""
    x, weight = torch.randn(2, 3, size, size + 1), torch.randn(3, 4, kernel, kernel)
    rows, columns = (blocks.deconvolved_size(n, kernel, stride, padding, more) for n in (size, size + 1))
    out = F.conv_transpose2d(x, weight, stride=stride, padding=padding, output_padding=more)
    assert out.shape == (2, 4, rows, columns)
    spread = blocks.insert_zeros(x, stride, after=more)
    by_hand = F.conv2d(spread, weight.flip(2, 3).transpose(0, 1), padding=kernel - 1 - padding)
    assert torch.allclose(by_hand, out, atol=1e-5)
    other = _onnx(
        "ConvTranspose",
        {"x": x.numpy(), "w": weight.numpy()},
        strides=[stride] * 2,
        pads=[padding] * 4,
        output_padding=[more] * 2,
    )
    assert np.allclose(other, out, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), list(itertools.product((1, 3, 5), (1, 2, 3))))
def test_deconvolution_undoes_the_size_of_a_convolution(kernel: int, stride: int) -> None:
    x = torch.randn(1, 2, 4 * stride, 7 * stride)
    narrow = blocks.Convolution(2, 5, kernel, stride)(x)
    assert narrow.shape == (1, 5, 4, 7)
    odd = blocks.Convolution(2, 5, kernel, stride)(x[:, :, 1:, 1:])
    assert odd.shape[2:] == (-(-(4 * stride - 1) // stride), -(-(7 * stride - 1) // stride))
    assert blocks.Deconvolution(5, 2, kernel, stride)(narrow).shape == x.shape


@pytest.mark.parametrize("kind", [blocks.Convolution, blocks.Deconvolution])
def test_kernels_have_a_middle(kind: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="kernel is 4; expected an odd number"):
        kind(3, 3, 4, 2)


@pytest.mark.parametrize("stride", [2, 3])
def test_average_unpooling_spreads_each_value_over_its_patch(stride: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    spread = blocks.AverageUnpooling(stride)(x)
    assert torch.equal(spread, torch.kron(x, torch.ones(stride, stride)))
    assert torch.allclose(blocks.AveragePooling(stride)(spread), x, atol=1e-6)


@pytest.mark.parametrize("stride", [2, 3])
def test_max_unpooling_puts_values_at_their_places(stride: int) -> None:
    """Against PyTorch, whose indices are of a plane, and ONNX, whose are of the whole tensor."""
    x = torch.randn(2, 3, 4 * stride, 5 * stride)
    values, locations = blocks.MaxPooling(stride)(x)
    expected, indices = F.max_pool2d(x, stride, return_indices=True)
    assert torch.equal(values, expected)
    assert torch.equal(blocks.plane_indices(locations, stride), indices)
    spread = blocks.MaxUnpooling(stride)(values, locations)
    assert torch.equal(spread, F.max_unpool2d(values, indices, stride))
    assert int((spread != 0).sum()) == values.numel()
    assert torch.equal(spread[spread != 0], x[spread != 0])
    other = _onnx(
        "MaxUnpool",
        {"x": values.numpy(), "indices": blocks.tensor_indices(locations, stride).numpy()},
        kernel_shape=[stride] * 2,
        strides=[stride] * 2,
    )
    assert np.array_equal(other, spread)


def test_max_pooling_teaches_the_largest_alone() -> None:
    x = torch.tensor([[[[1.0, 5.0], [3.0, 2.0]]]], requires_grad=True)
    values, locations = blocks.MaxPooling()(x)
    assert int(locations) == 1
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_cost_is_of_one_scale() -> None:
    """A sigmoid keeps pixels in [0, 1], where a ReLU does not; the cost is zero for equal pictures alone."""
    logits: Tensor = torch.linspace(-50, 50, 48).reshape(1, 3, 4, 4)
    assert 0 <= float(logits.sigmoid().min()) < float(logits.sigmoid().max()) <= 1
    assert float(F.relu(logits).max()) > 1
    x = torch.rand(2, 3, 4, 4)
    assert blocks.squared_error(x, x).tolist() == [0.0, 0.0]
    worse = x.clone()
    worse[1] += 0.1
    assert blocks.squared_error(x, worse).tolist() == pytest.approx([0.0, 0.01], abs=1e-6)
