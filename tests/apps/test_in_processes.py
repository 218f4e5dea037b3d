"""Real processes, of functions of this module."""

import os
import signal
import sys
import time
from contextlib import closing
from itertools import count, islice
from multiprocessing import active_children
from subprocess import PIPE, Popen

import pytest

from apps.in_processes import in_processes
from cq_edge.errors import CQEdgeError, UsageError

_factor: int


def _begin(factor):
    global _factor
    _factor = factor


def _work(item):
    if item < 0:
        raise UsageError(f"{item} is negative")
    if item == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 100:
        time.sleep(600)
    time.sleep(0.2 if item == 0 else 0)  # the first is not the first to be done
    return item * _factor, os.getpid()


def test_results_come_in_order_from_other_processes():
    found = list(in_processes(_work, range(9), 2, _begin, 3))
    assert [value for value, _ in found] == [3 * i for i in range(9)]
    assert os.getpid() not in {process for _, process in found}
    assert not active_children()


def test_nothing_begins_for_no_items():
    assert list(in_processes(_work, (), 2, _begin, 3)) == []


def test_items_are_taken_as_they_are_needed():
    items = count()
    with closing(in_processes(_work, items, 2, _begin, 1)) as found:
        assert [value for value, _ in islice(found, 3)] == [0, 1, 2]
    assert next(items) <= 8  # two a process ahead


def test_what_the_work_raises_is_raised_here():
    with pytest.raises(UsageError, match="-1 is negative"):
        list(in_processes(_work, [1, -1], 2, _begin, 1))


def test_a_killed_process_is_an_error_and_leaves_none_waiting():
    with pytest.raises(CQEdgeError, match="one of 2 processes was killed"):
        list(in_processes(_work, [1, 13, 2], 2, _begin, 1))
    assert not active_children()


def test_closing_ends_what_is_at_work():
    began = time.monotonic()
    with closing(in_processes(_work, [1, 100, 100, 2], 1, _begin, 1)) as found:
        assert next(found)[0] == 1
    assert time.monotonic() - began < 60
    assert not active_children()


def test_a_process_that_cannot_begin_is_an_error():
    with pytest.raises(CQEdgeError, match="killed or could not begin"):
        list(in_processes(_work, [1, 2], 2, _begin))  # which needs a factor


def test_processes_end_when_the_one_that_waits_for_them_is_killed():
    script = "import tests.apps.test_in_processes as t; t.tell_and_wait()"
    with Popen([sys.executable, "-c", script], stdout=PIPE, text=True) as waiting:
        assert waiting.stdout.readline() == "it works\n"
        waiting.kill()
        waiting.communicate(timeout=60)  # until nobody is left who could write there


def tell_and_wait():
    for _ in in_processes(_work, [1, 100], 1, _begin, 1):
        print("it works", flush=True)
