"""The benchmark against rivals: its loop, its processes, its table."""

import os
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch

from apps.engines import ENGINES
from benchmarks.rivals.alternate import Result, prepare_all, take_turns
from benchmarks.rivals.contenders import CONTENDERS, REFERENCE, make
from benchmarks.rivals.processes import ContenderFailedError, Place, Worker
from benchmarks.rivals.quality import Quality
from benchmarks.rivals.table import markdown, rows
from benchmarks.rivals.task import Task, guided_loop
from benchmarks.rivals.torch_unet import GuidedUNet
from benchmarks.rivals.with_cq_edge import CQEdge
from cq_edge.metrics import sqnr_db
from cq_edge.model.load import DEMO_MODEL
from tests.tiny_bundle import FakeEngine, write_bundle
from tests.tiny_pipeline import save_tiny_pipeline

_INT8 = "cq-edge int8, every step full"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder: Path = tmp_path_factory.mktemp("rivals")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, 77, 32), np.float32) for name in ("prompts", "others")}
    embeddings = folder / "embeddings.npz"
    negative = rng.standard_normal((1, 77, 32), np.float32)
    np.savez(embeddings, prompts=arrays["prompts"], calibration=arrays["others"], negative=negative)
    pipeline = save_tiny_pipeline(folder / "pipeline")
    # PNDM's, as Stable Diffusion ships: it says nothing of what DDIM is to do with samples
    copy(DEMO_MODEL / "scheduler" / "scheduler_config.json", pipeline / "scheduler")
    task = Task(
        pipeline=pipeline,
        float32=None,
        bundle=None,
        plan="full",
        float32_plan="full",
        prompts=("a", "b"),
        calibration_prompts=("c", "d"),
        calibration_steps=4,
        noise_scheduler="pndm",
        steps=4,
        whole_steps=4,
        guidance=3.5,
        threads=1,
        embeddings=embeddings,
    )
    task.write(folder / "task.json")
    return Place(folder / "task.json", folder, threads=1, at_most_s=120)


def test_a_contender_takes_its_turns_and_one_that_fails_says_why(place: Place) -> None:
    results = prepare_all(place, [REFERENCE, _INT8])
    take_turns(place, results, rounds=2, steps=5, keep=True)
    reference, failed = results
    assert reference.failure is None
    assert [len(steps) for steps in reference.steps_ms] == [5, 5]
    assert reference.modes == reference.ready["modes"] == "FFFFF"
    assert reference.peak_mib > 50
    assert failed.failure == "no such bundle was given"
    # the loop that OpenVINO and ONNX Runtime share does what diffusers' own does
    task = Task.read(place.task)
    unet = GuidedUNet(task)
    run = guided_loop(task, 1, 5, lambda *arrays: unet(*_tensors(arrays)).numpy())
    assert run.latents is not None
    assert sqnr_db(reference.latents[1], run.latents) > 90
    text = markdown({"rows": rows(results, {}, 5), "conditions": _CONDITIONS})
    assert f"| {_INT8} | failed: no such bundle was given |" in text


@pytest.mark.parametrize("noise_scheduler", ["pndm", "ddim"])
def test_a_loop_is_cut_short_where_it_should_be(
    place: Place, tmp_path: Path, noise_scheduler: str
) -> None:
    task = replace(Task.read(place.task), noise_scheduler=noise_scheduler)
    contender = make(REFERENCE)
    contender.load(task, tmp_path)
    run = contender.run(0, 2)
    unet = GuidedUNet(task)
    same = guided_loop(task, 0, 2, lambda *arrays: unet(*_tensors(arrays)).numpy())
    assert (run.modes, len(run.steps_ms)) == ("FF", 2)
    assert run.latents is not None and same.latents is not None
    assert sqnr_db(same.latents, run.latents) > 90


def test_the_projects_own_contender_runs_its_plan(place, tmp_path, monkeypatch) -> None:
    write_bundle(tmp_path / "bundle")
    monkeypatch.setitem(ENGINES, "xnnpack", FakeEngine)
    (tmp_path / "unet_bytes.json").write_text('{"int8": 1}')
    task = Task.read(place.task)
    changes = {"noise_scheduler": "ddim", "steps": 10, "whole_steps": 10, "plan": "uniform:2"}
    contender = CQEdge(quantised=True, planned=True)
    contender.load(replace(task, bundle=tmp_path / "bundle", **changes), tmp_path)
    found = contender.run(1, 4)
    assert found.modes == "FSFS"
    assert len(found.steps_ms) == 4
    assert np.isfinite(found.latents).all()
    assert not np.array_equal(found.latents, contender.run(0, 4).latents)


def test_a_process_that_dies_is_a_failure_with_its_exit_code(place: Place) -> None:
    worker = Worker(place, REFERENCE, "diffusers")
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(ContenderFailedError, match="ended with exit code -9"):
        worker.run(0, 5, place.work / "latents.npy")
    worker.end()


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("OpenVINO float32", "openvino"),
        ("ONNX Runtime float32", "onnxruntime"),
        ("stable-diffusion.cpp q8_0", "stable_diffusion_cpp"),
        ("diffusers float32, DeepCache 3", "DeepCache"),
    ],
)
def test_a_rival_that_is_not_installed_is_a_failure(place: Place, name: str, library: str) -> None:
    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(ContenderFailedError, match=f"^{library} is not installed$"):
        Worker(place, name, make(name).files)


def test_whole_loops_are_predicted_from_the_medians_of_their_modes() -> None:
    ready = {"versions": {"x": "1"}, "modes": "FFFFF", "disk_bytes": 2_000_000}
    reference = Result(REFERENCE, None, ready, [[100.0, 102.0, 98.0]], "FFF", 900.0)
    cached = Result("b", None, {**ready, "modes": "FSSSF"}, [[40.0, 8.0, 12.0]], "FSS", 500.0)
    unknown = Result("c", None, {**ready, "modes": None}, [[40.0, 1.0, 1.0]], "FKK", 500.0)
    found = rows([reference, cached, unknown], {"b": Quality(31.0)}, total=5)
    assert [row.get("loop_ms", {}).get("median") for row in found] == [500.0, 110.0, None]
    assert found[1]["speedup"]["median"] == pytest.approx(500 / 110)
    text = markdown({"rows": found, "conditions": {**_CONDITIONS, "steps_run": 3}})
    assert "| b | 40.0 (40.0–40.0) | 110 (110–110), 2 steps full, predicted | 4.55" in text
    assert "| 31.0 | – | – |" in text
    assert "| c | 40.0 (40.0–40.0) | – | – |" in text


def test_ratios_are_those_of_the_same_round() -> None:
    ready = {"versions": {}, "modes": "FF", "disk_bytes": 1}
    slow = Result(REFERENCE, None, ready, [[10.0, 10.0], [30.0, 30.0]], "FF")
    fast = Result("b", None, ready, [[5.0, 5.0], [10.0, 10.0]], "FF")
    assert rows([slow, fast], {}, 2)[1]["speedup"] == {"median": 2.5, "min": 2.0, "max": 3.0}


def test_every_contender_can_be_made_without_its_library() -> None:
    assert all(make(name).files for name in CONTENDERS)


def _tensors(arrays: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


_CONDITIONS = {
    "processor": "a processor",
    "threads": 1,
    "model": "tiny model",
    "latents": "4×8×8",
    "noise_scheduler": "pndm",
    "steps": 4,
    "steps_of_loop": 5,
    "steps_run": 5,
    "guidance": 3.5,
    "rounds": 2,
    "kept_loaded": True,
    "other_cores_busy": 0.0,
    "date": "today",
}
