"""Weights of four bits: rounded to the nearest, or so that the layer's outputs stay.

Rounded to the nearest, a weight's error is whatever it is. Where the inputs that a layer gets are
known, the errors of the weights already rounded can be made up for by those still to be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    quantize_affine,
)

GROUP = 32
WIDEST = 6144
"""Inputs of the widest layer that is rounded by `compensated`: its products take 151 MB, and
factoring them several times that."""
_LEAST, _MOST = -8, 7
_DAMPING = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class FourBits:
    """A matrix (O, I) on grids of four bits, a grid for each `GROUP` weights of a row.

    Attributes:
        levels: (O, I) int8, -8 to 7.
        scale: (O, I / GROUP) float32, above 0.
    """

    levels: Tensor
    scale: Tensor

    def weight(self) -> Tensor:
        """Returns the (O, I) float32 weights."""
        return self.levels * self.scale.repeat_interleave(GROUP, dim=1)


def nearest(weight: Tensor) -> FourBits:
    """Returns the (O, I) weights rounded to the nearest, as torchao rounds them; I is a multiple
    of `GROUP`."""
    block = (1, GROUP)
    scale, zero_point = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, block, torch.int8, quant_min=_LEAST, quant_max=_MOST,
        scale_dtype=torch.float32, zero_point_dtype=torch.int64,
    )  # fmt: skip
    levels = quantize_affine(weight, block, scale, zero_point, torch.int8, _LEAST, _MOST)
    return FourBits(levels, scale.reshape(len(weight), -1))


@torch.no_grad()
def compensated(weight: Tensor, products: Tensor) -> FourBits:
    """Returns weights rounded so that the layer's outputs differ little for inputs like those seen.

    Column by column; what a column's rounding changes in the outputs, the columns that are not
    rounded yet take back as far as they can.

    Args:
        weight: (O, I), I a multiple of `GROUP`.
        products: (I, I), the sum of x·xᵀ over the inputs x that were seen: GPTQ's H.

    Source: GPTQ (Frantar et al. 2023, arXiv 2210.17323), algorithm 1 with grids for groups.
    torchao's own is for CUDA and for other formats.
    """
    left = weight.detach().float().clone()
    factor = _inverse_factor(products)
    levels = torch.empty_like(left, dtype=torch.int8)
    scales = []
    for start in range(0, left.shape[1], GROUP):
        columns = slice(start, start + GROUP)
        scale = nearest(left[:, columns]).scale
        errors = torch.empty_like(left[:, columns])
        for i in range(GROUP):
            column = start + i
            rounded = (left[:, column, None] / scale).round().clamp(_LEAST, _MOST)
            levels[:, column] = rounded[:, 0].to(torch.int8)
            error = (left[:, column, None] - rounded * scale) / factor[column, column]
            left[:, column : columns.stop] -= error * factor[column, column : columns.stop]
            errors[:, i] = error[:, 0]
        left[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        scales.append(scale)
    return FourBits(levels, torch.cat(scales, dim=1))


def _inverse_factor(products: Tensor) -> Tensor:
    """Returns the (I, I) upper Cholesky factor of the products' inverse, float32: row i is what
    changing input i's weight makes of the best weights of the inputs behind it."""
    damped = products.double()
    damping = _DAMPING * damped.diagonal().mean()
    damped = damped + torch.eye(len(damped), dtype=torch.float64) * (damping if damping > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
