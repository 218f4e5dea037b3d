from collections.abc import Callable
from pathlib import Path

import pytest

from apps.cli import main
from apps.engines import ENGINES
from tests.tiny_bundle import FakeEngine, write_bundle


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: holds `bundle`, which the fake engine runs."""
    write_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(ENGINES, "xnnpack", FakeEngine)
    return tmp_path


@pytest.fixture
def generate(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `cq-edge generate bundle …`; returns the exit code, stdout and stderr."""
    del home

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["generate", "bundle", *words])
        return code, *capsys.readouterr()

    return call
