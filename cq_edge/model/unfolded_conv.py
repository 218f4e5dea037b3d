"""A 3×3 convolution as a linear layer, which XNNPACK computes with weights of four bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIDE = 3


class UnfoldedConv2d(nn.Module):
    """A 3×3 Conv2d of stride 1 and padding 1, numerically equal to it.

    Each pixel's neighbourhood lies side by side, channels innermost, as one token of the linear
    layer: nine times the picture in memory, and slower than a convolution of eight bits.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = unfolded_weight(conv)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=conv.bias is not None)
        self.linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if conv.bias is not None:
            self.linear.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C', H, W) for (B, C, H, W)."""
        height, width = x.shape[2:]
        tokens = self.linear(neighbourhoods(x))
        picture: Tensor = tokens.reshape(len(x), height, width, -1).permute(0, 3, 1, 2)
        return picture


def neighbourhoods(x: Tensor) -> Tensor:
    """Returns (B, H·W, 9·C): what each pixel of (B, C, H, W) has around it, zeros beyond it."""
    height, width = x.shape[2:]
    pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    beside = torch.cat([pixels[:, :, i : i + width] for i in range(_SIDE)], dim=-1)
    return torch.cat([beside[:, i : i + height] for i in range(_SIDE)], dim=-1).flatten(1, 2)


def can_unfold(conv: nn.Conv2d) -> bool:
    """Returns whether a convolution is one that `UnfoldedConv2d` computes."""
    kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return kind == ((_SIDE, _SIDE), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"


def unfolded_weight(conv: nn.Conv2d) -> Tensor:
    """Returns (C', 9·C): a convolution's weight with the rows of its linear layer."""
    return conv.weight.detach().permute(0, 2, 3, 1).flatten(1)


def folded_weight(rows: Tensor, conv: nn.Conv2d) -> Tensor:
    """Returns the (C', C, 3, 3) weight whose `unfolded_weight` is `rows`."""
    return rows.reshape(-1, _SIDE, _SIDE, conv.in_channels).permute(0, 3, 1, 2)
