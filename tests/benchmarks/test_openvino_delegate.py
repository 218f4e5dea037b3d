"""What the benchmark of the OpenVINO delegate runs in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cq_edge.checks import Check, Checks, save_checks
from exporters.to_executorch import export_executorch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("delegate")
    module, inputs = nn.Linear(8, 4).eval(), torch.randn(1, 8)
    export_executorch({"denoise": (module, (inputs,))}, folder / "graphs.pte")
    noise_pred = module(inputs).detach().numpy()
    right = Check({"latents": inputs.numpy()}, {"noise_pred": noise_pred}, {})
    twice = Check({"latents": inputs.numpy()}, {"noise_pred": 2 * noise_pred}, {})
    save_checks(folder / "checks.npz", Checks({"denoise": [right, twice]}, {}))
    return str(folder / "graphs.pte"), str(folder / "checks.npz")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.openvino_delegate_run", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("way", ["--loads=2", "--by-path"])
def test_the_worst_of_a_files_answers_is_what_it_is_judged_by(
    files: tuple[str, str], way: str
) -> None:
    done = _run("judge", *files, way)
    # half of what is expected: the error is half the signal, a quarter of its power
    assert json.loads(done.stdout)["db"]["denoise"] == pytest.approx(6.02, abs=0.01)


def test_files_race_round_by_round(files: tuple[str, str]) -> None:
    graphs, checks = files
    found = json.loads(_run("race", graphs, graphs, checks, "--rounds=3").stdout)
    assert [len(each["denoise"]) for each in found["ms"]] == [3, 3]


def test_a_file_that_does_not_load_ends_its_process_with_the_reason(
    files: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken.pte").write_bytes(b"no program")
    done = _run("judge", str(tmp_path / "broken.pte"), files[1])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: ")
