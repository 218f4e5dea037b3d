"""The manifest: what a good one holds, and every way in which one can be wrong."""

import json
import math
import re
from dataclasses import replace

import pytest

from cq_edge.errors import BundleError, OutputExistsError
from cq_edge.manifest import (
    EXACT_PARITY_DB,
    Defaults,
    FileEntry,
    GraphEntry,
    ImageSize,
    LatentShape,
    Manifest,
    ReuseTableEntry,
    TensorSpec,
    TokenizerEntry,
    read_manifest,
    verify_files,
    write_manifest,
)
from cq_edge.noise_scheduler import NoiseScheduleConfig

FILES = {
    "graphs.pte": b"program",
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "reuse_pndm_50.npz": b"table",
}


def graph(method, **change):
    entry = GraphEntry(
        file="graphs.pte",
        method=method,
        backend="xnnpack",
        inputs=(TensorSpec("latents", (1, 4, 16, 16), "float32"),),
        outputs=(TensorSpec("noise_pred", (1, 4, 16, 16), "float32"),),
        parity_db=36.3,
        parity_floor_db=25,
        delegated_macs_share=1.0,
        delegated_ops_share=0.9,
    )
    return replace(entry, **change)


def manifest(**change):
    whole = Manifest(
        name="demo",
        cq_edge_version="0.1.0",
        latents=LatentShape(4, 16, 16),
        image_px=ImageSize(128, 128),
        graphs={name: graph(name) for name in ("encode", "denoise", "denoise_shallow", "decode")},
        noise_schedule=NoiseScheduleConfig(),
        defaults=Defaults("pndm", 50, 7.5, 17),
        tokenizers=(TokenizerEntry("tokenizer/vocab.json", "tokenizer/merges.txt"),),
        reuse_tables=(ReuseTableEntry("reuse_pndm_50.npz", "pndm", 50),),
        conditions={"torch": "2.13.0", "threads": 2, "hours": 0.5},
    )
    return replace(whole, **change)


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    for relative, content in FILES.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def edited(folder, edit):
    """Writes the manifest, changed by `edit`; returns its path."""
    write_manifest(folder, manifest())
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content = edit(content) or content
    path.write_text(json.dumps(content))
    return path


def refusal(path, message):
    return pytest.raises(BundleError, match=f"^{re.escape(f'{path}{message}')}$")


def test_a_bundle_reads_as_it_was_written(bundle):
    written = write_manifest(bundle, manifest())
    assert read_manifest(bundle) == written
    verify_files(bundle, written)
    assert set(written.files) == set(FILES)
    assert written.files["graphs.pte"].bytes == len(FILES["graphs.pte"])
    assert replace(written, files={}) == manifest()


def test_format_version_stands_first_and_the_text_ends_with_a_newline(bundle):
    write_manifest(bundle, manifest())
    text = (bundle / "manifest.json").read_text()
    assert next(iter(json.loads(text))) == "format_version"
    assert text.startswith('{\n  "format_version": 8,\n')
    assert text.endswith("}\n")


def test_json_keeps_what_the_manifest_says():
    entries = {path: FileEntry(3, "0" * 64) for path in FILES}
    whole = manifest(files=entries, name="Ünïcode")
    assert Manifest.from_json(whole.to_json()) == whole


def test_an_exact_graph_is_written_as_a_finite_ratio():
    assert graph("decode", parity_db=math.inf).parity_db == EXACT_PARITY_DB


def test_files_that_the_manifest_does_not_name_are_nobodys_business(bundle):
    write_manifest(bundle, manifest())
    (bundle / ".DS_Store").write_bytes(b"finder")
    verify_files(bundle, read_manifest(bundle))


def test_nothing_unfinished_stays_behind(bundle):
    write_manifest(bundle, manifest())
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert files == {*FILES, "manifest.json"}


def test_a_written_manifest_is_not_overwritten(bundle):
    write_manifest(bundle, manifest())
    message = f"{bundle}/manifest.json exists: delete it, or write to another folder"
    with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
        write_manifest(bundle, manifest())


