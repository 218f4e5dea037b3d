"""`cq-edge measure --device android` against a stand-in phone that runs real programs."""

import json
import os
from pathlib import Path

import pytest

from apps.cli import main
from cq_edge.latency import GRAPHS, DeviceProfile
from runtime.bundle import open_bundle
from tests.interrupting import interrupted
from tests.stand_in_phone import StandInPhone, executorch_runner, shell_runner, sleeping_runner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def phone(home, monkeypatch):
    found = StandInPhone(home / "device")
    monkeypatch.setenv("PHONE", str(found.folder))
    monkeypatch.setenv("PATH", f"{found.bin}{os.pathsep}{os.environ['PATH']}")
    return found


@pytest.fixture
def measure(phone, capsys):
    """Runs `cq-edge measure bundle --device android …`; returns the exit code, stdout, stderr."""
    del phone

    def call(*words, bundle="bundle"):
        words = ["--device", "android", "--runner", "runner", *words]
        code = main(["measure", str(bundle), *words])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1] if err else ""

    return call


@pytest.fixture(autouse=True)
def runner(home):
    return sleeping_runner(home / "runner")


def test_what_the_phone_tells_is_a_profile_to_plan_from(home, phone, measure, capsys):
    code, out, _ = measure("--rounds", "2", "--sustain", "0.1", "--json", "-o", "phone.json")
    assert code == 0
    profile = DeviceProfile.load(home / "phone.json")
    assert json.loads(out.splitlines()[-1]) == profile.as_json()
    for graph in GRAPHS:
        row = profile.figures[graph]
        assert 2 <= row.p10_ms <= row.p50_ms < 20
        assert row.runs == 2 * 10
        assert row.load_ms == {"warm": 1.25}
        assert 1 < row.peak_memory_mib < 100  # of a Python process that sleeps
    assert profile.conditions["serial"] == "P1"
    assert profile.conditions["sustained_s"] >= 0.09
    assert profile.conditions["rounds"] == 2
    assert phone.files == []
    assert main(["plan", "bundle", "--device-profile", "phone.json", "--full-steps", "4"]) == 0
    capsys.readouterr()


def test_a_real_program_runs_with_the_bundles_inputs(home, phone, measure, real_bundle):
    executorch_runner(home / "runner")
    words = ["--rounds", "1", "--timing-only", "-o", "phone.json"]
    code, _, err = measure(*words, bundle=real_bundle.folder)
    assert code == 0, err
    profile = DeviceProfile.load(home / "phone.json")
    profile.require_graphs("xnnpack", open_bundle(real_bundle.folder).graphs_sha256())
    assert all(0 < taken < 50 for taken in profile.graphs_ms.values())
    assert phone.files == []


def test_every_file_is_pushed_with_its_digest_checked(phone, measure):
    phone.become("damaging")
    code, _, err = measure()
    assert code == 1
    assert "phone P1: runner did not arrive whole: its sha256 there is " in err
    assert phone.files == []


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        ([], [], "no phone is attached: connect one, and allow USB debugging on it"),
        (["P1\tdevice", "P2\tdevice"], [], "2 phones are attached (P1, P2): name one with "
         "--serial"),
        (["P1\tdevice"], ["--serial", "P3"], "phone P3 is not attached: attached are P1"),
        (["P1\tunauthorized"], [], "phone P1 is unauthorized: unlock it and allow USB debugging"),
        (["P1\toffline"], [], "phone P1 is offline: unlock it"),
    ],
)  # fmt: skip
def test_a_phone_that_cannot_be_used_is_named(phone, measure, rows, words, sentence):
    phone.attached(*rows)
    code, out, err = measure(*words)
    assert (code, out) == (1, "")
    assert f"cq-edge: error: {sentence}" in err


