"""UNets beside Stable Diffusion's own, each against diffusers' forward pass."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cq_edge.errors import ModelError
from cq_edge.metrics import sqnr_db
from cq_edge.model.graphs import EncodePairGraph, VectorDecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.prompts import embed_prompts, token_ids
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import context_shapes, split_unet
from cq_edge.model.text import text_reference
from tests.model.tiny_models import (
    no_correction,
    step_inputs,
    tiny_unconditional,
    tiny_unet,
    tiny_vq,
)
from tests.tiny_pipeline import save_tiny_lcm, save_tiny_sdxl

_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def _guided(scale, width):
    """The embedding of a guidance scale as LatentConsistencyModelPipeline makes it."""
    told = torch.tensor([(scale - 1) * 1000])
    return get_timestep_embedding(told, width, downscale_freq_shift=1)


def _conditional(**changes):
    """Returns a UNet, its latents and timestep, its context, and diffusers' prediction."""
    unet = tiny_unet(**changes)
    latents, timestep, embeddings = step_inputs()
    context, given = [embeddings], {}
    if "addition_embed_type" in changes:
        pooled = torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
        ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        context.append(pooled)
    if "time_cond_proj_dim" in changes:
        given["timestep_cond"] = _guided(6.5, changes["time_cond_proj_dim"])
        context.append(torch.tensor([6.5]))
    expected = unet(latents, timestep, embeddings, **given).sample
    return unet, (latents, timestep), context, expected


def _unconditional(**changes):
    unet = tiny_unconditional(**changes)
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([741.0])
    return unet, (latents, timestep), [], unet(latents, timestep).sample


_MODELS = {
    "Stable Diffusion 2": lambda: _conditional(use_linear_projection=True),
    "SDXL": lambda: _conditional(**_SDXL, **_BLOCKS),
    "LCM": lambda: _conditional(time_cond_proj_dim=16),
    "LCM of SDXL": lambda: _conditional(**_SDXL, time_cond_proj_dim=16),
    "BK-SDM-Tiny": lambda: _conditional(mid_block_type=None, layers_per_block=1),
    "SSD-1B": lambda: _conditional(mid_block_type="UNetMidBlock2D"),
    "DDPM": _unconditional,
    "DDPM, padded": lambda: _unconditional(downsample_padding=0, mid_block_type=None),
}


@pytest.mark.parametrize("name", _MODELS)
@torch.no_grad()
def test_both_graphs_are_the_unet(name):
    unet, seen, context, expected = _MODELS[name]()
    full, shallow = split_unet(unet)
    assert [tuple(told.shape) for told in context] == list(context_shapes(unet).values())
    found, feature = full(*seen, *context)
    # the guidance scale's sinusoids are of angles in the thousands, where float32 has three digits
    assert sqnr_db(expected.numpy(), found.numpy()) > (75 if "LCM" in name else 110)
    assert torch.equal(shallow(*seen, *context, feature, *no_correction(shallow)), found)


@pytest.mark.parametrize("name", _MODELS)
@torch.no_grad()
def test_rewritten_and_quantised_graphs_are_still_the_unet(name):
    unet, seen, context, expected = _MODELS[name]()
    pair = rewrite_for_xnnpack(nn.ModuleList(split_unet(unet)))
    found, feature = pair[0](*seen, *context)
    assert sqnr_db(expected.numpy(), found.numpy()) > (60 if "LCM" in name else 100)
    full, shallow = quantize_for_xnnpack(pair)
    found, feature = full(*seen, *context)
    assert sqnr_db(expected.numpy(), found.numpy()) > 20
    assert torch.equal(shallow(*seen, *context, feature, *no_correction(shallow)), found)


@pytest.mark.parametrize(
    ("unet", "sentence"),
    [
        (
            lambda: tiny_unconditional(num_class_embeds=3),
            "the UNet has num_class_embeds = 3, an input or a path that the graphs lack",
        ),
        (
            lambda: tiny_unconditional(
                down_block_types=("SkipDownBlock2D", "DownBlock2D"), norm_num_groups=4
            ),
            "the UNet has a SkipDownBlock2D: only CrossAttnDownBlock2D and AttnDownBlock2D and "
            "DownBlock2D can be split",
        ),
        (
            lambda: tiny_unconditional(downsample_type="resnet"),
            "the UNet has downsample_type = 'resnet', an input or a path that the graphs lack",
        ),
        (
            lambda: tiny_unet(addition_embed_type="text", cross_attention_dim=64),
            "the UNet has addition_embed_type = 'text', an input or a path that the graphs lack",
        ),
    ],
)
def test_what_the_graphs_lack_is_refused_by_name(unet, sentence):
    with pytest.raises(ModelError) as caught:
        split_unet(unet())
    assert str(caught.value) == sentence


@torch.no_grad()
def test_the_pair_of_text_encoders_is_what_sdxl_is_told(tmp_path):
    pipeline = load_pipeline(save_tiny_sdxl(tmp_path / "sdxl"))
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    prompt = "a large red star"
    embeddings, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=True
    )
    ((uncond, cond),) = embed_prompts(pipeline, [prompt], 7.5)
    assert torch.equal(cond[0], embeddings)
    assert torch.equal(cond[1], pooled)
    assert torch.equal(uncond[0], negative)
    assert torch.equal(uncond[1], negative_pooled)
    graph = EncodePairGraph(pipeline.text_encoder, pipeline.text_encoder_2)
    ids = token_ids(pipeline, prompt)
    reference = text_reference(pipeline)(*ids)
    for lean in (graph, rewrite_for_xnnpack(graph)):
        for found, expected in zip(lean(*ids), reference, strict=True):
            assert sqnr_db(expected.numpy(), found.numpy()) > 100


@torch.no_grad()
def test_text_is_pooled_at_its_end_where_the_configuration_names_no_token(
    tmp_path,
):
    pipeline = load_pipeline(save_tiny_sdxl(tmp_path / "sdxl"))
    written = pipeline.text_encoder_2.config.to_dict()
    # as SDXL's own, whose vocabulary a tokenizer of fewer words need not fill
    changes = {"eos_token_id": 2, "vocab_size": written["vocab_size"] + 50}
    torch.manual_seed(0)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**written, **changes})).eval()
    graph = EncodePairGraph(pipeline.text_encoder, second)
    for prompt in ("a star", "a large red star"):
        ids = token_ids(pipeline, prompt)
        expected, found = second(ids[1])[0], graph(*ids)[1]
        assert sqnr_db(expected.numpy(), found.numpy()) > 100


@torch.no_grad()
def test_an_lcm_is_told_its_guidance_scale(tmp_path):
    pipeline = load_pipeline(save_tiny_lcm(tmp_path / "lcm"))
    ((_, cond),) = embed_prompts(pipeline, ["a green ring"], 8.5)
    assert [tuple(told.shape) for told in cond] == [(1, 77, 32), (1,)]
    assert cond[1].item() == 8.5


@torch.no_grad()
def test_a_vq_models_picture_is_of_the_nearest_vectors():
    vq = tiny_vq()
    latents = torch.randn(1, 3, 8, 8)
    decoded = vq.decode(latents / vq.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    graph = VectorDecodeGraph(vq)
    assert torch.allclose(graph(latents), expected, atol=1e-5)
    assert sqnr_db(expected.numpy(), rewrite_for_xnnpack(graph)(latents).numpy()) > 100
