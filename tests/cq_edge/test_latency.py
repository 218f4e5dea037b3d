import json
import re

import pytest

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import OutputExistsError, UsageError
from cq_edge.latency import DeviceProfile

TIMES = {"encode": 2.0, "denoise": 10.0, "denoise_shallow": 3.0, "decode": 5.0}


def profile(**changes):
    return DeviceProfile("xnnpack", "ab", {**TIMES, **changes}, 0.0, {"runs": 5})


def test_a_loop_takes_what_its_graphs_take_once_per_branch():
    schedule = CacheSchedule.from_string("FSSFK")
    assert profile().loop_ms(schedule, 1) == 26
    assert profile().loop_ms(schedule, 2) == 52


def test_an_unguided_step_runs_its_graph_once_and_every_step_takes_its_arithmetic():
    schedule = CacheSchedule.from_string("FfsKs")
    assert profile().loop_ms(schedule, 2) == 2 * 10 + 10 + 3 + 3
    slower = DeviceProfile("xnnpack", "ab", TIMES, step_ms=0.5)
    assert slower.loop_ms(schedule, 2) == profile().loop_ms(schedule, 2) + 5 * 0.5


def test_a_picture_also_takes_its_prompts_and_the_decoding():
    assert profile().picture_ms(CacheSchedule.from_string("FS"), 2) == 2 * 13 + 2 * 2 + 5


def test_a_profile_survives_its_file(tmp_path):
    path = tmp_path / "device.json"
    profile().save(path)
    assert DeviceProfile.load(path) == profile()
    with pytest.raises(OutputExistsError):
        profile().save(path)


def test_figures_that_planning_does_not_need_are_passed_over(tmp_path):
    path = tmp_path / "device.json"
    rows = {graph: {"p10_ms": 0.1, "p50_ms": ms, "runs": 9} for graph, ms in TIMES.items()}
    path.write_text(json.dumps({"engine": "xnnpack", "graphs_sha256": "ab", "graphs": rows}))
    assert DeviceProfile.load(path).graphs_ms == TIMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a device profile: "),
        ("[]", "is no device profile: list indices"),
        ('{"engine": "x"}', "is no device profile: it lacks 'graphs_sha256'"),
        (
            '{"engine": "x", "graphs_sha256": "", "graphs": {"encode": {"p50_ms": 1}}}',
            ": a device profile has no time of graph denoise: measure all four",
        ),
        (
            '{"engine": "x", "graphs_sha256": "", "graphs": {"encode": {"p50_ms": -1}}}',
            ": a device profile's time of graph encode is -1.0 ms: it must be above 0 and finite",
        ),
        (
            json.dumps(
                {
                    "engine": "x",
                    "graphs_sha256": "",
                    "step_ms": -2,
                    "graphs": {graph: {"p50_ms": 1} for graph in TIMES},
                }
            ),
            ": a device profile's step_ms is -2.0: it must be 0 or more and finite",
        ),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, content, message):
    path = tmp_path / "device.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=f"^{re.escape(str(path))}.?{re.escape(message)}"):
        DeviceProfile.load(path)


def test_refuses_the_profile_of_something_else():
    profile().require_graphs("xnnpack", "ab")
    with pytest.raises(UsageError, match="of engine 'xnnpack', but the bundle is for 'coreml'"):
        profile().require_graphs("coreml", "ab")
    with pytest.raises(UsageError, match="sha256 ab, but the bundle's have cd: measure"):
        profile().require_graphs("xnnpack", "cd")
