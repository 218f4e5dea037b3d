from dataclasses import replace

import numpy as np
import pytest

from apps.draw_captions import TIMED_CAPTIONS as TIMED
from apps.draw_captions import draw_captions, picture_of
from apps.engines import engine_for
from apps.kept_pictures import KeptPictures
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import CQEdgeError
from runtime.draw import Drawn, Method
from tests.tiny_bundle import captions, reuse_table


@pytest.fixture
def methods(real_bundle):
    engine = engine_for(real_bundle, 1)
    return [
        Method(real_bundle, engine, 10, schedule, reuse_table())
        for schedule in (CacheSchedule.all_full(10), CacheSchedule.uniform(10, 3))
    ]


def test_processes_draw_the_same_pictures_in_order_and_keep_them(methods, tmp_path):
    told, kept = captions(TIMED + 3), KeptPictures(tmp_path / "kept")
    expected = list(draw_captions(methods, told, None, processes=1))
    assert all(isinstance(one, Drawn) for found in expected for one in found)
    found = list(draw_captions(methods, told, kept, processes=2))
    assert len(found) == len(told)
    for seed, (ways, same) in enumerate(zip(found, expected, strict=True)):
        # the first are timed: they are drawn here
        assert all(isinstance(one, Drawn) == (seed < TIMED) for one in ways)
        pictures = [*map(picture_of, ways)]
        for method, picture, one in zip(methods, pictures, same, strict=True):
            assert np.array_equal(picture, one.picture)
            assert np.array_equal(kept.find(method, told[seed], seed), picture)
    assert not np.array_equal(pictures[0], pictures[1])


def test_what_another_process_cannot_draw_is_an_error_here(methods, tmp_path, monkeypatch):
    monkeypatch.setattr("apps.draw_captions.TIMED_CAPTIONS", 0)  # none is drawn here
    gone = replace(methods[0], bundle=replace(methods[0].bundle, folder=tmp_path / "gone"))
    with pytest.raises(CQEdgeError, match="gone"):
        list(draw_captions([gone], captions(1), None, processes=2))
