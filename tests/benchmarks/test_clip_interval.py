import json
from argparse import Namespace
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from apps.evaluate import SCENES_SEED
from benchmarks.clip_interval import _chunks, _float32, _line, _read, _result, _Scores
from cq_edge.metrics import mean_interval
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.plan_trial import final_latents
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.scenes import scenes
from runtime.bundle import open_bundle
from tests.tiny_bundle import captions, write_bundle


@pytest.fixture
def bundle(tmp_path):
    """Of the demo model's latents, with two steps of PNDM."""
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    manifest = bundle.manifest
    defaults = replace(manifest.defaults, noise_scheduler="pndm", steps=2)
    latents = replace(manifest.latents, height=16, width=16)
    return replace(bundle, manifest=replace(manifest, defaults=defaults, latents=latents))


@torch.no_grad()
def test_batches_draw_what_the_loop_draws_one_by_one(bundle):
    texts, defaults = captions(4), bundle.manifest.defaults
    chunks = list(_float32(bundle, iter(texts[1:]), 1, torch.device("cpu"), batch=2))
    assert [chunk.first_seed for chunk in chunks] == [1, 3]
    assert [caption for chunk in chunks for caption in chunk.captions] == texts[1:]
    pipeline, (tokenizer,) = load_pipeline(), bundle.tokenizers()
    noise_scheduler = make_noise_scheduler("pndm", 2, bundle.manifest.noise_schedule)

    def full(latents, timestep, embeddings):
        sample = pipeline.unet(latents, timestep, encoder_hidden_states=embeddings).sample
        return sample, torch.zeros(1, 1, 1, 1)

    negative, *told = (
        (pipeline.text_encoder(torch.from_numpy(tokenizer.encode(text)[0]))[0],)
        for text in ("", *texts)
    )
    loop = Loop(full, noise_scheduler, (4, 16, 16), defaults.guidance_scale)
    finals = final_latents(loop, [(negative, prompt) for prompt in told])
    pictures = np.concatenate([chunk.pictures for chunk in chunks])
    for latents, picture in zip(finals[1:], pictures, strict=True):
        levels = 255 * DecodeGraph(pipeline.vae)(latents)[0].permute(1, 2, 0).numpy()
        assert np.abs(picture - levels).max() <= 0.51


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    float32, ours = rng.normal(90, 2, (2, 48))
    return _Scores(float32, ours, rng.normal(45, 2, 48))


def part(scores, of):
    return _Scores(scores.float32[of], scores.ours[of], scores.psnr_db[of])


def test_the_interval_is_of_all_differences_in_a_file_and_of_each_run(scores, tmp_path):
    file = tmp_path / "scores.jsonl"
    assert _read(file) == []
    lines = [
        json.dumps({"run": {"plan": "one"}}),
        _line(part(scores, slice(16))),
        _line(part(scores, slice(16, 32))),
        json.dumps({"run": {"plan": "stopped before it found anything"}}),
        json.dumps({"run": {"plan": "two"}}),
        _line(part(scores, slice(32, 48))),
    ]
    file.write_text("\n".join(lines) + "\n")
    result = _result(_read(file))
    deltas = scores.ours - scores.float32
    assert result["captions"] == 48
    assert result["clip_delta"] == pytest.approx(deltas.mean(), abs=1e-3)
    assert result["clip_delta_ci"] == pytest.approx(mean_interval(deltas), abs=1e-3)
    assert result["psnr_db"] == pytest.approx(scores.psnr_db.mean(), abs=1e-3)
    one, two = result["runs"]
    assert (one["plan"], one["captions"], two["plan"], two["captions"]) == ("one", 32, "two", 16)
    assert two["clip_delta_ci"] == pytest.approx(mean_interval(deltas[32:]), abs=1e-3)


def test_a_run_goes_on_after_the_last_caption(bundle):
    args = Namespace(captions=38, device=None)
    chunks = list(_chunks(bundle, 5, args))
    assert [(chunk.first_seed, len(chunk.captions)) for chunk in chunks] == [
        (5, 16),
        (21, 16),
        (37, 1),
    ]
    told = [caption for chunk in chunks for caption in chunk.captions]
    world = islice(scenes(SCENES_SEED, held_out=True), 38)
    assert told == [scene.caption() for scene in world][5:]
