"""Whole pipelines in diffusers layout that convert in seconds: random weights, real classes."""

from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from cq_edge.model.load import DEMO_MODEL
from tests.model.tiny_models import lively, tiny_unconditional, tiny_unet, tiny_vae, tiny_vq


def save_tiny_pipeline(folder: Path) -> Path:
    """Writes it: 8×8 latents, 16×16 pictures, the demo model's tokenizer."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=tiny_vae(attention=False),
        text_encoder=lively(CLIPTextModel(_text_config(tokenizer, 1)).eval()),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=32, layers_per_block=1, attention_head_dim=2),
        scheduler=DDIMScheduler.from_pretrained(DEMO_MODEL / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_tiny_sdxl(folder: Path) -> Path:
    """Writes an SDXL pipeline: two text encoders, pooled text of 24 channels."""
    tokenizer, second = _tokenizer(), _tokenizer()
    second.pad_token = "!"
    torch.manual_seed(0)
    open_clip = _text_config(second, 2, hidden_act="gelu", projection_dim=24)
    StableDiffusionXLPipeline(
        vae=tiny_vae(attention=False),
        text_encoder=lively(CLIPTextModel(_text_config(tokenizer, 2)).eval()),
        text_encoder_2=lively(CLIPTextModelWithProjection(open_clip).eval()),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=tiny_unet(
            cross_attention_dim=64,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    ).save_pretrained(folder)
    return folder


def save_tiny_lcm(folder: Path) -> Path:
    """Writes a latent consistency model that is told its guidance scale."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    LatentConsistencyModelPipeline(
        vae=tiny_vae(attention=False),
        text_encoder=lively(CLIPTextModel(_text_config(tokenizer, 1)).eval()),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=32, layers_per_block=1, time_cond_proj_dim=16),
        scheduler=LCMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_tiny_ddpm(folder: Path) -> Path:
    """Writes an unconditional model of 8×8 pixels."""
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    DDPMPipeline(tiny_unconditional(), scheduler).save_pretrained(folder)
    return folder


def save_tiny_ldm(folder: Path) -> Path:
    """Writes an unconditional model of 8×8 latents and its VQModel of 16×16 pictures."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(tiny_vq(), tiny_unconditional(), scheduler).save_pretrained(folder)
    return folder


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")


def _text_config(tokenizer: CLIPTokenizer, layers: int, **changes: object) -> CLIPTextConfig:
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})
