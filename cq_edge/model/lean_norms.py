"""Group and layer normalisation in operators that XNNPACK has.

XNNPACK has neither, and its only mean is over a picture's height and width. The mean over a
group is that mean, averaged over the group's channels by a 1×1 convolution; another one spreads
the result back over the channels. The mean over a token's channels is a linear layer of one
output. What constants this takes depends on the widths alone, so that a file which stores equal
data once holds next to none.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cq_edge.model.surgery import replace_modules


class LeanGroupNorm(nn.Module):
    """torch.nn.GroupNorm of (B, C, H, W), numerically equal to it."""

    average: Tensor
    spread: Tensor
    epsilon: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups
        width = norm.num_channels // norm.num_groups
        average = torch.full((norm.num_groups, width, 1, 1), 1.0 / width)
        self.register_buffer("average", average, persistent=False)
        spread = torch.ones(norm.num_channels, 1, 1, 1)
        self.register_buffer("spread", spread, persistent=False)
        epsilon = torch.full((norm.num_groups,), norm.eps)
        self.register_buffer("epsilon", epsilon, persistent=False)
        self.weight = _as_parameter(norm.weight, (-1, 1, 1, 1))
        self.bias = _as_parameter(norm.bias, (-1,))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised (B, C, H, W).

        Weight and bias are a depthwise 1×1 convolution, which XNNPACK runs in one pass, rather
        than operators on constants, which ExecuTorch hands over and transposes in every run.
        """
        centred = x - self._over_channels(self._over_groups(x))
        variance = self._over_groups(centred * centred, self.epsilon)
        scaled = centred * self._over_channels(torch.rsqrt(variance))
        if self.weight is None:
            return scaled
        return F.conv2d(scaled, self.weight, self.bias, groups=x.shape[1])

    def affine(self, stripes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the factor and the offset, each (B, C, 1, 1), that normalise a picture.

        Args:
            stripes: The picture's (B, C, H / n, W), n of them; one at a time is squared.
        """
        share = 1.0 / len(stripes)
        mean = reduce(add, [self._over_groups(x) for x in stripes]) * share
        means = self._over_channels(mean)
        squares = [self._over_groups(torch.square(x - means)) for x in stripes]
        variance = reduce(add, squares) * share
        factor = self._over_channels(torch.rsqrt(variance + self.epsilon.reshape(1, -1, 1, 1)))
        if self.weight is None:
            return factor, -means * factor
        channels = means.shape[1]
        offset = F.conv2d(-means * factor, self.weight, self.bias, groups=channels)
        return F.conv2d(factor, self.weight, groups=channels), offset

    def _over_groups(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """Returns (B, G, 1, 1), each group's mean of (B, C, H, W) plus `offset` (G,)."""
        mean = x.mean((2, 3), keepdim=True)
        return F.conv2d(mean, self.average, offset, groups=self.groups)

    def _over_channels(self, groups: Tensor) -> Tensor:
        """Returns (B, C, 1, 1): each of (B, G, 1, 1) once per channel of its group."""
        return F.conv2d(groups, self.spread, groups=self.groups)


class LeanLayerNorm(nn.Module):
    """torch.nn.LayerNorm of (B, N, C) over C, numerically equal to it."""

    average: Tensor
    epsilon: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        self.register_buffer("average", torch.full((1, width), 1.0 / width), persistent=False)
        self.register_buffer("epsilon", torch.full((1,), norm.eps), persistent=False)
        self.weight = _as_parameter(norm.weight, (-1,))
        self.bias = _as_parameter(norm.bias, (-1,))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised (B, N, C)."""
        centred = x - F.linear(x, self.average)
        power = F.linear(centred * centred, self.average, self.epsilon)
        scaled = centred * torch.rsqrt(power)
        if self.weight is not None:
            scaled = scaled * self.weight
        return scaled if self.bias is None else scaled + self.bias


class LeanRmsNorm(nn.Module):
    """torch.nn.LayerNorm of (B, N, C) over C, for tokens whose first channel is their mean.

    In coordinates where the first channel alone holds the mean (`rotate_residual_streams`),
    there is nothing to subtract: the other channels' mean square is the variance. What consumes
    the result ignores its first channel.
    """

    average: Tensor
    epsilon: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        (width,) = norm.normalized_shape
        average = torch.full((1, width), 1.0 / width)
        average[0, 0] = 0.0
        self.register_buffer("average", average, persistent=False)
        self.register_buffer("epsilon", torch.full((1,), norm.eps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scaled (B, N, C)."""
        return x * torch.rsqrt(F.linear(x * x, self.average, self.epsilon))


def rewrite_group_norms(root: nn.Module) -> int:
    """Replaces every GroupNorm below `root` in place and returns how many there were."""
    return replace_modules(root, nn.GroupNorm, LeanGroupNorm)


def rewrite_layer_norms(root: nn.Module) -> int:
    """Replaces every LayerNorm below `root` in place and returns how many there were."""
    return replace_modules(root, nn.LayerNorm, LeanLayerNorm)


@torch.no_grad()
def fold_affine(norm: Any, linears: list[nn.Linear]) -> None:
    """Moves a normalisation's weight and bias into the linear layers that alone consume it.

    W·(w⊙x + b) + c = (W·diag(w))·x + (W·b + c), computed in float64; `norm` ends without
    weight and bias.
    """
    if norm.weight is None:
        return
    weight = norm.weight.double()
    offset = torch.zeros_like(weight) if norm.bias is None else norm.bias.double()
    for linear in linears:
        matrix = linear.weight.double()
        moved = matrix @ offset
        if linear.bias is not None:
            moved = moved + linear.bias.double()
        dtype = linear.weight.dtype
        linear.weight = nn.Parameter((matrix * weight).to(dtype), requires_grad=False)
        linear.bias = nn.Parameter(moved.to(dtype), requires_grad=False)
    norm.weight = None
    norm.bias = None


def _as_parameter(value: Tensor | None, shape: tuple[int, ...]) -> nn.Parameter | None:
    if value is None:
        return None
    return nn.Parameter(value.detach().clone().reshape(shape), requires_grad=False)
