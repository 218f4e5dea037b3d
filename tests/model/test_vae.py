import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from cq_edge.errors import ModelError
from cq_edge.metrics import sqnr_db
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.rewrite import rewrite_for_xnnpack
from tests.model.ldm_checkpoint import vae_weights
from tests.model.tiny_models import lively, tiny_vae
from tests.tiny_pipeline import save_tiny_pipeline


def tiny_taesd(**changes):
    torch.manual_seed(3)
    settings = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    }
    return lively(AutoencoderTiny(**{**settings, **changes}).eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_pipeline(tmp_path_factory.mktemp("vae") / "tiny")


@torch.no_grad()
def test_taesd_decodes_the_denoisers_latents_as_diffusers_does(folder, tmp_path):
    taesd = tiny_taesd()
    taesd.save_pretrained(tmp_path / "taesd")
    pipeline = load_pipeline(folder, vae=tmp_path / "taesd")
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert pipeline.vae_scale_factor == 2
    latents = 4 * torch.randn(1, 4, 8, 8)
    decoded = taesd.decode(latents / taesd.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    graph = DecodeGraph(pipeline.vae)
    assert torch.equal(graph(latents), expected)
    rewritten = rewrite_for_xnnpack(graph)(latents)
    assert sqnr_db(expected.numpy(), rewritten.numpy()) > 110


def _other_kl():
    vae = tiny_vae(attention=False)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.5)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    return vae


@torch.no_grad()
def test_another_autoencoder_brings_its_own_scaling_and_shift(folder, tmp_path):
    other = _other_kl()
    other.save_pretrained(tmp_path / "pipeline" / "vae")
    pipeline = load_pipeline(folder, vae=tmp_path / "pipeline")
    latents = torch.randn(1, 4, 4, 4)
    decoded = other.decode(latents / 0.5 + 0.25).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(DecodeGraph(pipeline.vae)(latents), expected, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_one_file_has_the_shapes_of_the_models_own(folder, tmp_path, prefix):
    other = _other_kl()
    weights = {f"{prefix}{k}": v.contiguous() for k, v in vae_weights(other).items()}
    save_file(weights, tmp_path / "vae.safetensors")
    found = load_pipeline(folder, vae=tmp_path / "vae.safetensors").vae
    for key, weight in other.state_dict().items():
        assert torch.equal(found.state_dict()[key], weight), key
    assert found.config.scaling_factor == load_pipeline(folder).vae.config.scaling_factor


def test_vaes_that_do_not_fit_are_refused(folder, tmp_path):
    def refusal(vae):
        with pytest.raises(ModelError) as caught:
            load_pipeline(folder, vae=vae)
        return str(caught.value)

    tiny_taesd(latent_channels=16).save_pretrained(tmp_path / "sixteen")
    assert refusal(tmp_path / "sixteen") == (
        f"the VAE of {tmp_path / 'sixteen'} decodes latents of 16 channels, and the UNet makes 4: "
        "give one that was made for this kind of model"
    )
    assert refusal(folder / "unet") == (
        f"{folder / 'unet'} holds a UNet2DConditionModel: a VAE can be replaced by AutoencoderKL "
        "and AutoencoderTiny"
    )
    assert refusal(tmp_path) == (f"{tmp_path} is no VAE in diffusers layout: it has no config.json")
    save_file({"1.weight": torch.zeros(1)}, tmp_path / "taesd.safetensors")
    assert refusal(tmp_path / "taesd.safetensors") == (
        f"{tmp_path / 'taesd.safetensors'} is no VAE in Stable Diffusion's layout: it has no "
        "decoder.conv_in; give one of another kind, such as TAESD, as a folder in diffusers layout"
    )
    assert "is a pickle file" in refusal(tmp_path / "x.pt")
    weights = {k: v.contiguous() for k, v in vae_weights(tiny_vae(attention=False)).items()}
    weights.pop("decoder.conv_out.bias")
    save_file(weights, tmp_path / "less.safetensors")
    assert refusal(tmp_path / "less.safetensors") == (
        f"{tmp_path / 'less.safetensors'} lacks weights that the model's own VAE has"
    )
    assert isinstance(load_pipeline(folder).vae, AutoencoderKL)
