"""Reads a `.pte` without copying its weights: what stands in it is looked at in the file."""

import mmap
from pathlib import Path

from executorch.exir._serialize import _program as serialized


def read_program(path: Path) -> serialized.PTEFile:
    """Returns what `deserialize_pte_binary` does, its buffers views of the mapped file.

    That function copies a file three times, and Stable Diffusion's is 1.5 GB.
    """
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    header = serialized._get_extended_header(
        bytes(content[: serialized._ExtendedHeader.EXPECTED_LENGTH + 8])
    )
    if header is None or header.segment_base_offset == 0:
        return serialized.deserialize_pte_binary(bytes(content))
    program = serialized._flatbuffer_to_program(bytes(content[: header.program_size]))
    return serialized._restore_segments(program, content[header.segment_base_offset :])
