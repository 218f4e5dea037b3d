"""Half-precision weights, widened layer by layer, against the same weights in float32."""

import copy

import torch
from diffusers import UNet2DConditionModel

from cq_edge.model.eight_bit_unet import eight_bit_unet
from cq_edge.model.narrow_weights import widen_while_running
from cq_edge.model.split import split_unet
from tests.model.tiny_models import tiny_unet


def _both() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Returns a UNet narrow, and one with the same weights in float32."""
    narrow = tiny_unet().half()
    wide = copy.deepcopy(narrow).float()
    widen_while_running(narrow)
    return narrow, wide


def _inputs(unet: UNet2DConditionModel) -> tuple[torch.Tensor, ...]:
    side = unet.config.sample_size
    embeddings = torch.randn(1, 77, unet.config.cross_attention_dim)
    return torch.randn(1, 4, side, side), torch.tensor([500.0]), embeddings


@torch.no_grad()
def test_narrow_weights_compute_what_wide_ones_do_and_stay_narrow() -> None:
    narrow, wide = _both()
    (found, _), (expected, _) = (split_unet(u) for u in (narrow, wide))
    inputs = _inputs(narrow)
    for ours, theirs in zip(found(*inputs), expected(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert {p.dtype for p in narrow.parameters()} == {torch.float16}


@torch.no_grad()
def test_a_narrow_unet_becomes_the_same_int8_graphs() -> None:
    narrow, wide = _both()
    found, expected = (eight_bit_unet(*split_unet(u))[0] for u in (narrow, wide))
    inputs = _inputs(narrow)
    for ours, theirs in zip(found(*inputs), expected(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert {p.dtype for p in narrow.parameters()} == {torch.float16}
