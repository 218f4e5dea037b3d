import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps.ablation import gain_cell
from apps.cli import main
from apps.draw_captions import TIMED_CAPTIONS as TIMED
from apps.evaluate import Variant, _same
from apps.frontier_margin import margins
from apps.kept_pictures import KeptPictures
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.forecast_share import plan_shares
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from cq_edge.planner import Plan, best_within_loop_ms, plan_frontier
from runtime.bundle import open_bundle
from runtime.draw import Method, draw
from tests.tiny_bundle import reuse_table, write_bundle

TIMES = {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 1.0, "decode": 5.0}
NAMES = [
    "float32", "quantised only", "quantised, corrected", "cached only",
    "naive", "naive, cache half", "naive, corrected",
    "ours, no correction", "ours, cache half alone", "ours, quantisation alone", "ours",
    "uniform cache", "fewer steps, ddim", "fewer steps, dpmsolver++",
]  # fmt: skip


@pytest.fixture
def evaluate(home, monkeypatch, capsys):
    """Runs `cq-edge evaluate bundle …` on a device where a shallow run takes a tenth."""
    write_bundle(home / "float32", quantization="none")
    profile = DeviceProfile("xnnpack", "", TIMES)
    monkeypatch.setattr("apps.evaluate.measure_graphs", lambda *_, **__: profile)

    def call(*words):
        code = main(["evaluate", "bundle", "--reference", "float32", *words])
        return code, *capsys.readouterr()

    return call, profile


def test_every_way_is_compared_with_float32(evaluate, monkeypatch):
    call, profile = evaluate
    monkeypatch.setattr("apps.evaluate._FRONTIER_SPEEDUPS", (2.0, 4.0))
    compared = []

    def watched(ours, others):
        compared.append(set(others))
        return margins(ours, others)

    monkeypatch.setattr("apps.evaluate.margins", watched)
    code, out, _ = call(
        "--captions", "3", "--frontier-captions", "2", "--speedup", "2",
        "--json", "report.json", "--html", "report.html",
    )  # fmt: skip
    assert code == 0
    report = json.loads(Path("report.json").read_text())
    rows = {row["name"]: row for row in report["variants"]}
    assert list(rows) == NAMES
    assert [line[:24].strip() for line in out.splitlines()[1 : 1 + len(NAMES)]] == NAMES
    # the fake graphs of both bundles are the same: quantisation alone changes nothing
    for name in ("float32", "quantised only", "quantised, corrected"):
        assert rows[name]["clip_delta"] == 0
        assert rows[name]["ssim"] == pytest.approx(1)
        assert rows[name]["plan"]["full"] == 10
    assert rows["float32"]["loop_speedup"] == 1
    assert rows["ours"]["clip_delta_trimmed_ci"] is None  # of so few
    assert rows["ours"]["psnr_db"] < rows["float32"]["psnr_db"]
    frontier = plan_frontier([reuse_table()], profile, 2, NoiseScheduleConfig())
    best = best_within_loop_ms(frontier, 2 * 100 / 2, profile, 2, NoiseScheduleConfig())
    assert profile.loop_ms(best.schedule, 2) <= 2 * 100 / 2
    assert rows["ours"]["plan"]["modes"] == best.schedule.to_string()
    assert rows["ours"]["plan"]["repeated"] == best.schedule.repeated
    assert rows["uniform cache"]["plan"]["modes"] == CacheSchedule.uniform(10, 3).to_string()
    assert rows["fewer steps, ddim"]["plan"]["steps"] == 5
    assert {row["name"] for row in report["frontier"]} == set(NAMES[4:])
    assert len(report["frontier"]) == 2 * len(NAMES[4:])
    page = Path("report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in NAMES)
    each = len(NAMES[4:])
    for gained, drawn, captions in (
        (report["ablation"], report["variants"][4:], 3),
        (report["frontier_ablation"][:2], report["frontier"][:each], 2),
        (report["frontier_ablation"][2:], report["frontier"][each:], 2),
    ):
        papers, ours = gained
        assert (papers["schedule"], ours["schedule"]) == ("the paper's", "ours")
        assert papers["captions"] == ours["captions"] == captions
        at = {row["name"]: row for row in drawn}
        assert papers["loop_speedup"] == at["naive, corrected"]["loop_speedup"]
        assert ours["loop_speedup"] == at["ours"]["loop_speedup"]
        psnrs_db = {name: row["psnr_db"] for name, row in at.items()}
        expected = psnrs_db["naive, corrected"] - psnrs_db["naive"]
        assert papers["both_db"] == pytest.approx(expected)
        expected = psnrs_db["ours"] - psnrs_db["ours, quantisation alone"]
        assert ours["cache_db"] == pytest.approx(expected)
        cells = [gain_cell(ours, gain) for gain in ("cache", "quantisation", "both")]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
        assert " ".join(f"{cell:>25}" for cell in cells) in out
    assert len(report["frontier_ablation"]) == 4
    margins_db = report["frontier_margins_db"]
    assert compared == [{"naive, corrected", *NAMES[-3:]}]
    for row in margins_db:
        line = f"<td>{row['loop_speedup']:.2f}</td><td>{row['difference']:+.2f}</td>"
        assert f"<tr><td>{row['next']}</td>{line}" in page
    least = min(row["difference"] for row in margins_db)
    assert f"x: {least:+.2f} dB (" in out.splitlines()[-1]
    assert "src=" in page
    assert "http" not in page


def test_ours_and_the_papers_schedule_have_the_shares_of_their_plan_and_other_halves_none(
    evaluate, monkeypatch
):
    call, _ = evaluate
    drawn = {}

    def watched(method, caption, seed):
        drawn[method.schedule, method.table is None or method.table.forecast_share.any()] = method
        return draw(method, caption, seed)

    monkeypatch.setattr("apps.draw_captions.draw", watched)
    code, *_ = call("--captions", "2", "--frontier-captions", "0", "--speedup", "2")
    assert code == 0
    given = 0
    for method in drawn.values():
        if method.table is None or not method.table.forecast_share.any():
            assert method.shares is None
            continue
        noise_scheduler = make_noise_scheduler("ddim", 10, NoiseScheduleConfig())
        expected = plan_shares(method.table, noise_scheduler, method.schedule)
        np.testing.assert_array_equal(method.shares, expected)
        given += 1
    assert given >= 3


def test_float32_runs_no_step_several_times(home):
    side = SimpleNamespace(tables=[reuse_table()], bundle=SimpleNamespace(folder=home))
    plan = Plan(CacheSchedule.from_string("FSDKQfsFFF"), reuse_table(), 0.0, 0.0, 1.0)
    assert _same(plan, side).schedule.to_string() == "FSFKFfsFFF"


def test_other_prompts_have_no_attributes(evaluate):
    call, _ = evaluate
    Path("prompts.txt").write_text("a cat\n\na dog\n")
    code, out, _ = call(
        "--prompts", "prompts.txt", "--frontier-captions", "0", "--json", "report.json"
    )
    assert code == 0
    report = json.loads(Path("report.json").read_text())
    assert {row["attribute_accuracy"] for row in report["variants"]} == {None}
    assert report["frontier"] == report["frontier_margins_db"] == []
    assert "–" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--captions", "1"), "--captions is 1: a comparison needs 2 or more"),
        (("--reference", "bundle"), "bundle is quantised: a reference is built with "),
        (("--prompts", "none.txt"), "--prompts none.txt cannot be read: "),
        (("--only", "best"), "--only best: choose float32, quantised only, "),
    ],
)
def test_what_cannot_be_compared_is_refused_with_a_sentence(evaluate, words, message):
    call, _ = evaluate
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"cq-edge: error: {message}")


