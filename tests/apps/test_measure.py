import json
import re
from pathlib import Path

import pytest

from apps import measure as measure_module
from apps.cli import main
from cq_edge.latency import GRAPHS, DeviceProfile
from runtime.bundle import open_bundle
from runtime.measure import RUNS_PER_ROUND
from runtime.measurement import BlockTime
from runtime.operator_time import OperatorTime
from tests.interrupting import interrupted

ROOT = Path(__file__).parents[2]


def test_the_profile_the_report_and_the_screen_hold_every_graph(home, capsys):
    words = ["measure", "bundle", "--rounds", "3", "--sustain", "0.2", "--quick"]
    assert main([*words, "--threads", "1", "-o", "here.json", "--html", "here.html"]) == 0
    screen = capsys.readouterr().out
    profile = DeviceProfile.load(home / "here.json")
    for graph in GRAPHS:
        row = profile.figures[graph]
        assert graph in screen
        assert f"{row.p50_ms:.2f}" in screen
        assert row.runs == 3 * RUNS_PER_ROUND[graph]
        assert row.load_ms["warm"] > 0
        assert row.low_ms <= row.p50_ms <= row.high_ms
        assert f"{graph} {row.low_ms:.2f} to {row.high_ms:.2f}" in screen
    assert profile.step_ms > 0
    for key in ("engine", "processor", "governor", "python", "date", "noise", "files", "threads"):
        assert key in profile.conditions
        assert f"{key}: " in screen
    assert profile.conditions["complete"] == "yes"
    assert (profile.conditions["rounds"], profile.conditions["processes"]) == (3, 3)
    assert profile.conditions["sustained_drift"] > 0
    assert 0 < profile.conditions["work_ms"] < 50
    assert profile.conditions["work_drift"] >= 1
    page = (home / "here.html").read_text()
    assert page.count("data:image/png;base64,") == 2  # every run, and without a pause
    assert not re.search('(src|href)=(?!"data:)', page)


