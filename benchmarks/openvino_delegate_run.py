"""Runs files of the OpenVINO delegate in a process that may crash; prints JSON."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from cq_edge.checks import Check, load_checks
from cq_edge.metrics import sqnr_db
from runtime.executorch_engine import extension_library

Checks = Mapping[str, Sequence[Check]]


def main() -> None:
    """Judges one file, or times several in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("what", choices=("judge", "race"))
    add("files", nargs="+", type=Path, help="the last one holds the checks")
    add("--threads", type=int, default=1)
    add("--by-path", action="store_true", help="else from bytes that are kept")
    add("--loads", type=int, default=1)
    add("--rounds", type=int, default=1)
    args = parser.parse_args()
    *files, checks_file = args.files
    checks = load_checks(checks_file).graphs
    extension_library()._unsafe_reset_threadpool(args.threads)
    opened = [_programs(file, args.by_path) for file in files]
    if args.what == "judge":
        found: Any = {"db": _worst_db(opened[0], checks, args.loads)}
    else:
        found = {"ms": _times(opened, checks, args.rounds)}
    print(json.dumps(found))


def _programs(file: Path, by_path: bool) -> Callable[[], Any]:
    """Returns what opens a file's program anew."""
    library = extension_library()
    if by_path:
        check = library.Verification.InternalConsistency
        return lambda: library._load_program(str(file), program_verification=check)
    content = file.read_bytes()
    return lambda: library._load_program_from_buffer(content)


def _worst_db(opened: Callable[[], Any], checks: Checks, loads: int) -> dict[str, float]:
    worst: dict[str, float] = {}
    for _ in range(loads):
        for graph, sets in checks.items():
            method = opened().load_method(graph)
            for check in sets:
                predicted = method(_tensors(check))[0].numpy()
                db = sqnr_db(check.expected["noise_pred"], predicted)
                worst[graph] = min(db, worst.get(graph, db))
    return worst


def _times(
    opened: Sequence[Callable[[], Any]], checks: Checks, rounds: int
) -> list[dict[str, list[float]]]:
    """Returns of each file each graph's ms, round by round."""
    taken: list[dict[str, list[float]]] = [{} for _ in opened]
    for graph, sets in checks.items():
        methods = [each().load_method(graph) for each in opened]
        inputs = _tensors(sets[0])
        for _ in range(rounds):
            for method, times in zip(methods, taken, strict=True):
                method(inputs)  # the caches are the others'
                start = perf_counter()
                method(inputs)
                times.setdefault(graph, []).append((perf_counter() - start) * 1e3)
    return taken


def _tensors(check: Check) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in check.inputs.values()]


if __name__ == "__main__":
    main()
