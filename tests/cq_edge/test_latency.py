import json
import re

import pytest

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import OutputExistsError, UsageError
from cq_edge.latency import DeviceProfile, GraphFigures

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


def test_a_step_that_is_full_several_times_runs_its_graph_so_often_for_each_branch():
    schedule = CacheSchedule.from_string("FDQS")
    assert profile().loop_ms(schedule, 1) == 10 * (1 + 2 + 4) + 3
    assert profile().loop_ms(schedule, 2) == 2 * profile().loop_ms(schedule, 1)


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


def test_all_that_was_measured_survives_the_file(tmp_path):
    figures = {graph: measured(p50_ms=taken) for graph, taken in TIMES.items()}
    saved = DeviceProfile("xnnpack", "ab", TIMES, 0.25, {"noise": "quiet"}, figures)
    saved.save(tmp_path / "device.json")
    loaded = DeviceProfile.load(tmp_path / "device.json")
    assert loaded == saved
    assert loaded.graphs_ms == TIMES
    assert loaded.figures["decode"].load_ms == {"cold": 20.0, "warm": 10.0}


def test_a_noisy_profile_says_why():
    assert profile().noise is None
    noisy = DeviceProfile("xnnpack", "ab", TIMES, 0.0, {"noise": "another process"})
    assert noisy.noise == "another process"


def measured(**changes):
    figures = {"p10_ms": 0.5, "p50_ms": 1.0, "p90_ms": 20.0, "p99_ms": 30.0, "runs": 9,
               "low_ms": 0.9, "high_ms": 15.0,
               "load_ms": {"cold": 20.0, "warm": 10.0}, "peak_memory_mib": 3.0}  # fmt: skip
    return GraphFigures(**{**figures, **changes})


def content(**changes):
    rows = {graph: {"p50_ms": ms} for graph, ms in TIMES.items()}
    rows["encode"].update(changes.pop("encode", {}))
    rows["decode"] = changes.pop("decode_row", rows["decode"])
    return {"engine": "xnnpack", "graphs_sha256": "ab", "graphs": rows, **changes}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the file must be an object"),
        ({"engine": "x"}, "graphs_sha256 is missing"),
        (content(engine=""), "engine must be a text that is not empty"),
        (
            {"engine": "x", "graphs_sha256": "a", "graphs": {"encode": {"p50_ms": 1}}},
            "graphs.denoise is missing: measure encode, denoise, denoise_shallow, decode",
        ),
        (content(encode={"p50_ms": -1}),
         "graphs.encode.p50_ms is -1: it must be a finite number above 0"),
        (content(encode={"p50_ms": 0}),
         "graphs.encode.p50_ms is 0: it must be a finite number above 0"),
        (content(encode={"p50_ms": float("nan")}),
         "graphs.encode.p50_ms is nan: it must be a finite number above 0"),
        (content(encode={"p50_ms": 10**400}),
         f"graphs.encode.p50_ms is 1{'0' * 39}: it must be a finite number above 0"),
        (content(decode_row={}), "graphs.decode.p50_ms is missing"),
        (content(encode={"p50_ms": "3"}),
         "graphs.encode.p50_ms is '3': it must be a finite number above 0"),
        (content(encode={"p50_ms": True}),
         "graphs.encode.p50_ms is True: it must be a finite number above 0"),
        (content(encode={"p90_ms": float("inf")}),
         "graphs.encode.p90_ms is inf: it must be a finite number above 0"),
        (content(encode={"p90_ms": None}),
         "graphs.encode.p90_ms is null: leave it out, or measure it"),
        (content(encode={"p90_ms": 1.0}),
         "graphs.encode.p50_ms is 2, above p90_ms 1: quantiles must rise"),
        (content(encode={"low_ms": 3.0}),
         "graphs.encode.low_ms is 3, above p50_ms 2: the median must lie within"),
        (content(encode={"high_ms": -3.0}),
         "graphs.encode.high_ms is -3.0: it must be a finite number above 0"),
        (content(encode={"runs": 2.5}),
         "graphs.encode.runs is 2.5: it must be a whole number above 0"),
        (content(encode={"load_ms": {"cold": -3}}),
         "graphs.encode.load_ms.cold is -3: it must be a finite number above 0"),
        (content(encode={"load_ms": {"hot": 3}}),
         "graphs.encode.load_ms.hot is unknown: allowed are cold, warm"),
        (content(encode={"load_ms": 3}),
         "graphs.encode.load_ms must be an object with cold and warm"),
        (content(encode={"p95_ms": 3}),
         "graphs.encode.p95_ms is unknown: allowed are p50_ms, p10_ms, p90_ms, p99_ms, low_ms, "
         "high_ms, load_ms, peak_memory_mib, runs"),
        (content(phone="x"),
         "phone is unknown: allowed are engine, graphs_sha256, graphs, step_ms, conditions"),
        (content(step_ms=-2), "step_ms is -2: it must be a finite number of 0 or more"),
        (content(conditions={"threads": float("nan")}),
         "conditions.threads is nan: it must be a finite number"),
        (content(conditions={"threads": [1]}), "conditions.threads must be a text or a number"),
        (content(conditions=[]), "conditions must be an object"),
    ],
)  # fmt: skip
def test_says_which_field_of_a_file_is_wrong_and_what_is_allowed(tmp_path, given, message):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(given))
    with pytest.raises(UsageError) as caught:
        DeviceProfile.load(path)
    assert str(caught.value) == f"{path} is no device profile: {message}"


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "device.json"
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"^{re.escape(str(path))} cannot be read as a device"):
            DeviceProfile.load(path)


def test_refuses_the_profile_of_something_else():
    profile().require_graphs("xnnpack", "ab")
    with pytest.raises(UsageError, match="of engine 'xnnpack', but the bundle is for 'coreml'"):
        profile().require_graphs("coreml", "ab")
    with pytest.raises(UsageError, match="sha256 ab, but the bundle's have cd: measure"):
        profile().require_graphs("xnnpack", "cd")
