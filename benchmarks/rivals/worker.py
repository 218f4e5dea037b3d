"""The process of one contender: `prepare` ends when its files are written, `serve` runs loops.

`serve` reads a line of JSON a loop from stdin and answers each, as it did once after loading, with
a line of JSON on what was stdout when it started; what libraries print goes to stderr.
Between lines it sleeps. An answer with the key "failure" is the last.
"""

import argparse
import json
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.rivals.contenders import make
from benchmarks.rivals.task import Contender, Task
from cq_edge.errors import CQEdgeError
from runtime.peak_memory import peak_memory_mib


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["prepare", "serve"])
    parser.add_argument("contender")
    parser.add_argument("task", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    answers = _own_stdout()
    try:
        contender, task = make(args.contender), Task.read(args.task)
        if args.action == "prepare":
            contender.prepare(task, args.work)
        else:
            _serve(contender, task, args.work, answers)
    except Exception as error:  # whatever a library raises is the contender's result
        traceback.print_exc()
        _answer(answers, {"failure": reason(error)})
        sys.exit(1)


def reason(error: Exception) -> str:
    """Returns why a contender failed, in a sentence."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, CQEdgeError) else f"{type(error).__name__}: {text}"


def _serve(contender: Contender, task: Task, work: Path, answers: TextIO) -> None:
    contender.load(task, work)
    ready = {
        "versions": {name: _version(name) for name in contender.libraries},
        "modes": contender.modes(),
        "disk_bytes": contender.disk_bytes(),
    }
    _answer(answers, ready)
    for line in sys.stdin:
        request = json.loads(line)
        run = contender.run(request["picture"], request["steps"])
        if run.latents is not None:
            np.save(request["latents"], run.latents)
        found = {
            "steps_ms": run.steps_ms,
            "modes": run.modes,
            "peak_mib": peak_memory_mib() if run.peak_mib is None else run.peak_mib,
            "has_latents": run.latents is not None,
        }
        _answer(answers, found)


def _own_stdout() -> TextIO:
    """Returns the stdout of the start; from now on, what is printed goes to stderr."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of no known version"


if __name__ == "__main__":
    main()