def test_processes_start_some_seconds_apart_unless_it_is_to_be_quick(home, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("apps.local_runs.sleep", waited.append)
    monkeypatch.setattr("apps.local_runs._APART_S", 1000)
    words = ["measure", str(home / "bundle"), "--rounds", "3", "--timing-only"]
    assert main(words) == 0
    assert len(waited) == 2  # before the second and the third
    assert all(900 < seconds < 1000 for seconds in waited)
    assert "waiting, to see other moments" in capsys.readouterr().err
    waited.clear()
    assert main([*words, "--quick"]) == 0
    assert waited == []


def test_parts_of_the_full_graph_stand_with_their_shares_and_rates(home, capsys, monkeypatch):
    parts = [BlockTime("mid_layer_0", 3.0, 60_000_000), BlockTime("head", 1.0, 5_000_000)]
    monkeypatch.setattr(measure_module, "measure_blocks", lambda *_: parts)
    words = ["--rounds", "1", "--timing-only", "--blocks", "built-in", "--html", "here.html"]
    assert main(["measure", "bundle", *words]) == 0
    screen, page = capsys.readouterr().out, (home / "here.html").read_text()
    for cells in (
        ("mid_layer_0", "3.000", "75.0%", "60.0", "20.0"),
        ("head", "1.000", "25.0%", "5.0", "5.0"),
        ("all parts", "4.000", "100.0%", "65.0", "16.2"),
    ):
        assert re.search(r"\s*│\s*".join(map(re.escape, cells)), screen)
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page


def test_operators_that_a_tracer_tells_of_are_shown(home, capsys, monkeypatch):
    told = [OperatorTime("decode", "Convolution", "delegate", 1.25)]
    monkeypatch.setattr(measure_module, "traced_operators", lambda *_: told)
    words = ["--rounds", "1", "--timing-only", "--operators", "--html", "here.html"]
    assert main(["measure", "bundle", *words]) == 0
    assert re.search(r"decode +│ Convolution │ delegate │ 1\.2500", capsys.readouterr().out)
    assert (
        "<td>Convolution</td><td>delegate</td><td>1.2500</td>" in (home / "here.html").read_text()
    )


def test_plan_and_generate_work_from_what_measure_wrote(home, capsys, monkeypatch):
    words = ["--rounds", "2", "--quick", "--timing-only", "--json", "-o", "here.json"]
    assert main(["measure", "bundle", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((home / "here.json").read_text())
    given = ["--device-profile", "here.json"]
    assert main(["plan", "bundle", "--speedup", "1", "--json", *given]) == 0
    assert json.loads(capsys.readouterr().out)["graphs_ms"] == {
        graph: row["p50_ms"] for graph, row in printed["graphs"].items()
    }
    monkeypatch.setattr("apps.generate.measure_graphs", None)  # nothing is measured again
    assert main(["generate", "bundle", "a ring", "--budget-ms", "60000", *given]) == 0
    assert main(["generate", "bundle", "a star", *given]) == 2
    assert "--device-profile is for --budget-ms" in capsys.readouterr().err


def test_a_noisy_profile_is_doubted_aloud(home, capsys):
    digest = open_bundle(home / "bundle").graphs_sha256()
    times = dict.fromkeys(GRAPHS, 2.0)
    DeviceProfile("xnnpack", digest, times, 0.0, {"noise": "noisy: a thief"}).save(home / "d.json")
    assert main(["plan", "bundle", "--full-steps", "4", "--device-profile", "d.json"]) == 0
    assert "warning: d.json was measured on a machine that was noisy: a thief" in (
        capsys.readouterr().err
    )


def test_files_that_exist_are_kept_unless_told(home, capsys):
    (home / "here.json").write_text("mine")
    assert main(["measure", "bundle", "-o", "here.json"]) == 1
    assert "here.json exists already: give --force to replace it" in capsys.readouterr().err
    assert (home / "here.json").read_text() == "mine"


def test_core_ml_is_not_measured_where_there_is_none(home, capsys, monkeypatch):
    monkeypatch.setattr(measure_module, "has_coreml", lambda: False)
    manifest = json.loads((home / "bundle" / "manifest.json").read_text())
    for graph in manifest["graphs"].values():
        graph["backend"] = "coreml"
    (home / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    assert main(["measure", "bundle"]) == 2
    err = capsys.readouterr().err
    assert "bundle has coreml graphs, and this system has no Core ML: the times of the " in err
    assert main(["measure", "bundle", "--device", "android", "--runner", "x"]) == 2
    assert capsys.readouterr().err.endswith(
        "bundle has coreml graphs, and --device android measures xnnpack graphs: build one with "
        "--backend executorch\n"
    )


def test_an_iphone_is_measured_from_a_mac_only(home, capsys, monkeypatch):
    del home
    monkeypatch.setattr(measure_module, "has_coreml", lambda: False)
    assert main(["measure", "bundle", "--device", "ios", "--team", "T"]) == 2
    assert "--device ios needs a Mac with Xcode, to which" in capsys.readouterr().err
    monkeypatch.setattr(measure_module, "has_coreml", lambda: True)
    assert main(["measure", "bundle", "--device", "ios"]) == 2
    assert "--device ios needs --team ID" in capsys.readouterr().err
    assert main(["measure", "bundle", "--device", "ios", "--team", "T"]) == 2
    assert "--device ios measures coreml graphs: build one with --backend coreml" in (
        capsys.readouterr().err
    )
    assert main(["measure", "bundle", "--team", "T"]) == 2
    assert "--team is for --device ios" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        (["--rounds", "100000", "--threads", "1"], r"timing: +\d+%.* [1-9]\d\d+/"),
        (["--rounds", "2", "--quick", "--threads", "1"], r"loading: +0%"),
    ],
    ids=["while timing", "while loading"],
)
def test_ctrl_c_leaves_a_valid_report_of_what_was_measured(real_bundle, tmp_path, words, stage):
    outputs = ["-o", str(tmp_path / "here.json"), "--html", str(tmp_path / "here.html")]
    code, said = interrupted(["measure", str(real_bundle.folder), *words, *outputs], stage)
    assert code == 130, said
    assert "Traceback" not in said
    assert "cq-edge: warning: interrupted: this is what was measured until then" in said
    profile = DeviceProfile.load(tmp_path / "here.json")
    assert profile.conditions["complete"] == "no: interrupted"
    assert profile.conditions["noise"]
    assert all(row.runs >= 1 for row in profile.figures.values())
    assert (tmp_path / "here.html").read_text().endswith("</table>\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.html", "here.json"]


def test_ctrl_c_before_every_graph_has_run_leaves_nothing(home, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure_module, "measure_here", stop)
    assert main(["measure", "bundle", "-o", "here.json"]) == 130
    assert capsys.readouterr().err == "\ncq-edge: interrupted\n"
    assert not (home / "here.json").exists()
