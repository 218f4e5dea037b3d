import pytest
import torch
from torch import nn

from cq_edge.metrics import sqnr_db
from cq_edge.model.four_bits import GROUP, compensated, nearest


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def inputs(count, width):
    """Returns inputs that share much, as those of a layer do: (N, I), off zero."""
    mixed = torch.randn(count, 24) @ torch.randn(24, width)
    return mixed + 0.3 * torch.randn(count, width) + 0.5


def output_db(weight, rounded, x):
    return sqnr_db((x @ weight.T).numpy(), (x @ rounded.weight().T).numpy())


def test_rounded_for_its_inputs_a_layer_gives_nearer_outputs_for_others_like_them():
    weight, x = torch.randn(40, 3 * GROUP), inputs(4000, 3 * GROUP)
    seen, others = x[:2000], x[2000:]
    found = compensated(weight, seen.T @ seen)
    assert found.levels.min() >= -8
    assert found.levels.max() <= 7
    assert found.scale.shape == (40, 3)
    assert output_db(weight, found, others) > output_db(weight, nearest(weight), others) + 5


def test_inputs_that_share_nothing_leave_the_nearest():
    weight = torch.randn(8, 2 * GROUP)
    found, expected = compensated(weight, torch.eye(2 * GROUP)), nearest(weight)
    torch.testing.assert_close(found.scale, expected.scale)
    # a group's largest lies halfway between two levels
    halfway = (weight / expected.scale.repeat_interleave(GROUP, 1)).abs() > 7.499
    assert torch.equal(found.levels[~halfway], expected.levels[~halfway])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_inputs_and_none_leave_weights_that_can_be_used(count):
    x = inputs(5, GROUP)[:count]
    x[:, 3] = 0
    weight = torch.randn(6, GROUP)
    found = compensated(weight, x.T @ x)
    assert torch.isfinite(found.weight()).all()
    assert sqnr_db(weight.numpy(), found.weight().numpy()) > 13


@torch.no_grad()
def test_the_nearest_is_what_torchao_stores():
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    layer = nn.Linear(2 * GROUP, 5)
    found = nearest(layer.weight)
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)
    )
    quantize_(net := nn.Sequential(layer), config)
    assert torch.equal(net[0].weight.qdata, found.levels)
    torch.testing.assert_close(net[0].weight.scale, found.scale)
    torch.testing.assert_close(net[0].weight.dequantize(), found.weight())
