from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.clip_interval import _float32, _Found, _result
from cq_edge.metrics import mean_interval
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.plan_trial import final_latents
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import make_noise_scheduler
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
    texts, defaults = captions(3), bundle.manifest.defaults
    chunks = list(_float32(bundle, iter(texts), torch.device("cpu"), batch=2))
    assert [chunk.first_seed for chunk in chunks] == [0, 2]
    assert [caption for chunk in chunks for caption in chunk.captions] == texts
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
    for latents, picture in zip(finals, pictures, strict=True):
        levels = 255 * DecodeGraph(pipeline.vae)(latents)[0].permute(1, 2, 0).numpy()
        assert np.abs(picture - levels).max() <= 0.51


def test_the_interval_is_of_all_chunks_differences():
    rng = np.random.default_rng(0)
    float32, ours = rng.normal(90, 2, (2, 30))
    nothing = np.zeros(0)
    parts = [
        _Found(float32[part], ours[part], np.full(15, 40.0), exported)
        for part, exported in ((slice(15), np.array([90.0, 95.0])), (slice(15, None), nothing))
    ]
    result = _result(parts)
    deltas = ours - float32
    assert result["captions"] == 30
    assert result["clip_delta"] == pytest.approx(deltas.mean())
    assert result["clip_delta_ci"] == pytest.approx(mean_interval(deltas))
    assert result["exported_float32"] == {"captions": 2, "least_psnr_db": 90.0}
    alone = _result(parts[1:])
    assert alone["exported_float32"] == {"captions": 0, "least_psnr_db": None}
