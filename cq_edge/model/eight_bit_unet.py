"""A UNet rewritten and quantised part by part, so that no second float UNet is ever whole.

SDXL's in float32 is 10 GB, and the rewrites change most of it: beside the original, one part's
float weights at a time are little.
"""

from functools import partial
from typing import cast

from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from cq_edge.freed_memory import give_back
from cq_edge.model.narrow_weights import widen
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import FullUNet, Layer, OutputHead, ShallowUNet, TimeEmbedding
from cq_edge.model.surgery import copied, replace_modules

# what the graphs are made of beside their layers, by the last name of each; `conv_in` is no part
_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("time", TimeEmbedding),
    ("resampler", Downsample2D),
    ("resampler", Upsample2D),
    ("head", OutputHead),
)


def eight_bit_unet(full: FullUNet, shallow: ShallowUNet) -> nn.ModuleList:
    """Returns both, rewritten for XNNPACK and in int8; equal to doing either to them whole.

    Args:
        full: Float, or narrow, as `split_unet` returns it; left as it was.
        shallow: Likewise; what the two share stays shared.
    """
    both = copied(nn.ModuleList([full, shallow]))
    copied_full = cast(FullUNet, both[0])
    outermost = {id(layer) for part in (copied_full.last, copied_full.outer) for layer in part}

    def converted_layer(layer: Layer) -> nn.Module:
        return _converted(layer, "outer" if id(layer) in outermost else "layer")

    replace_modules(both, Layer, converted_layer)
    for name, kind in _PARTS:
        replace_modules(both, kind, partial(_converted, name=name))
    widen(both)  # what was no part
    return both


def _converted(part: nn.Module, name: str) -> nn.Module:
    """Returns a part converted, which is emptied: whoever replaces it may hold it for long.

    Its name decides which of its layers stay float.
    """
    widen(part)
    converted = quantize_for_xnnpack(rewrite_for_xnnpack(nn.ModuleDict({name: part})))[name]
    for module in part.modules():
        module._parameters.clear()
    give_back()
    return converted
