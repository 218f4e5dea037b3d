"""Packages in the form of Apple's Swift pipeline, read from the disk by the interpreter."""

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from cq_edge.metrics import sqnr_db
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from cq_edge.model.split import split_unet
from exporters.apple_layout import apple_modules, apple_specs
from exporters.graph_spec import graph_specs
from exporters.to_coreml import export_coreml
from runtime.mil.interpreter import read_functions
from tests.model.tiny_models import lively, tiny_unet, tiny_vae

_RNG = np.random.default_rng(0)
_LAST_ID = 49407  # of CLIP's vocabulary: float16 would round it


def _text():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=_LAST_ID + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    return lively(CLIPTextModel(config).eval())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The functions that lie on the disk, by package, and the pipeline's own modules."""
    folder = tmp_path_factory.mktemp("apple")
    text, vae = _text(), tiny_vae(attention=False)
    unet = tiny_unet(layers_per_block=1, attention_head_dim=2, cross_attention_dim=32)
    ours = {
        "encode": EncodeGraph(text),
        "denoise": split_unet(unet)[0],
        "decode": DecodeGraph(vae),
    }
    specs = graph_specs((4, 8, 8), (16, 16), 32, feature_channels=16, consumed_channels=32)
    export_coreml(apple_modules(ours), apple_specs(specs), folder)
    packages = {path.stem: read_functions(path)["main"] for path in folder.iterdir()}
    return packages, text, unet, vae


def test_names_and_shapes_are_those_that_the_swift_sources_read(exported):
    found = {
        name: (function.input_shapes, function.output_names)
        for name, function in exported[0].items()
    }
    unet = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 32, 1, 77)}
    assert found == {
        "TextEncoder": ({"input_ids": (1, 77)}, ("last_hidden_state",)),
        "Unet": (unet, ("noise_pred",)),
        "VAEDecoder": ({"z": (1, 4, 8, 8)}, ("image",)),
    }


def test_ids_that_float16_cannot_tell_apart_keep_their_embeddings(exported):
    packages, text, *_ = exported
    ids = np.arange(_LAST_ID - 76, _LAST_ID + 1)[None]
    with torch.no_grad():
        expected = text(torch.from_numpy(ids))[0].numpy()
    found = packages["TextEncoder"].run({"input_ids": ids.astype(np.float32)})
    assert sqnr_db(expected, found["last_hidden_state"]) > 50


def test_the_unet_predicts_both_branches_as_diffusers_does(exported):
    packages, _, unet, _ = exported
    sample = _RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)
    embeddings = _RNG.standard_normal((2, 77, 32)).astype(np.float32)
    timestep = np.array([741, 741], np.float32)
    with torch.no_grad():
        expected = unet(*map(torch.from_numpy, (sample, timestep, embeddings)))[0].numpy()
    hidden = np.ascontiguousarray(embeddings.transpose(0, 2, 1)[:, :, None])
    given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": hidden}
    assert sqnr_db(expected, packages["Unet"].run(given)["noise_pred"]) > 50


def test_the_decoder_takes_latents_over_the_factor_that_swift_divides_by(exported):
    packages, *_, vae = exported
    latents = 0.1 * _RNG.standard_normal((1, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        scaled = torch.from_numpy(latents) / vae.config.scaling_factor
        expected = vae.decode(scaled).sample.clamp(-1, 1).numpy()
    found = packages["VAEDecoder"].run({"z": latents / np.float32(0.18215)})
    assert sqnr_db(expected, found["image"]) > 45
