"""What a resnet computes, in two halves with room for a correction between them.

The first half are the layers that consume a resnet's input, its first convolution and its
shortcut: where a cached feature comes in, their outputs are what the quantisation correction
mends. Works on diffusers' ResnetBlock2D and on its rewritten, quantised forms alike.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

Resnet = Any  # ResnetBlock2D or LeanResnet: the same layers by the same names


def consumed(resnet: Resnet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the outputs of the layers that consume the input: convolution and shortcut.

    Args:
        resnet: Without a shortcut layer, the input itself is the second; every resnet of an up
            block has one.
        x: (B, C, H, W) input.

    Returns:
        Two of (B, C', H, W).
    """
    shortcut = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
    return resnet.conv1(F.silu(resnet.norm1(x))), shortcut


def finished(resnet: Resnet, convolved: Tensor, shortcut: Tensor, time: Tensor | None) -> Tensor:
    """Returns what the resnet makes of the outputs that `consumed` gave.

    Args:
        resnet: The same.
        convolved: (B, C', H, W).
        shortcut: (B, C', H, W).
        time: (1 or B, E) time embedding; None for the autoencoder's resnets, which have none.
    """
    hidden = convolved
    if resnet.time_emb_proj is not None and time is not None:
        offset = resnet.time_emb_proj(F.silu(time))
        hidden = hidden + offset.reshape(time.shape[0], -1, 1, 1)
    hidden = resnet.conv2(F.silu(resnet.norm2(hidden)))
    summed: Tensor = shortcut + hidden
    scale = resnet.output_scale_factor
    return summed if scale == 1.0 else summed * (1.0 / scale)


def corrected(resnet: Resnet, x: Tensor, time: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Returns the resnet's output with gain · y + bias for y of its consuming layers.

    Args:
        resnet: As above.
        x: (B, C, H, W) input.
        time: (1, E) time embedding.
        gain: (2·C',): of the convolution's channels, then of the shortcut's; 1 for none.
        bias: (2·C',) likewise; 0 for none.
    """
    convolved, shortcut = consumed(resnet, x)
    channels = convolved.shape[1]
    first, second = (
        (gain[part].reshape(1, -1, 1, 1), bias[part].reshape(1, -1, 1, 1))
        for part in (slice(0, channels), slice(channels, 2 * channels))
    )
    return finished(resnet, convolved * first[0] + first[1], shortcut * second[0] + second[1], time)
