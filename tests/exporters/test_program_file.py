import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from torch import nn

from exporters.program_file import read_program
from exporters.to_executorch import export_executorch


def test_a_program_read_from_its_file_is_the_one_read_from_its_bytes(tmp_path):
    path = tmp_path / "graphs.pte"
    layer = nn.Linear(8, 4).eval()
    export_executorch({"one": (layer, (torch.zeros(1, 8),))}, path)
    found, expected = read_program(path), deserialize_pte_binary(path.read_bytes())

    assert found.program == expected.program
    assert found.named_data.pte_data == expected.named_data.pte_data
    assert found.named_data.buffers == expected.named_data.buffers
    assert [type(weights) for weights in found.named_data.buffers] == [memoryview] * 2
