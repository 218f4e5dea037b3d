import json

import numpy as np
import pytest

from apps import plan as plan_module
from apps.cli import main
from cq_edge.cache_schedule import plan_full_steps
from cq_edge.latency import DeviceProfile
from cq_edge.noise_scheduler import NoiseScheduleConfig
from cq_edge.planner import best_at_speedup, best_within_ms, plan_frontier, with_better_end
from runtime.bundle import open_bundle
from tests.tiny_bundle import reuse_table

TIMES = {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 3.0, "decode": 5.0}


@pytest.fixture
def device(home):
    """A device profile of the bundle, in device.json."""
    digest = open_bundle(home / "bundle").manifest.files["graphs.pte"].sha256
    profile = DeviceProfile("xnnpack", digest, TIMES)
    profile.save(home / "device.json")
    return profile


@pytest.fixture
def plan(device, capsys):
    """Runs `cq-edge plan bundle …` with device.json; returns the exit code, stdout and stderr."""
    del device

    def call(*words):
        code = main(["plan", "bundle", "--device-profile", "device.json", *words])
        return code, *capsys.readouterr()

    return call


def test_json_says_the_plan_and_what_it_is_predicted_to_cost(plan, device):
    code, out, _ = plan("--speedup", "1.5", "--json")
    assert code == 0
    found = json.loads(out.splitlines()[-1])
    frontier = plan_frontier([reuse_table()], device, 2, NoiseScheduleConfig())
    first = best_at_speedup(frontier, 1.5)
    expected = with_better_end(first, 10 * 20 / 1.5, device, 2, NoiseScheduleConfig())
    assert expected.error < first.error
    assert expected.speedup >= 1.5
    assert found["modes"] == expected.schedule.to_string()
    assert found["plan"] == expected.schedule.counts
    for name in ("unguided", "repeated"):
        assert found[name] == getattr(expected.schedule, name)
    assert found["error"] == expected.error
    assert found["picture_ms"] == pytest.approx(expected.picture_ms, abs=0.01)
    assert found["speedup"] == pytest.approx(expected.speedup, abs=1e-4)
    times, errors = zip(*((p["picture_ms"], p["error"]) for p in found["frontier"]), strict=True)
    assert list(times) == sorted(times)
    assert list(errors) == sorted(errors, reverse=True)
    assert found["modes"] in [p["modes"] for p in found["frontier"]]
    assert expected.picture_ms > first.picture_ms  # there was time to spare


def test_the_end_of_the_best_plan_within_a_budget_gets_better(plan, device):
    frontier = plan_frontier([reuse_table()], device, 2, NoiseScheduleConfig())
    least, *_, most = (plan.picture_ms for plan in frontier)
    gains = []
    for budget_ms in np.linspace(least, most, 8).tolist():
        _, out, _ = plan("--budget-ms", str(budget_ms), "--json")
        found = json.loads(out)
        assert found["picture_ms"] <= budget_ms + 0.01
        gains.append(best_within_ms(frontier, budget_ms).error - found["error"])
    assert min(gains) >= 0
    assert max(gains) > 0


def test_the_papers_objective_is_a_named_choice(plan):
    _, ours, _ = plan("--full-steps", "4", "--json")
    _, papers, _ = plan("--full-steps", "4", "--objective", "feature_l1", "--json")
    expected = plan_full_steps(reuse_table().feature_l1, 4)
    assert json.loads(papers)["modes"] == expected.to_string()
    assert json.loads(ours)["modes"] != json.loads(papers)["modes"]
    _, out, _ = plan("--speedup", "1.5", "--objective", "feature_l1", "--json")
    found = json.loads(out)
    assert {key: found[key] for key in found["frontier"][0]} in found["frontier"]


def test_the_screen_shows_the_choice_and_how_to_use_it(plan):
    code, out, _ = plan("--full-steps", "4")
    assert code == 0
    (chosen,) = [line for line in out.splitlines() if line.endswith("<- chosen")]
    assert chosen.split()[3] == "4"
    words = out.splitlines()[-1].split()
    assert words[:5] == ["--scheduler", "ddim", "--steps", "10", "--plan"]
    assert words[5].count("F") == 4
    assert chosen.split()[6:8] == ["0", "0"]  # unguided, repeated
    assert main(["generate", "bundle", "a ring", *words]) == 0


def test_a_budget_below_the_fastest_plan_says_the_least(plan):
    code, out, err = plan("--budget-ms", "5")
    assert (code, out) == (2, "")
    assert err.startswith("cq-edge: error: no plan takes 5 ms or less on this device: the fastest")


def test_full_steps_that_cannot_be_planned_say_which_can(plan):
    code, _, err = plan("--full-steps", "1")
    assert code == 2
    assert "1 full steps of 10 are too few for what was calibrated: ask for " in err


def test_the_profile_of_other_graphs_is_refused_with_both_digests(home, plan):
    DeviceProfile("xnnpack", "0" * 64, TIMES).save(home / "other.json")
    code, _, err = plan("--full-steps", "4", "--device-profile", "other.json")
    assert code == 2
    digest = open_bundle(home / "bundle").manifest.files["graphs.pte"].sha256
    assert f"sha256 {'0' * 64}, but the bundle's have {digest}" in err


def test_without_a_profile_the_graphs_are_measured_here(home, capsys):
    arguments = ["plan", "bundle", "--full-steps", "4", "--save-profile", "here.json", "--json"]
    assert main(arguments) == 0
    measured = json.loads(capsys.readouterr().out)["graphs_ms"]
    assert DeviceProfile.load(home / "here.json").graphs_ms == measured
    assert main(arguments) == 1  # here.json exists


def test_the_frontier_on_the_screen_always_holds_the_choice(device):
    frontier = plan_frontier([reuse_table()], device, 2, NoiseScheduleConfig())
    for chosen in frontier:
        assert chosen in plan_module._shown(chosen, frontier)
