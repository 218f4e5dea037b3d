"""Partitioning a large graph without a set of nodes for every node.

torch's partitioner holds of each node the set of all that follow from it, and ExecuTorch's, which
is made of it, once more with all that come before: for the tens of thousands of nodes of SDXL's
UNet more than 20 GB. As the bits of one integer each they are 100 MB.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch.fx import GraphModule, Node
from torch.fx.passes.infra import partitioner


@contextmanager
def lean_partitioner() -> Iterator[None]:
    """Lets the partitioners keep what follows from what as bits within the context."""
    modules: tuple[Any, ...] = (partitioner, group_partitioner)
    originals = [module._DependencyViewer for module in modules]
    for module in modules:
        module._DependencyViewer = LeanDependencyViewer
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module._DependencyViewer = original


class LeanDependencyViewer:
    """Answers as their `_DependencyViewer` does, but for what comes before, which none asks for."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._nodes = list(graph_module.graph.nodes)
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._bits = [0] * len(self._nodes)
        for place in reversed(range(len(self._nodes))):
            bits = 0
            for user in self._nodes[place].users:
                bits |= 1 << self._places[user] | self._bits[self._places[user]]
            self._bits[place] = bits
        # the partitioner asks again and again for what follows from the same few
        self._downstreams_at = lru_cache(maxsize=64)(self._decoded)

    def downstreams_of(self, node: Node) -> frozenset[Node]:
        """Returns all nodes that follow from a node."""
        return self._downstreams_at(self._places[node])

    def _decoded(self, place: int) -> frozenset[Node]:
        data = self._bits[place].to_bytes(-(-len(self._nodes) // 8), "little")
        found = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
        return frozenset(self._nodes[other] for other in found.tolist())
