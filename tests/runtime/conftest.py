from pathlib import Path

import pytest

from runtime.bundle import Bundle, open_bundle
from tests.tiny_bundle import write_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle"))
