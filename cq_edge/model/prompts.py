"""Prompts as the UNet sees them, and the prompts that calibrate when the caller names none."""

from collections.abc import Sequence
from itertools import islice

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from cq_edge.model.text import text_reference, tokenizers
from cq_edge.model.trajectory import Context, Prompt
from cq_edge.scenes import scenes

_SCENE_SEED = 5_000_000

# everyday subjects, styles and lights, for models trained on pictures of the world
WORLD_PROMPTS = (
    "a photo of a brown dog running on a beach at sunset",
    "an oil painting of a mountain village in winter",
    "a close-up portrait of an old fisherman, dramatic light",
    "a bowl of ramen with a soft-boiled egg, studio photograph",
    "a futuristic city skyline at night, neon reflections in the rain",
    "a watercolour of a fox sleeping under a birch tree",
    "an empty train station in morning fog",
    "a macro photograph of a dragonfly on a blade of grass",
)


def scene_prompts(count: int) -> list[str]:
    """Returns captions of scenes that the demo model may have trained on, never held-out ones."""
    return [s.caption() for s in islice(scenes(_SCENE_SEED, held_out=False), count)]


@torch.no_grad()
def embed_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], guidance_scale: float
) -> list[Prompt]:
    """Returns what the UNet is told of the empty prompt and of each prompt; see `split`.

    Args:
        pipeline: With text encoders or without.
        prompts: One or more.
        guidance_scale: What a guidance-distilled UNet is told to follow; others are not told.
    """
    uncond = _context(pipeline, "", guidance_scale)
    if zeros_for_empty_prompt(pipeline):
        uncond = tuple(torch.zeros_like(told) for told in uncond)
    return [(uncond, _context(pipeline, prompt, guidance_scale)) for prompt in prompts]


def token_ids(pipeline: DiffusionPipeline, prompt: str) -> tuple[Tensor, ...]:
    """Returns each tokenizer's (1, 77) int64, padded and cut as diffusers does."""
    return tuple(
        tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in tokenizers(pipeline)
    )


def zeros_for_empty_prompt(pipeline: DiffusionPipeline) -> bool:
    """Returns whether the UNet is told zeros where there is no negative prompt, as SDXL's is."""
    return bool(pipeline.config.get("force_zeros_for_empty_prompt", False))


def _context(pipeline: DiffusionPipeline, prompt: str, guidance_scale: float) -> Context:
    encoder = text_reference(pipeline)
    if encoder is None:
        return ()
    told = encoder(*token_ids(pipeline, prompt))
    context: Context = (told,) if isinstance(told, Tensor) else tuple(told)
    if guidance_kind(pipeline) == "embedded":
        return (*context, torch.tensor([guidance_scale]))
    return context


def guidance_kind(pipeline: DiffusionPipeline) -> str:
    """Returns how a picture is guided, as a manifest says it: by "two_calls" of the UNet, by a
    scale that the UNet was distilled to follow ("embedded"), or not at all ("none")."""
    if text_reference(pipeline) is None:
        return "none"
    distilled = pipeline.unet.config.time_cond_proj_dim is not None
    return "embedded" if distilled else "two_calls"
