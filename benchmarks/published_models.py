"""Operators of the models that published measurements are of, from their configurations alone.

Built on the meta device: no weights, no download.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cq_edge.operators import Operators
from exporters.module_operators import module_operators
from tools.architectures import ARCHITECTURES

_TINY: Mapping[str, Any] = {
    **ARCHITECTURES["sd15"].unet,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
}
UNETS: Mapping[str, Mapping[str, Any]] = {
    **{name: architecture.unet for name, architecture in ARCHITECTURES.items()},
    "bk-sdm-tiny": _TINY,
}


@cache
def unet_operators(
    model: str, latents: int, batch: int, *, dtype: str, weight_bits: float
) -> Operators:
    """Returns the operators of one UNet call.

    Args:
        model: One of `UNETS`.
        latents: Their height and width.
        batch: Pictures, guided and unguided ones counted apart.
        dtype: What the engine computes on.
        weight_bits: That it stores a weight in.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=latents, **UNETS[model]).eval()
        noisy = torch.empty(batch, 4, latents, latents)
        embeddings = torch.empty(batch, 77, UNETS[model]["cross_attention_dim"])
        added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        inputs = (noisy, torch.empty(batch), embeddings)
    return module_operators(
        _Called(unet, added if model == "sdxl" else None),
        inputs,
        dtype=dtype,
        weight_bits=weight_bits,
    )


@cache
def text_operators(*, dtype: str, weight_bits: float) -> Operators:
    """Returns the operators of Stable Diffusion 1.x's text encoder, CLIP ViT-L/14."""
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
        text = CLIPTextModel(config).eval()
        ids = torch.zeros(1, 77, dtype=torch.int64)
    return module_operators(text, (ids,), dtype=dtype, weight_bits=weight_bits)


def parameters(model: str) -> int:
    """Returns how many a UNet has."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
    return sum(parameter.numel() for parameter in unet.parameters())


class _Called(nn.Module):
    """A UNet with what SDXL takes beside the prompt."""

    def __init__(self, unet: nn.Module, added: dict[str, Tensor] | None) -> None:
        super().__init__()
        self.unet = unet
        self.added = added

    def forward(self, latents: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        """Returns the noise prediction."""
        found: Tensor = self.unet(
            latents, timestep, embeddings, added_cond_kwargs=self.added, return_dict=False
        )[0]
        return found
