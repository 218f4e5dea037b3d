import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from cq_edge.errors import UsageError
from cq_edge.latency_model import (
    MOVED,
    Device,
    MeasuredGraph,
    device_names,
    fit_costs,
    shipped_device,
    terms_of,
)
from cq_edge.operators import Operator

LINEAR = Operator("linear", "float32", 1, 100, 64, 20, 25600, 5120, 8000, count=2)
CALL = Operator("call", "float32", 1, 0, 0, 0, 400, 0, 0)
ADD = Operator("elementwise", "float32", 1, 0, 0, 0, 2000, 0, 1000)


def device(**changes):
    words = dict.fromkeys(("source", "date", "measured", "derived"), "a test")
    return replace(
        Device(
            name="Test phone",
            engine="xnnpack",
            compute_unit="cpu",
            **words,
            gmacs_per_s={"linear float32": 10.0},
            gb_per_s=dict.fromkeys(MOVED, 5.0),
            dispatch_us=2.0,
            dispatch_int8_us=3.0,
            row_int8_us=0.01,
            call_us=50.0,
            tile_rows=1,
            tile_columns=16,
            load_ms=1.5,
            load_gb_per_s=0.5,
            throttling_factor=1.25,
            error=0.05,
            rate_uncertainty=0.5,
        ),
        **changes,
    )


def test_a_prediction_is_the_sum_of_what_is_computed_moved_and_dispatched():
    computed = 2 * 100 * 64 * 32 / 10e9  # 20 columns are two tiles of 16
    moved = (2 * (25600 + 8000) + 3000 + 400 + 2 * 5120) / 5e9
    expected = (computed + moved + 3 * 2e-6 + 50e-6) * 1e3
    found = device().predict((CALL, LINEAR, ADD))
    assert found.ms == pytest.approx(expected, rel=1e-12)
    assert found.load_ms == pytest.approx(1.5 + 2 * 5120 / 0.5e9 * 1e3)
    hot = device().predict((CALL, LINEAR, ADD), sustained=True)
    assert hot.ms == pytest.approx(1.25 * expected, rel=1e-12)


def test_quantised_operators_are_dispatched_at_their_own_cost():
    quantise = replace(ADD, kind="quantise")
    terms = terms_of((LINEAR, quantise, replace(LINEAR, dtype="int8")))
    assert (terms["dispatch"], terms["dispatch int8"]) == (2, 3)
    assert terms["rows int8"] == 2 * 100


def test_terms_scale_with_counts():
    once = terms_of((replace(LINEAR, count=1),))
    assert terms_of((LINEAR,)) == {term: 2 * amount for term, amount in once.items()}


def test_costs_are_found_again_where_the_measurements_pin_them():
    rng = np.random.default_rng(0)
    true = {"linear float32": 20.0, "elementwise": 300.0, "dispatch": 0.002}
    graphs = [
        {"linear float32": a, "elementwise": b, "dispatch": c}
        for a, b, c in zip(rng.uniform(0, 1, 30), rng.uniform(0, 0.1, 30),
                           rng.uniform(10, 1e4, 30), strict=True)
    ]  # fmt: skip
    measured = [(g, sum(g[t] * true[t] for t in true)) for g in graphs]
    start = {"linear float32": 10.0, "elementwise": 100.0, "dispatch": 0.01}
    found = fit_costs(measured, start, looseness=1e6)
    assert found == pytest.approx(true, rel=1e-4)


def test_what_no_measurement_pins_keeps_its_proportion():
    start = {"linear float32": 10.0, "linear int8": 2.5}
    found = fit_costs([({"linear float32": 3.0}, 60.0)], start, looseness=1.0)
    assert found == pytest.approx({"linear float32": 20.0, "linear int8": 5.0})


def test_a_narrow_product_follows_the_float32_product_of_its_kind():
    start = {"linear float32": 10.0, "linear int8": 2.5, "convolution float32": 10.0}
    measured = [({"linear float32": 3.0}, 60.0), ({"convolution float32": 3.0}, 15.0)]
    found = fit_costs(measured * 100, start, looseness=10.0)
    assert found["linear float32"] == pytest.approx(20.0, rel=1e-3)
    assert found["linear int8"] == pytest.approx(found["linear float32"] / 4, rel=1e-6)


def test_no_cost_is_negative_or_zero_whatever_was_measured():
    start = {"linear float32": 1.0, "elementwise": 1.0}
    measured = [({"linear float32": 1.0, "elementwise": x}, 5.0 - x) for x in (1.0, 2.0, 3.0)]
    assert all(cost > 0 for cost in fit_costs(measured, start, looseness=100.0).values())


def test_the_range_is_narrow_near_measured_graphs_and_wide_away_from_them():
    shares = {"linear float32": 0.5, "linear": 0.3, "weights": 0.1, "dispatch": 0.1}
    near = device(measured_graphs=(MeasuredGraph("a", 1.0, shares),) * 50)
    far = near.predict((ADD,))
    close = near.predict((LINEAR,))
    assert close.distance < 0.5 < far.distance
    assert far.distance > 0.95
    assert close.high_ms / close.ms < far.high_ms / far.ms
    assert close.ms / close.low_ms == pytest.approx(close.high_ms / close.ms)
    none = device().predict((LINEAR,))
    assert none.distance == pytest.approx(1.0)


