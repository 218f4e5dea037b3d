"""A whole pipeline in diffusers layout that converts in seconds: random weights, real classes."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cq_edge.model.load import DEMO_MODEL
from tests.model.tiny_models import lively, tiny_unet, tiny_vae


def save_tiny_pipeline(folder: Path) -> Path:
    """Writes it: 8×8 latents, 16×16 pictures, the demo model's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(attention=False),
        text_encoder=lively(CLIPTextModel(config).eval()),
        tokenizer=tokenizer,
        unet=tiny_unet(cross_attention_dim=32, layers_per_block=1, attention_head_dim=2),
        scheduler=DDIMScheduler.from_pretrained(DEMO_MODEL / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
