import pytest
import torch
from torch import nn

from cq_edge.errors import ModelError, UsageError
from cq_edge.metrics import sqnr_db
from cq_edge.model.split import split_unet
from cq_edge.model.split_einsum import ATTENTIONS, with_attention
from tests.model.tiny_models import no_correction, step_inputs, tiny_unet, tiny_vae


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_every_kind_of_attention_equals_the_original(name):
    full, shallow = split_unet(tiny_unet())
    pair = with_attention(nn.ModuleList([full, shallow]), name, query_chunk=24)
    noise_pred, feature = full(*step_inputs())
    found, found_feature = pair[0](*step_inputs())
    assert sqnr_db(noise_pred.numpy(), found.numpy()) > 110
    correction = no_correction(pair[1])
    again = pair[1](*step_inputs(), found_feature, *correction)
    assert torch.equal(again, found)  # the shallow graph still shares the full one's layers
    assert sqnr_db(feature.numpy(), found_feature.numpy()) > 110


@torch.no_grad()
def test_the_module_itself_is_left_as_it_was():
    full, _ = split_unet(tiny_unet())
    before = full(*step_inputs())[0]
    with_attention(full, "split-einsum")
    assert torch.equal(full(*step_inputs())[0], before)


def test_the_second_version_takes_the_queries_in_chunks():
    full, _ = split_unet(tiny_unet())
    programs = [
        torch.export.export(with_attention(full, name, query_chunk=16), step_inputs())
        for name in ("split-einsum", "split-einsum-v2")
    ]
    softmaxes = [
        sum("softmax" in str(node.target) for node in program.graph.nodes) for program in programs
    ]
    assert softmaxes[1] > softmaxes[0] > 0


def test_a_kind_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(UsageError) as refusal:
        with_attention(nn.Identity(), "flash")
    assert str(refusal.value) == (
        "attention is 'flash': it must be one of original, split-einsum, split-einsum-v2"
    )


def test_an_attention_with_a_norm_of_its_own_is_refused():
    with pytest.raises(ModelError, match="has group_norm: split-einsum knows none"):
        with_attention(tiny_vae(), "split-einsum")
