import torch
from torch import nn

from cq_edge.metrics import sqnr_db
from cq_edge.model.eight_bit_activations import RoundedInput, with_rounded_inputs


class _Graph(nn.Module):
    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(4, 8, 1)
        self.inner = shared

    def forward(self, x):
        return self.inner(self.conv_in(x))


def _both():
    shared = nn.Conv2d(8, 8, 3)
    graphs = nn.ModuleList([_Graph(shared), _Graph(shared)]).requires_grad_(requires_grad=False)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return graphs, x


def test_a_layer_takes_whole_numbers_of_a_127th_of_its_largest_input():
    graphs, x = _both()
    changed = with_rounded_inputs(graphs, [(graphs[0], (x,))])
    hidden = graphs[0].conv_in(x)
    scale = hidden.abs().max() / 127
    expected = graphs[0].inner((hidden / scale).round() * scale)
    assert sqnr_db(expected.numpy(), changed[0](x).numpy()) > 90
    assert 30 < sqnr_db(graphs[0](x).numpy(), changed[0](x).numpy()) < 60


def test_the_largest_input_of_both_graphs_counts_and_the_layer_stays_shared():
    graphs, x = _both()
    changed = with_rounded_inputs(graphs, [(graphs[0], (x,)), (graphs[1], (3 * x,))])
    assert changed[0].inner is changed[1].inner
    largest = max(
        float(graphs[0].conv_in(x).abs().max()), float(graphs[1].conv_in(3 * x).abs().max())
    )
    assert changed[0].inner.scale * 127 == largest


def test_the_first_layer_and_one_that_never_ran_stay_float():
    graphs, x = _both()
    graphs[1].idle = nn.Linear(4, 4)
    changed = with_rounded_inputs(graphs, [(graphs[0], (x,))])
    assert type(changed[0].conv_in) is nn.Conv2d
    assert type(changed[1].idle) is nn.Linear
    assert isinstance(changed[0].inner, RoundedInput)
    assert type(graphs[0].inner) is nn.Conv2d
