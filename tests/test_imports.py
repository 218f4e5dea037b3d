"""What each part may import, shown by processes in which the forbidden cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_WITHOUT = """
import sys
for name in {forbidden!r}:
    sys.modules[name] = None  # any import of it raises ImportError
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""


def _modules(folder: str) -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem != "__init__"
    ]


def _import_without(forbidden: list[str], modules: list[str]) -> None:
    program = _WITHOUT.format(forbidden=forbidden, modules=modules)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_cq_edge_and_runtime_are_imported_where_there_is_no_torch():
    modules = _modules("cq_edge") + _modules("runtime") + ["apps.cli", "apps.generate"]
    assert len(modules) > 12
    _import_without(["torch", "diffusers", "transformers", "torchao", "executorch"], modules)


def test_generate_reaches_neither_exporters_nor_the_torch_side():
    _import_without(["exporters", "cq_edge.model"], ["apps.cli", "apps.generate"])


def test_a_forbidden_import_would_be_noticed():
    with pytest.raises(AssertionError, match="import of torch halted"):
        _import_without(["torch"], ["cq_edge.model.capture"])


@pytest.mark.parametrize("name", ["cq_edge", "exporters", "runtime", "apps"])
def test_the_imported_package_lies_in_this_project(name):
    module = __import__(name)
    assert Path(module.__file__).is_relative_to(ROOT)
