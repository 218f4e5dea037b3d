from contextlib import nullcontext

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import nn

from cq_edge.errors import ParityError
from cq_edge.manifest import TensorSpec
from cq_edge.model.quantize import Int8Conv2d
from exporters.graph_spec import GraphSpec
from exporters.module_graph import module_graph
from exporters.parity import check_parity
from exporters.to_executorch import load_graph
from exporters.xnnpack_mend import mended_channels_last_pass

SPEC = GraphSpec(
    "forward",
    (TensorSpec("x", (1, 8, 6, 6), "float32"),),
    (TensorSpec("y", (1, 8, 6, 6), "float32"),),
)


class SoftmaxBeforeAConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Int8Conv2d(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return self.conv(torch.softmax(x, dim=-1))


def parity_of(path, context):
    torch.manual_seed(0)
    module = SoftmaxBeforeAConvolution().eval()
    x = torch.randn(SPEC.inputs[0].shape)
    with context:
        edge = to_edge_transform_and_lower(
            torch.export.export(module, (x,), strict=False),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
    calls = [n for n in edge.exported_program().graph.nodes if "call_delegate" in str(n.target)]
    assert len(calls) == 1, "the graph must be delegated whole, or the test shows nothing"
    path.write_bytes(edge.to_executorch().buffer)
    inputs = [{"x": np.asarray(x)}]
    return check_parity("forward", module_graph(module, SPEC), load_graph(path, SPEC), inputs, 30)


def test_the_mended_pass_lowers_a_quantised_convolution_correctly(tmp_path):
    assert parity_of(tmp_path / "mended.pte", mended_channels_last_pass()).min_db > 30


def test_the_unmended_pass_miscompiles_it_silently_and_parity_catches_that(tmp_path):
    with pytest.raises(ParityError) as caught:
        parity_of(tmp_path / "unmended.pte", nullcontext())
    assert str(caught.value).startswith("graph forward computes something else")
