import pytest

from cq_edge.errors import DeviceError
from runtime.executor_runner import read_runner, runner_words

SAID = """\
I 00:00:00.001 executorch:executor_runner.cpp:400] Model loaded in 12.500000 ms.
I 00:00:00.002 executorch:executor_runner.cpp:600] Iteration 1 of 2: 9.750000 ms
I 00:00:00.003 executorch:executor_runner.cpp:600] Iteration 2 of 2: 8.250000 ms
I 00:00:00.003 executorch:executor_runner.cpp:620] Model executed successfully 2 time(s) in 18 ms.
OutputX 0: tensor(sizes=[1], [0.])
"""


def test_the_words_are_the_runners_flags():
    assert runner_words("g.pte", "encode", ["a.bin", "b.bin"], 3, None) == [
        "--model_path=g.pte",
        "--method_name=encode",
        "--inputs=a.bin,b.bin",
        "--num_executions=3",
    ]
    assert runner_words("g.pte", "encode", ["a.bin"], 3, 4)[-1] == "--cpu_threads=4"


def test_every_runs_time_is_read():
    told = read_runner(SAID, 2)
    assert told.taken_ms == (9.75, 8.25)
    assert told.load_ms == 12.5
    assert read_runner(SAID.replace("Model loaded", ""), 2).load_ms is None


@pytest.mark.parametrize("said", ["", SAID.replace("Iteration 2", "Step 2"), SAID + SAID])
def test_times_that_are_not_those_asked_for_are_refused(said):
    with pytest.raises(DeviceError, match=r"the times of \d of 2 runs: it must print"):
        read_runner(said, 2)


def test_a_time_of_zero_is_refused():
    with pytest.raises(DeviceError, match="a time that is not above 0"):
        read_runner(SAID.replace("9.75", "0.0"), 2)
