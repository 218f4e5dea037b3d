"""ExecuTorch's own command-line runner: how it is called, and what it prints.

Its command line is the contract with whoever builds it for a phone:

    executor_runner --model_path=FILE --method_name=NAME --inputs=FILE,FILE,…
                    --num_executions=N [--cpu_threads=N]

`--inputs` names a file per input of the method, its bytes as they lie in memory. It says, on
stderr and among other things,

    Model loaded in 12.345678 ms.
    Iteration 3 of 10: 98.765432 ms

so it must be built with its log on (`-DEXECUTORCH_ENABLE_LOGGING=ON`) and going to stderr
(`-DEXECUTORCH_PAL_DEFAULT=posix`, the default; `android` would send it to logcat), and with the
XNNPACK backend and the kernels that the program uses.

Source: pytorch/executorch, examples/portable/executor_runner/executor_runner.cpp at commit
018a3a524425b33dcf8be85894ee5a1e83bc138c. `--method_name` came with pull request 17228 (2026-02);
runners that do not print each iteration's time are refused by what they print.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cq_edge.errors import DeviceError

_ITERATION = re.compile(r"Iteration (\d+) of (\d+): ([0-9.]+) ms")
_LOADED = re.compile(r"Model loaded in ([0-9.]+) ms")


@dataclass(frozen=True, slots=True)
class RunnerRuns:
    """What a call of the runner said: ms of each run in order, ms of loading."""

    taken_ms: tuple[float, ...]
    load_ms: float | None


def runner_words(
    model: str, method: str, inputs: Sequence[str], runs: int, threads: int | None
) -> list[str]:
    """Returns the arguments of the runner.

    Args:
        model: The .pte file.
        method: Which of its methods runs.
        inputs: A file per input, in the method's order.
        runs: 1 or more.
        threads: None lets the runner choose: the fast cores.
    """
    words = [
        f"--model_path={model}",
        f"--method_name={method}",
        f"--inputs={','.join(inputs)}",
        f"--num_executions={runs}",
    ]
    return words if threads is None else [*words, f"--cpu_threads={threads}"]


def read_runner(said: str, runs: int) -> RunnerRuns:
    """Returns the times in what the runner said.

    Args:
        said: Both streams.
        runs: That were asked for.

    Raises:
        DeviceError: They are not all there, or no times.
    """
    found = _ITERATION.findall(said)
    taken = tuple(float(ms) for _, _, ms in found if ms.count(".") <= 1)
    expected = [(str(number), str(runs)) for number in range(1, runs + 1)]
    if [(number, of) for number, of, _ in found] != expected or len(taken) != runs:
        raise DeviceError(
            f"the runner told the times of {len(found)} of {runs} runs: it must print "
            "`Iteration 1 of N: X ms` on stderr (build a recent executor_runner with "
            "-DEXECUTORCH_ENABLE_LOGGING=ON -DEXECUTORCH_PAL_DEFAULT=posix)"
        )
    if not all(math.isfinite(ms) and ms > 0 for ms in taken):
        raise DeviceError("the runner told a time that is not above 0")
    loaded = _LOADED.search(said)
    return RunnerRuns(taken, float(loaded.group(1)) if loaded else None)
