"""Operators that move elements and compute none."""

import torch
from torch import Tensor

from runtime.mil.arguments import Arguments
from runtime.mil.arithmetic import Operator


def _reshape(given: Arguments) -> Tensor:
    x, shape = given.tensor("x"), given.integers("shape")
    # a 0 keeps the size that the input has there
    return x.reshape([size or x.shape[axis] for axis, size in enumerate(shape)])


def _expand_dims(given: Arguments) -> Tensor:
    x, axes = given.tensor("x"), given.integers("axes")
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(given: Arguments) -> Tensor:
    x = given.tensor("x")
    single = [axis for axis, size in enumerate(x.shape) if size == 1]
    return x.squeeze(given.integers("axes", single))


def _transpose(given: Arguments) -> Tensor:
    return given.tensor("x").permute(given.integers("perm"))


def _concat(given: Arguments) -> Tensor:
    if given.flag("interleave"):
        raise given.refuse("interleave")
    return torch.cat(given.tensors("values"), given.integer("axis"))


def _stack(given: Arguments) -> Tensor:
    return torch.stack(given.tensors("values"), given.integer("axis"))


def _split(given: Arguments) -> tuple[Tensor, ...]:
    x, axis = given.tensor("x"), given.integer("axis")
    if given.optional("split_sizes") is not None:
        return tuple(x.split_with_sizes(given.integers("split_sizes"), axis))
    return tuple(x.chunk(given.integer("num_splits"), axis))


def _slice_by_index(given: Arguments) -> Tensor:
    x = given.tensor("x")
    zeros = [0] * x.dim()
    whole_begin, whole_end = given.integers("begin_mask", zeros), given.integers("end_mask", zeros)
    strides = given.integers("stride", [1] * x.dim())
    if min(strides) < 1:
        raise given.refuse(f"stride {strides}")
    single = given.integers("squeeze_mask", zeros)
    parts: list[slice | int] = []
    for axis, (begin, end) in enumerate(
        zip(given.integers("begin"), given.integers("end"), strict=True)
    ):
        part = slice(
            None if whole_begin[axis] else begin, None if whole_end[axis] else end, strides[axis]
        )
        parts.append(begin if single[axis] else part)
    return x[tuple(parts)]


def _gather(given: Arguments) -> Tensor:
    x, indices = given.tensor("x"), given.tensor("indices").long()
    if given.integer("batch_dims", 0):
        raise given.refuse("batch_dims")
    axis = given.integer("axis", 0) % x.dim()
    found = x.index_select(axis, (indices % x.shape[axis]).reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_nd(given: Arguments) -> Tensor:
    x, indices = given.tensor("x"), given.tensor("indices").long()
    if given.integer("batch_dims", 0):
        raise given.refuse("batch_dims")
    return x[tuple(indices.unbind(-1))]


def _upsample(given: Arguments) -> Tensor:
    x, found = given.tensor("x"), []
    for name in ("scale_factor_height", "scale_factor_width"):
        factor = given.number(name, 1.0)
        if factor != int(factor):
            raise given.refuse(f"{name} {factor}")
        found.append(int(factor))
    return x.repeat_interleave(found[0], -2).repeat_interleave(found[1], -1)


def _tile(given: Arguments) -> Tensor:
    return given.tensor("x").repeat(given.integers("reps"))


LAYOUT: dict[str, Operator] = {
    "concat": _concat,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gather_nd": _gather_nd,
    "reshape": _reshape,
    "slice_by_index": _slice_by_index,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "upsample_nearest_neighbor": _upsample,
}
"""By the operator's name in a Core ML program."""
