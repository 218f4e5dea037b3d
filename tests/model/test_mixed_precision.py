import pytest
import torch
from torch import nn

from cq_edge.errors import UsageError
from cq_edge.metrics import sqnr_db
from cq_edge.model import mixed_precision
from cq_edge.model.four_bits import nearest
from cq_edge.model.mixed_precision import (
    choose_four_bits,
    conv_candidates,
    linear_candidates,
    stored_bytes,
)
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from cq_edge.model.unfolded_conv import (
    UnfoldedConv2d,
    can_unfold,
    folded_weight,
    unfolded_weight,
)
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from tests.model.tiny_models import step_inputs, tiny_unet


def rewritten():
    unet = tiny_unet(block_out_channels=(32, 64), cross_attention_dim=32)
    return rewrite_for_xnnpack(nn.ModuleList(split_unet(unet)))


def choose(full, compression, counts=(2, 3), **changes):
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple((told,) for told in torch.randn(2, 1, 77, 32, generator=generator))]
    schedulers = [make_noise_scheduler("ddim", steps, NoiseScheduleConfig()) for steps in counts]
    return choose_four_bits(full, compression, prompts, schedulers, (4, 8, 8), 3.0, **changes)


def to_nearest(full, names):
    """Returns the layers' weights rounded to the nearest, by their names in the pair."""
    layers = {name: full.get_submodule(name) for name in names}
    return {
        f"0.{name}": nearest(unfolded_weight(m) if isinstance(m, nn.Conv2d) else m.weight)
        for name, m in layers.items()
    }


def compression(full, chosen):
    return 4 * sum(p.numel() for p in full.parameters()) / stored_bytes(full, chosen)


@torch.no_grad()
def test_as_many_layers_have_four_bits_as_the_size_needs():
    full = rewritten()[0]
    least, most = compression(full, ()), compression(full, linear_candidates(full))
    assert choose(full, least) == {}
    middle = (least + most) / 2
    chosen = choose(full, middle)
    assert compression(full, chosen) >= middle
    assert 0 < len(chosen) < len(linear_candidates(full))
    assert set(choose(full, most)) == set(linear_candidates(full))


@torch.no_grad()
def test_the_layers_chosen_cost_less_than_the_others_would():
    pair = rewritten()
    full = pair[0]
    least, most = compression(full, ()), compression(full, linear_candidates(full))
    chosen = choose(full, (least + most) / 2)
    others = set(linear_candidates(full)) - set(chosen)
    inputs = step_inputs(width=32)
    expected = full(*inputs)[0].numpy()

    def quality_db(names):
        quantised = quantize_for_xnnpack(pair, four_bits=to_nearest(full, names))
        return sqnr_db(expected, quantised[0](*inputs)[0].numpy())

    assert quality_db(chosen) > quality_db(others)


@torch.no_grad()
def test_layers_are_rounded_for_the_inputs_they_get_unless_they_are_too_wide(monkeypatch):
    pair = rewritten()
    full = pair[0]
    candidates = linear_candidates(full)
    most = compression(full, candidates)
    inputs = step_inputs(width=32)
    expected = full(*inputs)[0].numpy()
    rounded = choose(full, most)
    monkeypatch.setattr("cq_edge.model.mixed_precision.WIDEST", 32)
    partly = choose(full, most)

    def quality_db(chosen):
        quantised = quantize_for_xnnpack(pair, four_bits={f"0.{k}": v for k, v in chosen.items()})
        return sqnr_db(expected, quantised[0](*inputs)[0].numpy())

    for name, layer in candidates.items():
        plain = nearest(layer.weight).levels
        assert torch.equal(partly[name].levels, plain) == (layer.in_features > 32)
        assert not torch.equal(rounded[name].levels, plain)
    to_the_nearest = {name: nearest(layer.weight) for name, layer in candidates.items()}
    assert quality_db(rounded) > quality_db(to_the_nearest) + 1