def test_one_of_two_phones_is_chosen_by_its_serial(phone, measure):
    phone.attached("P1\tdevice", "P2\tdevice")
    assert measure("--serial", "P2", "--rounds", "1", "--timing-only")[0] == 0
    assert "-s P2 push" in phone.log
    assert "-s P1" not in phone.log


def test_a_full_phone_says_what_is_needed_and_is_left_empty(phone, measure):
    phone.become("full")
    code, _, err = measure("-o", "phone.json")
    assert code == 1
    assert "phone P1: its storage is full: runner needs 0.0 MiB in /data/local/tmp/cq-edge-" in err
    assert phone.files == []


def test_a_phone_that_is_unplugged_meanwhile_is_told(home, measure):
    shell_runner(home / "runner", 'touch "$PHONE/unplugged"')
    code, _, err = measure("-o", "phone.json")
    assert code == 1
    assert "phone P1: the runner of graph encode failed with exit code 1: adb: device 'P1'" in err
    assert not (home / "phone.json").exists()


def test_a_runner_that_crashes_is_quoted(home, phone, measure):
    shell_runner(home / "runner", 'echo "E executorch: no kernel of aten::x" >&2; kill -SEGV $$')
    code, _, err = measure()
    assert code == 1
    assert "the runner of graph encode failed with exit code 139: " in err
    assert "no kernel of aten::x" in err
    assert phone.files == []


def test_a_runner_that_hangs_is_ended_on_the_phone_too(home, phone, measure):
    shell_runner(home / "runner", f'echo $$ > "{home}/hanging"; exec sleep 1000')
    code, _, err = measure("--timeout", "1")
    assert code == 1
    assert "the runner of graph encode" in err
    assert "did not end within 1 s" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((home / "hanging").read_text()), 0)
    assert phone.files == []


def test_ctrl_c_keeps_what_was_measured_and_empties_the_phone(home, phone, real_bundle):
    sleeping_runner(home / "runner", ms=20)
    words = ["measure", str(real_bundle.folder), "-o", str(home / "phone.json")]
    options = ["--device", "android", "--runner", str(home / "runner"), "--rounds", "1000"]
    code, said = interrupted([*words, *options], r" [5-9]/4000 ")  # every graph has run, and more
    assert code == 130, said
    assert "Traceback" not in said
    profile = DeviceProfile.load(home / "phone.json")
    assert profile.conditions["complete"] == "no: interrupted"
    assert all(row.runs >= 10 for row in profile.figures.values())
    assert phone.files == []


def test_a_runner_that_tells_no_times_is_refused(home, measure):
    shell_runner(home / "runner", "echo Model executed successfully 12 time\\(s\\) in 3 ms.")
    code, _, err = measure()
    assert code == 1
    assert (
        "the runner told the times of 0 of 12 runs: it must print `Iteration 1 of N: X ms`" in err
    )


def test_a_runner_without_methods_by_name_is_told_apart(home, measure):
    shell_runner(home / "runner", "echo \"ERROR: unknown command line flag 'method_name'\"; exit 1")
    assert "the runner has no --method_name: build executor_runner from a later" in measure()[2]


def test_no_adb_no_runner_file_no_runner(home, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(home))
    assert main(["measure", "bundle", "--device", "android", "--runner", "runner"]) == 1
    assert "adb is not installed" in capsys.readouterr().err
    assert main(["measure", "bundle", "--device", "android"]) == 2
    assert "--device android needs --runner PATH" in capsys.readouterr().err
    assert main(["measure", "bundle", "--runner", "x"]) == 2
    assert "--runner and --serial are for --device android" in capsys.readouterr().err
    words = ["measure", "bundle", "--device", "android", "--runner", "runner", "--quick"]
    assert main(words) == 2
    assert "--quick is for this machine: leave --device out" in capsys.readouterr().err


def test_a_runner_that_is_no_file_is_named(measure):
    code, _, err = measure("--runner", "nowhere")
    assert code == 1
    assert "--runner nowhere is no file" in err
