"""The project itself: its documents, its packaging, its size."""

import re
import tomllib
from pathlib import Path

import cq_edge

ROOT = Path(__file__).parents[1]
_DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_version_is_the_same_wherever_it_stands():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cq_edge.__version__


def test_every_dependency_has_an_exact_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {name.lower() for name in wanted} <= pinned


def test_links_between_documents_lead_somewhere():
    for document in _DOCUMENTS:
        text = document.read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'src="([^"]+)"', text):
            assert (document.parent / target).exists(), f"{document} names {target}"


def test_every_make_task_that_the_readme_names_exists():
    tasks = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named <= tasks


def test_the_demo_model_and_its_scorer_are_as_small_as_promised():
    for folder, limit_mib in (("demo_model", 25), ("demo_scorer", 5)):
        files = list((ROOT / "cq_edge" / folder).rglob("*.safetensors"))
        assert files
        assert sum(p.stat().st_size for p in files) <= limit_mib * 1_000_000
