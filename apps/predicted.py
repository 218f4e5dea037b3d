"""`--device`: a bundle's graphs on a device that nobody here holds."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from cq_edge.errors import BundleError, UsageError
from cq_edge.latency import DeviceProfile
from cq_edge.latency_model import Device, Prediction, device_names, shipped_device
from cq_edge.operators import OPERATORS_FILE, Operators, load_operators
from runtime.bundle import Bundle

_LARGEST = 4  # shares of a graph's time that are shown
DEVICE_HELP = "predict the times for this device instead of measuring; list shows those there are"


class DeviceAction(argparse.Action):
    """Takes a device's name; `list` prints the devices and ends the program, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Keeps the name, or lists."""
        del option_string
        if values == "list":
            for name in device_names():
                device = shipped_device(name)
                print(f"{name:24} {device.name}; {device.engine}, {device.compute_unit}")
            parser.exit()
        setattr(namespace, self.dest, values)


def predictions(bundle: Bundle, name: str) -> tuple[Device, Bundle, dict[str, Prediction]]:
    """Returns a device that ships, the bundle for its engine, and each graph's time there.

    Raises:
        UsageError: No such device ships, or its engine is none that the bundle is for.
        BundleError: The bundle lacks its graphs' operators.
    """
    device = shipped_device(name)
    if device.engine not in bundle.manifest.backends:
        raise UsageError(
            f"device {name} runs {device.engine} graphs, but the bundle is for "
            f"{' and '.join(bundle.manifest.backends)}: choose another device, or build for it"
        )
    bundle = bundle.for_backend(device.engine)
    operators = _operators(bundle, device.engine)
    return device, bundle, {graph: device.predict(found) for graph, found in operators.items()}


def predicted_profile(
    device: Device, bundle: Bundle, predicted: Mapping[str, Prediction]
) -> DeviceProfile:
    """Returns predictions as the device profile that plans are made of; it says that it is no
    measurement."""
    conditions: dict[str, str | int | float] = {"predicted for": device.name, "date": device.date}
    for graph, found in predicted.items():
        conditions |= {f"{graph}_low_ms": found.low_ms, f"{graph}_high_ms": found.high_ms}
    times = {graph: found.ms for graph, found in predicted.items()}
    return DeviceProfile(device.engine, bundle.graphs_sha256(), times, 0.0, conditions)


def report(device: Device, predicted: Mapping[str, Prediction]) -> str:
    """Returns a table of the predictions for people, and what they rest on."""
    lines = [
        f"predicted for {device.name} ({device.engine}, {device.compute_unit}), not measured:",
        f"{'graph':16} {'ms':>9} {'90 % of such graphs':>22} {'distance':>9} {'load, ms':>9}  "
        "most of it",
    ]
    lines += [
        f"{graph:16} {p.ms:9.1f} {f'{p.low_ms:.1f} to {p.high_ms:.1f}':>22} {p.distance:9.2f} "
        f"{'unknown' if p.load_ms is None else f'{p.load_ms:.0f}':>9}  {_most(p)}"
        for graph, p in predicted.items()
    ]
    lines += [
        "distance: 0 where the device's measured graphs pin the time, 1 where they say nothing",
        f"measured: {device.measured}; derived: {device.derived}",
    ]
    return "\n".join(lines)


def _most(predicted: Prediction) -> str:
    """Returns the kinds of operators that take the most of a graph's time."""
    largest = list(predicted.shares.items())[:_LARGEST]
    return ", ".join(f"{kind} {share:.0%}" for kind, share in largest)


def _operators(bundle: Bundle, backend: str) -> Mapping[str, Operators]:
    if OPERATORS_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.folder} has no {OPERATORS_FILE}, which predictions are made from: "
            "build it again"
        )
    found = load_operators(bundle.path(OPERATORS_FILE)).get(backend, {})
    missing = [graph for graph in bundle.manifest.graphs if graph not in found]
    if missing:
        raise BundleError(
            f"{OPERATORS_FILE} has no operators of {', '.join(missing)} on {backend}: "
            "build the bundle again"
        )
    return {graph: found[graph] for graph in bundle.manifest.graphs}
