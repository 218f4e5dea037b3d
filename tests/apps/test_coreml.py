"""Core ML bundles of a tiny pipeline: built once, verified, tampered with, drawn with."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess

import coremltools as ct
import numpy as np
import pytest
from PIL import Image

from apps.build_coreml import CoreMLOptions, size_warning
from apps.cli import main
from cq_edge.manifest import MANIFEST_FILE, read_manifest
from cq_edge.metrics import psnr_db
from runtime.mil.interpreter import read_functions
from tests.tiny_pipeline import save_tiny_pipeline

_PROMPT = "a red star"
_WEIGHTS = "Unet.mlpackage/Data/com.apple.CoreML/weights/weight.bin"


def _build(folder, *words):
    (folder / "prompts.txt").write_text(f"{_PROMPT}\n")
    model, printed = save_tiny_pipeline(folder / "model"), io.StringIO()
    usual = ["--steps", "4", "--scheduler", "ddim", "--max-gap", "2", "--json"]
    with contextlib.redirect_stdout(printed):
        code = main(["build", str(model), "-o", str(folder / "bundle"), *usual, "--prompts",
                     str(folder / "prompts.txt"), *words])  # fmt: skip
    assert code == 0
    return folder / "bundle", json.loads(printed.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A Core ML bundle, and what --json printed."""
    return _build(tmp_path_factory.mktemp("coreml"), "--backend", "coreml", "--layout", "apple")


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "copy")


def _verify(capsys, folder):
    code = main(["verify", str(folder)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _seal(folder):
    """Makes the manifest's digests those of the files as they are."""
    path = folder / MANIFEST_FILE
    content = json.loads(path.read_text())
    for relative, entry in content["files"].items():
        data = (folder / relative).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content))


def _flip(path, share, bits):
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= bits
    path.write_bytes(data)


def _function(folder, manifest, graph):
    """Returns a graph's package, its specification and its operations, to be changed."""
    entry = manifest.graphs[graph]
    spec = ct.utils.load_spec(str(folder / entry.file))
    function = spec.mlProgram.functions[entry.method]
    operations = function.block_specializations[function.opset].operations
    return folder / entry.file / "Data" / "com.apple.CoreML", spec, operations


_FLOAT16 = 1  # in the header of each constant of a weight file


