"""The configurations that Stable Diffusion models are published with, and tiny ones of their kind.

Sources: the config.json files of Stable Diffusion 1.5, of 2.1 (768 px, v-prediction) and of SDXL
base 1.0. Keys that have diffusers' or transformers' default values there are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A latent diffusion pipeline without weights: constructors' arguments, by component.

    Attributes:
        latents: Height and width of the latents, an eighth of the picture's.
        unet: Of UNet2DConditionModel, without `sample_size`.
        texts: Of each text encoder's CLIPTextConfig: one, or SDXL's two, whose second projects.
        pads: The token that pads each tokenizer's ids; None is the one that ends a prompt.
        vae: Of AutoencoderKL.
        scheduler: A diffusers noise scheduler's class.
        schedule: Its arguments.
    """

    latents: int
    unet: Config
    texts: tuple[Config, ...]
    pads: tuple[str | None, ...]
    vae: Config
    scheduler: str
    schedule: Config


_CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}
_OPEN_CLIP_H: Config = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # the published encoder leaves out the last of 24
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
_OPEN_CLIP_G: Config = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_SD15_UNET: Config = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD15 = Architecture(
    latents=64,
    unet=_SD15_UNET,
    texts=(_CLIP_L,),
    pads=(None,),
    vae={**_VAE, "sample_size": 512},
    scheduler="PNDMScheduler",
    schedule={**_SCHEDULE, "set_alpha_to_one": False, "skip_prk_steps": True},
)
_SD21 = Architecture(
    latents=96,
    unet={
        **_SD15_UNET,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    texts=(_OPEN_CLIP_H,),
    pads=("!",),
    vae={**_VAE, "sample_size": 768},
    scheduler="DDIMScheduler",
    schedule={
        **_SCHEDULE,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "prediction_type": "v_prediction",
    },
)
_SDXL = Architecture(
    latents=128,
    unet={
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    texts=(_CLIP_L, _OPEN_CLIP_G),
    pads=(None, "!"),
    vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    scheduler="EulerDiscreteScheduler",
    schedule={**_SCHEDULE, "timestep_spacing": "leading", "interpolation_type": "linear"},
)
ARCHITECTURES: Mapping[str, Architecture] = {"sd15": _SD15, "sd21": _SD21, "sdxl": _SDXL}


def tiny(architecture: Architecture) -> Architecture:
    """Returns the same kind of pipeline at a size that converts in seconds: 16×16 latents, the
    outermost and the innermost block alone, of 32 and 64 channels and one layer."""
    unet = {**architecture.unet, "block_out_channels": (32, 64), "layers_per_block": 1}
    for kinds in ("down_block_types", "up_block_types"):
        unet[kinds] = (unet[kinds][0], unet[kinds][-1])
    heads = unet["attention_head_dim"]
    unet["attention_head_dim"] = 2 if isinstance(heads, int) else (2, 4)
    if "transformer_layers_per_block" in unet:
        unet["transformer_layers_per_block"] = (1, 2)
    texts = tuple(_tiny_text(text) for text in architecture.texts)
    unet["cross_attention_dim"] = sum(text["hidden_size"] for text in texts)
    if "addition_time_embed_dim" in unet:
        unet["addition_time_embed_dim"] = 8
        # six sizes of the picture, and the second encoder's projection
        unet["projection_class_embeddings_input_dim"] = 6 * 8 + texts[-1]["projection_dim"]
    vae = {
        **architecture.vae,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 128,
    }
    return replace(architecture, latents=16, unet=unet, texts=texts, vae=vae)


def _tiny_text(text: Config) -> Config:
    return {
        **text,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
