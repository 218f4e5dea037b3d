"""Eight-bit weights and activations, in the form that XNNPACK computes on.

Weights are int8 with one scale per output channel; activations become int8 while the graph
runs, per token in linear layers and per picture in convolutions. torchao does the linear
layers; its configurations take no Conv2d, so that is a module of ours on torchao's primitives.
Layers named so have weights of four bits instead (`four_bits`): XNNPACK has them for linear
layers alone, so that a convolution becomes one.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    quantize_,
)
from torchao.quantization.granularity import PerAxis
from torchao.quantization.pt2e import quantizer as _registers_quantized_decomposed  # noqa: F401
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

from cq_edge.model.four_bits import GROUP, FourBits
from cq_edge.model.surgery import copied, replace_modules
from cq_edge.model.unfolded_conv import UnfoldedConv2d

Root = TypeVar("Root", bound=nn.Module)
FLOAT_LAYERS = (
    "conv_in", "conv_out", "head.conv", "last.*conv_shortcut", "outer.*conv_shortcut",
)  # fmt: skip
"""Names of the layers that stay float, few weights all of them: the first and the last, and the
shortcuts of the last up block. These take a residual stream and a skip side by side as they are,
which are of unequal size, so that one scale fits neither; and what they give is all but the end.
Source: Q-Diffusion (Li et al. 2023, arXiv 2302.04304) quantises a shortcut's two inputs apart.
"""
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


def quantize_for_xnnpack(
    module: Root,
    keep: Collection[str] = FLOAT_LAYERS,
    four_bits: Mapping[str, FourBits] = MappingProxyType({}),
) -> Root:
    """Returns a copy whose Conv2d and Linear layers are int8; what was shared stays shared, and
    what stays float is the original's.

    Args:
        module: Already rewritten for XNNPACK; the rewrites' constant helpers are no layers and
            stay float.
        keep: Names of layers that stay float32, matched as `is_named` does.
        four_bits: By qualified name, the weights of layers that get four bits instead: Linear
            ones, and convolutions that can be unfolded (theirs are `unfolded_weight`'s).
    """
    quantized = copied(module)
    names = {id(child): name for name, child in quantized.named_modules()}

    def convolution(conv: nn.Conv2d) -> nn.Module:
        if names[id(conv)] in four_bits:
            unfolded = UnfoldedConv2d(conv)
            unfolded.linear.weight = _stored(four_bits[names[id(conv)]])
            return unfolded
        fits = conv.groups == 1 and conv.padding_mode == "zeros"
        return conv if is_named(names[id(conv)], keep) or not fits else Int8Conv2d(conv)

    replace_modules(quantized, nn.Conv2d, convolution)
    names = {id(child): name for name, child in quantized.named_modules()}
    for child in quantized.modules():
        if isinstance(child, nn.Linear) and names[id(child)] in four_bits:
            child.weight = _stored(four_bits[names[id(child)]])

    def stays_to_quantize(child: nn.Module, _name: str) -> bool:
        return (
            isinstance(child, nn.Linear)
            and not isinstance(child.weight, IntxUnpackedToInt8Tensor)
            and not is_named(names[id(child)], keep)
        )

    wide = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0)
    )
    quantize_(quantized, wide, filter_fn=stays_to_quantize)
    return quantized


def _stored(weights: FourBits) -> nn.Parameter:
    """Returns weights as torchao keeps them, for inputs of eight bits per token."""
    stored = IntxUnpackedToInt8Tensor(
        weights.levels,
        weights.scale,
        torch.zeros_like(weights.scale, dtype=torch.int8),
        target_dtype=torch.int4,  # type: ignore[attr-defined]
        block_size=(1, GROUP),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    return nn.Parameter(stored, requires_grad=False)


def is_named(name: str, ends: Collection[str]) -> bool:
    """Returns whether a qualified name ends in one of `ends`, at a dot: "head.conv" names
    "head.conv" and "0.head.conv"; * in an end is anything."""
    return any(fnmatchcase(f".{name}", f"*.{end}") for end in ends)
