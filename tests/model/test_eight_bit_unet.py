import gc

import pytest
import torch
from torch import nn

from cq_edge.model.eight_bit_unet import eight_bit_unet
from cq_edge.model.narrow_weights import widen_while_running
from cq_edge.model.quantize import quantize_for_xnnpack
from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from tests.model.tiny_models import no_correction, step_inputs, tiny_unet


@torch.no_grad()
def test_converted_part_by_part_a_unet_is_what_it_is_converted_whole():
    pair = split_unet(tiny_unet())
    whole = quantize_for_xnnpack(rewrite_for_xnnpack(nn.ModuleList(pair)))
    before = [tensor.clone() for tensor in pair[0].parameters()]

    parts = eight_bit_unet(*pair)

    assert [(n, type(m)) for n, m in parts.named_modules()] == [
        (n, type(m)) for n, m in whole.named_modules()
    ]
    inputs = step_inputs()
    for found, expected in zip(parts[0](*inputs), whole[0](*inputs), strict=True):
        assert torch.equal(found, expected)
    assert all(map(torch.equal, pair[0].parameters(), before))


@pytest.fixture
def wide_parameters():
    """Counts the plain float32 parameters that are alive and were made since the test began."""

    def count():
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is nn.Parameter]
        return sum(p.numel() for p in found if p.dtype == torch.float32)

    gc.collect()
    gc.freeze()
    yield count
    gc.unfreeze()


@torch.no_grad()
def test_no_more_than_a_part_is_wide_at_a_time(monkeypatch, wide_parameters):
    pair = split_unet(tiny_unet().half())
    widen_while_running(pair[0])
    wide = []

    def counted(part):
        wide.append(wide_parameters())
        return quantize_for_xnnpack(part)

    monkeypatch.setattr("cq_edge.model.eight_bit_unet.quantize_for_xnnpack", counted)
    eight_bit_unet(*pair)
    assert len(wide) > 5
    assert 0 < max(wide) < 0.4 * sum(p.numel() for p in pair[0].parameters())


@torch.no_grad()
def test_the_two_graphs_still_share_their_layers():
    full, shallow = eight_bit_unet(*split_unet(tiny_unet(), shallow_layers=2))
    inputs = step_inputs()
    predicted, feature = full(*inputs)
    assert torch.equal(shallow(*inputs, feature, *no_correction(shallow)), predicted)
    ours = {id(module) for module in full.modules()}
    assert all(id(m) in ours for m in shallow.modules() if not list(m.children()))
