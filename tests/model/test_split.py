import pytest
import torch

from cq_edge.errors import ModelError
from cq_edge.model.split import split_refusal, split_unet
from tests.model.tiny_models import no_correction, step_inputs, tiny_unet


@pytest.mark.parametrize("size", [8, 10, 7])
@pytest.mark.parametrize("shallow_layers", [1, 2, 3])
@torch.no_grad()
def test_both_modules_equal_the_unet_bit_for_bit(shallow_layers, size):
    unet = tiny_unet()
    inputs = step_inputs(size)
    full, shallow = split_unet(unet, shallow_layers)

    predicted, feature = full(*inputs)
    channels = shallow.feature_channels
    again = shallow(*inputs, feature, *no_correction(shallow))

    assert torch.equal(predicted, unet(*inputs).sample)
    assert torch.equal(again, predicted)
    assert feature.shape == (1, channels, size, size)


@torch.no_grad()
def test_the_cache_correction_is_applied_to_the_cached_feature():
    _, shallow = split_unet(tiny_unet())
    inputs = step_inputs()
    feature = torch.randn(1, 16, 8, 8)
    gain, bias = torch.rand(16) + 0.5, torch.rand(16)
    none = no_correction(shallow)

    corrected = shallow(*inputs, feature, gain, bias, *none[2:])

    by_hand = feature * gain[None, :, None, None] + bias[None, :, None, None]
    assert torch.allclose(corrected, shallow(*inputs, by_hand, *none), atol=1e-6)
    assert not torch.allclose(corrected, shallow(*inputs, feature, *none), atol=1e-3)


@torch.no_grad()
def test_the_quantisation_correction_is_that_of_the_layers_that_consume_the_feature():
    _, shallow = split_unet(tiny_unet())
    inputs, feature = step_inputs(), torch.randn(1, 16, 8, 8)
    gain, bias = torch.rand(32) + 0.5, torch.rand(32)
    corrected = shallow(*inputs, feature, *no_correction(shallow)[:2], gain, bias)
    before = shallow.consumed(*inputs, feature)

    resnet = shallow.outer[0].resnet
    for layer, part in ((resnet.conv1, slice(0, 16)), (resnet.conv_shortcut, slice(16, 32))):
        layer.weight *= gain[part, None, None, None]
        layer.bias.copy_(layer.bias * gain[part] + bias[part])
    by_hand = shallow(*inputs, feature, *no_correction(shallow))

    torch.testing.assert_close(corrected, by_hand, atol=1e-5, rtol=1e-5)
    after = shallow.consumed(*inputs, feature)
    expected = before * gain[None, :, None, None] + bias[None, :, None, None]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


def test_the_modules_share_the_unets_parameters_and_the_shallow_holds_only_what_it_runs():
    unet = tiny_unet()
    full, shallow = split_unet(unet)

    of_unet = {id(p) for p in unet.parameters()}
    assert {id(p) for p in full.parameters()} == of_unet
    assert {id(p) for p in shallow.parameters()} < of_unet
    run = [unet.time_embedding, unet.conv_in, unet.conv_norm_out, unet.conv_out]
    run += [unet.up_blocks[-1].resnets[-1], unet.up_blocks[-1].attentions[-1]]
    assert {id(p) for p in shallow.parameters()} == {id(p) for m in run for p in m.parameters()}


def test_more_shallow_layers_keep_the_matching_down_layers():
    unet = tiny_unet()
    _, shallow = split_unet(unet, 2)

    assert [layer.resnet for layer in shallow.down] == [unet.down_blocks[0].resnets[0]]
    assert [layer.resnet for layer in shallow.outer] == list(unet.up_blocks[-1].resnets)[1:]


def test_a_unet_that_can_be_split_is_not_refused():
    assert split_refusal(tiny_unet()) is None


@pytest.mark.parametrize(
    ("changes", "shallow_layers", "message"),
    [
        (
            {"class_embed_type": "timestep"},
            1,
            "the UNet has class_embed_type = 'timestep', an input or a path that the graphs lack",
        ),
        (
            {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
            1,
            "the UNet has a SimpleCrossAttnDownBlock2D: only CrossAttnDownBlock2D and "
            "AttnDownBlock2D and DownBlock2D can be split",
        ),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            1,
            "the UNet's middle block is UNetMidBlock2DSimpleCrossAttn: only "
            "UNetMidBlock2DCrossAttn and UNetMidBlock2D are known",
        ),
        (
            {},
            4,
            "shallow_layers is 4, but the last up block has 3 layers: give 1 to 3",
        ),
        (
            {},
            0,
            "shallow_layers is 0, but the last up block has 3 layers: give 1 to 3",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_reason(changes, shallow_layers, message):
    unet = tiny_unet(**changes)
    with pytest.raises(ModelError) as refusal:
        split_unet(unet, shallow_layers)
    assert str(refusal.value) == message
