"""Eight-bit weights and activations, in the form that XNNPACK computes on.

Weights are int8 with one scale per output channel; activations become int8 while the graph
runs, per token in linear layers and per picture in convolutions. torchao does the linear
layers; its configurations take no Conv2d, so that is a module of ours on torchao's primitives.
Layers named so have weights of four bits instead, with a scale per `GROUP` of them: XNNPACK has
that for linear layers alone, so that a convolution becomes one.
"""

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.pt2e import quantizer as _registers_quantized_decomposed  # noqa: F401
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

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
GROUP = 32
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
    module: Root, keep: Collection[str] = FLOAT_LAYERS, four_bits: Collection[str] = ()
) -> Root:
    """Returns a copy whose Conv2d and Linear layers are int8; what was shared stays shared, and
    what stays float is the original's.

    Args:
        module: Already rewritten for XNNPACK; the rewrites' constant helpers are no layers and
            stay float.
        keep: Names of layers that stay float32, matched as `is_named` does.
        four_bits: Qualified names of layers that get four bits instead: Linear ones, and
            convolutions that can be unfolded, whose inputs are a multiple of `GROUP`.
    """
    quantized = copied(module)
    names = {id(child): name for name, child in quantized.named_modules()}

    def convolution(conv: nn.Conv2d) -> nn.Module:
        if names[id(conv)] in four_bits:
            return UnfoldedConv2d(conv)
        fits = conv.groups == 1 and conv.padding_mode == "zeros"
        return conv if is_named(names[id(conv)], keep) or not fits else Int8Conv2d(conv)

    replace_modules(quantized, nn.Conv2d, convolution)
    names = {id(child): name for name, child in quantized.named_modules()}
    narrowed = {*four_bits, *(f"{name}.linear" for name in four_bits)}
    done: set[int] = set()

    def linears(wanted: Callable[[str], bool]) -> Callable[[nn.Module, str], bool]:
        """Returns a filter for layers by name that takes each layer once."""

        def fits(child: nn.Module, _name: str) -> bool:
            found = isinstance(child, nn.Linear) and id(child) not in done
            found = found and wanted(names[id(child)])
            if found:
                done.add(id(child))
            return found

        return fits

    narrow = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(GROUP),
    )
    quantize_(quantized, narrow, filter_fn=linears(lambda name: name in narrowed))
    wide = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int8, weight_granularity=PerAxis(0)
    )
    quantize_(quantized, wide, filter_fn=linears(lambda name: not is_named(name, keep)))
    return quantized


def is_named(name: str, ends: Collection[str]) -> bool:
    """Returns whether a qualified name ends in one of `ends`, at a dot: "head.conv" names
    "head.conv" and "0.head.conv"; * in an end is anything."""
    return any(fnmatchcase(f".{name}", f"*.{end}") for end in ends)
