import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cq_edge.errors import BundleError, UsageError
from runtime.bundle import Bundle, open_bundle
from runtime.executorch_engine import ExecuTorchEngine
from tests.tiny_bundle import SIDE, WIDTH, write_bundle
from tests.tiny_program import tiny_modules


@pytest.fixture(scope="module")
def modules() -> dict[str, nn.Module]:
    return tiny_modules()


def denoise_inputs(seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((1, 4, SIDE, SIDE), np.float32),
        "timestep": np.array([981], np.float32),
        "embeddings": rng.standard_normal((1, 77, WIDTH), np.float32),
    }


def tensors(inputs: dict[str, NDArray[Any]]) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in inputs.values())


def test_a_real_program_computes_what_its_module_does(
    real_bundle: Bundle, modules: dict[str, nn.Module]
) -> None:
    engine, inputs = ExecuTorchEngine(real_bundle, threads=1), denoise_inputs()
    outputs = engine.run("denoise", dict(reversed(inputs.items())))  # order is the manifest's
    with torch.no_grad():
        noise_pred, feature = modules["denoise"](*tensors(inputs))
    assert list(outputs) == ["noise_pred", "cached_feature"]
    np.testing.assert_allclose(outputs["noise_pred"], noise_pred.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["cached_feature"], feature.numpy(), atol=1e-5)


def test_outputs_are_the_callers_own(real_bundle: Bundle) -> None:
    engine = ExecuTorchEngine(real_bundle)
    first = engine.run("denoise", denoise_inputs(0))["noise_pred"]
    kept = first.copy()
    engine.run("denoise", denoise_inputs(1))
    engine.unload("denoise")
    assert np.array_equal(first, kept)


def test_read_only_and_strided_arrays_are_fine(real_bundle: Bundle) -> None:
    engine, inputs = ExecuTorchEngine(real_bundle), denoise_inputs()
    expected = engine.run("denoise", inputs)["noise_pred"]
    strided = np.asfortranarray(inputs["latents"])
    strided.flags.writeable = False
    found = engine.run("denoise", {**inputs, "latents": strided})["noise_pred"]
    assert np.array_equal(found, expected)


def test_an_unloaded_graph_loads_again_when_it_runs(real_bundle: Bundle) -> None:
    engine = ExecuTorchEngine(real_bundle)
    ids = np.zeros((1, 77), np.int64)
    engine.load("encode")
    engine.load("encode")
    first = engine.run("encode", {"input_ids": ids})["embeddings"]
    engine.unload("encode")
    engine.unload("encode")
    assert np.array_equal(engine.run("encode", {"input_ids": ids})["embeddings"], first)


def test_the_thread_pool_has_the_size_asked_for(real_bundle: Bundle) -> None:
    from executorch.extension.pybindings import portable_lib

    ExecuTorchEngine(real_bundle, threads=1)
    assert portable_lib._threadpool_get_thread_count() == 1
    with pytest.raises(UsageError) as caught:
        ExecuTorchEngine(real_bundle, threads=0)
    assert str(caught.value) == "threads is 0: ask for 1 or more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latents": np.zeros((1, 4, 8, 8), np.float32)},
            "graph 'denoise' takes latents as (1, 4, 4, 4) float32, not (1, 4, 8, 8) float32",
        ),
        (
            {"timestep": np.zeros(1)},
            "graph 'denoise' takes timestep as (1,) float32, not (1,) float64",
        ),
        (
            {"gain": np.zeros(4, np.float32)},
            "graph 'denoise' takes latents, timestep, embeddings; it was given latents, timestep, "
            "embeddings, gain",
        ),
    ],
)
def test_wrong_inputs_are_named_before_the_call(
    real_bundle: Bundle, change: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        ExecuTorchEngine(real_bundle).run("denoise", {**denoise_inputs(), **change})
    assert str(caught.value) == message


def test_a_graph_that_the_file_or_the_bundle_lacks_is_named(real_bundle: Bundle) -> None:
    graphs = dict(real_bundle.manifest.graphs)
    graphs["decode"] = replace(graphs["decode"], method="paint")
    engine = ExecuTorchEngine(
        replace(real_bundle, manifest=replace(real_bundle.manifest, graphs=graphs))
    )
    with pytest.raises(BundleError) as caught:
        engine.load("decode")
    assert str(caught.value) == (
        "graphs.pte has no method 'paint': it has decode, denoise, denoise_shallow, encode"
    )
    with pytest.raises(BundleError) as caught:
        engine.load("upscale")
    assert str(caught.value) == (
        "the bundle has no graph upscale: it has encode, denoise, denoise_shallow, decode"
    )


def test_outputs_other_than_the_manifests_are_refused(real_bundle: Bundle) -> None:
    graphs = dict(real_bundle.manifest.graphs)
    graphs["denoise"] = replace(graphs["denoise"], outputs=graphs["denoise"].outputs[:1])
    bundle = replace(real_bundle, manifest=replace(real_bundle.manifest, graphs=graphs))
    with pytest.raises(BundleError) as caught:
        ExecuTorchEngine(bundle).run("denoise", denoise_inputs())
    assert str(caught.value) == (
        "graphs.pte: 'denoise' gave (1, 4, 4, 4) float32, (1, 4, 4, 4) float32, but the manifest "
        "says (1, 4, 4, 4) float32"
    )


def test_a_file_that_is_no_program_is_named(tmp_path: Path) -> None:
    engine = ExecuTorchEngine(open_bundle(write_bundle(tmp_path / "bundle")))
    with pytest.raises(BundleError) as caught:
        engine.load("denoise")
    assert str(caught.value) == (
        "graphs.pte: cannot load 'denoise': Failed to load program, error: 0x:12"
    )


def test_running_imports_nothing_that_exports(real_bundle: Bundle) -> None:
    script = f"""
import sys
import numpy as np
from pathlib import Path
from runtime.bundle import open_bundle
from runtime.executorch_engine import ExecuTorchEngine
engine = ExecuTorchEngine(open_bundle(Path({str(real_bundle.folder)!r})))
engine.run("encode", {{"input_ids": np.zeros((1, 77), np.int64)}})
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    unwanted = {"torchao", "executorch.exir", "torch._dynamo", "transformers", "cq_edge.model"}
    assert not set(done.stdout.split()) & unwanted
    assert done.stderr == ""


def test_the_runtimes_own_chatter_stays_off_stderr(
    real_bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    ExecuTorchEngine(real_bundle, threads=1).run("denoise", denoise_inputs())
    with pytest.raises(BundleError):
        ExecuTorchEngine(real_bundle).load("upscale")
    assert capfd.readouterr() == ("", "")