def test_the_range_holds_what_it_says_of_graphs_with_such_errors():
    known = device(measured_graphs=(MeasuredGraph("a", 1.0, {"elementwise": 1.0}),) * 10_000)
    found = known.predict((replace(ADD, read_bytes=10**9),))
    errors = np.exp(np.random.default_rng(0).normal(0, known.error, 20_000))
    inside = (found.low_ms < found.ms * errors) & (found.ms * errors < found.high_ms)
    assert inside.mean() == pytest.approx(0.9, abs=0.01)


def test_a_data_type_without_a_rate_is_refused_with_those_there_are():
    with pytest.raises(UsageError) as refused:
        device().predict((replace(LINEAR, dtype="int4"),))
    assert str(refused.value) == "Test phone has no rate for linear int4: it has linear float32"


def test_a_device_never_measured_hot_says_so():
    with pytest.raises(UsageError, match="it was not measured hot"):
        device(throttling_factor=None).predict((LINEAR,), sustained=True)
    assert device(load_ms=None).predict((LINEAR,)).load_ms is None


def test_a_graph_of_nothing_is_refused():
    with pytest.raises(UsageError, match="no operators"):
        device().predict(())


def _refusal(tmp_path, change):
    content = asdict(device(measured_graphs=(MeasuredGraph("a", 1.0, {"dispatch": 1.0}),)))
    change(content)
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as refused:
        Device.load(path)
    return str(refused.value)


def _set(key, value):
    def change(content):
        *path, last = key.split(".")
        for part in path:
            content = content[part]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("dispatch_us", -1.0), "dispatch_us is -1.0: it must be finite and above 0"),
        (_set("error", 0.0), "error is 0.0: it must be finite and above 0"),
        (_set("tile_rows", 0), "tile_rows is 0: it must be finite and above 0"),
        (_set("tile_rows", 10**400),
         f"tile_rows is 1{'0' * 39}: it must be finite and above 0"),
        (_set("tile_rows", 1.5), "tile_rows is a number (1.5): it must be a whole number"),
        (_set("load_ms", -3.0), "load_ms is -3.0: it must be finite and above 0"),
        (_set("load_ms", "1"), "load_ms is a string ('1'): it must be null or a number"),
        (_set("throttling_factor", 0.9),
         "throttling_factor is 0.9: it must be finite and 1 or more"),
        (_set("gb_per_s.softmax", 0.0),
         "gb_per_s.softmax is 0.0: it must be finite and above 0"),
        (lambda c: c["gb_per_s"].pop("weights"),
         "gb_per_s.weights is missing: it must be finite and above 0"),
        (_set("gmacs_per_s.linear int8", -2.0),
         "gmacs_per_s.linear int8 is -2.0: it must be finite and above 0"),
        (lambda c: c.pop("rate_uncertainty"), "key rate_uncertainty is missing"),
        (_set("colour", "red"), "key colour is unknown: known here are name, engine, "),
        (_set("gb_per_s.colour", 1.0), "gb_per_s has 'colour': it may have convolution, "),
        (_set("dispatch_us", math.nan), "NaN is not JSON; numbers must be finite"),
        (_set("dispatch_us", math.inf), "Infinity is not JSON; numbers must be finite"),
        (_set("name", 3), "name is a whole number (3): it must be a string"),
        (lambda c: c["measured_graphs"][0].update(p50_ms=0.0),
         "measured_graphs[0]: p50_ms is 0.0: it must be finite and above 0"),
        (lambda c: c["measured_graphs"][0].update(shares={"dispatch": -0.5}),
         "measured_graphs[0]: shares.dispatch is -0.5: it must be finite and 0 or more"),
    ],
)  # fmt: skip
def test_a_wrong_device_file_is_refused_by_field(tmp_path, change, message):
    assert message in _refusal(tmp_path, change)


def test_a_whole_number_counts_as_a_number(tmp_path):
    path = tmp_path / "phone.json"
    path.write_text(json.dumps({**asdict(device()), "load_ms": 2, "dispatch_us": 3}))
    assert (Device.load(path).load_ms, Device.load(path).dispatch_us) == (2.0, 3.0)


def test_a_file_that_is_no_device_is_refused(tmp_path):
    (tmp_path / "phone.json").write_text("{")
    with pytest.raises(UsageError, match=r"device phone\.json: .* is not JSON"):
        Device.load(tmp_path / "phone.json")
    with pytest.raises(UsageError, match="cannot be read as a device"):
        Device.load(tmp_path / "none.json")


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_device_loads_and_says_where_it_is_from(name):
    found = shipped_device(name)
    assert found.source and found.date and found.measured and found.derived
    assert found.measured_graphs


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match=r"no device 'fridge' ships: choose one of "):
        shipped_device("fridge")


def test_shares_say_what_kinds_of_operators_take_the_time():
    found = device().predict((LINEAR, ADD))
    assert sum(found.shares.values()) == pytest.approx(1)
    assert list(found.shares.values()) == sorted(found.shares.values(), reverse=True)
    added = terms_of((ADD,))["elementwise"] * device().costs["elementwise"]
    assert found.shares["elementwise"] == pytest.approx(added / found.ms)
