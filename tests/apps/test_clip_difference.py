import numpy as np
import pytest
from scipy.stats import trim_mean

from apps.clip_difference import clip_difference
from cq_edge.metrics import mean_interval


def test_a_few_captions_that_tip_decide_the_mean_and_not_the_trimmed_one():
    deltas = np.concatenate([np.random.default_rng(0).normal(0, 0.3, 198), [-30.0, 12.0]])
    found = clip_difference(deltas)
    assert found["clip_delta"] == pytest.approx(deltas.mean())
    assert found["clip_delta_ci"] == mean_interval(deltas)
    assert found["clip_delta_trimmed"] == pytest.approx(trim_mean(deltas, 0.01))
    low, high = found["clip_delta_trimmed_ci"]
    assert low < found["clip_delta_trimmed"] < high
    least, most = found["clip_delta_ci"]
    assert high - low < (most - least) / 2


def test_of_fewer_than_a_hundred_captions_none_is_left_out():
    found = clip_difference(np.linspace(-1, 1, 99))
    assert found["clip_delta_trimmed"] is found["clip_delta_trimmed_ci"] is None
