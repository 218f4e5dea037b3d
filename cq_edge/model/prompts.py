"""Prompts as the UNet sees them, and the prompts that calibrate when the caller names none."""

from collections.abc import Sequence
from itertools import islice

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

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
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], negative: str = ""
) -> list[tuple[Tensor, Tensor]]:
    """Returns for each prompt the (uncond, cond) embeddings, each (1, 77, D) float32."""
    uncond = pipeline.text_encoder(token_ids(pipeline, negative))[0]
    return [(uncond, pipeline.text_encoder(token_ids(pipeline, prompt))[0]) for prompt in prompts]


def token_ids(pipeline: StableDiffusionPipeline, prompt: str) -> Tensor:
    """Returns (1, 77) int64, padded and cut as diffusers does."""
    ids: Tensor = pipeline.tokenizer(
        prompt, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return ids