@torch.no_grad()
def test_layers_rounded_in_parts_are_rounded_alike(monkeypatch):
    full = rewritten()[0]
    most = compression(full, linear_candidates(full))
    whole = choose(full, most)
    monkeypatch.setattr("cq_edge.model.mixed_precision._PRODUCTS_BYTES", 300_000)
    parts = choose(full, most)
    assert list(whole) == list(parts)
    for name, found in whole.items():
        assert torch.equal(found.levels, parts[name].levels)


@torch.no_grad()
def test_errors_are_measured_in_runs_that_nothing_was_rounded_for(monkeypatch):
    runs, module = [], "cq_edge.model.mixed_precision"
    samples = mixed_precision._samples

    def watched(full, seed, prompt, noise_scheduler, shape):
        runs.append((seed, tuple(noise_scheduler.timesteps)))
        return samples(full, seed, prompt, noise_scheduler, shape)

    monkeypatch.setattr(f"{module}._samples", watched)
    full = rewritten()[0]
    choose(full, compression(full, ()) * 1.02, (5, 6, 7))
    *seen, tried = runs
    assert len(seen) == 2
    assert tried[0] not in {seed for seed, _ in seen}
    between = [set(times[1:-1]) for _, times in [*seen, tried]]  # all begin and end alike
    assert not between[-1] & set.union(*between[:-1])


@torch.no_grad()
def test_trying_leaves_the_weights_as_they_were():
    full, told = rewritten()[0], []
    before = {name: p.clone() for name, p in full.named_parameters()}
    choose(full, compression(full, ()) * 1.02, on_layer=lambda: told.append(None))
    assert len(told) == 2 * len(linear_candidates(full))
    assert all(torch.equal(p, before[name]) for name, p in full.named_parameters())


@torch.no_grad()
def test_convolutions_have_four_bits_only_where_the_linear_layers_are_not_enough():
    full = rewritten()[0]
    linear, convs = linear_candidates(full), conv_candidates(full)
    middle = (compression(full, linear) + compression(full, {**linear, **convs})) / 2
    chosen = choose(full, middle)
    assert set(linear) < set(chosen) < {*linear, *convs}
    assert compression(full, chosen) >= middle


@torch.no_grad()
def test_an_unfolded_convolution_is_numerically_equal():
    conv = nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(2, 6, 7, 4)
    assert sqnr_db(conv(x).numpy(), UnfoldedConv2d(conv)(x).numpy()) > 110
    torch.testing.assert_close(folded_weight(unfolded_weight(conv), conv), conv.weight)


@pytest.mark.parametrize(
    "changes", [{"stride": 2}, {"padding": 0}, {"groups": 2}, {"padding_mode": "reflect"}]
)
def test_other_convolutions_cannot_be_unfolded(changes):
    assert can_unfold(nn.Conv2d(6, 6, 3, padding=1))
    assert not can_unfold(nn.Conv2d(6, 6, 3, **{"padding": 1, **changes}))


def test_a_size_that_cannot_be_had_says_which_can():
    full = rewritten()[0]
    most = compression(full, {**linear_candidates(full), **conv_candidates(full)})
    message = f"^the UNet cannot be 7 times smaller: .* it is {most:.2f} times smaller; ask for"
    with pytest.raises(UsageError, match=message):
        choose(full, 7.0)


@torch.no_grad()
def test_layers_of_four_bits_are_stored_in_four_and_the_others_in_eight():
    pair = rewritten()
    name = next(iter(linear_candidates(pair[0])))
    full, _ = quantize_for_xnnpack(pair, four_bits=to_nearest(pair[0], [name]))
    layer = full.get_submodule(name)
    assert layer.weight.qdata.unique().numel() <= 16
    other = full.get_submodule(list(linear_candidates(pair[0]))[1])
    assert other.weight.qdata.unique().numel() > 16


@torch.no_grad()
def test_a_convolution_of_four_bits_is_a_linear_layer_of_four_bits():
    pair = rewritten()
    name = next(iter(conv_candidates(pair[0])))
    full, _ = quantize_for_xnnpack(pair, four_bits=to_nearest(pair[0], [name]))
    layer = full.get_submodule(name)
    assert isinstance(layer, UnfoldedConv2d)
    assert layer.linear.weight.qdata.unique().numel() <= 16