def test_a_report_that_exists_is_kept_unless_forced(evaluate):
    call, _ = evaluate
    Path("report.json").write_text("mine")
    assert call("--json", "report.json")[0] == 1
    assert Path("report.json").read_text() == "mine"


def test_only_the_named_ways_are_drawn(evaluate):
    call, _ = evaluate
    code, _, _ = call(
        "--only", "ours", "--captions", "2", "--frontier-captions", "0", "--json", "report.json"
    )
    assert code == 0
    report = json.loads(Path("report.json").read_text())
    assert [row["name"] for row in report["variants"]] == ["float32", "ours"]


def test_kept_pictures_are_drawn_once_but_the_first_whose_time_counts(evaluate, monkeypatch):
    call, _ = evaluate
    drawn, timed = [], []

    def counted(method, caption, seed):
        drawn.append((method.bundle.folder.name, seed))
        return draw(method, caption, seed)

    monkeypatch.setattr("apps.draw_captions.draw", counted)

    def rows(captions):
        words = ["--captions", str(captions), "--frontier-captions", "0", "--keep", "kept"]
        assert call("--only", "ours", *words, "--json", "report.json", "--force")[0] == 0
        report = json.loads(Path("report.json").read_text())
        timed.append(report["conditions"]["timed_captions"])
        return [{**row, "loop_speedup": 0, "end_to_end_speedup": 0} for row in report["variants"]]

    expected = rows(TIMED + 3)
    assert len(drawn) == 2 * (TIMED + 3)
    drawn.clear()
    assert rows(TIMED + 3) == expected
    assert {seed for _, seed in drawn} == set(range(TIMED))
    # one that cannot be read, and one of another prompt, are drawn again; so are new captions
    first, *others = sorted(Path("kept").glob(f"*/{TIMED:06d}.png"))
    first.write_bytes(first.read_bytes()[:100])
    for path in others:
        path.replace(path.with_name(f"{TIMED + 1:06d}.png"))
    drawn.clear()
    found = rows(TIMED + 4)
    assert sorted(seed for _, seed in drawn if seed >= TIMED) == [
        TIMED, TIMED, TIMED + 1, TIMED + 3, TIMED + 3,
    ]  # fmt: skip
    drawn.clear()
    shutil.rmtree("kept")
    assert rows(TIMED + 4) == found
    assert timed == [TIMED + 3, TIMED, TIMED + 2, TIMED + 4]