def test_a_mentioned_file_must_be_there_when_the_manifest_is_written(bundle):
    (bundle / "reuse_pndm_50.npz").unlink()
    message = f'reuse_tables[0].file is "reuse_pndm_50.npz", but {bundle} has no such file'
    with refusal("", message):
        write_manifest(bundle, manifest())
    assert not (bundle / "manifest.json").exists()


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    message = " is not a bundle: it has no manifest.json; `cq-edge build` makes bundles"
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refusal(folder, message):
            read_manifest(folder)


def test_a_missing_file_is_named(bundle):
    write_manifest(bundle, manifest())
    path = bundle / "tokenizer/merges.txt"
    path.unlink()
    with refusal(path, " is missing: copy or build the bundle again"):
        read_manifest(bundle)


@pytest.mark.parametrize(("content", "fault"), [(b"prog", "truncated"), (b"programme", "too long")])
def test_a_file_of_another_size_is_named(bundle, content, fault):
    write_manifest(bundle, manifest())
    path = bundle / "graphs.pte"
    path.write_bytes(content)
    message = (
        f" is {fault}: it has {len(content)} bytes and the manifest says 7; copy or build the "
        "bundle again"
    )
    with refusal(path, message):
        read_manifest(bundle)


def test_a_changed_file_of_the_same_size_is_found_by_its_digest(bundle):
    written = write_manifest(bundle, manifest())
    path = bundle / "graphs.pte"
    path.write_bytes(b"Program")
    assert read_manifest(bundle) == written
    message = (
        " was changed after the bundle was written (its sha256 differs): copy or build the "
        "bundle again"
    )
    with refusal(path, message):
        verify_files(bundle, written)


