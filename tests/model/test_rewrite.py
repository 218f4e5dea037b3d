import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

import cq_edge.model.lean_attention as lean_attention
from cq_edge.errors import ModelError
from cq_edge.metrics import sqnr_db
from cq_edge.model.lean_attention import (
    LeanAttention,
    fold_attention_biases,
    rewrite_attention,
)
from cq_edge.model.lean_norms import LeanGroupNorm, LeanLayerNorm, LeanRmsNorm, fold_affine
from cq_edge.model.lean_resnet import LeanTimesteps, LeanUpsample, rewrite_resnets
from cq_edge.model.lean_transformer import _mean_first, rewrite_transformers
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from tests.model.tiny_models import no_correction, step_inputs, tiny_unet, tiny_vae


def agreement_db(reference, other):
    return sqnr_db(reference.numpy(), other.numpy())


@pytest.mark.parametrize("mean", [0.0, 30.0])
@torch.no_grad()
def test_group_norm_is_numerically_equal_even_far_from_zero(mean):
    norm = nn.GroupNorm(4, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 24, 5, 7) + mean
    assert agreement_db(norm.double()(x.double()), LeanGroupNorm(norm.float())(x)) > 95


@torch.no_grad()
def test_layer_norm_is_numerically_equal():
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 9, 24)
    assert agreement_db(norm(x), LeanLayerNorm(norm)(x)) > 110


@torch.no_grad()
def test_a_norms_affine_part_moves_into_the_layers_behind_it():
    norm = nn.LayerNorm(24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with_bias, without = nn.Linear(24, 8), nn.Linear(24, 8, bias=False)
    x = torch.randn(2, 9, 24)
    before = [with_bias(norm(x)), without(norm(x))]
    fold_affine(norm, [with_bias, without])
    assert norm.weight is None
    for expected, linear in zip(before, (with_bias, without), strict=True):
        assert agreement_db(expected, linear(norm(x))) > 110


@pytest.mark.parametrize("width", [1, 2, 24])
def test_rotation_puts_the_mean_first_and_keeps_lengths(width):
    rotation = _mean_first(width)
    x = torch.randn(width, 5, dtype=torch.float64)
    torch.testing.assert_close((rotation @ x)[0], x.mean(0) * width**0.5)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64))


@pytest.mark.parametrize("mean", [0.0, 20.0])
@torch.no_grad()
def test_transformers_need_no_mean_of_tokens_and_stay_equal(mean):
    transformer = Transformer2DModel(2, 8, 16, num_layers=2, norm_num_groups=4,
        cross_attention_dim=10, activation_fn="geglu").eval()  # fmt: skip
    transformer.proj_in.bias += mean
    root = nn.ModuleList([transformer])
    picture, context = torch.randn(2, 16, 3, 5), torch.randn(2, 7, 10)
    expected = transformer(picture, encoder_hidden_states=context).sample
    rewritten = rewrite_for_xnnpack(root)
    kinds = [type(module) for module in rewritten.modules()]
    assert kinds.count(LeanRmsNorm) == 6
    assert LeanLayerNorm not in kinds
    assert agreement_db(expected, rewritten[0](picture, context)[0]) > 100


@pytest.mark.parametrize("context_width", [None, 10])
@pytest.mark.parametrize("at_once", [4, 60, 130, 260, 1024])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_attention_is_numerically_equal_whole_by_head_or_in_chunks(
    monkeypatch, batch, context_width, at_once
):
    monkeypatch.setattr(lean_attention, "SCORES_AT_ONCE", at_once)
    attention = Attention(16, cross_attention_dim=context_width, heads=4, dim_head=4)
    tokens = torch.randn(batch, 11, 16)
    context = None if context_width is None else torch.randn(batch, 5, 10)
    expected = attention(tokens, encoder_hidden_states=context)
    assert agreement_db(expected, LeanAttention(attention)(tokens, context)) > 110


