import json
from dataclasses import asdict, replace

import pytest

from apps.cli import main
from cq_edge import latency_model
from cq_edge.latency import DeviceProfile
from cq_edge.manifest import read_manifest, write_manifest
from runtime.bundle import open_bundle
from tests.cq_edge.test_latency_model import device
from tests.tiny_bundle import operators


@pytest.fixture
def phones(home, monkeypatch):
    """Ships two devices: "phone" for XNNPACK and "tablet" for Core ML."""
    folder = home / "devices"
    folder.mkdir()
    for name, shipped in (("phone", device()), ("tablet", device(engine="coreml"))):
        (folder / f"{name}.json").write_text(json.dumps(asdict(shipped)))
    monkeypatch.setattr(latency_model, "DEVICES", folder)
    return home


def _plan(*words):
    return main(["plan", "bundle", "--full-steps", "4", *words])


def test_a_plan_for_a_shipped_device_is_made_of_its_predicted_times(phones, capsys):
    assert _plan("--device", "phone", "--json", "--save-profile", "phone.json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = {graph: device().predict(o).ms for graph, o in operators().items()}
    assert found["graphs_ms"] == pytest.approx(expected)
    assert found["conditions"]["predicted for"] == "Test phone"
    assert found["conditions"]["denoise_low_ms"] < expected["denoise"]
    saved = DeviceProfile.load(phones / "phone.json")
    assert saved.graphs_ms == pytest.approx(expected)
    assert _plan("--device-profile", "phone.json") == 0


def test_the_screen_says_that_it_is_predicted_and_shows_ranges(phones, capsys):
    del phones
    assert _plan("--device", "phone") == 0
    out = capsys.readouterr().out
    assert out.startswith("predicted for Test phone (xnnpack, cpu), not measured:")
    found = device().predict(operators()["denoise"])
    assert f"{found.low_ms:.1f} to {found.high_ms:.1f}" in out
    kind, share = next(iter(found.shares.items()))
    assert f"{kind} {share:.0%}" in out
    assert "<- chosen" in out


def test_the_list_names_every_device_and_needs_no_plan(phones, capsys):
    del phones
    assert main(["plan", "bundle", "--device", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["phone", "tablet"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fridge", "no device 'fridge' ships: choose one of phone, tablet"),
        ("tablet", "device tablet runs coreml graphs, but the bundle is for xnnpack: choose "
         "another device, or build for it"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_used_is_refused(phones, capsys, name, sentence):
    del phones
    assert _plan("--device", name) == 2
    assert capsys.readouterr().err == f"cq-edge: error: {sentence}\n"


def test_a_bundle_without_operators_says_to_build_it_again(phones, capsys):
    bundle = phones / "bundle"
    manifest = read_manifest(bundle)
    (bundle / "operators.json").unlink()
    (bundle / "manifest.json").unlink()
    write_manifest(bundle, replace(manifest, files={}))
    open_bundle(bundle)
    assert _plan("--device", "phone") == 1
    assert (
        "bundle has no operators.json, which predictions are made from" in capsys.readouterr().err
    )


def test_a_profile_and_a_device_exclude_each_other(phones, capsys):
    del phones
    assert _plan("--device", "phone", "--device-profile", "here.json") == 2
    assert "not allowed with argument" in capsys.readouterr().err
