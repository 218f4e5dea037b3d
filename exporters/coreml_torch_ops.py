"""How Core ML's front end reads torchao's `dequantize_affine`: as a compressed weight of any rank.

coremltools and ExecuTorch both register a reading that takes matrices only, each when it is
imported.
"""

from typing import Any

import numpy as np
from coremltools.converters.mil.frontend._utils import _construct_constexpr_dequant_op
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types

_TYPES = {7: "int4", 127: "int8"}  # by the largest whole number
_NAMES = ["torchao::dequantize_affine", "torchao.dequantize_affine", "quant::dequantize_affine"]


def register_torch_ops() -> None:
    """Makes coremltools read the operator as `dequantize_affine` below does, from now on."""
    register_torch_op(dequantize_affine, torch_alias=_NAMES, override=True)


def dequantize_affine(context: Any, node: Any) -> None:
    """Adds the operator that holds whole numbers and one scale for each block of them.

    Raises:
        ValueError: There is a zero point, or whole numbers of neither four bits nor eight; or
            blocks inside a channel on iOS 17.
    """
    steps, block, scale, zero_point, _, _, most, *_ = _get_inputs(context, node, expected=[7, 8])
    if zero_point is not None and zero_point.val is not None and np.any(zero_point.val):
        raise ValueError(f"{node.name} has a zero point: weights are symmetric here")
    if int(most.val) not in _TYPES:
        raise ValueError(f"{node.name} has whole numbers up to {most.val}: known are 7 and 127")
    whole = types.nptype_from_builtin(types.string_to_builtin(_TYPES[int(most.val)]))
    blocks = [size // each for size, each in zip(steps.val.shape, block.val, strict=True)]
    scales = scale.val.astype(np.float32).reshape(blocks)
    stored = _construct_constexpr_dequant_op(steps.val.astype(whole), None, scales, name=node.name)
    context.add(stored, node.name)
