"""Layers whose inputs are rounded to int8 with a scale fixed beforehand: activations for hardware
that multiplies int8 by int8, as the Neural Engine of the A17 and M4 does.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import quantizer as _registers_quantized_decomposed  # noqa: F401

from cq_edge.model.quantize import FLOAT_LAYERS, is_named
from cq_edge.model.surgery import replace_modules

Root = TypeVar("Root", bound=nn.Module)
_MOST = 127
_KEPT = (*FLOAT_LAYERS, "linear_1", "linear_2")  # of the time embedding: one vector, and exact


class RoundedInput(nn.Module):
    """A layer that takes its input as whole numbers times one scale."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the layer makes of the rounded input."""
        ops, form = torch.ops.quantized_decomposed, (self.scale, 0, -_MOST - 1, _MOST, torch.int8)
        rounded = ops.quantize_per_tensor.default(x, *form)
        result: Tensor = self.layer(ops.dequantize_per_tensor.default(rounded, *form))
        return result


@torch.no_grad()
def with_rounded_inputs(
    module: nn.ModuleList, inputs: Iterable[tuple[nn.Module, tuple[Tensor, ...]]]
) -> nn.ModuleList:
    """Returns a copy whose Linear and Conv2d layers, but the first, the last and the time
    embedding's, round their inputs; what was shared stays shared.

    Args:
        module: A UNet's full and shallow graph, float.
        inputs: Which of the two to run on what, to see how large each layer's inputs become.
    """
    largest = _largest_inputs(module, inputs)
    names = {id(layer): name for name, layer in module.named_modules()}
    scales = {names[layer]: most / _MOST for layer, most in largest.items() if most > 0}
    changed = copy.deepcopy(module)
    places = {id(layer): name for name, layer in changed.named_modules()}

    def build(layer: nn.Module) -> nn.Module:
        name = places[id(layer)]
        if name not in scales or is_named(name, _KEPT):
            return layer
        return RoundedInput(layer, scales[name])

    for kind in (nn.Linear, nn.Conv2d):
        replace_modules(changed, kind, build)
    return changed


def _largest_inputs(
    module: nn.ModuleList, inputs: Iterable[tuple[nn.Module, tuple[Tensor, ...]]]
) -> Mapping[int, float]:
    """Returns the largest magnitude that each layer was given, by the layer's identity."""
    found: dict[int, float] = {}

    def watch(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[id(layer)] = max(found.get(id(layer), 0.0), float(given[0].abs().max()))

    layers = {id(m): m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    try:
        for graph, arguments in inputs:
            graph(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found
