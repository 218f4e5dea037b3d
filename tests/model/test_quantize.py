import torch
from torch import nn

from cq_edge.metrics import sqnr_db
from cq_edge.model.load import load_pipeline
from cq_edge.model.prompts import embed_prompts
from cq_edge.model.quantize import FLOAT_LAYERS, Int8Conv2d, quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from tests.model.tiny_models import no_correction, step_inputs, tiny_unet


def quantised_pair():
    pair = rewrite_for_xnnpack(nn.ModuleList(split_unet(tiny_unet())))
    return pair, quantize_for_xnnpack(pair)


@torch.no_grad()
def test_a_convolutions_weights_are_nearest_on_the_127_step_grid_of_their_channel():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    quantised = Int8Conv2d(conv)
    scale = conv.weight.abs().amax((1, 2, 3)) / 127
    assert torch.allclose(quantised.scale, scale)
    expected = torch.round(conv.weight / quantised.scale[:, None, None, None])
    assert torch.equal(quantised.weight, expected.to(torch.int8))


@torch.no_grad()
def test_a_quantised_convolution_keeps_stride_padding_and_bias():
    conv = nn.Conv2d(16, 8, 3, stride=2, padding=1)
    x = torch.randn(1, 16, 9, 9)
    quantised = Int8Conv2d(conv)(x)
    assert quantised.shape == conv(x).shape
    assert sqnr_db(conv(x).numpy(), quantised.numpy()) > 35


@torch.no_grad()
def test_a_quantised_unet_stays_close_and_the_float_one_is_left_alone():
    pair, quantised = quantised_pair()
    inputs = step_inputs()
    expected = pair[0](*inputs)[0]
    ratio_db = sqnr_db(expected.numpy(), quantised[0](*inputs)[0].numpy())
    assert 25 < ratio_db < 60
    assert torch.equal(pair[0](*inputs)[0], expected)


@torch.no_grad()
def test_the_quantised_pair_agrees_bit_for_bit():
    _, (full, shallow) = quantised_pair()
    inputs = step_inputs()
    predicted, feature = full(*inputs)
    assert torch.equal(shallow(*inputs, feature, *no_correction(shallow)), predicted)


def test_all_layers_but_the_first_and_last_and_the_last_shortcuts_are_eight_bits():
    _, (full, _) = quantised_pair()
    floats = [name for name, m in full.named_modules() if type(m) is nn.Conv2d]
    assert [name for name in floats if "shortcut" not in name] == ["conv_in", "head.conv"]
    shortcuts = [f"{layer}.resnet.conv_shortcut" for layer in ("last.0", "last.1", "outer.0")]
    assert [name for name in floats if "shortcut" in name] == shortcuts
    linears = [m for m in full.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(type(m.weight) is not nn.Parameter for m in linears)


@torch.no_grad()
def test_the_last_shortcuts_in_float_save_most_of_the_demo_models_error():
    pipeline = load_pipeline()
    pair = rewrite_for_xnnpack(nn.ModuleList(split_unet(pipeline.unet)))
    (_, prompt), *_ = embed_prompts(pipeline, ["a red circle above a blue square"], 3.5)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = (latents, torch.tensor([501.0]), *prompt)
    expected = pair[0](*inputs)[0]

    def error_db(keep: tuple[str, ...]) -> float:
        return sqnr_db(expected.numpy(), quantize_for_xnnpack(pair, keep)[0](*inputs)[0].numpy())

    without = tuple(name for name in FLOAT_LAYERS if "shortcut" not in name)
    assert error_db(FLOAT_LAYERS) > error_db(without) + 4


def test_layers_named_to_be_kept_stay_float():
    pair, _ = quantised_pair()
    full, _ = quantize_for_xnnpack(pair, keep=("conv_in", "head.conv", "linear_1"))
    assert type(full.time.network.linear_1.weight) is nn.Parameter
    assert type(full.time.network.linear_2.weight) is not nn.Parameter
