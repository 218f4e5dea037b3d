"""Resnets, the timestep's sinusoids and nearest upsampling, in operators that XNNPACK has."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from cq_edge.errors import ModelError
from cq_edge.model.corrected_resnet import consumed, finished
from cq_edge.model.surgery import replace_modules


class LeanResnet(nn.Module):
    """diffusers' ResnetBlock2D without its neutral division and its indexing by None."""

    def __init__(self, resnet: ResnetBlock2D) -> None:
        super().__init__()
        self.in_channels = resnet.in_channels
        self.out_channels = resnet.out_channels
        self.norm1 = resnet.norm1
        self.conv1 = resnet.conv1
        self.time_emb_proj = resnet.time_emb_proj
        self.norm2 = resnet.norm2
        self.conv2 = resnet.conv2
        self.conv_shortcut = resnet.conv_shortcut
        self.output_scale_factor = resnet.output_scale_factor

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """Returns (B, C', H, W) for a picture (B, C, H, W) and a time embedding (1 or B, E)."""
        return finished(self, *consumed(self, input_tensor), temb)


class LeanTimesteps(nn.Module):
    """diffusers' Timesteps with its frequencies computed once."""

    frequencies: Tensor

    def __init__(self, timesteps: Timesteps) -> None:
        super().__init__()
        half = timesteps.num_channels // 2
        self.cosine_first = timesteps.flip_sin_to_cos
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(exponent / (half - timesteps.downscale_freq_shift))
        column = (timesteps.scale * frequencies)[:, None]
        self.register_buffer("frequencies", column, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """Returns (B, channels) for (B,) timesteps."""
        angles = F.linear(timestep.reshape(-1, 1), self.frequencies)
        pair = [torch.sin(angles), torch.cos(angles)]
        return torch.cat(pair[::-1] if self.cosine_first else pair, dim=-1)


class LeanUpsample(nn.Module):
    """diffusers' Upsample2D by two, its nearest neighbours as concatenations: exactly equal.

    With channels last, a row of pixels beside itself channel by channel is that row with every
    pixel doubled, and a picture of rows beside themselves is the picture with every row doubled.
    """

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, hidden_states: Tensor, output_size: object = None) -> Tensor:
        """Returns (B, C', 2H, 2W) for (B, C, H, W).

        Raises:
            ModelError: If an output size is forced, which odd sizes of latents would need.
        """
        if output_size is not None:
            raise ModelError(
                f"upsampling to {output_size} is not by two: the latents' height and width must "
                "be multiples of 2 to the number of downsamplers"
            )
        picture = doubled(hidden_states)
        return picture if self.conv is None else self.conv(picture)


class LeanDoubling(nn.Module):
    """torch's Upsample by two to the nearest neighbour, as AutoencoderTiny has it."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C, 2H, 2W) for (B, C, H, W)."""
        return doubled(x)


def doubled(x: Tensor) -> Tensor:
    """Returns the (B, C, 2H, 2W) picture with every pixel of (B, C, H, W) four times."""
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    rows = torch.cat([pixels, pixels], dim=-1).reshape(batch, height, 2 * width * channels)
    both = torch.cat([rows, rows], dim=-1)
    return both.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def rewrite_resnets(root: nn.Module) -> int:
    """Replaces every ResnetBlock2D below `root` in place and returns how many there were.

    Raises:
        ModelError: If one resamples, or scales by its time embedding.
    """
    return replace_modules(root, ResnetBlock2D, _checked_resnet)


def rewrite_timesteps(root: nn.Module) -> int:
    """Replaces every Timesteps below `root` in place and returns how many there were."""
    return replace_modules(root, Timesteps, LeanTimesteps)


def rewrite_upsamplers(root: nn.Module) -> int:
    """Replaces every Upsample2D, and torch's Upsample, below `root` in place; returns how many
    there were.

    Raises:
        ModelError: If one is no nearest-neighbour doubling.
    """
    plain = replace_modules(root, nn.Upsample, _checked_doubling)
    return plain + replace_modules(root, Upsample2D, _checked_upsample)


def _checked_resnet(resnet: ResnetBlock2D) -> LeanResnet:
    # without a time embedding (a VAE's resnets) its kind of normalisation has no effect
    scales = resnet.time_emb_proj is not None and resnet.time_embedding_norm != "default"
    if resnet.up or resnet.down or scales:
        raise ModelError(
            "a resnet resamples or has time_embedding_norm "
            f"{resnet.time_embedding_norm!r}: only Stable Diffusion's plain resnets can be exported"
        )
    if resnet.skip_time_act or not isinstance(resnet.nonlinearity, nn.SiLU):
        raise ModelError(
            f"a resnet's activation is {type(resnet.nonlinearity).__name__} or skips the time "
            "embedding: only SiLU on both can be exported"
        )
    return LeanResnet(resnet)


def _checked_upsample(upsample: Upsample2D) -> LeanUpsample:
    if upsample.norm is not None or upsample.use_conv_transpose or not upsample.interpolate:
        raise ModelError(
            "an upsampler normalises or convolves instead of doubling: only Stable Diffusion's "
            "nearest-neighbour upsampling can be exported"
        )
    return LeanUpsample(upsample)


def _checked_doubling(upsample: nn.Upsample) -> LeanDoubling:
    if upsample.mode != "nearest" or upsample.scale_factor not in (2, (2, 2), (2.0, 2.0)):
        raise ModelError(
            f"an upsampler is {upsample.mode} by {upsample.scale_factor}: only doubling to the "
            "nearest neighbour can be exported"
        )
    return LeanDoubling()
