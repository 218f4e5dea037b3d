import os
import subprocess
import sys
import time

import pytest

from cq_edge.latency import QUIET
from runtime.noise import Noise, NoiseWatch, Watched, speed_conditions


@pytest.fixture
def busy_process():
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def watch_for(seconds):
    watch = NoiseWatch(threads=2)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        watch.tick()
    return watch.noise()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_a_process_that_loads_a_core_makes_the_machine_noisy(busy_process):
    assert busy_process.poll() is None
    noise = watch_for(1.5)
    # own work on two threads competes with it: it gets half of a core at the very least
    assert noise.other_cores > 0.4
    assert noise.verdict.startswith("noisy: other processes kept ")
    assert noise.as_conditions()["noise"] == noise.verdict


def test_a_quiet_machine_is_quiet():
    assert Noise(0.03, 0.001, 1.1).verdict == QUIET
    assert Noise(None, None, 1.1).as_conditions() == {"noise": "quiet", "work_spread": 1.1}


def test_every_reason_is_told():
    assert Noise(1.0, 0.05, 2.0).verdict == (
        "noisy: other processes kept 1.00 cores busy, the hypervisor took 5% of the time, the "
        "same work took up to 2.0 times its median time"
    )


def test_what_several_processes_saw_counts_by_how_long_they_looked():
    seen = [Watched(3.0, 0.3, 0.0, (1.0,) * 8), Watched(1.0, 0.5, 0.4, (1.0, 3.0))]
    found = Noise.of(seen)
    assert found.other_cores == pytest.approx(0.2)
    assert found.stolen_share == pytest.approx(0.1 / (os.cpu_count() or 1))
    assert found.work_spread == pytest.approx(1.2)
    assert Noise.of([*seen, Watched(1.0, None, 0.0, ())]).other_cores is None


def test_how_fast_the_processor_was_is_told_by_process():
    works = [(1.0, 1.1, 9.0), (), (1.2, 1.3, 1.2), (1.4,)]
    seen = [Watched(1.0, 0.0, 0.0, work_ms) for work_ms in works]
    assert speed_conditions(seen) == {"work_ms": 1.2, "work_drift": 1.2727}
    assert speed_conditions(seen[1:2]) == {}
