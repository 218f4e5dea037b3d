import math

import numpy as np
import pytest

from cq_edge.errors import ParityError
from cq_edge.metrics import sqnr_db
from exporters.parity import check_parity

INPUTS = [{"x": np.linspace(1.0, 2.0, 50).reshape(5, 10)}, {"x": np.ones((5, 10))}]


def double(arrays):
    return {"y": 2 * arrays["x"], "z": arrays["x"]}


def off_by(share):
    return lambda arrays: {"y": 2 * arrays["x"] * (1 + share), "z": arrays["x"]}


def refusal(exported, inputs=INPUTS, floor_db=30.0):
    with pytest.raises(ParityError) as caught:
        check_parity("denoise", double, exported, inputs, floor_db)
    return str(caught.value)


def test_a_known_relative_error_is_reported_in_decibels():
    report = check_parity("denoise", double, off_by(0.01), INPUTS, 30.0)
    assert report.min_db_by_output == {"y": pytest.approx(40.0), "z": math.inf}
    assert report.min_db == report.min_db_by_output["y"]


def test_the_worst_output_counts_wherever_it_stands():
    swapped = lambda arrays: dict(reversed(double(arrays).items()))  # noqa: E731
    worse = lambda arrays: dict(reversed(off_by(0.01)(arrays).items()))  # noqa: E731
    report = check_parity("denoise", swapped, worse, INPUTS, 30.0)
    assert report.min_db == pytest.approx(40.0)


def test_an_error_below_the_floor_names_graph_output_ratio_and_floor():
    assert refusal(off_by(0.1)) == (
        "graph denoise computes something else than its float module: y agrees to 20.0 dB, and "
        "at least 30.0 dB are required"
    )


def test_what_would_help_is_part_of_the_error():
    with pytest.raises(ParityError, match=r"at least 30\.0 dB are required; take more bits$"):
        check_parity("denoise", double, off_by(0.1), INPUTS, 30.0, "take more bits")


def test_the_second_output_is_held_to_the_floor_too():
    exported = lambda a: {"y": 2 * a["x"], "z": -a["x"]}  # noqa: E731
    assert refusal(exported).startswith("graph denoise computes something else")


def test_nan_never_passes():
    exported = lambda a: {"y": np.full_like(a["x"], np.nan), "z": a["x"]}  # noqa: E731
    assert refusal(exported).startswith("graph denoise computes something else")


def test_wrong_shapes_names_and_no_inputs_are_told_apart():
    flat = lambda a: {"y": a["x"].ravel(), "z": a["x"]}  # noqa: E731
    assert refusal(flat) == ("graph denoise returns y of shape [50]: its reference's is [5, 10]")
    assert refusal(lambda a: {"y": a["x"]}) == "graph denoise returns y: its reference returns y, z"
    assert refusal(double, inputs=[]) == (
        "graph denoise was compared on no inputs: give at least one set"
    )


def test_equal_is_infinite_and_a_lost_signal_is_minus_infinite():
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    assert sqnr_db(ones, ones) == math.inf
    assert sqnr_db(zeros, ones) == -math.inf
