"""Models of every kind, built without rounding and run: the pictures are diffusers' own."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.schedulers import scheduling_lcm
from PIL import Image
from safetensors.torch import save_file

from apps.cli import main
from cq_edge.manifest import read_manifest
from cq_edge.model.load import load_pipeline
from runtime.bundle import open_bundle
from runtime.generate import noises
from tests import tiny_pipeline
from tests.model.ldm_checkpoint import ldm_weights
from tests.model.test_vae import tiny_taesd

_PROMPT, _SEED = "a large red star", 5
_PROMPTS = ("a small green ring\n", "a blue square on a white background\n")


def _run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert code == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def _build(folder, model, *words):
    (folder / "prompts.txt").write_text("".join(_PROMPTS))
    bundle = folder / "bundle"
    prompts = ("--prompts", folder / "prompts.txt")
    return bundle, _run("build", model, "-o", bundle, "--max-gap", 2, "--json", *prompts, *words)


def _picture(bundle, folder, *words):
    _run("generate", bundle, *words, "-o", folder / "x.png", "--seed", _SEED, "--plan", "full")
    return np.asarray(Image.open(folder / "x.png"), float)


def _noise(shape):
    fresh = noises(shape, _SEED)
    return lambda *_, **__: torch.from_numpy(next(fresh))


def _assert_same(found, images):
    expected = np.asarray(images[0], float)
    assert expected.std() > 1  # a picture, not a colour
    assert np.abs(found - expected).max() <= 2  # of 255


@pytest.mark.slow
def test_a_single_file_that_predicts_v_with_a_lora(tmp_path):
    folder = tiny_pipeline.save_tiny_pipeline(tmp_path / "tiny")
    pipeline = load_pipeline(folder)
    save_file(ldm_weights(pipeline), tmp_path / "one.safetensors")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    lora = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    save_file(lora, tmp_path / "style.safetensors")
    bundle, _ = _build(
        tmp_path, tmp_path / "one.safetensors", "--config", folder, "--prediction-type",
        "v_prediction", "--lora", f"{tmp_path / 'style.safetensors'}:0.5", "--quantization",
        "none", "--scheduler", "ddim", "--steps", 5,
    )  # fmt: skip
    manifest = read_manifest(bundle)
    assert (manifest.name, manifest.conditions["lora"]) == ("one", "style.safetensors:0.5")
    assert manifest.noise_schedule.prediction_type == "v_prediction"
    with torch.no_grad():
        pipeline.unet.get_submodule(layer).weight += 0.5 * up @ down
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    start = _noise((4, 8, 8))()
    drawn = pipeline(
        _PROMPT, latents=start, num_inference_steps=5, guidance_scale=7.5, output_type="pil"
    )
    _assert_same(_picture(bundle, tmp_path, _PROMPT), drawn.images)


@pytest.mark.slow
def test_sdxl(tmp_path):
    folder = tiny_pipeline.save_tiny_sdxl(tmp_path / "sdxl")
    words = ("--quantization", "none", "--scheduler", "euler", "--steps", 5)
    bundle, _ = _build(tmp_path, folder, *words)
    manifest = read_manifest(bundle)
    assert [spec.name for spec in manifest.graph("encode").inputs] == ["input_ids", "input_ids_2"]
    assert [t.pad_token for t in manifest.tokenizers] == ["<|endoftext|>", "!"]
    assert manifest.empty_negative_prompt == "zeros"
    pipeline = load_pipeline(folder)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    for negative in ([], ["--negative-prompt", "a blue ring"]):
        start = _noise((4, 8, 8))() * 1.0
        drawn = pipeline(
            _PROMPT,
            negative_prompt=negative[-1] if negative else None,
            latents=start,
            num_inference_steps=5,
            guidance_scale=7.5,
            original_size=(64, 64),  # SDXL's eight pixels a cell
            target_size=(64, 64),
            output_type="pil",
        )
        _assert_same(_picture(bundle, tmp_path, _PROMPT, *negative, "--force"), drawn.images)
    # quantised graphs and a plan
    small = _build(tmp_path, folder, "--steps", 3, "--full-steps", 2, "--force")[0]
    _run("generate", small, _PROMPT, "-o", tmp_path / "y.png")
    _run("verify", small)


@pytest.mark.slow
def test_a_latent_consistency_model(tmp_path, monkeypatch):
    folder = tiny_pipeline.save_tiny_lcm(tmp_path / "lcm")
    bundle, (_, err) = _build(tmp_path, folder, "--quantization", "none")
    assert "4 steps have next to nothing to reuse" in err
    manifest = read_manifest(bundle)
    defaults = manifest.defaults
    assert (defaults.noise_scheduler, defaults.steps, defaults.full_steps) == ("lcm", 4, 4)
    assert (manifest.guidance, defaults.guidance_scale) == ("embedded", 8.5)
    pipeline = load_pipeline(folder)
    for words, scale in (((), 8.5), (("--guidance-scale", 3), 3.0)):
        fresh = _noise((4, 8, 8))
        start = fresh()
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", fresh)
        drawn = pipeline(
            _PROMPT, latents=start, num_inference_steps=4, guidance_scale=scale, output_type="pil"
        )
        _assert_same(_picture(bundle, tmp_path, _PROMPT, *words, "--force"), drawn.images)
    out, _ = _run("plan", bundle, "--speedup", 1)
    assert "note: 4 steps have next to nothing to reuse" in out
    assert open_bundle(bundle).calibrated() == (("lcm", 4),)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_an_unconditional_model(tmp_path, kind):
    save = {"ddpm": tiny_pipeline.save_tiny_ddpm, "ldm": tiny_pipeline.save_tiny_ldm}[kind]
    folder = save(tmp_path / kind)
    bundle = tmp_path / "bundle"
    _run("build", folder, "-o", bundle, "--quantization", "none", "--steps", 10, "--max-gap", 2)
    manifest = read_manifest(bundle)
    assert manifest.guidance == "none"
    assert set(manifest.graphs) == {"denoise", "denoise_shallow", "decode"}
    assert manifest.noise_schedule.clip_sample == (kind == "ddpm")
    found = _picture(bundle, tmp_path)
    pipeline = load_pipeline(folder)
    latents = _noise((3, 8, 8))()
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            predicted = pipeline.unet(latents, timestep).sample
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        if kind == "ldm":
            latents = pipeline.vqvae.decode(latents / pipeline.vqvae.config.scaling_factor).sample
    picture = (latents / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    _assert_same(found, [np.rint(picture * 255)])
    _run("plan", bundle, "--speedup", 1.2)
    _run("generate", bundle, "-o", tmp_path / "y.png", "--budget-ms", 60_000)
    assert main(["generate", str(bundle), "a prompt"]) == 2


@pytest.mark.slow
def test_a_single_step_and_taesd(tmp_path):
    folder = tiny_pipeline.save_tiny_pipeline(tmp_path / "tiny")
    tiny_taesd().save_pretrained(tmp_path / "taesd")
    words = ("--steps", 1, "--scheduler", "euler", "--guidance-scale", 1)
    bundle, (out, err) = _build(tmp_path, folder, *words, "--vae", tmp_path / "taesd")
    assert "a single step has next to nothing to reuse" in err
    assert json.loads(out.splitlines()[-1])["graphs"]["decode"]["delegated_macs_share"] > 0.99
    manifest = read_manifest(bundle)
    assert (manifest.defaults.full_steps, manifest.conditions["vae"]) == (1, "taesd")
    _run("generate", bundle, _PROMPT, "-o", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (16, 16)
