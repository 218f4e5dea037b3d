"""Lets the contenders take turns, loop by loop, and keeps what came of each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.rivals.contenders import make
from benchmarks.rivals.processes import ContenderFailedError, Place, Worker, prepare
from benchmarks.rivals.task import FloatArray


@dataclass(slots=True)
class Result:
    """What came of a contender; lists have an entry a round.

    Attributes:
        name: In `CONTENDERS`.
        failure: Why it has no figures; None if it has.
        ready: What its worker answered when it had loaded.
        steps_ms: Of each loop, the time of each step.
        modes: Of the last loop, what each step ran.
        peak_mib: The most memory its process held.
        latents: The last of each loop; empty where a contender does not give them.
    """

    name: str
    failure: str | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    steps_ms: list[list[float]] = field(default_factory=list)
    modes: str = ""
    peak_mib: float = 0.0
    latents: list[FloatArray] = field(default_factory=list)

    @property
    def loops_ms(self) -> list[float]:
        """The time of each loop."""
        return [sum(steps) for steps in self.steps_ms]

    def step_ms(self, mode: str) -> list[float]:
        """Returns the times of the steps of a mode in all loops."""
        return [
            taken
            for steps in self.steps_ms
            for taken, ran in zip(steps, self.modes, strict=True)
            if ran == mode
        ]


def prepare_all(place: Place, names: Sequence[str]) -> list[Result]:
    """Returns the contenders, those that could not be prepared with the reason.

    Those that share files are prepared once; if that fails, all fail. What an earlier call
    prepared in the same place, or failed to, is not prepared again.
    """
    done = place.work / "prepared.json"
    failures: dict[str, str | None] = {}
    if done.exists():
        failures = json.loads(done.read_text(encoding="utf-8"))
    for name in tqdm(names, desc="prepare"):
        files = make(name).files
        if files not in failures:
            failures[files] = _try_to_prepare(place, name, files)
            done.write_text(json.dumps(failures, indent=2), encoding="utf-8")
    return [Result(name, failures[make(name).files]) for name in names]


def take_turns(
    place: Place, results: Sequence[Result], rounds: int, steps: int, *, keep: bool
) -> None:
    """Runs the loop of picture i in round i for every contender, in an order that rotates.

    Args:
        place: Where.
        results: Filled. A contender that fails has no further turn.
        rounds: 1 or more.
        steps: How many of a loop run.
        keep: Whether all stay loaded, each warmed up by a loop, or, for lack of memory, each is
            loaded anew for its turn, and warmed up by a step.
    """
    workers: dict[str, Worker] = {}
    try:
        if keep:
            for result in tqdm(results, desc="load"):
                _turn(place, result, workers, 0, steps, counts=False)
        for index in tqdm(range(rounds), desc="rounds"):
            start = index % len(results)
            for result in (*results[start:], *results[:start]):
                if not keep:
                    _turn(place, result, workers, index, 1, counts=False)
                _turn(place, result, workers, index, steps, counts=True)
                if not keep and result.name in workers:
                    workers.pop(result.name).end()
    finally:
        for worker in workers.values():
            worker.end()


def _turn(
    place: Place,
    result: Result,
    workers: dict[str, Worker],
    picture: int,
    steps: int,
    *,
    counts: bool,
) -> None:
    """Runs a loop, loading the contender if need be; the result says so if it fails."""
    if result.failure is not None:
        return
    latents = place.work / "latents.npy"
    try:
        if result.name not in workers:
            workers[result.name] = Worker(place, result.name, make(result.name).files)
        worker = workers[result.name]
        found = worker.run(picture, steps, latents)
    except ContenderFailedError as error:
        if result.name in workers:
            workers.pop(result.name).end()
        result.failure = str(error)
        return
    result.ready = worker.ready
    result.peak_mib = max(result.peak_mib, found["peak_mib"])
    if counts:
        result.steps_ms.append(found["steps_ms"])
        result.modes = found["modes"]
        result.latents += [np.load(latents)] if found["has_latents"] else []


def _try_to_prepare(place: Place, name: str, files: str) -> str | None:
    try:
        prepare(place, name, files)
    except ContenderFailedError as error:
        return str(error)
    return None
