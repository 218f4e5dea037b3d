import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.passes.infra import partitioner

from cq_edge.model.rewrite import rewrite_for_xnnpack
from cq_edge.model.split import split_unet
from exporters.lean_partitioner import LeanDependencyViewer, lean_partitioner
from tests.model.tiny_models import step_inputs, tiny_unet

MODULES = (partitioner, group_partitioner)
THEIRS = [module._DependencyViewer for module in MODULES]


@pytest.mark.parametrize("viewer", THEIRS)
def test_what_follows_from_a_node_is_what_they_find(viewer):
    class Diamond(nn.Module):
        def forward(self, x, y):
            a, b = x + 1, x * y
            return torch.cat([a * b, a - 2, y]), b

    module = symbolic_trace(Diamond())
    theirs, ours = viewer(module), LeanDependencyViewer(module)
    sizes = set()
    for node in module.graph.nodes:
        assert ours.downstreams_of(node) == theirs.downstreams_of(node)
        sizes.add(len(ours.downstreams_of(node)))
    assert len(sizes) > 3


@torch.no_grad()
def test_a_unet_is_partitioned_as_torch_would():
    full = rewrite_for_xnnpack(split_unet(tiny_unet())[0]).eval()
    program = to_edge(torch.export.export(full, step_inputs())).exported_program()

    def tags():
        XnnpackPartitioner().partition(program)
        return [node.meta.pop("delegation_tag", None) for node in program.graph.nodes]

    theirs = tags()
    with lean_partitioner():
        assert {module._DependencyViewer for module in MODULES} == {LeanDependencyViewer}
        assert tags() == theirs
    assert [module._DependencyViewer for module in MODULES] == THEIRS
    assert len({tag for tag in theirs if tag}) >= 1
