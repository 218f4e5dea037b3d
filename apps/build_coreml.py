"""The Core ML half of `cq-edge build`: packages, run from the disk and compared."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from apps.quiet import quiet_toolchains
from cq_edge.errors import UsageError
from cq_edge.manifest import GraphEntry

if TYPE_CHECKING:
    from torch import nn

    from exporters.graph_spec import GraphSpec
    from exporters.parity import Graph, ParityReport
    from exporters.to_coreml import Place

TARGETS = ("ios18", "ios17")
WEIGHTS = (
    "mixed", "float16", "int8", "int4", "palette8", "palette6", "palette4", "palette3",
    "torchao-int8", "torchao-int4", "w8a8",
)  # fmt: skip
LAYOUTS = ("cq-edge", "apple", "executorch")
ATTENTIONS = ("original", "split-einsum", "split-einsum-v2")
COMPRESSION = 4.0  # of the UNet, unless told otherwise
# least parity in dB: float16 rounds everything a little; weights of eight bits or their equal in
# size round more; what is smaller than that is asked for by people who can look at pictures
FLOAT16_FLOOR_DB, _EIGHT_BIT_FLOOR_DB, _SMALLER_FLOOR_DB = 45.0, 28.0, 10.0
# of weights that torchao rounds before the conversion
_TORCHAO_BITS = {"torchao-int8": 8, "torchao-int4": 4, "w8a8": 8}
_SAMPLES = 4  # sets of inputs that formats are chosen on
_GIB = 1 << 30
# what the Neural Engine takes in one weight file
_LARGEST_BYTES = {"ios18": 2 * _GIB, "ios17": _GIB}

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class CoreMLOptions:
    """How packages are written.

    `weights` is one of `WEIGHTS`; `compression`, of mixed weights, is how many times smaller than
    float32 the UNet's are to be; `attention` is one of `ATTENTIONS`; `layout` one of `LAYOUTS`.
    """

    target: str
    weights: str
    compression: float
    attention: str = "original"
    layout: str = "cq-edge"

    @property
    def torchao_bits(self) -> int | None:
        """The bits of weights that torchao rounds, None where coremltools does."""
        return _TORCHAO_BITS.get(self.weights)

    @property
    def unet_floor_db(self) -> float:
        """The least agreement of the UNet's graphs, dB."""
        if self.weights == "float16":
            return FLOAT16_FLOOR_DB
        eight = self.weights in ("int8", "palette8", "palette6", "torchao-int8")
        if eight or (self.weights == "mixed" and self.compression <= COMPRESSION):
            return _EIGHT_BIT_FLOOR_DB
        return _SMALLER_FLOOR_DB

    @property
    def float32_stream(self) -> bool:
        """Whether the residual stream of the UNet's last up block is in float32: smaller weights
        err more by themselves."""
        return self.weights == "float16"

    @property
    def cure(self) -> str:
        """What helps UNet graphs that agree to less, empty where nothing does."""
        if self.weights == "mixed":
            return f"ask for less than --compression {self.compression:g}"
        if self.weights == "float16":
            return ""
        return (
            f"{self.weights} weights are too coarse for this UNet: take the default, "
            "--coreml-weights mixed, which keeps more bits where they count (--compression 6 or "
            "8 makes it smaller)"
        )


@dataclass(frozen=True, slots=True)
class CoreMLResult:
    """One graph: as a function of the interpreter's, where it lies and how it agrees."""

    spec: "GraphSpec"
    run: "Graph"
    place: "Place"
    parity: "ParityReport"

    def entry(self) -> GraphEntry:
        """Returns what the manifest says of it."""
        return GraphEntry(
            file=self.place.package,
            method=self.place.function,
            backend="coreml",
            inputs=self.spec.inputs,
            outputs=self.spec.outputs,
            parity_db=self.parity.min_db,
            parity_floor_db=self.parity.floor_db,
            delegated_macs_share=1.0,
            delegated_ops_share=1.0,
        )


