from collections import defaultdict

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.passes.infra import partitioner

from cq_edge.model.quantize import quantize_for_xnnpack
from exporters.lean_partitioner import LeanDependencyViewer, lean_partitioner

MODULES = (partitioner, group_partitioner)
THEIRS = [module._DependencyViewer for module in MODULES]


class Interrupted(nn.Module):
    """Layers on what an operator that XNNPACK has not makes of the first one's output."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = torch.cumsum(torch.relu(self.first(x)), 0)
        return self.left(y) * self.right(y + 1) + x


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
def test_quantised_layers_are_partitioned_as_they_would(monkeypatch):
    module = quantize_for_xnnpack(Interrupted()).eval()
    traced = torch.export.export(module, (torch.randn(3, 16),))
    program = to_edge(
        traced, compile_config=EdgeCompileConfig(_check_ir_validity=False)
    ).exported_program()

    def parts():
        XnnpackPartitioner().partition(program)
        found = defaultdict(set)
        for node in program.graph.nodes:
            found[node.meta.pop("delegation_tag", None)].add(node.name)
        return set(map(frozenset, found.values()))

    theirs = parts()
    asked = []
    original = LeanDependencyViewer.__init__

    def counted(self, graph_module):
        original(self, graph_module)
        answer = self.downstreams_of
        self.downstreams_of = lambda node: asked.append(node) or answer(node)

    monkeypatch.setattr(LeanDependencyViewer, "__init__", counted)
    with lean_partitioner():
        assert parts() == theirs
    assert asked
    assert len(theirs) > 2
    assert [module._DependencyViewer for module in MODULES] == THEIRS
