from pathlib import Path

import pytest

from runtime.bundle import Bundle, open_bundle
from tests.tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graphs.pte is a real ExecuTorch program of tiny modules."""
    from tests.tiny_program import tiny_modules, tiny_program

    folder: Path = tmp_path_factory.mktemp("real") / "bundle"
    return open_bundle(write_bundle(folder, tiny_program(tiny_modules())))