def test_a_link_out_of_the_folder_is_refused_when_written_and_when_read(bundle, tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(FILES["graphs.pte"])
    path = bundle / "graphs.pte"
    written = write_manifest(bundle, manifest())
    path.unlink()
    path.symlink_to(outside)
    message = " is a link out of the bundle: put the file itself there"
    with refusal(path, message):
        read_manifest(bundle)
    with refusal(path, message):
        verify_files(bundle, written)
    (bundle / "manifest.json").unlink()
    with refusal(path, message):
        write_manifest(bundle, manifest())


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secret",
        "a/../../b",
        "C:/x",
        "a\\b",
        "",
        "a//b",
        "./a",
        "a/",
        "nul\0",
        "\ud800",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(bundle, path):
    rule = (
        f" leaves the bundle or is no plain relative path ({json.dumps(path)}): write it as "
        "folder/file, without a drive, a leading slash or .."
    )

    def in_files(content):
        content["files"][path] = content["files"].pop("graphs.pte")

    def in_graph(content):
        content["graphs"]["denoise"]["file"] = path

    source = edited(bundle, in_files)
    with refusal(source, f': files["{path}"]{rule}'):
        read_manifest(bundle)
    source.unlink()
    source = edited(bundle, in_graph)
    with refusal(source, f": graphs.denoise.file{rule}"):
        read_manifest(bundle)


def setter(value, *keys):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def remover(*keys):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


WRONG = [
    (
        setter(9, "format_version"),
        " was written by a newer cq-edge (format_version 9; this one reads 8): upgrade cq-edge",
    ),
    (
        setter(1, "format_version"),
        " was written by an older cq-edge (format_version 1; this one reads 8): build the bundle "
        "again",
    ),
    (setter(0, "format_version"), ": format_version is 0: it must be 8"),
    (setter(True, "format_version"), ": format_version is true: it must be 8"),
    (remover("format_version"), ": format_version is missing: it must be 8"),
    (lambda _: [1], " holds an array: it must hold an object"),
    (
        setter(1, "latents", "depth"),
        ": key latents.depth is unknown: known here are channels, height, width",
    ),
    (
        setter(1, "graphs", "denoise", "inputs", 0, "colour"),
        ": key graphs.denoise.inputs[0].colour is unknown: known here are name, shape, dtype",
    ),
    (remover("tokenizers", 0, "vocab"), ": key tokenizers[0].vocab is missing"),
    (remover("noise_schedule"), ": key noise_schedule is missing"),
    (
        setter("50", "defaults", "steps"),
        ": defaults.steps is a string ('50'): it must be a whole number",
    ),
    (
        setter(True, "defaults", "steps"),
        ": defaults.steps is true or false (True): it must be a whole number",
    ),
    (
        setter(1.5, "defaults", "steps"),
        ": defaults.steps is a number (1.5): it must be a whole number",
    ),
    (setter(None, "name"), ": name is null: it must be a string"),
    (setter([], "files"), ": files is an array: it must be an object"),
    (
        setter(4, "graphs", "encode", "outputs", 0, "shape"),
        ": graphs.encode.outputs[0].shape is a whole number (4): it must be an array",
    ),
    (
        setter([], "conditions", "torch"),
        ": conditions.torch is an array: it must be a string or a number",
    ),
    (
        setter([1, 0], "graphs", "encode", "outputs", 0, "shape"),
        ": graphs.encode.outputs[0]: tensor noise_pred has shape [1, 0]: every size must be 1 or "
        "more",
    ),
    (
        setter("bool", "graphs", "encode", "inputs", 0, "dtype"),
        ': graphs.encode.inputs[0]: tensor latents has dtype "bool": it must be one of float32, '
        "float16, int64, int32, int8, uint8",
    ),
    (
        setter(1.5, "graphs", "decode", "delegated_macs_share"),
        ": graphs.decode: delegated_macs_share is 1.5: a share lies in 0 to 1",
    ),
    (
        setter("one_call", "guidance"),
        ': guidance is "one_call": it must be "two_calls" or "embedded" or "none"',
    ),
    (
        setter([], "tokenizers"),
        ": there are 0 tokenizers, and encode takes 1 inputs: there must be one for each",
    ),
    (setter(0, "image_px", "width"), ": image_px: width is 0: it must be 1 or more"),
    (
        setter("ddpm", "defaults", "noise_scheduler"),
        ': defaults: noise_scheduler is "ddpm": it must be one of ddim, pndm, euler, dpmsolver++, '
        "lcm",
    ),
    (
        setter("sigmoid", "noise_schedule", "beta_schedule"),
        ': noise_schedule: beta_schedule is "sigmoid": it must be one of scaled_linear, linear, '
        "squaredcos_cap_v2",
    ),
    (
        setter("xyz", "files", "graphs.pte", "sha256"),
        ': files.graphs.pte: sha256 is "xyz": it must be 64 lower-case hex digits',
    ),
    (
        setter(-1, "files", "graphs.pte", "bytes"),
        ": files.graphs.pte: bytes is -1: it must be 0 or more",
    ),
    (
        remover("files", "tokenizer/vocab.json"),
        ': tokenizers[0].vocab is "tokenizer/vocab.json", which "files" does not list',
    ),
    (
        setter(10**400, "defaults", "guidance_scale"),
        f": defaults.guidance_scale is a whole number ({10**400}): it must be a number",
    ),
    (
        setter(2, "tokenizers", 0, "max_length"),
        ": tokenizers[0]: max_length is 2: it must be 3 or more",
    ),
]


@pytest.mark.parametrize(("edit", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_a_wrong_manifest_is_refused_with_the_key_named(bundle, edit, message):
    path = edited(bundle, edit)
    with refusal(path, message):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", " is not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ("", " is not JSON: Expecting value: line 1 column 1"),
        ('{"a": 1, "a": 2}', ': key "a" stands twice in one object'),
        ('{"a": NaN}', ": NaN is not JSON; numbers must be finite"),
        ("[" * 100_000, " is not JSON: "),
        ("9" * 5000, " is not JSON: "),
    ],
)
def test_a_text_that_is_no_json_object_is_refused(bundle, text, message):
    path = bundle / "manifest.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=f"^{re.escape(f'{path}{message}')}"):
        read_manifest(bundle)


def test_bytes_that_are_no_text_are_refused(bundle):
    path = bundle / "manifest.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=f"^{re.escape(str(path))} cannot be read: "):
        read_manifest(bundle)


def test_a_number_too_large_for_a_float_is_refused(bundle):
    path = edited(bundle, setter("LARGE", "conditions", "hours"))
    path.write_text(path.read_text().replace('"LARGE"', "1e999"))
    with refusal(path, ": conditions.hours is inf: numbers must be finite"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", ["x" * 5000, "loop"])
def test_a_file_name_that_the_system_cannot_follow_is_refused(bundle, name):
    def rename(content):
        content["files"][name] = content["files"]["graphs.pte"]

    path = edited(bundle, rename)
    (bundle / "loop").symlink_to("loop")
    with pytest.raises(BundleError, match=f"^{re.escape(str(bundle / name))} "):
        read_manifest(bundle)
    assert path.exists()


def test_a_condition_that_json_cannot_hold_is_refused():
    message = "conditions.hours is nan: JSON has finite numbers only"
    with pytest.raises(BundleError, match=f"^{message}$"):
        manifest(conditions={"hours": math.nan}).to_json()


def test_a_graph_is_found_by_name_or_the_names_are_listed():
    assert manifest().graph("decode").method == "decode"
    message = "the bundle has no graph upscale: it has encode, denoise, denoise_shallow, decode"
    with pytest.raises(BundleError, match=f"^{message}$"):
        manifest().graph("upscale")


PACKAGE = "Unet.mlpackage/Data/weight.bin"


def with_coreml(folder):
    """A manifest of both backends; their files lie in `folder`."""
    (folder / PACKAGE).parent.mkdir(parents=True)
    (folder / PACKAGE).write_bytes(b"weights")
    first = manifest().graphs
    others = {n: replace(g, file="Unet.mlpackage", backend="coreml") for n, g in first.items()}
    return manifest(alternatives={"coreml": others})


def test_a_bundle_of_two_backends_reads_as_either(bundle):
    written = write_manifest(bundle, with_coreml(bundle))
    found = read_manifest(bundle)
    assert found == written
    assert PACKAGE in found.files
    assert found.backends == ("xnnpack", "coreml")
    coreml = found.for_backend("coreml")
    assert coreml.graph("denoise").file == "Unet.mlpackage"
    assert coreml.backends == ("coreml",)
    assert found.for_backend("xnnpack").graphs == found.graphs


def test_a_backend_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(BundleError) as caught:
        manifest().for_backend("coreml")
    assert str(caught.value) == (
        "the bundle has no graphs for coreml: it has some for xnnpack; `cq-edge build --backend "
        "executorch,coreml` makes both"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda g: {"coreml": {**g, "decode": replace(g["decode"], backend="xnnpack")}},
            "alternatives.coreml holds a graph of another backend",
        ),
        (
            lambda g: {"xnnpack": {n: replace(e, backend="xnnpack") for n, e in g.items()}},
            'alternatives.xnnpack is the backend of "graphs" already',
        ),
        (
            lambda g: {"coreml": {"decode": g["decode"]}},
            "alternatives.coreml has decode: it must have encode, denoise, denoise_shallow, decode",
        ),
        (
            lambda g: {"coreml": {**g, "decode": replace(g["decode"], outputs=())}},
            "alternatives.coreml.decode takes or returns something else than graphs.decode: "
            "inputs and outputs must be the same",
        ),
    ],
)
def test_alternatives_that_are_not_the_same_graphs_are_refused(bundle, change, message):
    graphs = with_coreml(bundle).alternatives["coreml"]
    with pytest.raises(BundleError) as caught:
        manifest(alternatives=change(graphs))
    assert str(caught.value) == message


def test_a_package_that_is_not_there_is_refused(bundle):
    whole = with_coreml(bundle)
    (bundle / PACKAGE).unlink()
    with pytest.raises(BundleError) as caught:
        write_manifest(bundle, whole)
    assert str(caught.value) == (
        f'alternatives.coreml.encode.file is "Unet.mlpackage", but {bundle} has no such file'
    )
