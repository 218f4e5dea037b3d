"""Trained weights become the two folders that ship inside `cq_edge`, in float16."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from cq_edge.model.vocabulary import write_vocabulary


def package_pipeline(
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    folder: Path,
) -> None:
    """Writes the diffusers pipeline to `folder`, replacing what was there."""
    noise_scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(folder)
    pipeline.to(torch.float32)
    write_vocabulary(tokenizer, folder / "tokenizer")
    _forget_where_from(folder)


def package_scorer(tokenizer: CLIPTokenizer, clip: CLIPModel, folder: Path) -> None:
    """Writes the scorer to `folder`, replacing what was there."""
    side = clip.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    shutil.rmtree(folder, ignore_errors=True)
    clip.half().save_pretrained(folder)
    clip.float()
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    _forget_where_from(folder)


def _forget_where_from(folder: Path) -> None:
    """Drops from every config the path of the machine it was trained on."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
