"""Bad input first, then one real bundle of the demo model, built once and used by every test."""

import contextlib
import io
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.cli import main
from cq_edge.errors import ExportError
from cq_edge.forecast_share import forecast_share
from cq_edge.manifest import MANIFEST_FILE, read_manifest, verify_files
from cq_edge.model.load import DEMO_MODEL, load_pipeline
from cq_edge.model.optimize import OptimizeConfig
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.operators import OPERATORS_FILE, load_operators, multiply_adds
from runtime.bundle import open_bundle

_PROMPT = "a large red circle on a plain white background"
_GRAPHS = {"encode", "denoise", "denoise_shallow", "decode"}


def _refusal(capsys, *words):
    code = main(["build", *words])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err.strip().splitlines()[-1]


def test_a_folder_that_is_no_pipeline_is_refused_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, err = _refusal(capsys, str(tmp_path / "empty"), "-o", str(tmp_path / "out"))
    assert code == 1
    assert err == (
        f"cq-edge: error: {tmp_path / 'empty'} is no diffusers pipeline: it has no "
        "model_index.json; give the folder that a pipeline's save_pretrained wrote, or a single "
        ".safetensors file"
    )
    assert not (tmp_path / "out").exists()


def test_a_unet_that_cannot_be_split_is_refused_with_the_reason(tmp_path, capsys):
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = model / "unet" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"time_embedding_act_fn": "silu"})
    )
    code, err = _refusal(capsys, str(model), "-o", str(tmp_path / "out"))
    assert code == 1
    assert err == (
        "cq-edge: error: the UNet has time_embedding_act_fn = 'silu', an input or a path that the "
        "graphs lack"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--steps", "0"), 1, "steps"),
        (("--steps", "1001"), 1, "steps"),
        (("--also", "pndm"), 2, "--also 'pndm' is no noise scheduler with steps, such as "),
        (("--full-steps", "99"), 2, "--full-steps is 99: 51 steps with --max-gap 10 take 5 to 51"),
        (("--max-gap", "0"), 2, "--max-gap is 0: a shallow step needs 1 or more"),
        (("--calibration-prompts", "9"), 2, "9, and there are 8 prompts: give more with --prompts"),
        (("--prompts", "nowhere.txt"), 2, "--prompts nowhere.txt cannot be read"),
        (("--target-bytes", "0"), 2, "--target-bytes is 0: it must be 1 or more"),
        (("--target-bytes", "1000000"), 2, "possible it is 6."),
        (("--shallow-layers", "4"), 1, "the last up block has 3 layers: give 1 to 3"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, capsys, words, code, sentence):
    found, err = _refusal(capsys, "-o", str(tmp_path / "out"), *words)
    assert (found, sentence in err) == (code, True), err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompts_file_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    code, err = _refusal(
        capsys, "-o", str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts.txt")
    )
    assert code == 2
    assert "holds no prompt: write one a line" in err


def test_a_quantisation_that_is_none_of_ours_is_refused():
    with pytest.raises(Exception, match="quantization is 'int3': choose int8 or none"):
        OptimizeConfig(prompts=("x",), quantization="int3")


def test_the_float_unet_is_freed_while_the_graphs_are_lowered(tmp_path, capsys, monkeypatch):
    loaded = []

    def load_and_remember(source, **options):
        pipeline = load_pipeline(source, **options)
        loaded.append(weakref.ref(pipeline.unet))
        return pipeline

    def lower(*_):
        raise ExportError(f"float UNets: {sum(unet() is not None for unet in loaded)}")

    monkeypatch.setattr("cq_edge.model.load.load_pipeline", load_and_remember)
    monkeypatch.setattr("exporters.to_executorch.export_executorch", lower)
    code, err = _refusal(capsys, "-o", str(tmp_path / "out"))
    assert (code, len(loaded)) == (1, 1)
    assert err == "cq-edge: error: float UNets: 0"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds the demo bundle at 8 DDIM steps, and 4 of another: (folder, what --json printed)."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "prompts.txt").write_text(_PROMPT + "\na blue star on a green striped background\n")
    printed = io.StringIO()
    words = ["--steps", "8", "--scheduler", "ddim", "--full-steps", "3", "--max-gap", "4",
             "--also", "dpmsolver++:4"]  # fmt: skip
    with contextlib.redirect_stdout(printed):
        prompts = ["--prompts", str(folder / "prompts.txt")]
        code = main(["build", "-o", str(folder / "bundle"), "--json", *words, *prompts])
    assert code == 0
    return folder / "bundle", json.loads(printed.getvalue().splitlines()[-1])


def test_the_last_line_is_the_json_that_programs_rely_on(built):
    folder, result = built
    assert Path(result["bundle"]) == folder
    assert set(result["graphs"]) == _GRAPHS
    for graph in result["graphs"].values():
        assert set(graph) >= {
            "bytes",
            "parity_db",
            "delegated_macs_share",
            "delegated_ops_share",
        }
    stages = result["stages"]
    assert list(stages) == ["load", "optimize", "export", "calibrate", "check"]
    peaks = [stage["peak_memory_mib"] for stage in stages.values()]
    assert peaks[0] > 100 and peaks == sorted(peaks)
    assert result["peak_memory_mib"] == peaks[-1]
    taken = sum(stage["seconds"] for stage in stages.values())
    assert taken == pytest.approx(result["seconds"], abs=1)


def test_the_unet_is_small_and_its_two_graphs_share_their_weights(built):
    _, result = built
    # int8 but for the layers that stay float: of so small a UNet 0.8 % are the last shortcuts
    assert result["unet_compression"] >= 3.85
    assert 1 <= result["shared_overhead"] <= 1.03


def test_every_graph_agrees_with_its_float_module_and_nearly_all_work_is_delegated(built):
    folder, result = built
    for name, entry in read_manifest(folder).graphs.items():
        assert entry.parity_db >= entry.parity_floor_db
        assert result["graphs"][name]["parity_db"] == pytest.approx(entry.parity_db, abs=0.01)
    for name in ("denoise", "denoise_shallow", "decode"):
        assert result["graphs"][name]["delegated_macs_share"] > 0.99


def test_the_bundle_says_what_its_graphs_compute(built):
    folder, _ = built
    operators = load_operators(folder / OPERATORS_FILE)["xnnpack"]
    assert operators.keys() == _GRAPHS
    macs = {graph: multiply_adds(found) for graph, found in operators.items()}
    assert 400e6 < macs["denoise"] < 700e6  # the demo model's UNet, normalisation included
    assert macs["denoise_shallow"] < macs["denoise"] / 5
    dtypes = {o.dtype for o in operators["denoise"] if o.kind == "linear"}
    assert "int8" in dtypes


def test_fewer_steps_are_calibrated_too_and_planned_where_time_is_short(built, capsys):
    folder, _ = built
    own, few = open_bundle(folder).reuse_tables()
    assert (own.noise_scheduler, own.steps) == ("ddim", 8)
    assert (few.noise_scheduler, few.steps) == ("dpmsolver++", 4)
    # what quantisation does to every plan, and to the other's what fewer steps do too
    assert 0 < own.base_error < few.base_error
    noise_schedule = open_bundle(folder).manifest.noise_schedule
    for table in (own, few):
        noise_scheduler = make_noise_scheduler(table.noise_scheduler, table.steps, noise_schedule)
        expected = forecast_share(table, noise_scheduler)
        np.testing.assert_allclose(table.forecast_share, expected, atol=1e-6)
    assert own.forecast_share.any()
    assert main(["plan", str(folder), "--speedup", "1", "--json"]) == 0
    frontier = json.loads(capsys.readouterr().out)["frontier"]
    assert {plan["noise_scheduler"] for plan in frontier} == {"ddim", "dpmsolver++"}
    assert all(plan["speedup"] >= 1 for plan in frontier)
    # what has no negative prompt has less of the noise that guidance multiplies
    assert frontier[-1]["modes"].upper() == "F" * 8
    assert 0 < frontier[-1]["error"] < frontier[0]["error"]  # quantised full steps err too


def test_the_bundle_opens_and_a_changed_byte_is_noticed(built, tmp_path):
    folder, _ = built
    open_bundle(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    graphs = bytearray((copy / "graphs.pte").read_bytes())
    graphs[len(graphs) // 2] ^= 1
    (copy / "graphs.pte").write_bytes(graphs)
    with pytest.raises(Exception, match="was changed after the bundle was written"):
        verify_files(copy, read_manifest(copy))


def _generate(folder, out, *words):
    assert main(["generate", str(folder), _PROMPT, "-o", str(out), "--seed", "5", *words]) == 0
    return out


def test_the_same_seed_gives_the_same_picture_byte_for_byte(built, tmp_path):
    folder, _ = built
    a = _generate(folder, tmp_path / "a.png")
    b = _generate(folder, tmp_path / "b.png")
    assert a.read_bytes() == b.read_bytes()
    assert Image.open(a).size == (128, 128)


def test_a_plan_with_shallow_steps_stays_near_the_full_run(built, tmp_path):
    folder, _ = built
    full = Image.open(_generate(folder, tmp_path / "full.png", "--plan", "full"))
    planned = Image.open(_generate(folder, tmp_path / "planned.png", "--plan", "full-steps:5"))
    difference = np.abs(np.asarray(full, float) - np.asarray(planned, float)).mean()
    assert 0 < difference < 40


def test_generate_prints_the_json_that_programs_rely_on(built, tmp_path, capsys):
    folder, _ = built
    _generate(folder, tmp_path / "a.png", "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] == [str(tmp_path / "a.png")]
    assert result["seed"] == 5
    assert result["plan"]["full"] == 3
    assert sum(result["plan"].values()) == 8
    assert result["steps"] == 8
    assert 0 < result["denoise_ms"] < result["total_ms"]


def test_building_over_a_bundle_needs_force(built, capsys):
    folder, _ = built
    before = (folder / MANIFEST_FILE).read_bytes()
    code, err = _refusal(capsys, "-o", str(folder))
    assert code == 1
    assert err == f"cq-edge: error: {folder} exists already: give --force to replace it"
    assert (folder / MANIFEST_FILE).read_bytes() == before
