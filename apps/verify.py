"""`cq-edge verify`: a bundle is held against what it was when it was built."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from apps.engines import ENGINES
from cq_edge.checks import CHECKS_FILE, Check, load_checks
from cq_edge.errors import BundleError, CQEdgeError
from cq_edge.metrics import sqnr_db
from runtime.bundle import Bundle, open_bundle
from runtime.coreml_reference_engine import CoreMLReferenceEngine
from runtime.engine import Engine

_LARGEST_DB = 999.0  # stands for infinity, which JSON lacks
# a graph must repeat what it computed when the bundle was built, as closely as another processor
# allows: int8 activations round differently where float32 sums were added in another order
_SAME_DB = {"xnnpack": 35.0, "coreml": 55.0}

_DESCRIPTION = """\
Checks a bundle without the model it was made of: the digest of every file; and for every graph
of every backend, on inputs that the bundle carries, that it computes what the float module did
(to the floor in the manifest) and what it did itself when the bundle was built. Core ML
programs are run by a reference interpreter that reads the packages on the disk."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """How one graph agrees, at the worst output of the worst inputs, in dB."""

    backend: str
    graph: str
    parity_db: float
    floor_db: float
    same_db: float
    same_floor_db: float

    @property
    def fault(self) -> str | None:
        """What is wrong, or None."""
        name = f"graph {self.graph} ({self.backend})"
        if not self.parity_db >= self.floor_db:
            return (
                f"{name} computes something else than its float module: it agrees to "
                f"{self.parity_db:.1f} dB, and at least {self.floor_db:.1f} dB are required"
            )
        if not self.same_db >= self.same_floor_db:
            return (
                f"{name} computes something else than when the bundle was built: it agrees to "
                f"{self.same_db:.1f} dB, and at least {self.same_floor_db:.1f} dB are required"
            )
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge verify`."""
    parser.description = _DESCRIPTION
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a bundle's folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Verifies the bundle and returns the exit code 0.

    Raises:
        BundleError: A file was changed, or a graph computes something else.
    """
    bundle = open_bundle(args.bundle)
    checks = load_checks(bundle.path(CHECKS_FILE))
    verdicts = [verdict for name in bundle.manifest.backends for verdict in _verdicts(
        bundle.for_backend(name), name, checks.graphs)]  # fmt: skip
    faults = [verdict.fault for verdict in verdicts if verdict.fault is not None]
    faults += _broken_seals(bundle, checks.seals)
    _report(args, verdicts, good=not faults)
    if faults:
        raise BundleError("; ".join(faults))
    return 0


def _verdicts(
    bundle: Bundle, backend: str, checks: Mapping[str, Sequence[Check]]
) -> Iterator[_Verdict]:
    engine = _engine(bundle, backend)
    for graph, entry in bundle.manifest.graphs.items():
        if not checks.get(graph):
            raise BundleError(f"{CHECKS_FILE} has no inputs for graph {graph}: build again")
        parity, same = [], []
        for number, check in enumerate(checks[graph]):
            if backend not in check.exported:
                raise BundleError(f"{CHECKS_FILE} has no outputs of {graph} on {backend}")
            found = _outputs(engine, graph, check)
            where = f"{CHECKS_FILE}, {graph} {number}"
            parity.append(_agreement_db(where, check.expected, found))
            same.append(_agreement_db(where, check.exported[backend], found))
        floors = entry.parity_floor_db, _SAME_DB[backend]
        yield _Verdict(backend, graph, min(parity), floors[0], min(same), floors[1])
        engine.unload(graph)


def _broken_seals(bundle: Bundle, seals: Mapping[str, str]) -> list[str]:
    """Returns which of the graphs' files are not those that were run, though they are what the
    manifest says: `open_bundle` has held every file against that."""
    graphs = [entry.file for name in bundle.manifest.backends
              for entry in bundle.for_backend(name).manifest.graphs.values()]  # fmt: skip
    belong = [
        file
        for file in bundle.manifest.files
        if any(file == graph or file.startswith(f"{graph}/") for graph in graphs)
    ]
    return [
        f"{file} is not the file that was run when the bundle was built"
        for file in belong
        if seals.get(file) != bundle.manifest.files[file].sha256
    ]


def _engine(bundle: Bundle, backend: str) -> Engine:
    """Returns what runs the graphs here: of Core ML always the interpreter, which rounds alike
    on every system."""
    return CoreMLReferenceEngine(bundle) if backend == "coreml" else ENGINES[backend](bundle, None)


def _outputs(engine: Engine, graph: str, check: Check) -> Mapping[str, NDArray[Any]]:
    try:
        return engine.run(graph, check.inputs)
    except CQEdgeError as error:
        raise BundleError(f"graph {graph} cannot be run on its check inputs: {error}") from error


def _agreement_db(
    where: str, expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]
) -> float:
    """Returns the least agreement over a graph's outputs, dB."""
    if expected.keys() != found.keys():
        raise BundleError(f"{where} is of {', '.join(expected)}; the graph has {', '.join(found)}")
    try:
        return min(sqnr_db(array, found[name]) for name, array in expected.items())
    except CQEdgeError as error:
        raise BundleError(f"{where} cannot be compared: {error}") from error


def _report(args: argparse.Namespace, verdicts: Sequence[_Verdict], *, good: bool) -> None:
    if args.json:
        graphs = [
            {
                "backend": one.backend,
                "graph": one.graph,
                "parity_db": round(min(one.parity_db, _LARGEST_DB), 2),
                "same_db": round(min(one.same_db, _LARGEST_DB), 2),
                "good": one.fault is None,
            }
            for one in verdicts
        ]
        print(json.dumps({"bundle": str(args.bundle), "good": good, "graphs": graphs}))
        return
    print("every file is what the manifest says")
    print(f"{'backend':9}{'graph':17}{'parity dB':>10}{'floor':>7}{'as built dB':>13}{'floor':>7}")
    for one in verdicts:
        same = "equal" if one.same_db > _LARGEST_DB else f"{one.same_db:.1f}"
        wrong = "" if one.fault is None else "  WRONG"
        print(
            f"{one.backend:9}{one.graph:17}{one.parity_db:10.1f}{one.floor_db:7.1f}"
            f"{same:>13}{one.same_floor_db:7.1f}{wrong}"
        )
