"""Operators with weights, norms and attention: where the time goes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.mil.arguments import Arguments
from runtime.mil.arithmetic import Operator


def _linear(given: Arguments) -> Tensor:
    return F.linear(given.tensor("x"), given.tensor("weight"), given.optional("bias"))


def _conv(given: Arguments) -> Tensor:
    x, weight = given.tensor("x"), given.tensor("weight")
    spatial = weight.dim() - 2
    kind = given.text("pad_type", "valid")
    if kind == "custom":
        pairs = given.integers("pad", [0] * (2 * spatial))
        # torch pads the last axis first
        around = [p for axis in reversed(range(spatial)) for p in pairs[2 * axis : 2 * axis + 2]]
        x = F.pad(x, around)
    elif kind != "valid":
        raise given.refuse(f"pad_type {kind}")
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    ones = [1] * spatial
    return convolve(
        x,
        weight,
        given.optional("bias"),
        given.integers("strides", ones),
        0,
        given.integers("dilations", ones),
        given.integer("groups", 1),
    )


def _matmul(given: Arguments) -> Tensor:
    x, y = given.tensor("x"), given.tensor("y")
    x = x.transpose(-1, -2) if given.flag("transpose_x") else x
    y = y.transpose(-1, -2) if given.flag("transpose_y") else y
    return torch.matmul(x, y)


def _einsum(given: Arguments) -> Tensor:
    return torch.einsum(given.text("equation", ""), *given.tensors("values"))


def _layer_norm(given: Arguments) -> Tensor:
    x = given.tensor("x")
    axes = sorted(axis % x.dim() for axis in given.integers("axes", range(x.dim())))
    if axes != list(range(axes[0], x.dim())):
        raise given.refuse(f"axes {axes}, not the last ones")
    shape, epsilon = list(x.shape[axes[0] :]), given.number("epsilon", 1e-5)
    return F.layer_norm(x, shape, given.optional("gamma"), given.optional("beta"), epsilon)


def _batch_norm(given: Arguments) -> Tensor:
    return F.batch_norm(
        given.tensor("x"),
        given.tensor("mean"),
        given.tensor("variance"),
        given.optional("gamma"),
        given.optional("beta"),
        eps=given.number("epsilon", 1e-5),
    )


def _attention(given: Arguments) -> Tensor:
    mask = given.optional("attn_mask")
    return F.scaled_dot_product_attention(
        given.tensor("query"), given.tensor("key"), given.tensor("value"), attn_mask=mask
    )


NETWORK: dict[str, Operator] = {
    "batch_norm": _batch_norm,
    "conv": _conv,
    "einsum": _einsum,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
"""By the operator's name in a Core ML program."""
