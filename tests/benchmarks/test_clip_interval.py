from argparse import Namespace
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from apps.engines import ENGINES, engine_for
from apps.evaluate import SCENES_SEED
from benchmarks.clip_interval import (
    _added,
    _against_known,
    _Chunk,
    _chunks,
    _compared,
    _count,
    _float32,
    _float32_of,
    _Process,
    _read,
    _result,
    _Scores,
)
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.metrics import mean_interval
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.plan_trial import final_latents
from cq_edge.model.scorer import Scorer
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.scenes import scenes
from runtime.bundle import open_bundle
from runtime.draw import draw, planned
from tests.tiny_bundle import FakeEngine, captions, write_bundle


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
    first = [part(scores, slice(16)), part(scores, slice(16, 32))]
    assert list(_added(file, {"plan": "one"}, 0, first)) == first
    assert list(_added(file, {"plan": "found nothing"}, 32, [])) == []
    with file.open("a") as lines:
        lines.write('{"first": 32, "float32": [90.0, 9')  # where a run was killed
    list(_added(file, {"plan": "two"}, _count(_read(file)), [part(scores, slice(32, 48))]))
    result = _result(_read(file))
    deltas = scores.ours - scores.float32
    assert result["captions"] == 48
    assert result["clip_delta"] == pytest.approx(deltas.mean(), abs=1e-3)
    assert result["clip_delta_ci"] == pytest.approx(mean_interval(deltas), abs=1e-3)
    assert result["psnr_db"] == pytest.approx(scores.psnr_db.mean(), abs=1e-3)
    one, two = result["runs"]
    assert (one["plan"], one["captions"], two["plan"], two["captions"]) == ("one", 32, "two", 16)
    assert two["clip_delta_ci"] == pytest.approx(mean_interval(deltas[32:]), abs=1e-3)


def test_scores_are_in_the_file_before_the_next_are_drawn(scores, tmp_path):
    file, parts = tmp_path / "scores.jsonl", [part(scores, slice(16)), part(scores, slice(16, 48))]
    for seen, _ in enumerate(_added(file, {}, 0, parts), 1):
        assert _count(_read(file)) == (16, 48)[seen - 1]


def test_captions_of_ours_alone_count_where_float32s_mean_is_known(scores, tmp_path):
    file, nothing = tmp_path / "scores.jsonl", np.full(32, np.nan)
    both, alone = part(scores, slice(16)), _Scores(nothing, scores.ours[16:], nothing)
    list(_added(file, {"plan": "both"}, 0, [both]))
    list(_added(file, {"plan": "ours"}, 16, [alone]))
    runs = _read(file)
    result, deltas = _result(runs), both.ours - both.float32
    assert (_count(runs), result["captions"]) == (48, 16)
    assert result["clip_delta"] == pytest.approx(deltas.mean(), abs=1e-3)
    assert result["runs"][1]["clip_ours"] == pytest.approx(alone.ours.mean(), abs=1e-3)
    known = _against_known(scores.ours, result, 48, float(scores.float32.mean()))
    assert known["clip_delta"] == pytest.approx((scores.ours - scores.float32).mean(), abs=1e-3)
    low, high = known["clip_delta_ci"]
    whole = np.subtract(*mean_interval(deltas)[::-1])
    assert high - low == pytest.approx(whole / np.sqrt(3), abs=1e-3)
    assert low < known["clip_delta"] < high
    with pytest.raises(UsageError, match=r"48 captions are drawn, and .* over 49: run this again"):
        _against_known(scores.ours, result, 49, 90.0)
    with pytest.raises(UsageError, match="no caption has both scores"):
        _against_known(alone.ours, _result(runs[1:]), 32, 90.0)


