"""An autoencoder's decoder whose large pictures exist as horizontal stripes, exactly equal.

At 512×512 pixels a picture of 256 channels has 268 MB. Between two group normalisations all is
local: with a row of its neighbours above and below, a stripe is activated and convolved alone,
so that only what a later layer still needs is ever whole. XNNPACK's plan of its workspace, which
cannot reuse the place of large pictures well, finds it easier too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from torch import Tensor, nn

from cq_edge.model.lean_norms import LeanGroupNorm
from cq_edge.model.lean_resnet import LeanResnet, doubled
from cq_edge.model.surgery import replace_modules

STRIPES = 8
LARGE = 1 << 24
"""Elements from which on a block's output is made in stripes: 64 MiB."""
_MOST_CONCATENATED = 4  # XNNPACK takes five

Stripes = list[Tensor]
"""A (B, C, H, W) picture from top to bottom, each (B, C, H / `STRIPES`, W)."""


class StripedDecoder(nn.Module):
    """diffusers' Decoder, of rewritten layers, for pictures of any size."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.conv_in = decoder.conv_in
        self.mid_block = decoder.mid_block
        self.up_blocks = decoder.up_blocks
        self.conv_norm_out = decoder.conv_norm_out
        self.conv_out = decoder.conv_out

    def forward(self, latents: Tensor) -> Tensor:
        """Returns the (B, 3, 8·h, 8·w) picture of (B, 4, h, w) latents."""
        stripes = [self.mid_block(self.conv_in(latents))]
        for block in self.up_blocks:
            if len(stripes) == 1 and _is_large(stripes[0], block):
                stripes = _divided(stripes[0])
            stripes = _upper_block(block, stripes)
        return _joined(_normed_conv(self.conv_norm_out, self.conv_out, stripes))


def stripe_decoders(root: nn.Module) -> int:
    """Replaces every Decoder of rewritten resnets below `root` in place and returns how many
    there were; leaves those with other blocks as they are."""
    return replace_modules(root, Decoder, lambda d: StripedDecoder(d) if _is_plain(d) else d)


def _is_plain(decoder: Any) -> bool:
    blocks = decoder.up_blocks
    resnets = [resnet for block in blocks for resnet in block.resnets]
    return (
        isinstance(decoder.conv_norm_out, LeanGroupNorm)
        and all(isinstance(block, UpDecoderBlock2D) for block in blocks)
        and all(isinstance(resnet, LeanResnet) for resnet in resnets)
    )


def _is_large(hidden: Tensor, block: Any) -> bool:
    """Returns whether what a block makes of a picture is large, and can be divided."""
    pixels = hidden.shape[2] * hidden.shape[3] * (1 if block.upsamplers is None else 4)
    return pixels * hidden.shape[1] >= LARGE and hidden.shape[2] % STRIPES == 0


def _divided(picture: Tensor) -> Stripes:
    rows = picture.shape[2] // STRIPES
    # slices, and no split: XNNPACK has those
    return [picture[:, :, i * rows : (i + 1) * rows] for i in range(STRIPES)]


def _upper_block(block: Any, stripes: Stripes) -> Stripes:
    for resnet in block.resnets:
        stripes = _resnet(resnet, stripes)
    for upsampler in block.upsamplers or ():
        stripes = _conv(upsampler.conv, [doubled(stripe) for stripe in stripes])
    return stripes


def _resnet(resnet: Any, stripes: Stripes) -> Stripes:
    inner = _normed_conv(resnet.norm1, resnet.conv1, stripes)
    inner = _normed_conv(resnet.norm2, resnet.conv2, inner)
    shortcut = resnet.conv_shortcut or nn.Identity()
    scale = resnet.output_scale_factor
    sums = [shortcut(stripe) + added for stripe, added in zip(stripes, inner, strict=True)]
    return sums if scale == 1.0 else [x * (1.0 / scale) for x in sums]


def _normed_conv(norm: LeanGroupNorm, conv: nn.Conv2d, stripes: Stripes) -> Stripes:
    """Returns the convolution of the normalised and activated picture."""
    factor, offset = norm.affine(stripes)
    return _conv(conv, stripes, lambda x: F.silu(x * factor + offset))


def _conv(
    conv: nn.Conv2d, stripes: Stripes, before: Callable[[Tensor], Tensor] = lambda x: x
) -> Stripes:
    """Returns a 3×3 convolution of what `before` makes of the picture, pixel by pixel."""
    last = len(stripes) - 1
    found = []
    for i, stripe in enumerate(stripes):
        above = [stripes[i - 1][:, :, -1:]] if i > 0 else []
        below = [stripes[i + 1][:, :, :1]] if i < last else []
        rows = before(torch.cat([*above, stripe, *below], dim=2) if last else stripe)
        rows = F.pad(rows, (0, 0, int(i == 0), int(i == last)))
        found.append(F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1)))
    return found


def _joined(stripes: Stripes) -> Tensor:
    """Returns the whole picture."""
    while len(stripes) > 1:
        ends = range(0, len(stripes), _MOST_CONCATENATED)
        stripes = [torch.cat(stripes[i : i + _MOST_CONCATENATED], dim=2) for i in ends]
    return stripes[0]
