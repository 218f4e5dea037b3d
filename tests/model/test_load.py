import json
import shutil

import pytest
import torch

from cq_edge.errors import ModelError
from cq_edge.model.load import DEMO_MODEL, load_pipeline


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(DEMO_MODEL, tmp_path / "model")


def test_the_demo_model_is_what_is_loaded_when_nothing_is_named():
    pipeline = load_pipeline()
    assert pipeline.unet.dtype == torch.float32
    assert not pipeline.unet.training
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert pipeline.vae_scale_factor == 8


def test_a_folder_without_an_index_is_no_pipeline(tmp_path):
    with pytest.raises(ModelError) as caught:
        load_pipeline(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is no diffusers pipeline: it has no model_index.json; give the folder that "
        "a pipeline's save_pretrained wrote, or a single .safetensors file"
    )


def test_a_missing_component_is_named(copied):
    shutil.rmtree(copied / "vae")
    with pytest.raises(ModelError) as caught:
        load_pipeline(copied)
    assert str(caught.value) == (
        f"{copied} has no vae: a pipeline needs tokenizer, text_encoder, unet, vae, scheduler"
    )


def test_another_kind_of_pipeline_is_refused_by_name(copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ModelError) as caught:
        load_pipeline(copied)
    assert str(caught.value) == (
        f"{copied} holds a FluxPipeline; cq-edge builds from StableDiffusionPipeline, "
        "StableDiffusionXLPipeline, LatentConsistencyModelPipeline, DDPMPipeline, DDIMPipeline, "
        "LDMPipeline"
    )


def test_an_index_that_is_no_json_is_refused(copied):
    (copied / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="is not the JSON object diffusers writes"):
        load_pipeline(copied)


def test_damaged_weights_are_refused_in_one_sentence(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"could not be loaded: [^\n]+$"):
        load_pipeline(copied)