def test_float32s_scores_of_another_plan_count_again(scores, tmp_path):
    file, new, nothing = tmp_path / "scores.jsonl", tmp_path / "new.jsonl", np.full(16, np.nan)
    run = {"float32": "graphs 1", "guidance_scale": 3.5, "engine": "xnnpack"}
    list(_added(file, run, 0, [part(scores, slice(32))]))
    list(
        _added(
            file, run | {"float32": "not drawn"}, 32, [_Scores(nothing, scores.ours[32:], nothing)]
        )
    )
    float32 = _float32_of(file, run)
    alone = [_Scores(nothing, scores.ours[i : i + 16] - 1, nothing) for i in (16, 32)]
    list(_added(new, {}, 0, [part(scores, slice(16))]))
    list(_added(new, {}, 16, _compared(alone, 16, float32)))
    one, two = _result(_read(new))["runs"]
    assert (one["captions"], two["captions"]) == (16, 16)  # of the last 16 it knows none
    deltas = scores.ours[16:32] - 1 - scores.float32[16:32]
    assert two["clip_delta"] == pytest.approx(deltas.mean(), abs=1e-3)
    assert "psnr_db" in one
    assert "psnr_db" not in two
    with pytest.raises(UsageError, match=r"differ in float32 \(graphs 1, here graphs 2\)"):
        _float32_of(file, run | {"float32": "graphs 2"})
    with pytest.raises(UsageError, match=r"differ in guidance_scale \(3.5, here 7.5\)"):
        _float32_of(file, run | {"guidance_scale": 7.5})
    with pytest.raises(UsageError, match="has no scores"):
        _float32_of(tmp_path / "gone.jsonl", run)


def test_captions_that_are_missing_or_stand_twice_are_refused(scores, tmp_path):
    file = tmp_path / "scores.jsonl"
    list(_added(file, {}, 0, [part(scores, slice(16))]))
    list(_added(file, {}, 8, [part(scores, slice(16, 32))]))
    with pytest.raises(UsageError, match="line 4: captions from 16 on are missing or stand twice"):
        _read(file)
    with pytest.raises(UsageError, match="no caption was drawn"):
        _result([])


def test_a_process_draws_both_sides_with_their_seeds_and_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "xnnpack", FakeEngine)
    folder = write_bundle(tmp_path / "bundle")
    reference = write_bundle(tmp_path / "float32", quantization="none")
    plan = {"noise_scheduler": "ddim", "steps": 10, "modes": "FSKKFSKKFF"}
    process = _Process(folder, reference, plan, tmp_path / "kept")
    chunk = _Chunk(7, captions(2))
    found = process.compare(chunk)
    bundle = open_bundle(folder)
    schedule = CacheSchedule.from_string(plan["modes"])
    table = bundle.reuse_table("ddim", 10)
    method = planned(bundle, engine_for(bundle, 1), table, schedule)
    ours = [draw(method, caption, seed).picture for seed, caption in enumerate(captions(2), 7)]
    scores = Scorer.load().clip_scores(np.stack(ours), captions(2))
    np.testing.assert_allclose(found.ours, scores, rtol=1e-5)
    assert (found.psnr_db < 90).all()
    assert len(list((tmp_path / "kept").rglob("00000[78].png"))) == 4
    again = process.compare(chunk)
    np.testing.assert_allclose(again.float32, found.float32, rtol=1e-5)
    alone = _Process(folder, None, plan, None).compare(chunk)
    np.testing.assert_allclose(alone.ours, scores, rtol=1e-5)
    assert np.isnan([alone.float32, alone.psnr_db]).all()
    given = _Process(folder, None, plan, None).compare(_Chunk(7, captions(2), np.stack(ours)))
    np.testing.assert_allclose(given.float32, found.ours, rtol=1e-5)


def test_a_run_goes_on_after_the_last_caption(bundle):
    args = Namespace(captions=38, device=None)
    chunks = list(_chunks(bundle, 5, args))
    assert [chunk.first_seed for chunk in chunks] == [5, 21, 37]
    assert [len(chunk.captions) for chunk in chunks] == [16, 16, 1]
    told = [caption for chunk in chunks for caption in chunk.captions]
    world = islice(scenes(SCENES_SEED, held_out=True), 38)
    assert told == [scene.caption() for scene in world][5:]
