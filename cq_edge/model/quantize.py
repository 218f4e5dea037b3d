"""Eight-bit weights and activations, in the form that XNNPACK computes on.

Weights are int8 with one scale per output channel; activations become int8 while the graph
runs, per token in linear layers and per picture in convolutions. torchao does the linear
layers; its configurations take no Conv2d, so that is a module of ours on torchao's primitives.
"""

import copy
from collections.abc import Collection
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.pt2e import quantizer as _registers_quantized_decomposed  # noqa: F401
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from cq_edge.model.surgery import replace_modules

Root = TypeVar("Root", bound=nn.Module)
FIRST_AND_LAST = ("conv_in", "conv_out", "head.conv")
_MIN, _MAX = -127, 127
_ACTIVATION_MIN, _ACTIVATION_MAX = -128, 127
_EPSILON = torch.finfo(torch.float32).eps


class Int8Conv2d(nn.Module):
    """A Conv2d with int8 weights, one scale per output channel, and int8 activations."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        block = (1, *conv.weight.shape[1:])
        scale, zero_point = choose_qparams_affine(
            conv.weight.detach(),
            MappingType.SYMMETRIC,
            block,
            torch.int8,
            quant_min=_MIN,
            quant_max=_MAX,
            scale_dtype=torch.float32,
            zero_point_dtype=torch.int64,
        )
        weight = quantize_affine(
            conv.weight.detach(), block, scale, zero_point, torch.int8, _MIN, _MAX
        )
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("zero_point", zero_point.flatten())
        self.bias = conv.bias
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C', H', W') for (B, C, H, W)."""
        ops = torch.ops.quantized_decomposed
        bounds = (_ACTIVATION_MIN, _ACTIVATION_MAX)
        scale, zero_point = ops.choose_qparams.tensor(x, *bounds, _EPSILON, torch.int8)
        rounded = ops.quantize_per_tensor.tensor(x, scale, zero_point, *bounds, torch.int8)
        x = ops.dequantize_per_tensor.tensor(rounded, scale, zero_point, *bounds, torch.int8)
        weight = ops.dequantize_per_channel.default(
            self.weight, self.scale, self.zero_point, 0, _MIN, _MAX, torch.int8
        )
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def quantize_for_xnnpack(module: Root, keep: Collection[str] = FIRST_AND_LAST) -> Root:
    """Returns a copy whose Conv2d and Linear layers are int8; what was shared stays shared.

    Args:
        module: Already rewritten for XNNPACK; the rewrites' constant helpers are no layers and
            stay float.
        keep: Names of layers that stay float32, each matched against the end of the qualified
            name at a dot: "head.conv" keeps "head.conv" and "0.head.conv".
    """
    quantized = copy.deepcopy(module)
    names = {id(child): name for name, child in quantized.named_modules()}

    def is_kept(child: nn.Module) -> bool:
        return any(f".{names[id(child)]}".endswith(f".{name}") for name in keep)

    def convolution(conv: nn.Conv2d) -> nn.Module:
        fits = conv.groups == 1 and conv.padding_mode == "zeros"
        return conv if is_kept(conv) or not fits else Int8Conv2d(conv)

    replace_modules(quantized, nn.Conv2d, convolution)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0)
    )
    done: set[int] = set()

    def linear(child: nn.Module, _name: str) -> bool:
        wanted = isinstance(child, nn.Linear) and id(child) not in done and not is_kept(child)
        done.add(id(child))
        return wanted

    quantize_(quantized, config, filter_fn=linear)
    return quantized
