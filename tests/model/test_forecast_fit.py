import numpy as np
import pytest

from cq_edge.forecast import Forecast, expected_back
from cq_edge.model.forecast_fit import ForecastRun

T, R, PROMPTS = 9, 3, 2


@pytest.fixture(scope="module")
def runs():
    """(PROMPTS, T, 2, 5) of values that go on for a while."""
    rng = np.random.default_rng(0)
    values = np.cumsum(np.cumsum(rng.normal(size=(PROMPTS, T, 2, 5)), axis=1), axis=1) + 30
    return (values + rng.normal(scale=0.3, size=values.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def taken(runs):
    run = ForecastRun(T, R)
    for values in runs:
        for step in range(T):
            run.take(step, values[step])
    return run


def test_every_weight_is_the_least_squares_one(runs, taken):
    values = runs.astype(np.float64)
    weights = taken.weights()
    assert weights.shape == (T, R + 2, R + 1)
    for step, back, gap in np.ndindex(weights.shape):
        if not (0 < back <= step and 0 < gap < T - step):
            assert weights[step, back, gap] == 0
            continue
        change = (values[:, step] - values[:, step - back]).reshape(-1, 1)
        wanted = (values[:, step + gap] - values[:, step]).ravel()
        (expected,), *_ = np.linalg.lstsq(change, wanted, rcond=None)
        assert weights[step, back, gap] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_is_left_is_what_forecasts_from_even_steps_err_by(runs, taken):
    weights = taken.weights()
    left = taken.left(weights)
    for step, gap in np.ndindex(left.shape):
        if gap == 0 or step + gap >= T:
            assert left[step, gap] == 0
            continue
        errors = []
        for value in runs:
            forecast, back = Forecast(), expected_back(step, gap)
            for computed in sorted({step - back, step}):
                forecast = forecast.after(computed, value[computed])
            found = forecast.at(step + gap, weights)
            errors.append(np.square(found - value[step + gap]).mean())
        assert left[step, gap] == pytest.approx(sum(errors), rel=1e-4)


def test_what_does_not_change_is_taken_again():
    run = ForecastRun(4, 1)
    for step in range(4):
        run.take(step, np.ones(3))
    assert (run.weights() == 0).all()
