"""The shipped demo model and scorer are what their card says."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from cq_edge.model.load import DEMO_MODEL
from cq_edge.model.scorer import DEMO_SCORER, Scorer
from cq_edge.scenes import render, scenes

HELD_OUT = list(islice(scenes(77, held_out=True), 256))


@pytest.fixture(scope="module")
def scorer():
    return Scorer.load()


@pytest.fixture(scope="module")
def rendered():
    return np.stack([render(scene) for scene in HELD_OUT])


def test_the_scorer_reads_rendered_pictures_as_well_as_its_card_says(scorer, rendered):
    accuracy = scorer.attribute_accuracy(rendered, HELD_OUT)
    assert accuracy["all"] >= 0.98
    # the card's figures, less what another draw of scenes may cost
    assert accuracy["colour"] >= 0.98
    assert accuracy["kind"] >= 0.96
    assert accuracy["background colour"] >= 0.98
    assert accuracy["background pattern"] >= 0.98


def test_the_scorer_prefers_a_pictures_own_caption(scorer, rendered):
    captions = [scene.caption() for scene in HELD_OUT]
    own = scorer.clip_scores(rendered, captions)
    other = scorer.clip_scores(rendered, captions[1:] + captions[:1])
    assert own.shape == (256,)
    assert (own > other).mean() > 0.95


def test_the_scorer_is_no_better_than_chance_on_noise(scorer):
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
    assert scorer.attribute_accuracy(noise, HELD_OUT[:64])["all"] < 0.35


def test_pictures_of_another_size_are_scored_alike(scorer):
    large = np.stack([render(scene, 256) for scene in HELD_OUT[:32]])
    assert scorer.attribute_accuracy(large, HELD_OUT[:32])["all"] >= 0.9


def test_the_pipeline_runs_unchanged_in_diffusers():
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red circle on a plain white background",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (128, 128, 3)
    assert 0 < image.std() < 1


@pytest.mark.parametrize("folder", [DEMO_MODEL, DEMO_SCORER])
def test_no_config_names_a_machine(folder):
    for path in Path(folder).rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in text
        assert isinstance(json.loads(text), dict)


@pytest.mark.slow
def test_generated_pictures_show_what_held_out_captions_say(scorer):
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO_MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    some = HELD_OUT[:32]
    output = pipeline(
        [scene.caption() for scene in some],
        num_inference_steps=50,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(i) for i in range(len(some))],
        output_type="np",
    )
    pictures = (output.images * 255 + 0.5).astype(np.uint8)
    assert scorer.attribute_accuracy(pictures, some)["all"] >= 0.85
