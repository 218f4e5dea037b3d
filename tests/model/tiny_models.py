"""Real model classes at sizes that run in a moment."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from cq_edge.model.split import ShallowUNet


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "sample_size": 8,
        "layers_per_block": 2,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": [2, 4],
        "norm_num_groups": 4,
    }
    return lively(UNet2DConditionModel(**{**settings, **changes}).eval())


def tiny_vae(*, attention: bool = True) -> AutoencoderKL:
    torch.manual_seed(0)
    return lively(
        AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=attention,
            scaling_factor=0.18215,
        ).eval()
    )


def tiny_unconditional(**changes: object) -> UNet2DModel:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return lively(UNet2DModel(**{**settings, **changes}).eval())


def tiny_vq() -> VQModel:
    torch.manual_seed(0)
    return lively(
        VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            num_vq_embeddings=32,
            norm_num_groups=4,
            scaling_factor=0.5,
        ).eval()
    )


def tiny_text(activation: str = "quick_gelu") -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
    )
    return lively(CLIPTextModel(config).eval())


def step_inputs(size: int = 8, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, size, size, generator=generator)
    embeddings = torch.randn(1, 77, width, generator=generator)
    return latents, torch.tensor([741.0]), embeddings


def no_correction(shallow: ShallowUNet) -> list[Tensor]:
    """Returns both halves' gains and biases that change nothing."""
    widths = (shallow.feature_channels, shallow.consumed_channels)
    return [values for width in widths for values in (torch.ones(width), torch.zeros(width))]


@torch.no_grad()
def lively(model):
    """Moves norms away from weight 1 and bias 0, where a dropped affine part would not show."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model
