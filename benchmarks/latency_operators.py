"""Single operators as graphs of their own: what units of work cost on a machine, measured apart.

Graphs of one sort cannot tell costs that always come together, such as a convolution's arithmetic
and the bytes it moves. These can: each is one or two operators, or a chain of them, at shapes whose
proportions differ. They take a minute to export and to time, once for each machine.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.latency_setting import Setting
from cq_edge.manifest import TensorSpec
from cq_edge.model.lean_norms import LeanGroupNorm, LeanLayerNorm
from cq_edge.model.quantize import quantize_for_xnnpack
from exporters.graph_spec import GraphSpec

GRAPH = "operator"
_HEAD = 32  # channels of an attention head
_CHAIN = 24  # operators in a chain that is to show what starting them takes

# channels in and out, and the side of the picture; for linear layers its pixels are the tokens
_SHAPES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "conv": ((32, 32, 16), (64, 64, 32), (48, 192, 24), (192, 48, 24), (256, 256, 8),
             (128, 128, 48)),
    "linear": ((64, 64, 8), (64, 512, 16), (512, 64, 16), (192, 192, 24), (128, 128, 48)),
    "chain": ((16, 16, 2),),
    "attention": ((32, 32, 8), (64, 64, 16), (128, 128, 24), (64, 64, 32)),
    "group_norm": ((32, 32, 24), (128, 128, 16), (64, 64, 48)),
    "layer_norm": ((64, 64, 16), (192, 192, 24)),
    "silu": ((64, 64, 16), (64, 64, 48)),
    "add": ((64, 64, 16), (64, 64, 48)),
    "transpose": ((64, 64, 16), (64, 64, 48)),
    "concatenate": ((64, 64, 16), (64, 64, 48)),
    "small": ((8, 8, 4),),
}  # fmt: skip
_QUANTISED = ("conv", "linear", "chain")


def operator_settings() -> tuple[Setting, ...]:
    """Returns what is measured: every operator at its shapes, in float32 and, of layers with
    weights, in int8."""
    return tuple(
        Setting(GRAPH, kind, (first, second), side, dtype)
        for kind, shapes in _SHAPES.items()
        for first, second, side in shapes
        for dtype in (("float32", "int8") if kind in _QUANTISED else ("float32",))
    )


def operator_spec(setting: Setting) -> GraphSpec:
    """Returns what the setting's graph takes and returns."""
    (first, second), side = setting.widths, setting.latents
    picture, tokens = (1, first, side, side), (1, side * side, first)
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    if setting.kind == "attention":
        heads, pixels = first // _HEAD, side * side
        queries, keys = (heads, pixels, _HEAD), (heads, _HEAD, pixels)
        inputs, output = (queries, keys, queries), queries
    elif setting.kind in ("linear", "chain", "layer_norm", "transpose"):
        inputs, output = (tokens,), (1, side * side, second)
    else:
        inputs, output = (picture,), (1, second, side, side)
    if setting.kind == "transpose":
        output = (1, first, side * side)
    if setting.kind == "concatenate":
        output = (1, 2 * first, side, side)
    if setting.kind == "add":
        inputs = (picture, picture)
    return GraphSpec(
        GRAPH,
        tuple(TensorSpec(f"x{i}", shape, "float32") for i, shape in enumerate(inputs)),
        (TensorSpec("y", output, "float32"),),
    )


def operator_module(setting: Setting) -> nn.Module:
    """Returns the setting's module; what is quantised is quantised as a UNet is."""
    (first, second) = setting.widths
    module = _MODULES[setting.kind](first, second).eval()
    return quantize_for_xnnpack(module, keep=()) if setting.dtype == "int8" else module


class _Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns what the function returns."""
        return self.function(*inputs)


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(queries, keys), dim=-1), values)


def _small(x: Tensor) -> Tensor:
    for _ in range(_CHAIN):
        x = torch.sigmoid(x + x)
    return x


_MODULES: Mapping[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda first, second: nn.Sequential(nn.Conv2d(first, second, 3, padding=1)),
    "linear": lambda first, second: nn.Sequential(nn.Linear(first, second)),
    "chain": lambda first, second: nn.Sequential(
        *(nn.Linear(first, second) for _ in range(_CHAIN))
    ),
    "attention": lambda *_: _Function(_attended),
    "group_norm": lambda first, _: LeanGroupNorm(nn.GroupNorm(16, first)),
    "layer_norm": lambda first, _: LeanLayerNorm(nn.LayerNorm(first)),
    "silu": lambda *_: nn.SiLU(),
    "add": lambda *_: _Function(torch.add),
    "transpose": lambda *_: _Function(lambda x: x.transpose(1, 2)),
    "concatenate": lambda *_: _Function(lambda x: torch.cat([x, x.neg()], dim=1)),
    "small": lambda *_: _Function(_small),
}
