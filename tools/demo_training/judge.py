"""What the demo model and its scorer are worth, on captions no training has seen."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cq_edge.model.load import DEMO_MODEL
from cq_edge.model.scorer import Scorer
from cq_edge.scenes import Scene, render
from tools.demo_training.data import held_out_scenes


def judge_scorer(scorer: Scorer, count: int) -> None:
    """Prints the scorer's attribute accuracy and CLIP score on held-out rendered pictures."""
    scenes = held_out_scenes(count)
    drawn = np.stack([render(scene) for scene in scenes])
    _report("rendered", scorer, drawn, scenes)


def judge_model(count: int, guidance_scale: float, sheet: Path, device: str) -> None:
    """Generates the held-out captions at 50 PNDM steps, float32; prints the attribute accuracy
    and CLIP score and writes a sheet of the first 32 pictures."""
    scenes = held_out_scenes(count)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, torch_dtype=torch.float32)
    pipeline.to(device).set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    parts = []
    for start in tqdm(range(0, count, 16), desc="generate"):
        batch = [scene.caption() for scene in scenes[start : start + 16]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        output = pipeline(
            batch,
            num_inference_steps=50,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="np",
        )
        parts.append((output.images * 255 + 0.5).astype(np.uint8))
    generated = np.concatenate(parts)
    _report(f"generated, guidance {guidance_scale:g}", Scorer.load(), generated, scenes)
    _write_sheet(generated[:32], sheet)


def _report(name: str, scorer: Scorer, drawn: NDArray[np.uint8], scenes: list[Scene]) -> None:
    accuracy = scorer.attribute_accuracy(drawn, scenes)
    score = scorer.clip_scores(drawn, [scene.caption() for scene in scenes]).mean()
    shares = ", ".join(f"{key} {share:.2%}" for key, share in accuracy.items())
    print(f"{name}, {len(scenes)} held-out captions: CLIP score {score:.2f}; right: {shares}")


def _write_sheet(drawn: NDArray[np.uint8], path: Path) -> None:
    rows = drawn.reshape(-1, 8, *drawn.shape[1:])
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(path)