@dataclass(frozen=True, slots=True)
class CoreMLBuild:
    """The graphs by name, and the bytes of the weights that the UNet's packages hold."""

    results: Mapping[str, CoreMLResult]
    unet_bytes: int

    def entries(self) -> dict[str, GraphEntry]:
        """Returns what the manifest says of each graph."""
        return {name: result.entry() for name, result in self.results.items()}

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """Returns a graph's outputs by name, as the interpreter computes them."""
        return self.results[graph].run(inputs)

    def summary(self, float32_bytes: int) -> dict[str, Any]:
        """Returns what `--json` prints; sizes are those of the weight files."""
        alone = self.results["denoise"].place.weight_bytes
        return {
            "graphs": {
                name: {
                    "file": result.place.package,
                    "function": result.place.function,
                    "bytes": result.place.weight_bytes,
                    "parity_db": round(min(result.parity.min_db, 999.0), 2),
                }
                for name, result in self.results.items()
            },
            "unet_compression": round(float32_bytes / self.unet_bytes, 4),
            "shared_overhead": round(self.unet_bytes / alone, 5),
        }

    def report(self) -> None:
        """Prints the packages' table for people."""
        print(f"{'graph':16} {'MB':>7} {'parity dB':>10} {'floor':>6}  package, function")
        for name, result in self.results.items():
            place, parity = result.place, result.parity
            print(
                f"{name:16} {place.weight_bytes / 1e6:7.2f} {parity.min_db:10.1f} "
                f"{parity.floor_db:6.0f}  {place.package}, {place.function}"
            )


def coreml_options(args: argparse.Namespace, compression: float | None) -> CoreMLOptions:
    """Returns the options that the arguments of `cq-edge build` ask for.

    Args:
        args: The arguments.
        compression: What they ask for, None for the default.

    Raises:
        UsageError: They contradict each other.
    """
    weights = "float16" if args.quantization == "none" else args.coreml_weights
    if compression is not None and weights != "mixed":
        raise UsageError(
            f"--compression is for --coreml-weights mixed: {weights} weights have one size only"
        )
    if args.coreml_target == "ios17" and weights in ("int4", "palette3", "torchao-int4"):
        raise UsageError(
            f"--coreml-weights {weights} needs --coreml-target ios18: iOS 17 cannot express it; "
            "there, take palette4 (two packages, Unet and UnetShallow)"
        )
    if args.layout == "executorch" and (args.coreml_target, args.attention) != (
        "ios18",
        "original",
    ):
        raise UsageError(
            "--layout executorch keeps both UNet graphs in one model, of weights that torchao "
            "rounds: it takes --coreml-target ios18 and --attention original only"
        )
    if weights in _TORCHAO_BITS and args.attention != "original":
        raise UsageError(
            f"--coreml-weights {weights} takes --attention original only: {args.attention} reads "
            "weights in another shape; int8 and int4 take both"
        )
    return CoreMLOptions(
        args.coreml_target,
        weights,
        COMPRESSION if compression is None else compression,
        args.attention,
        args.layout,
    )


def stored_unet(
    graphs: "Mapping[str, nn.Module]",
    inputs: Mapping[str, Sequence[Arrays]],
    options: CoreMLOptions,
) -> "dict[str, nn.Module]":
    """Returns both UNet graphs with the attention asked for, and with what is rounded before the
    conversion: torchao's weights, activations of eight bits. What was shared stays shared.

    Args:
        graphs: The float modules by name, the UNet's two among them.
        inputs: Their inputs at real steps.
        options: What is asked for.
    """
    from torch import from_numpy
    from torch.nn import ModuleList

    from cq_edge.model.split_einsum import with_attention
    from exporters.to_coreml import UNET_GRAPHS

    unet = with_attention(ModuleList(graphs[name] for name in UNET_GRAPHS), options.attention)
    bits = options.torchao_bits
    if options.weights == "w8a8":
        from cq_edge.model.eight_bit_activations import with_rounded_inputs

        given = [
            (graph, tuple(from_numpy(np.asarray(array)) for array in arrays.values()))
            for name, graph in zip(UNET_GRAPHS, unet, strict=True)
            for arrays in inputs[name]
        ]
        unet = with_rounded_inputs(unet, given)
    if bits is not None:
        from cq_edge.model.weight_only import with_weights_of

        unet = with_weights_of(unet, bits)
    return {name: module.eval() for name, module in zip(UNET_GRAPHS, unet, strict=True)}


