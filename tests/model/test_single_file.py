import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from cq_edge.errors import ModelError
from cq_edge.model.load import load_pipeline
from cq_edge.model.single_file import CHECKPOINT_CONFIGS, _clip_tokenizer
from tests.model.ldm_checkpoint import ldm_weights, unet_weights
from tests.model.tiny_models import lively, tiny_unet, tiny_vae
from tests.tiny_pipeline import save_tiny_pipeline

_PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
_TEXT = {"sd1": 123_060_480, "sd2": 340_387_840, "sdxl": 123_060_480}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("single") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(folder):
    path = folder.parent / "tiny.safetensors"
    save_file(ldm_weights(load_pipeline(folder)), path)
    return path


def _assert_same(found, expected, names):
    for name in names:
        weights = getattr(expected, name).state_dict()
        state = getattr(found, name).state_dict()
        assert state.keys() == weights.keys()
        for key, weight in weights.items():
            assert torch.equal(state[key], weight), f"{name} {key}"


def test_a_checkpoint_of_stable_diffusion_1_is_the_folder_it_was_made_of(folder, checkpoint):
    _assert_same(
        load_pipeline(checkpoint, config=folder),
        load_pipeline(folder),
        ("unet", "vae", "text_encoder"),
    )


def _open_clip_config(tokenizer, **changes):
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "projection_dim": 32,
    }
    return CLIPTextConfig(**{**settings, **changes})


def test_a_checkpoint_of_stable_diffusion_2_has_open_clips_text_encoder(folder):
    pipeline = load_pipeline(folder)
    text = lively(CLIPTextModel(_open_clip_config(pipeline.tokenizer)).eval())
    unet = tiny_unet(cross_attention_dim=32, use_linear_projection=True)
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder.parent / "two")
    path = folder.parent / "two.safetensors"
    save_file(ldm_weights(pipeline), path)
    found = load_pipeline(path, config=folder.parent / "two")
    _assert_same(found, pipeline, ("unet", "vae", "text_encoder"))
    assert found.scheduler.config.prediction_type == "v_prediction"


def test_a_file_that_says_v_prediction_is_taken_at_its_word(folder, checkpoint, tmp_path):
    assert load_pipeline(checkpoint, config=folder).scheduler.config.prediction_type == "epsilon"
    weights = ldm_weights(load_pipeline(folder))
    save_file(weights, tmp_path / "said.safetensors", {"modelspec.prediction_type": "v"})
    save_file(weights | {"v_pred": torch.empty(0)}, tmp_path / "marked.safetensors")
    for name in ("said", "marked"):
        found = load_pipeline(tmp_path / f"{name}.safetensors", config=folder)
        assert found.scheduler.config.prediction_type == "v_prediction"
    told = load_pipeline(checkpoint, config=folder, prediction_type="v_prediction")
    assert told.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_shipped_configurations_are_the_published_models(kind):
    root = CHECKPOINT_CONFIGS / kind
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(root / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(root / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(root / "text_encoder"))
    for model, count in ((unet, _PARAMETERS[kind]), (vae, 83_653_863), (text, _TEXT[kind])):
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    # diffusers finds every weight of the published layout, in its place
    original = {f"model.diffusion_model.{k}": v for k, v in unet_weights(unet).items()}
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    expected = {key: weight.shape for key, weight in unet.state_dict().items()}
    assert {key: weight.shape for key, weight in converted.items()} == expected


def test_the_vocabulary_made_of_clips_merges_gives_clips_ids():
    tokenizer = _clip_tokenizer()
    assert len(tokenizer) == 49408
    ids = tokenizer("a photo of a cat", padding="max_length").input_ids
    assert ids[:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    padded = _clip_tokenizer(pad_token="!")("a photo of a cat", padding="max_length").input_ids
    assert padded[6:9] == [49407, 0, 0]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (
            {"lora_unet_x.lora_down.weight": (1,)},
            "is no Stable Diffusion checkpoint: it holds LoRA weights; give the model they belong "
            "to, and this file with --lora",
        ),
        (
            {"decoder.conv_in.weight": (1,)},
            "is no Stable Diffusion checkpoint: it holds a VAE; give the model, and this file with "
            "--vae",
        ),
        (
            {"x": (1,)},
            "is no Stable Diffusion checkpoint: it has no model.diffusion_model.… weights (its "
            "first is x)",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)},
            "takes 9 channels where a text-to-image UNet takes 4: it is made for inpainting or "
            "another conditioning, which cq-edge does not build",
        ),
        (
            {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
            "is neither Stable Diffusion 1.x, nor 2.x, nor SDXL by the width of its "
            "cross-attention: give a folder in diffusers layout with its configurations (--config)",
        ),
    ],
)
def test_other_files_are_refused_by_what_they_hold(tmp_path, weights, sentence):
    path = tmp_path / "x.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in weights.items()}, path)
    with pytest.raises(ModelError) as caught:
        load_pipeline(path)
    assert str(caught.value) == f"{path} {sentence}"


def test_a_checkpoint_without_all_weights_is_refused(folder, tmp_path):
    weights = ldm_weights(load_pipeline(folder))
    del weights["model.diffusion_model.out.2.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ModelError, match="lacks weights that tiny has: if it follows other"):
        load_pipeline(tmp_path / "less.safetensors", config=folder)


def test_weights_of_other_shapes_are_refused(folder, tmp_path):
    weights = ldm_weights(load_pipeline(folder))
    weights["model.diffusion_model.out.2.bias"] = torch.zeros(7)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not hold the weights of tiny"):
        load_pipeline(tmp_path / "other.safetensors", config=folder)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 a renamed pickle")
    with pytest.raises(ModelError, match="is no safetensors file, or a damaged one"):
        load_pipeline(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is no file: there is no checkpoint"):
        load_pipeline(tmp_path / "y.safetensors")


def test_pickles_are_refused_with_the_reason_and_a_cure_that_works(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.ones(3)}, "global_step": 7}, path)
    with pytest.raises(ModelError) as caught:
        load_pipeline(path)
    reason, _, command = str(caught.value).partition(' with python -c "')
    assert reason == (
        f"{path} is a pickle file, and reading one can run any code that was put in it: convert "
        "it to safetensors, which holds numbers alone,"
    )
    exec(command.removesuffix('"'))
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(3))


def test_a_folder_of_pickles_is_refused_with_a_cure(folder, tmp_path):
    import shutil

    model = shutil.copytree(folder, tmp_path / "model")
    unet = load_pipeline(folder).unet
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_pipeline(model)
    reason, _, command = str(caught.value).partition(' with python -c "')
    assert reason == (
        f"{model / 'unet' / 'diffusion_pytorch_model.bin'} is a pickle file, and reading one can "
        "run any code that was put in it: convert the folder to safetensors"
    )
    exec(command.removesuffix('"'))
    _assert_same(load_pipeline(f"{model}-safetensors"), load_pipeline(folder), ("unet", "vae"))


def test_a_config_is_for_single_files_alone(folder):
    with pytest.raises(ModelError) as caught:
        load_pipeline(folder, config=folder)
    assert str(caught.value) == (
        f"--config is for a single .safetensors file: {folder} has its own"
    )
