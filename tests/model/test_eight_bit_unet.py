import torch
from torch import nn

from cq_edge.model.eight_bit_unet import eight_bit_unet
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


@torch.no_grad()
def test_the_two_graphs_still_share_their_layers():
    full, shallow = eight_bit_unet(*split_unet(tiny_unet(), shallow_layers=2))
    inputs = step_inputs()
    predicted, feature = full(*inputs)
    assert torch.equal(shallow(*inputs, feature, *no_correction(shallow)), predicted)
    ours = {id(module) for module in full.modules()}
    assert all(id(m) in ours for m in shallow.modules() if not list(m.children()))