def weight_compressor(
    full: "nn.Module", inputs: Sequence[Arrays], options: CoreMLOptions
) -> Callable[[Any], Any]:
    """Returns what maps a UNet graph's Core ML model to one with the weights asked for.

    Args:
        full: The float full module.
        inputs: Its inputs at real steps.
        options: Which weights.

    Raises:
        UsageError: The compression asked for cannot be had.
    """
    with quiet_toolchains():
        from exporters.coreml_weights import compress_weights

    if options.weights == "float16" or options.torchao_bits is not None:
        return lambda model: model
    choose = _chosen_formats(full, inputs, options)
    return lambda model: compress_weights(model, choose)


def export_packages(
    modules: "Mapping[str, nn.Module]",
    specs: "Mapping[str, GraphSpec]",
    compress: Callable[[Any], Any],
    options: CoreMLOptions,
    folder: Path,
) -> "dict[str, Place]":
    """Writes the packages and returns where each graph lies.

    Raises:
        ExportError: A graph cannot be converted.
    """
    from exporters.to_coreml import export_coreml

    with tqdm(total=1, desc="export", unit="stage") as progress:
        progress.set_postfix_str("converting to Core ML")
        places = export_coreml(
            modules,
            specs,
            folder,
            options.target,
            compress,
            float32_stream=options.float32_stream,
        )
        progress.update()
    return places


def check_packages(
    reference: "Mapping[str, nn.Module]",
    specs: "Mapping[str, GraphSpec]",
    places: "Mapping[str, Place]",
    inputs: Mapping[str, Sequence[Arrays]],
    options: CoreMLOptions,
    folder: Path,
) -> CoreMLBuild:
    """Runs every function from the disk against its float module and returns what came of each.

    Raises:
        ParityError: One computes something else than its float module.
    """
    from exporters.module_graph import module_graph
    from exporters.parity import check_parity
    from exporters.to_coreml import UNET_GRAPHS, weight_bytes
    from runtime.mil.interpreter import read_functions

    results = {}
    packages = {place.package for place in places.values()}
    functions = {package: read_functions(folder / package) for package in sorted(packages)}
    with tqdm(specs.items(), desc="check", unit="graph") as progress:
        for name, spec in progress:
            progress.set_postfix_str(f"{name} of Core ML against the float module")
            run = functions[places[name].package][places[name].function].run
            floor_db = options.unet_floor_db if name in UNET_GRAPHS else FLOAT16_FLOOR_DB
            expected = module_graph(reference[name], spec)
            cure = options.cure if name in UNET_GRAPHS else ""
            parity = check_parity(name, expected, run, inputs[name], floor_db, cure)
            results[name] = CoreMLResult(spec, run, places[name], parity)
    unet = {places[name].package for name in UNET_GRAPHS}
    return CoreMLBuild(results, sum(weight_bytes(folder / package) for package in unet))


def size_warning(weight_bytes: int, float32_bytes: int, options: CoreMLOptions) -> str | None:
    """Returns what is wrong with the UNet's weight file and what helps, or None.

    Args:
        weight_bytes: The file's size.
        float32_bytes: The parameters' size in float32.
        options: How the package was written.
    """
    largest = _LARGEST_BYTES[options.target]
    if weight_bytes <= largest:
        return None
    fitting = math.ceil(10 * float32_bytes / largest) / 10
    mixed = "" if options.weights == "mixed" else f"mixed weights, not {options.weights}, and "
    return (
        f"the Core ML UNet's weight file has {weight_bytes / _GIB:.2f} GiB: the Neural Engine "
        f"refuses more than {largest / _GIB:g} GiB on {options.target}; build with {mixed}"
        f"--compression {fitting:g}"
    )


def _chosen_formats(
    full: "nn.Module", inputs: Sequence[Arrays], options: CoreMLOptions
) -> "Callable[[NDArray[np.generic]], str]":
    """Returns a function that names each weight's format."""
    from exporters.coreml_mix import choose_formats
    from exporters.coreml_weights import weight_key

    if options.weights != "mixed":
        return lambda _weight: options.weights
    spread = np.linspace(0, len(inputs) - 1, min(_SAMPLES, len(inputs))).round().astype(int)
    with tqdm(desc="choose formats", unit="pass") as progress:
        chosen = choose_formats(
            full, [inputs[i] for i in spread], options.compression, options.target, progress.update
        )
    return lambda weight: chosen.get(weight_key(weight), "int8")
