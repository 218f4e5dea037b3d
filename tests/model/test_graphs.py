import pytest
import torch

from cq_edge.errors import ModelError
from cq_edge.metrics import sqnr_db
from cq_edge.model.graphs import DecodeGraph, EncodeGraph
from tests.model.tiny_models import tiny_text, tiny_vae


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_the_encode_graph_is_the_text_towers_last_hidden_state(activation):
    text = tiny_text(activation)
    ids = torch.randint(0, 99, (1, 77))
    expected = text(ids).last_hidden_state
    assert sqnr_db(expected.numpy(), EncodeGraph(text)(ids).numpy()) > 110


def test_an_unknown_activation_is_refused():
    with pytest.raises(ModelError) as refusal:
        EncodeGraph(tiny_text("relu"))
    assert str(refusal.value) == (
        "the text encoder's activation is relu: CLIP's are gelu and quick_gelu"
    )


@torch.no_grad()
def test_the_decode_graph_is_the_pipelines_picture():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 4, 4)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(DecodeGraph(vae)(latents), expected, atol=1e-5)