def test_the_frontier_takes_what_the_table_drew(evaluate, monkeypatch):
    call, _ = evaluate
    monkeypatch.setattr("apps.evaluate._FRONTIER_SPEEDUPS", (2.0, 4.0))
    monkeypatch.setattr("apps.evaluate._planned_ways", one_way)
    drawn = []

    def counted(method, caption, seed):
        drawn.append((method.bundle.folder.name, method.schedule.to_string(), seed))
        return draw(method, caption, seed)

    monkeypatch.setattr("apps.draw_captions.draw", counted)
    words = ["--only", "quantised only", "--captions", str(TIMED + 2), "--keep", "kept"]
    assert call(*words, "--frontier-captions", str(TIMED + 1))[0] == 0
    untimed = [way for way in drawn if way[2] >= TIMED]
    assert len(untimed) == len(set(untimed))
    assert [seed for folder, _, seed in untimed if folder == "float32"] == [TIMED, TIMED + 1]


def test_pictures_that_follow_from_something_else_are_not_taken(home):
    bundle = open_bundle(home / "bundle")
    kept, table = KeptPictures(home / "kept"), reuse_table()
    picture = np.zeros((8, 8, 3), np.uint8)
    own = Method(bundle, None, 10, CacheSchedule.uniform(10, 3), table)
    kept.keep(own, "a cat", 5, picture)
    assert np.array_equal(kept.find(own, "a cat", 5), picture)
    assert kept.find(own, "a dog", 5) is None
    assert kept.find(own, "a cat", 6) is None
    for change in (
        {"table": table.without_corrections()},
        {"table": replace(table, skip_weight=0.5 * table.skip_weight)},
        {"table": replace(table, forecast_share=np.float32(0.5) * table.forecast_share)},
        {"schedule": CacheSchedule.uniform(10, 2)},
        {"shares": np.zeros(10, np.float32)},
        {"noise_scheduler": "dpmsolver++"},
        {"steps": 9},
    ):
        assert kept.find(replace(own, **change), "a cat", 5) is None
    planned_anew = replace(table, base_error=1.0, noise_influence=2 * table.noise_influence)
    assert kept.find(replace(own, table=planned_anew), "a cat", 5) is not None
    other = replace(bundle.manifest, noise_schedule=NoiseScheduleConfig(beta_start=0.001))
    assert kept.find(replace(own, bundle=replace(bundle, manifest=other)), "a cat", 5) is None
    write_bundle(home / "other", graphs_pte=b"other graphs")
    assert kept.find(replace(own, bundle=open_bundle(home / "other")), "a cat", 5) is None
    write_bundle(home / "same")
    assert kept.find(replace(own, bundle=open_bundle(home / "same")), "a cat", 5) is not None


@pytest.mark.parametrize(("whole", "code"), [(3, 0), (1, 130)])
def test_ctrl_c_compares_the_captions_that_were_drawn_in_every_way(
    evaluate, monkeypatch, whole, code
):
    call, _ = evaluate
    pictures = iter(range(2 * whole + 1))

    def until_ctrl_c(*given):
        if next(pictures, None) is None:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr("apps.draw_captions.draw", until_ctrl_c)
    words = ["--only", "ours", "--captions", "9", "--keep", "kept", "--json", "report.json"]
    assert call(*words)[0] == code
    # what was drawn of a caption that was not finished is kept too
    assert len(list(Path("kept").glob("*/*.png"))) == 2 * whole + 1
    if code == 0:
        report = json.loads(Path("report.json").read_text())
        assert report["conditions"]["captions"] == whole
        assert report["conditions"]["interrupted"]
        assert report["variants"][1]["ssim"] < 1
        assert not report["frontier"]


@pytest.mark.parametrize(("whole", "points"), [(2, 2), (1, 0)])
def test_ctrl_c_along_the_frontier_loses_nothing_of_the_table(evaluate, monkeypatch, whole, points):
    call, _ = evaluate
    monkeypatch.setattr("apps.evaluate._FRONTIER_SPEEDUPS", (2.0, 4.0))
    monkeypatch.setattr("apps.evaluate._planned_ways", one_way)
    pictures = iter(range(2 * 3 + 3 * whole + 1))

    def until_ctrl_c(*given):
        if next(pictures, None) is None:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr("apps.draw_captions.draw", until_ctrl_c)
    words = ["--only", "quantised only", "--captions", "3", "--frontier-captions", "3"]
    assert call(*words, "--json", "report.json")[0] == 0
    report = json.loads(Path("report.json").read_text())
    assert report["conditions"]["captions"] == 3
    assert report["conditions"]["frontier_captions"] == (whole if points else 0)
    assert report["conditions"]["interrupted"]
    assert len(report["frontier"]) == points


def one_way(ours, plan, _):
    return [Variant("ours", ours.plan(plan))]