@pytest.mark.parametrize(
    ("at_once", "most", "pieces"), [(128, 100, 6), (256, 100, 3), (20, 100, 66), (20, 8, 12)]
)
def test_attention_goes_heads_together_and_in_few_pieces(monkeypatch, at_once, most, pieces):
    monkeypatch.setattr(lean_attention, "SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(lean_attention, "MOST_PIECES", most)
    shapes = []
    weighted = lean_attention._weighted
    monkeypatch.setattr(
        lean_attention, "_weighted", lambda *x: shapes.append(x[0].shape) or weighted(*x)
    )
    queries, keys, values = torch.randn(6, 11, 3), torch.randn(6, 3, 11), torch.randn(6, 11, 3)
    found = lean_attention._attended(queries, keys, values)
    assert agreement_db(weighted(queries, keys, values), found) > 110
    assert len(shapes) == pieces
    assert max(heads * rows * 11 for heads, rows, _ in shapes) <= max(at_once, 6 * 11 * 11 // most)


@torch.no_grad()
def test_attention_over_a_picture_is_numerically_equal():
    attention = Attention(
        16, heads=1, dim_head=16, norm_num_groups=4, residual_connection=True, bias=True,
        rescale_output_factor=2.0, _from_deprecated_attn_block=True,
    )  # fmt: skip
    picture = torch.randn(2, 16, 3, 5)
    assert agreement_db(attention(picture), LeanAttention(attention)(picture)) > 110


@torch.no_grad()
def test_biases_of_keys_and_values_move_into_the_output():
    attention = LeanAttention(Attention(16, heads=2, dim_head=8, bias=True))
    for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out):
        nn.init.normal_(linear.bias)
    tokens = torch.randn(2, 11, 16)
    expected = attention(tokens)
    assert fold_attention_biases(nn.ModuleList([attention])) == 1
    assert attention.to_k.bias is None
    assert attention.to_v.bias is None
    assert agreement_db(expected, attention(tokens)) > 110


@torch.no_grad()
def test_sinusoids_are_equal_over_the_whole_range():
    steps = torch.arange(1000.0)
    for flip in (True, False):
        timesteps = Timesteps(32, flip_sin_to_cos=flip, downscale_freq_shift=0)
        assert torch.equal(timesteps(steps), LeanTimesteps(timesteps)(steps))


@torch.no_grad()
def test_upsampling_is_exactly_equal():
    upsample = Upsample2D(6, use_conv=False)
    picture = torch.randn(2, 6, 3, 5)
    assert torch.equal(upsample(picture), LeanUpsample(upsample)(picture))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_linear_projection": True},
        {"transformer_layers_per_block": 2},
        {"block_out_channels": (16, 16, 32), "attention_head_dim": 4,
         "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_rewritten_unet_is_numerically_equal_and_leaves_the_original_alone(changes):
    unet = tiny_unet(**changes)
    inputs = step_inputs()
    expected = unet(*inputs).sample
    pair = nn.ModuleList(split_unet(unet))
    rewritten, _ = rewrite_for_xnnpack(pair)
    predicted, feature = rewritten(*inputs)
    assert agreement_db(expected, predicted) > 100
    assert agreement_db(pair[0](*inputs)[1], feature) > 100
    assert torch.equal(unet(*inputs).sample, expected)


@torch.no_grad()
def test_the_rewritten_pair_still_shares_and_agrees_bit_for_bit():
    full, shallow = rewrite_for_xnnpack(nn.ModuleList(split_unet(tiny_unet())))
    inputs = step_inputs()
    predicted, feature = full(*inputs)
    assert torch.equal(shallow(*inputs, feature, *no_correction(shallow)), predicted)
    assert {id(p) for p in shallow.parameters()} < {id(p) for p in full.parameters()}


def test_no_layer_that_xnnpack_lacks_is_left():
    full, _ = rewrite_for_xnnpack(nn.ModuleList(split_unet(tiny_unet())))
    lacking = (nn.GroupNorm, nn.LayerNorm, Attention, ResnetBlock2D, Transformer2DModel,
               Upsample2D, Timesteps)  # fmt: skip
    assert [m for m in full.modules() if isinstance(m, lacking)] == []


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_a_rewritten_decoder_is_numerically_equal(attention):
    decoder = tiny_vae(attention=attention).decoder
    latents = torch.randn(1, 4, 6, 6)
    assert agreement_db(decoder(latents), rewrite_for_xnnpack(decoder)(latents)) > 100


def test_unknown_layers_are_refused_with_a_sentence():
    holder = nn.ModuleList([Attention(16, heads=2, dim_head=8, qk_norm="layer_norm")])
    with pytest.raises(ModelError) as refusal:
        rewrite_attention(holder)
    assert str(refusal.value) == (
        "an attention layer has norm_q, which the XNNPACK rewrite does not know: only Stable "
        "Diffusion's plain attention can be exported"
    )
    holder = nn.ModuleList(
        [ResnetBlock2D(in_channels=8, groups=4, time_embedding_norm="scale_shift")]
    )
    with pytest.raises(ModelError) as refusal:
        rewrite_resnets(holder)
    assert str(refusal.value) == (
        "a resnet resamples or has time_embedding_norm 'scale_shift': only Stable Diffusion's "
        "plain resnets can be exported"
    )
    holder = nn.ModuleList(
        [Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4, only_cross_attention=True,
                            cross_attention_dim=8)]
    )  # fmt: skip
    with pytest.raises(ModelError) as refusal:
        rewrite_transformers(holder)
    assert str(refusal.value) == (
        "a transformer has only_cross_attention or double_self_attention: only self- followed "
        "by cross-attention can be exported"
    )
