"""What a torch module computes, operator by operator, watched while it runs.

For engines whose programs cannot be read: Core ML, QNN. On the meta device nothing is computed, so
that the largest model takes a second and no memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cq_edge.operators import Operator, Operators, merged

_KINDS = {
    "mean": ("group_norm", "layer_norm", "mean"),
    "softmax": ("softmax",),
    "elementwise": ("add", "sub", "mul", "div", "truediv", "rsub", "clamp", "neg", "add_",
                    "mul_", "div_", "sub_"),
    "activation": ("silu", "gelu", "sigmoid", "tanh", "exp", "sin", "cos", "sqrt", "rsqrt"),
    "layout": ("cat", "concat", "interpolate", "pad", "contiguous", "embedding", "masked_fill"),
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


def module_operators(
    module: nn.Module, inputs: tuple[Tensor, ...], *, dtype: str, weight_bits: float
) -> Operators:
    """Returns the operators of a module.

    Args:
        module: In evaluation mode, on any device.
        inputs: As its `forward` takes them, on the same device.
        dtype: What the engine computes on: "float32", "float16" or "int8".
        weight_bits: That the engine stores a weight in, on average.
    """
    bytes_per_element = {"float32": 4, "float16": 2, "int8": 1}[dtype]
    watch = _Watch(dtype, bytes_per_element, weight_bits)
    with torch.no_grad(), watch:
        outputs = module(*inputs)
    ends = sum(tensor.numel() for tensor in _tensors((inputs, outputs))) * bytes_per_element
    call = Operator("call", dtype, 1, 0, 0, 0, ends, 0, 0)
    return merged([call, *watch.found])


class _Watch(TorchFunctionMode):
    """Notes every function of torch that is called, not those that they call in turn."""

    def __init__(self, dtype: str, element_bytes: int, weight_bits: float) -> None:
        super().__init__()
        self.dtype = dtype
        self.element_bytes = element_bytes
        self.weight_bits = weight_bits
        self.found: list[Operator] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Returns what the function does, and notes it."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor):
            self.found.extend(self._operators(name.strip("_"), args, kwargs or {}, result))
        return result

    def _operators(self, name: str, args: Any, kwargs: Any, result: Tensor) -> Iterator[Operator]:
        tensors = list(_tensors((args, kwargs)))
        if name == "conv2d":
            weight, groups = args[1], args[6] if len(args) > 6 else kwargs.get("groups", 1)
            pixels, depth = result.numel() // result.shape[1], math.prod(weight.shape[1:])
            yield self._one("convolution", (groups, pixels, depth, result.shape[1] // groups),
                            tensors, result)  # fmt: skip
        elif name == "linear":
            columns = result.shape[-1]
            product = (1, result.numel() // columns, args[1].shape[-1], columns)
            yield self._one("linear", product, tensors, result)
        elif name in ("matmul", "bmm", "baddbmm"):
            first = tensors[-2]
            yield self._matmul(first.shape, tensors[-1].shape[-1])
        elif name == "scaled_dot_product_attention":
            queries, keys = args[0].shape, args[1].shape
            scores = (*queries[:-1], keys[-2])
            yield self._matmul(queries, keys[-2])
            count = math.prod(scores) * self.element_bytes
            yield Operator("softmax", self.dtype, 1, 0, 0, 0, count, 0, count)
            yield self._matmul(scores, keys[-1])
        elif name in _KIND_OF:
            yield self._one(_KIND_OF[name], (1, 0, 0, 0), tensors, result)

    def _one(
        self, kind: str, product: tuple[int, int, int, int], tensors: list[Tensor], result: Tensor
    ) -> Operator:
        weights = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
        read = sum(t.numel() for t in tensors) - weights
        return Operator(
            kind,
            self.dtype,
            *product,
            read_bytes=read * self.element_bytes,
            weight_bytes=round(weights * self.weight_bits / 8),
            written_bytes=result.numel() * self.element_bytes,
        )

    def _matmul(self, first: Any, columns: int) -> Operator:
        """Returns the product of (…, M, K) and (…, K, N)."""
        *batch, rows, depth = first
        size = math.prod(batch)
        read = size * (rows * depth + depth * columns) * self.element_bytes
        written = size * rows * columns * self.element_bytes
        return Operator("matmul", self.dtype, size, rows, depth, columns, read, 0, written)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
