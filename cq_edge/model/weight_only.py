"""Weights as torchao quantises them, for toolchains that compute in float: eight bits with one
scale for each output channel, or four bits with one for each block of input channels.

torchao's own configurations take no Conv2d, or give it a scale for each place in the kernel;
these are its primitives with the blocks of our choice. A weight becomes whole numbers and scales
that torchao's `dequantize_affine` turns back: exporters see both, and so can store them.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

Root = TypeVar("Root", bound=nn.Module)
BLOCK = 32
_SMALLEST = 2048  # elements: what is smaller is hardly worth a scale
# without the lowest whole number, which only negative weights could take: with it the largest
# positive weight of each block is cut off
_RANGES = {8: (-127, 127), 4: (-7, 7)}


def with_weights_of(module: Root, bits: int) -> Root:
    """Returns a copy whose Linear and Conv2d weights are whole numbers times scales; what was
    shared stays shared.

    Args:
        module: Float, a UNet's graph or a ModuleList of both.
        bits: 8, or 4 where a layer's input channels are a multiple of `BLOCK`: others get 8.
    """
    changed = copy.deepcopy(module)
    for child in list(changed.modules()):
        if isinstance(child, nn.Linear | nn.Conv2d) and child.weight.numel() > _SMALLEST:
            fits = bits == 8 or child.weight.shape[1] % BLOCK == 0
            _quantize(child, bits if fits else 8)
    return changed


def _quantize(layer: nn.Module, bits: int) -> None:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    inner = tuple(weight.shape[1:]) if bits == 8 else (BLOCK, *[1] * (weight.dim() - 2))
    stored = _Stored(weight, (1, *inner), *_RANGES[bits])
    # the float weight would stay in the layer, unused, as an empty one does not
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    parametrize.register_parametrization(layer, "weight", stored, unsafe=True)


class _Stored(nn.Module):
    """A weight in whole numbers; called, it gives the weight back whatever it is given."""

    steps: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, block: tuple[int, ...], least: int, most: int) -> None:
        super().__init__()
        self.block, self.bounds = list(block), (least, most)
        scale, zero_point = choose_qparams_affine(
            weight,
            MappingType.SYMMETRIC,
            block,
            torch.int8,
            quant_min=least,
            quant_max=most,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.int32,
        )
        steps = quantize_affine(weight, block, scale, zero_point, torch.int8, least, most)
        self.register_buffer("steps", steps)
        self.register_buffer("scale", scale)

    def forward(self, _empty: Tensor) -> Tensor:
        """Returns the (O, …) weight in float32."""
        weight: Tensor = torch.ops.torchao.dequantize_affine(
            self.steps, self.block, self.scale, None, torch.int8, *self.bounds
        )
        return weight
