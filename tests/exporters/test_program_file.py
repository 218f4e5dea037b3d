from executorch.exir._serialize._program import deserialize_pte_binary

from exporters.program_file import read_program
from tests.tiny_program import tiny_modules, tiny_program


def test_a_program_read_from_its_file_is_the_one_read_from_its_bytes(tmp_path):
    content, path = tiny_program(tiny_modules()), tmp_path / "graphs.pte"
    path.write_bytes(content)
    found, expected = read_program(path), deserialize_pte_binary(content)

    assert found.program == expected.program
    assert found.named_data.pte_data == expected.named_data.pte_data
    assert found.named_data.buffers == expected.named_data.buffers
    assert all(isinstance(weights, memoryview) for weights in found.named_data.buffers)
