"""Times a bundle's graphs on a phone, with the runner that its user built for it."""

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from cq_edge.errors import DeviceError
from runtime.adb import Phone
from runtime.bundle import Bundle
from runtime.executor_runner import RunnerRuns, read_runner, runner_words
from runtime.measure import sample_inputs

_FOLDER = "/data/local/tmp"  # where adb's user may write and run programs
_RUNNER, _PID = "executor_runner", "pid"


@dataclass(frozen=True, slots=True)
class PhoneRunner:
    """The runner, the graphs and their inputs, copied to a folder of a phone.

    Attributes:
        phone: Where.
        folder: On it.
        bundle: Whose graphs they are.
        threads: Of the runner; None lets it choose.
        timeout_s: Longest time of one call.
    """

    phone: Phone
    folder: str
    bundle: Bundle
    threads: int | None
    timeout_s: float

    def run(self, graph: str, runs: int) -> RunnerRuns:
        """Runs a graph so many times in one process on the phone.

        Raises:
            DeviceError: The runner crashed, hangs, or tells no times; or the phone is gone.
        """
        # the runner's number is kept, so that one that hangs can be ended
        command = f"cd {self.folder} && echo $$ > {_PID} && exec {self._call(graph, runs)}"
        return read_runner(self._checked(graph, f"sh -c {shlex.quote(command)}"), runs)

    def peak_memory_mib(self, graph: str, runs: int) -> float:
        """Returns the largest resident memory of the runner's process; a pass of its own, since
        watching it slows the run.

        Args:
            graph: Its name.
            runs: In one process; together they must take longer than looks at it lie apart.

        Raises:
            DeviceError: As `run`.
        """
        # a process that has ended has no such line any more
        watch = "while grep VmHWM /proc/$p/status 2>/dev/null; do sleep 0.05; done"
        call = self._call(graph, runs)
        command = f"cd {self.folder} && {{ {call} & p=$!; echo $p > {_PID}; {watch}; wait $p; }}"
        said = self._checked(graph, f"sh -c {shlex.quote(command)}")
        peaks = [line.split()[1] for line in said.splitlines() if line.startswith("VmHWM:")]
        if not peaks:
            raise DeviceError(f"phone {self.phone.serial} does not tell a process's memory")
        return max(int(kib) for kib in peaks) / 1024

    def _call(self, graph: str, runs: int) -> str:
        entry = self.bundle.manifest.graph(graph)
        inputs = [_input_file(graph, index) for index in range(len(entry.inputs))]
        words = runner_words(Path(entry.file).name, entry.method, inputs, runs, self.threads)
        return shlex.join([f"./{_RUNNER}", *words])

    def _checked(self, graph: str, command: str) -> str:
        try:
            return self.phone.shell(command, self.timeout_s)
        except DeviceError as error:
            if "unknown command line flag 'method_name'" in str(error):
                raise DeviceError(
                    "the runner has no --method_name: build executor_runner from a later ExecuTorch"
                ) from error
            reason = str(error).removeprefix(f"phone {self.phone.serial}: ").split("` ", 1)[-1]
            raise DeviceError(
                f"phone {self.phone.serial}: the runner of graph {graph} {reason}"
            ) from error


@contextmanager
def runner_on_phone(
    phone: Phone, runner: Path, bundle: Bundle, threads: int | None, timeout_s: float
) -> Iterator[PhoneRunner]:
    """Copies what is needed to the phone; ends what still runs there and removes all of it.

    Raises:
        DeviceError: The runner is no file, or the phone is full or gone.
    """
    if not runner.is_file():
        raise DeviceError(f"--runner {runner} is no file: name executor_runner built for the phone")
    folder = f"{_FOLDER}/cq-edge-{uuid4().hex}"
    try:
        phone.shell(f"mkdir {folder}")
        phone.push(runner, f"{folder}/{_RUNNER}")
        phone.shell(f"chmod 755 {folder}/{_RUNNER}")
        for file in bundle.graph_files():
            phone.push(bundle.path(file), f"{folder}/{Path(file).name}")
        _push_inputs(phone, folder, bundle)
        yield PhoneRunner(phone, folder, bundle, threads, timeout_s)
    finally:
        pid = f"{folder}/{_PID}"
        phone.try_shell(f"if [ -f {pid} ]; then kill -9 $(cat {pid}); fi; true")
        phone.try_shell(f"rm -rf {folder}")


def phone_conditions(phone: Phone) -> dict[str, str | int | float]:
    """Returns what figures of this phone must say of it; lacks what it does not tell."""
    asked = {
        "maker": "getprop ro.product.manufacturer",
        "machine": "getprop ro.product.model",
        "processor": "getprop ro.soc.model",
        "abi": "getprop ro.product.cpu.abi",
        "system": "getprop ro.build.version.release",
        "governor": "cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    }
    told = {key: phone.try_shell(command) for key, command in asked.items()}
    return {"serial": phone.serial, **{key: text for key, text in told.items() if text}}


def thermal_status(phone: Phone) -> str:
    """Returns Android's thermal status, 0 (none) to 6 (shutdown), or that it is not told."""
    said = phone.try_shell("dumpsys thermalservice")
    lines = [line for line in said.splitlines() if line.strip().startswith("Thermal Status:")]
    return lines[0].split(":")[1].strip() if lines else "not told by the system"


def _push_inputs(phone: Phone, folder: str, bundle: Bundle) -> None:
    with tempfile.TemporaryDirectory() as here:
        for graph in bundle.graphs:
            for index, array in enumerate(sample_inputs(bundle, graph).values()):
                path = Path(here) / _input_file(graph, index)
                path.write_bytes(np.ascontiguousarray(array).tobytes())
                phone.push(path, f"{folder}/{path.name}")


def _input_file(graph: str, index: int) -> str:
    return f"{graph}-{index}.bin"
