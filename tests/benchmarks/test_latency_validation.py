"""That the validation holds out what it says, and counts what is known of published models."""

import numpy as np
import pytest

from benchmarks.latency_data import Timings, known_operators, timed_devices
from benchmarks.latency_graphs import settings
from benchmarks.latency_machine import START, Point, errors_of, held_out, splits
from benchmarks.latency_published import Chip, Order, Row, fit, pair_orders
from benchmarks.latency_setting import Setting
from benchmarks.published_models import parameters, text_operators, unet_operators
from cq_edge.latency_model import device_names, terms_of
from cq_edge.operators import Operator, multiply_adds

ALL = settings()


@pytest.mark.parametrize("question", splits())
def test_nothing_that_is_held_out_is_fitted(question):
    for fold in splits()[question]:
        fitted = {s for s in ALL if fold.fits(s)}
        outside = {s for s in ALL if fold.holds_out(s)}
        assert fitted and outside and not fitted & outside


@pytest.mark.parametrize("question", ["other widths", "other latents"])
def test_every_unet_is_held_out_once(question):
    outside = [s for fold in splits()[question] for s in ALL if fold.holds_out(s)]
    assert sorted(s.name for s in outside) == sorted(
        s.name for s in ALL if s.graph.startswith("denoise")
    )
    assert len(outside) >= 24


def test_a_setting_is_found_again_from_its_name():
    of_bundle = Setting("decode", "bundle my-own", (), 16, "int8")
    for setting in (*ALL, of_bundle):
        assert Setting.from_name(setting.name) == setting
    assert of_bundle.is_of_bundle and not any(s.is_of_bundle for s in ALL)


@pytest.mark.parametrize("device", timed_devices())
def test_what_was_timed_is_kept_with_its_operators(device):
    timings = Timings.load(device)
    assert device in device_names()
    assert timings.turns_ms.keys() <= known_operators().keys()
    alone = errors_of(held_out(timings.points(), splits()["int8 from float32 alone"]))
    assert len(alone) >= 24
    assert np.median(alone) < 0.10 and alone.max() < 0.25


def _point(setting, rng):
    """A graph of one matrix product whose time follows the start's costs exactly."""
    rows, width = setting.latents**2, setting.widths[0]
    product = Operator("linear", setting.dtype, 1, rows, width, 16 * width, 0, 0, 4 * rows, count=3)
    add = Operator("elementwise", "float32", 1, 0, 0, 0, int(rng.integers(1e3, 1e6)), 0, 0)
    amounts = terms_of((product, add), (1, 16))
    return Point(setting, (product, add), sum(a * START[t] for t, a in amounts.items()), 0.01)


def test_held_out_points_of_a_machine_that_is_as_the_model_says_are_predicted():
    rng = np.random.default_rng(0)
    points = [_point(setting, rng) for setting in ALL]
    for folds in splits().values():
        for found in held_out(points, folds):
            assert found.error == pytest.approx(0, abs=0.02)
            assert found.is_in_range


def test_models_have_the_parameters_and_multiply_adds_that_are_known_of_them():
    sd15 = unet_operators("sd15", 64, 1, dtype="float16", weight_bits=16)
    assert parameters("sd15") == 859_520_964
    assert sum(o.count * o.weight_bytes for o in sd15) == 2 * 859_520_964
    attention = multiply_adds(o for o in sd15 if o.kind == "matmul")
    # 339 without attention's products (BK-SDM's paper), 402 with them
    assert (multiply_adds(sd15) - attention) / 1e9 == pytest.approx(339, abs=1)
    assert multiply_adds(sd15) / 1e9 == pytest.approx(402, abs=1)
    twice = unet_operators("sd15", 64, 2, dtype="float16", weight_bits=16)
    assert multiply_adds(twice) == pytest.approx(2 * multiply_adds(sd15), rel=1e-3)
    assert parameters("bk-sdm-tiny") / 1e6 == pytest.approx(323.4, abs=0.1)
    text = text_operators(dtype="int8", weight_bits=8)
    assert sum(o.count * o.weight_bytes for o in text) == pytest.approx(123e6, rel=0.01)


def _row(name, gmacs_per_s, ms):
    chip = Chip(name, name, "npu", gmacs_per_s, 100.0, "a test")
    product = Operator("linear", "int8", 1, 1000, 1000, 1000, 10**6, 10**6, 10**6)
    return Row(chip, "qnn", "int8", "UNet", (product,), ms, "a test", "median")


def test_a_faster_chip_that_was_never_fitted_is_predicted_faster():
    rows = [_row(f"phone {i}", 1000.0 * i, 3.0 / i + 0.1) for i in (1, 2, 4, 8)]
    assert fit(rows).ms(rows[0]) > fit(rows).ms(rows[-1])
    assert pair_orders(rows) == {("qnn npu", "UNet"): Order(6, 6, 6, 0)}
