import torch
from torch import nn

from cq_edge.metrics import sqnr_db
from cq_edge.model.weight_only import BLOCK, with_weights_of


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(64, 64, 3)
        self.linear = nn.Linear(64, 64)
        self.odd = nn.Linear(50, 64)
        self.small = nn.Linear(32, 8)


def test_eight_bits_leave_one_scale_for_each_output_channel():
    net = _Net().requires_grad_(requires_grad=False)
    changed = with_weights_of(net, 8)
    for name in ("conv", "linear", "odd"):
        before, after = getattr(net, name).weight, getattr(changed, name).weight
        assert 40 < sqnr_db(before.numpy(), after.detach().numpy()) < 60
        stored = getattr(changed, name).parametrizations.weight[0]
        assert stored.steps.dtype == torch.int8
        assert stored.scale.numel() == 64
        scale = stored.scale.reshape(-1, *[1] * (before.dim() - 1))
        assert torch.allclose(after, stored.steps * scale)
    assert torch.equal(changed.small.weight, net.small.weight)


def test_four_bits_leave_one_scale_for_each_block_of_input_channels():
    net = _Net().requires_grad_(requires_grad=False)
    changed = with_weights_of(net, 4)
    rows = changed.linear.weight.reshape(-1, BLOCK)
    assert max(len(row.unique()) for row in rows) <= 16
    kernel = changed.conv.weight.reshape(64, 2, BLOCK, 3, 3).movedim(2, -1).reshape(-1, BLOCK)
    assert max(len(row.unique()) for row in kernel) <= 16
    assert 15 < sqnr_db(net.linear.weight.numpy(), changed.linear.weight.numpy()) < 30
    assert sqnr_db(net.odd.weight.numpy(), changed.odd.weight.numpy()) > 40, (
        "8 bits: 50 is no block"
    )


def test_what_was_shared_stays_shared_and_the_original_is_left():
    layer = nn.Linear(64, 64).requires_grad_(requires_grad=False)
    both = nn.ModuleList([nn.Sequential(layer), nn.Sequential(layer)])
    changed = with_weights_of(both, 8)
    assert changed[0][0] is changed[1][0]
    assert type(layer) is nn.Linear
    assert layer.weight.shape == (64, 64)
