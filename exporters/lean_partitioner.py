"""Partitioning a large graph without a set of nodes for every node.

torch's partitioner holds of each node the set of all that follow from it. ExecuTorch's, which is
made of it, does so once more, with all that come before, and has a set of the parts that follow
from each part, which nothing reads: all grow with the square of the nodes, and SDXL's UNet has so
many that they did not fit into memory. As the bits of one integer each, what follows from a node
takes a bit for every other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any
from unittest.mock import patch

import numpy as np
from executorch.exir.backend.canonical_partitioners import group_partitioner
from torch.fx import GraphModule, Node
from torch.fx.passes.infra import partitioner


@contextmanager
def lean_partitioner() -> Iterator[None]:
    """Lets the partitioners keep what follows from what as bits within the context."""
    grouped = group_partitioner.GroupBasedPartitioner
    with (
        patch.object(partitioner, "_DependencyViewer", LeanDependencyViewer),
        patch.object(group_partitioner, "_DependencyViewer", LeanDependencyViewer),
        patch.object(grouped, "_process_all_nodes", _without_map(grouped._process_all_nodes)),
    ):
        yield


def _without_map(process: Callable[..., None]) -> Callable[..., None]:
    """Returns a `_process_all_nodes` that fills no map of parts."""

    @wraps(process)
    def changed(self: Any, *arguments: Any) -> None:
        process(self, *arguments[:-1], _Unread())

    return changed


class _Unread(dict[int, set[int]]):
    """A map of sets that forgets what is put into them."""

    def __missing__(self, _part: int) -> set[int]:
        return set()


class LeanDependencyViewer:
    """Answers as their `_DependencyViewer` does, but for what comes before, which none asks for."""

    def __init__(self, graph_module: GraphModule) -> None:
        nodes = list(graph_module.graph.nodes)
        places = {node: place for place, node in enumerate(nodes)}
        bits = [0] * len(nodes)
        for place in reversed(range(len(nodes))):
            for user in nodes[place].users:
                bits[place] |= 1 << places[user] | bits[places[user]]

        # the partitioners ask again and again for what follows from the same few
        @lru_cache(maxsize=64)
        def downstreams_of(node: Node) -> frozenset[Node]:
            data = bits[places[node]].to_bytes(-(-len(nodes) // 8), "little")
            found = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
            return frozenset(nodes[place] for place in found.tolist())

        self.downstreams_of = downstreams_of
        """Returns all nodes that follow from a node."""
