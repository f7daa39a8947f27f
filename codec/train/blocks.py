"""The building blocks of a classic convolutional autoencoder: what narrows a picture, and what mirrors it.

    narrowing (analysis)                    widening (synthesis)
    Convolution with a stride               Deconvolution, a transposed convolution
    AveragePooling                          AverageUnpooling
    MaxPooling -> values and location map   MaxUnpooling <- values and location map
                                            sigmoid, the output layer

and `squared_error`, the cost at the end. Feature maps are (B, C, H, W) float. The source of each formula: Goodfellow,
Bengio and Courville, "Deep Learning" (2016), chapters 9 and 14; Dumoulin and Visin, "A guide to convolution arithmetic
for deep learning" (2016); Zeiler and Fergus, "Visualizing and understanding convolutional networks" (2014), which
names the location maps "switches".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass.codec.errors import InvalidArgument


class Convolution(nn.Conv2d):
    """Convolution with an odd kernel k and stride s: (B, C, H, W) -> (B, D, ceil(H / s), ceil(W / s)).

    out[d, i, j] = b[d] + sum over c, u, v of w[d, c, u, v] x[c, s i + u - p, s j + v - p], zero beyond the edges,
    with p = (k - 1) / 2. (Dumoulin and Visin, relationship 6.)

    Raises `InvalidArgument` for an even kernel.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, _odd(kernel), stride=stride, padding=kernel // 2)


class Deconvolution(nn.ConvTranspose2d):
    """Transposed convolution, the mirror of `Convolution`: (B, C, H, W) -> (B, D, s H, s W).

    Between any two neighbours s - 1 zeros are inserted, p' = k - 1 - p zeros are put around that, and an ordinary
    convolution with the odd kernel, turned by 180 degrees, follows. The output has `deconvolved_size` rows; the padding
    p = (k - 1) / 2 and the output padding op = s - 1 make that s H. (Dumoulin and Visin, relationship 14.)

    Raises `InvalidArgument` for an even kernel.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__(channels, out, _odd(kernel), stride=stride, padding=kernel // 2, output_padding=stride - 1)


def deconvolved_size(size: int, kernel: int, stride: int, padding: int, output_padding: int = 0) -> int:
    """Rows (or columns) that a transposed convolution makes of `size`: (H - 1) s - 2 p + k + op."""
    return (size - 1) * stride - 2 * padding + kernel + output_padding


def insert_zeros(x: Tensor, stride: int, after: int = 0) -> Tensor:
    """stride - 1 zeros between neighbours, `after` more behind the last: (B, C, H, W) ->
    (B, C, (H - 1) s + 1 + after, (W - 1) s + 1 + after).

    With a convolution behind it this is what `Deconvolution` computes, only slower.
    """
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, (height - 1) * stride + 1 + after, (width - 1) * stride + 1 + after)
    spread[:, :, : (height - 1) * stride + 1 : stride, : (width - 1) * stride + 1 : stride] = x
    return spread


class AveragePooling(nn.Module):
    """The mean of each patch of s x s: (B, C, s H, s W) -> (B, C, H, W)."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride)


class AverageUnpooling(nn.Module):
    """Each value spread over its patch of s x s: (B, C, H, W) -> (B, C, s H, s W).

    out[s i + u, s j + v] = x[i, j] for 0 <= u, v < s; pooled again it is x.
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.stride, mode="nearest")


class MaxPooling(nn.Module):
    """The largest value of each patch of s x s and where it stood: (B, C, s H, s W) -> two of (B, C, H, W).

    The second is the location map, int64: s u + v for the value at row u, column v of its patch, 0 to s^2 - 1. It is
    part of the code: `MaxUnpooling` cannot do without.
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = x.shape
        s = self.stride
        patches = x.reshape(batch, channels, height // s, s, width // s, s).permute(0, 1, 2, 4, 3, 5)
        values, locations = patches.reshape(batch, channels, height // s, width // s, s * s).max(-1)
        return values, locations


class MaxUnpooling(nn.Module):
    """The mirror of `MaxPooling`: values (B, C, H, W) and their location map -> (B, C, s H, s W).

    Each value at its place, zeros elsewhere.
    """

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, values: Tensor, locations: Tensor) -> Tensor:
        batch, channels, height, width = values.shape
        s = self.stride
        places = torch.arange(s * s, device=values.device)
        spread = values[..., None] * (locations[..., None] == places).to(values.dtype)
        spread = spread.reshape(batch, channels, height, width, s, s).permute(0, 1, 2, 4, 3, 5)
        return spread.reshape(batch, channels, s * height, s * width)


def plane_indices(locations: Tensor, stride: int) -> Tensor:
    """A location map (B, C, H, W) as PyTorch's `max_unpool2d` wants it: row * width + column in its own plane of
    s H x s W. Any shape of B and C; int64."""
    height, width = locations.shape[-2:]
    row = torch.arange(height, device=locations.device)[:, None] * stride + locations // stride
    column = torch.arange(width, device=locations.device) * stride + locations % stride
    return row * (width * stride) + column


def tensor_indices(locations: Tensor, stride: int) -> Tensor:
    """A location map (B, C, H, W) as ONNX's `MaxUnpool` wants it: an index into all B C s H s W values; int64."""
    batch, channels, height, width = locations.shape
    planes = torch.arange(batch * channels, device=locations.device).reshape(batch, channels, 1, 1)
    return plane_indices(locations, stride) + planes * (height * width * stride * stride)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """The cost of an autoencoder: the mean of (x - x_hat)^2 of each picture, (B, C, H, W) twice -> (B,).

    Both are on the same scale: the picture in [0, 1], and the output of the sigmoid, which a ReLU cannot bound to
    that.
    """
    return (x - x_hat).square().mean((1, 2, 3))


def _odd(kernel: int) -> int:
    if kernel < 1 or kernel % 2 == 0:
        raise InvalidArgument(f"kernel is {kernel}; expected an odd number, so that it has a middle")
    return kernel
