"""The contenders' processes, seen from the benchmark: started, asked in turns, ended."""

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class ContenderFailedError(Exception):
    """A contender could not be prepared, loaded or run; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where contenders run.

    Attributes:
        task: The task's file.
        work: Holds their files and logs.
        threads: Of each.
        at_most_s: That one may take to prepare, to load or to run a loop.
    """

    task: Path
    work: Path
    threads: int
    at_most_s: float

    def start(self, action: str, name: str, files: str) -> subprocess.Popen[str]:
        """Starts a contender's process."""
        folder = self.work / files
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **dict.fromkeys(_POOLS, str(self.threads))}
        # a pool that waits must sleep, not spin: the others are measured meanwhile
        environment["OMP_WAIT_POLICY"] = "passive"
        module = [sys.executable, "-m", "benchmarks.rivals.worker"]
        with self.log(name).open("a") as log:
            return subprocess.Popen(
                [*module, action, name, str(self.task), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def log(self, name: str) -> Path:
        """Returns the file of what a contender prints."""
        return self.work / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"


def prepare(place: Place, name: str, files: str) -> None:
    """Lets a contender write its files.

    Raises:
        ContenderFailedError: It could not, or took too long.
    """
    process = place.start("prepare", name, files)
    try:
        out, _ = process.communicate(timeout=place.at_most_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ContenderFailedError(_too_slow(place)) from None
    if process.returncode != 0:
        raise ContenderFailedError(_failure(out, process, place, name))


class Worker:
    """A contender that has loaded and waits.

    Attributes:
        ready: What it answered then: `versions`, `modes`, `disk_bytes`.

    Raises:
        ContenderFailedError: It could not load.
    """

    def __init__(self, place: Place, name: str, files: str) -> None:
        self._place, self._name = place, name
        self._process = place.start("serve", name, files)
        self.ready = self._read()

    def run(self, picture: int, steps: int, latents: Path) -> dict[str, Any]:
        """Returns what a loop took: `steps_ms`, `modes`, `peak_mib`, `has_latents`.

        Args:
            picture: Its number.
            steps: How many of the loop to run.
            latents: The .npy file that the latents are written to.

        Raises:
            ContenderFailedError: It could not run, or ended.
        """
        stdin = self._process.stdin
        assert stdin is not None  # it is a pipe
        try:
            request = {"picture": picture, "steps": steps, "latents": str(latents)}
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._failed("") from None
        return self._read()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None  # it is a pipe
        if not select.select([stdout], [], [], self._place.at_most_s)[0]:
            self.end()
            raise ContenderFailedError(_too_slow(self._place))
        line = stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line or "failure" in answer:
            raise self._failed(line)
        return answer

    def _failed(self, answer: str) -> ContenderFailedError:
        self._process.wait()
        return ContenderFailedError(_failure(answer, self._process, self._place, self._name))


def _too_slow(place: Place) -> str:
    return f"took longer than {place.at_most_s:.0f} s"


def _failure(answer: str, process: "subprocess.Popen[str]", place: Place, name: str) -> str:
    """Returns what a process said of its failure, or how it ended with its last line printed; of
    paths in the work folder, the end."""
    if answer.strip():
        said: str = json.loads(answer.strip().splitlines()[-1])["failure"]
    else:
        lines = [x for x in place.log(name).read_text(errors="replace").splitlines() if x.strip()]
        last = f"; its last line: {lines[-1].strip()}" if lines else ""
        said = f"the process ended with exit code {process.returncode}{last}"
    return said.replace(f"{place.work}{os.sep}", "")
