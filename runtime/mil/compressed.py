"""Operators that turn compressed weights, and quantised values, back into numbers."""

import math

import numpy as np
import torch
from torch import Tensor

from runtime.mil.arguments import Arguments
from runtime.mil.arithmetic import Operator


def _blockwise_shift_scale(given: Arguments) -> Tensor:
    """Each block of the data has a scale and may have an offset (iOS 18)."""
    data, scale = given.tensor("data").float(), given.tensor("scale")
    offset = given.optional("offset")
    if offset is not None:
        data = data - _spread(offset.float(), data)
    return data * _spread(scale, data)


def _affine_dequantize(given: Arguments) -> Tensor:
    """Each slice along `axis` has a scale and a zero point (iOS 16)."""
    data, axis = given.tensor("quantized_data").float(), given.integer("axis")
    return _affine(data, given.tensor("scale"), given.tensor("zero_point"), axis)


def _dequantize(given: Arguments) -> Tensor:
    data = given.tensor("input").float()
    return _affine(
        data, given.tensor("scale"), given.optional("zero_point"), given.integer("axis", 0)
    )


def _quantize(given: Arguments) -> Tensor:
    x, axis = given.tensor("input"), given.integer("axis", 0)
    kind = given.text("output_dtype", "int8")
    if kind not in ("int8", "uint8"):
        raise given.refuse(f"output_dtype {kind}")
    least, most = (-128, 127) if kind == "int8" else (0, 255)
    steps = torch.round(x / _along(given.tensor("scale"), x, axis))
    zero_point = given.optional("zero_point")
    if zero_point is not None:
        steps = steps + _along(zero_point.float(), x, axis)
    return steps.clamp(least, most)


def _lut_to_dense(given: Arguments) -> Tensor:
    """Indices into tables of values: one table of all (iOS 16) or one for each block (iOS 18)."""
    indices, table = given.tensor("indices"), given.tensor("lut")
    shape = given.optional("shape")
    if shape is not None:
        return table[_unpacked(indices, table, given.integers("shape"))]
    if table.shape[-1] != 1:
        raise given.refuse("a palette of vectors")
    indices = indices.long()
    table = table.squeeze(-1)
    blocks = table.shape[:-1]
    number = torch.arange(math.prod(blocks)).reshape(blocks)
    chosen: Tensor = table.reshape(-1, table.shape[-1])[_spread(number, indices), indices]
    return chosen


def _unpacked(indices: Tensor, table: Tensor, shape: list[int]) -> Tensor:
    """Returns indices that lie packed in bytes, the lowest bits first."""
    bits = int(math.log2(table.numel()))
    flat = np.unpackbits(indices.numpy().view(np.uint8), bitorder="little")
    places = flat[: math.prod(shape) * bits].reshape(-1, bits)
    numbers = places @ (1 << np.arange(bits))
    return torch.from_numpy(numbers).reshape(shape)


def _spread(blocks: Tensor, data: Tensor) -> Tensor:
    """Returns one entry for each block repeated over the block's elements."""
    for axis, (count, size) in enumerate(zip(blocks.shape, data.shape, strict=True)):
        if 1 < count < size:
            blocks = blocks.repeat_interleave(size // count, axis)
    return blocks.expand(data.shape)


def _affine(data: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    if zero_point is not None:
        data = data - _along(zero_point.float(), data, axis)
    return data * _along(scale, data, axis)


def _along(vector: Tensor, data: Tensor, axis: int) -> Tensor:
    """Returns a vector shaped to broadcast along one axis; a scalar as it is."""
    if vector.dim() == 0:
        return vector
    shape = [1] * data.dim()
    shape[axis] = -1
    return vector.reshape(shape)


COMPRESSED: dict[str, Operator] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "dequantize": _dequantize,
    "quantize": _quantize,
}
"""By the operator's name in a Core ML program."""