def _flip_a_weights_high_bit(folder, manifest, graph):
    """Changes one bit of a graph's largest float16 constant, its exponent's highest: of a weight,
    of the scales of one, or of the values that its indices stand for."""
    place, _, operations = _function(folder, manifest, graph)
    path = place / "weights" / "weight.bin"
    data = bytearray(path.read_bytes())
    # of the table of words only few rows are read
    looked_up = {o.inputs["x"].arguments[0].name for o in operations if o.type == "gather"}
    blobs = []
    for operation in operations:
        bindings = [b for given in operation.inputs.values() for b in given.arguments]
        values = [*operation.attributes.values(), *(binding.value for binding in bindings)]
        for value in values:
            if value.HasField("blobFileValue") and operation.outputs[0].name not in looked_up:
                at = value.blobFileValue.offset
                _, kind, size, start = struct.unpack_from("<IIQQ", data, at)
                if kind == _FLOAT16:
                    blobs.append((size, start))
    size, start = max(blobs)
    data[start + size // 4 * 2 + 1] ^= 0x40
    path.write_bytes(data)


def _swap(folder, manifest, graph, kind, names):
    """Swaps two inputs of the last operation of a kind; of the whole graph where that is None."""
    place, spec, operations = _function(folder, manifest, graph)
    if kind is not None:
        last = [operation for operation in operations if operation.type == kind][-1]
        first, second = (last.inputs[name].arguments[0] for name in names)
        first.name, second.name = second.name, first.name
    else:
        other = dict([names, names[::-1]])
        for operation in operations:
            for binding in (b for given in operation.inputs.values() for b in given.arguments):
                if binding.WhichOneof("binding") == "name":
                    binding.name = other.get(binding.name, binding.name)
    (place / "model.mlmodel").write_bytes(spec.SerializeToString())


def test_the_bundle_is_small_shares_its_weights_and_passes_its_floors(built):
    folder, result = built
    assert result["unet_compression"] >= 4.0
    assert result["shared_overhead"] <= 1.03
    manifest = read_manifest(folder)
    assert manifest.backends == ("coreml",)
    floors = {name: entry.parity_floor_db for name, entry in manifest.graphs.items()}
    assert floors == {"encode": 45, "denoise": 28, "denoise_shallow": 28, "decode": 45}
    for name, entry in manifest.graphs.items():
        assert entry.parity_db >= entry.parity_floor_db
        assert result["graphs"][name]["parity_db"] == pytest.approx(entry.parity_db, abs=0.01)
    assert {path.split("/")[0] for path in manifest.files} >= {
        "TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "checks.npz",
        "operators.json",
    }  # fmt: skip


def test_the_layout_for_apples_pipeline_has_its_resources_and_the_script_that_compiles(built):
    folder = built[0] / "apple"
    assert sorted(path.name for path in folder.iterdir()) == [
        "TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage", "compile.sh",
        "merges.txt", "vocab.json",
    ]  # fmt: skip
    for file in ("vocab.json", "merges.txt"):
        assert (folder / file).read_bytes() == (built[0] / "tokenizer" / file).read_bytes()
    assert read_functions(folder / "Unet.mlpackage")["main"].output_names == ("noise_pred",)


def test_the_script_compiles_each_package_and_copies_the_vocabulary(copy, tmp_path):
    """With a compiler that only makes the folder: the real one needs a Mac."""
    tools, folder = tmp_path / "tools", copy / "apple"
    tools.mkdir()
    (tools / "xcrun").write_text('#!/bin/sh\nmkdir "$4/$(basename "$3" .mlpackage).mlmodelc"\n')
    (tools / "xcrun").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    subprocess.run([folder / "compile.sh"], check=True, env={"PATH": path})
    assert sorted(path.name for path in (folder / "Resources").iterdir()) == [
        "TextEncoder.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "merges.txt", "vocab.json",
    ]  # fmt: skip


def test_a_tablets_times_are_predicted_from_the_bundle(built, capsys, tmp_path):
    words, saved = ["plan", str(built[0]), "--full-steps", "2"], str(tmp_path / "ipad.json")
    assert main([*words, "--device", "ipad-pro-m2", "--save-profile", saved]) == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted for iPad Pro (M2) (coreml, cpu_and_ne), not measured:")
    assert "<- chosen" in out
    assert main([*words, "--device-profile", saved]) == 0
    assert "<- chosen" in capsys.readouterr().out


def test_a_bundle_as_it_was_built_verifies(built, capsys):
    code, out, err = _verify(capsys, built[0])
    assert code == 0, err
    assert out.splitlines()[0] == "every file is what the manifest says"
    assert sum(line.startswith("coreml") for line in out.splitlines()) == 4
    assert "WRONG" not in out


def test_a_flipped_weight_bit_is_caught_by_its_digest(copy, capsys):
    _flip(copy / _WEIGHTS, 0.5, 0x80)
    code, _, err = _verify(capsys, copy)
    assert code == 1
    assert "weight.bin was changed after the bundle was written" in err


@pytest.mark.parametrize("bits", [0x80, 0x01])
def test_a_flipped_bit_is_caught_though_the_manifest_was_made_to_match(copy, capsys, bits):
    _flip(copy / _WEIGHTS, 0.4, bits)
    _seal(copy)
    code, _, err = _verify(capsys, copy)
    assert code == 1
    assert "weight.bin is not the file that was run when the bundle was built" in err


_GRAPHS = ("encode", "denoise", "denoise_shallow", "decode")


@pytest.mark.parametrize("graph", _GRAPHS)
def test_a_flipped_bit_is_caught_by_what_each_graph_computes(copy, capsys, graph):
    _flip_a_weights_high_bit(copy, read_manifest(copy), graph)
    _seal(copy)
    code, out, err = _verify(capsys, copy)
    assert code == 1
    assert "WRONG" in out
    assert f"graph {graph} (coreml) computes something else than" in err


@pytest.mark.parametrize(
    ("graph", "kind", "names"),
    [
        ("encode", "layer_norm", ("gamma", "beta")),
        ("denoise", "sub", ("x", "y")),
        ("denoise_shallow", None, ("gain", "bias")),
        ("decode", "sub", ("x", "y")),
    ],
)
def test_swapped_inputs_are_caught_by_what_each_graph_computes(copy, capsys, graph, kind, names):
    _swap(copy, read_manifest(copy), graph, kind, names)
    _seal(copy)
    code, _, err = _verify(capsys, copy)
    assert code == 1
    assert f"graph {graph} (coreml) computes something else than its float module" in err


def test_swapped_inputs_of_other_shapes_are_caught_where_they_do_not_fit(copy, capsys):
    _swap(copy, read_manifest(copy), "denoise", None, ("latents", "embeddings"))
    _seal(copy)
    code, _, err = _verify(capsys, copy)
    assert code == 1
    assert "graph denoise cannot be run on its check inputs" in err
    assert "Unet.mlpackage cannot be read as a Core ML program" in err


def test_a_bundle_without_checks_says_so(copy, capsys):
    (copy / "checks.npz").unlink()
    content = json.loads((copy / MANIFEST_FILE).read_text())
    del content["files"]["checks.npz"]
    (copy / MANIFEST_FILE).write_text(json.dumps(content))
    code, _, err = _verify(capsys, copy)
    assert code == 1
    assert "checks.npz is missing: without it nothing can be verified" in err


def test_generate_runs_the_packages_and_says_that_it_is_slow(built, tmp_path, capsys):
    words = ["generate", str(built[0]), _PROMPT, "--engine", "coreml", "--seed", "3"]
    for name in ("a.png", "b.png"):
        assert main([*words, "-o", str(tmp_path / name)]) == 0
    assert "a reference interpreter runs the graphs, many times slower" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_an_engine_that_the_bundle_is_not_for_is_refused(built, capsys):
    assert main(["generate", str(built[0]), _PROMPT, "--engine", "executorch"]) == 1
    assert "the bundle has no graphs for xnnpack: it has some for coreml" in capsys.readouterr().err


@pytest.mark.slow
def test_both_backends_make_the_same_picture_of_one_bundle(tmp_path, capsys):
    words = ("--backend", "executorch,coreml", "--quantization", "none", "--layout", "executorch")
    folder, result = _build(tmp_path, *words)
    assert set(result["alternatives"]) == {"coreml"}
    assert _verify(capsys, folder)[0] == 0
    pictures = []
    for engine in ("executorch", "coreml"):
        path = tmp_path / f"{engine}.png"
        words = ["--engine", engine, "-o", str(path), "--seed", "3"]
        assert main(["generate", str(folder), _PROMPT, *words]) == 0
        pictures.append(np.asarray(Image.open(path)))
    assert psnr_db(*pictures) > 40


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--coreml-weights", "int4", "--coreml-target", "ios17"),
            "--coreml-weights int4 needs --coreml-target ios18: iOS 17 cannot express it; there, "
            "take palette4 (two packages, Unet and UnetShallow)",
        ),
        (
            ("--backend", "executorch", "--layout", "apple"),
            "--layout apple is of Core ML: add --backend coreml",
        ),
        (
            ("--layout", "executorch", "--coreml-target", "ios17"),
            "--layout executorch keeps both UNet graphs in one model, of weights that torchao "
            "rounds: it takes --coreml-target ios18 and --attention original only",
        ),
        (
            ("--coreml-weights", "torchao-int8", "--attention", "split-einsum"),
            "--coreml-weights torchao-int8 takes --attention original only: split-einsum reads "
            "weights in another shape; int8 and int4 take both",
        ),
        (
            ("--coreml-weights", "int8", "--compression", "6"),
            "--compression is for --coreml-weights mixed: int8 weights have one size only",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, capsys, words, sentence):
    assert main(["build", "-o", str(tmp_path / "out"), "--backend", "coreml", *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"cq-edge: error: {sentence}"
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_none_is_refused(tmp_path, capsys):
    assert main(["build", "-o", str(tmp_path / "out"), "--backend", "coreml,tflite"]) == 2
    assert "'coreml,tflite' is none of executorch, coreml" in capsys.readouterr().err


def test_a_weight_file_that_the_neural_engine_refuses_is_warned_of_with_the_cure():
    gib = 1 << 30
    half = CoreMLOptions("ios18", "float16", 4.0)
    assert size_warning(2 * gib, 4 * gib, half) is None
    assert size_warning(3 * gib, 6 * gib + 1, half) == (
        "the Core ML UNet's weight file has 3.00 GiB: the Neural Engine refuses more than 2 GiB on "
        "ios18; build with mixed weights, not float16, and --compression 3.1"
    )
    old = size_warning(3 * gib // 2, 6 * gib, CoreMLOptions("ios17", "mixed", 4.0))
    assert old is not None
    assert old.endswith("refuses more than 1 GiB on ios17; build with --compression 6")


def test_weights_that_are_too_coarse_are_refused_with_what_to_take_instead():
    assert CoreMLOptions("ios18", "int4", 4.0).cure == (
        "int4 weights are too coarse for this UNet: take the default, --coreml-weights mixed, "
        "which keeps more bits where they count (--compression 6 or 8 makes it smaller)"
    )
    assert CoreMLOptions("ios18", "mixed", 9.0).cure == "ask for less than --compression 9"
