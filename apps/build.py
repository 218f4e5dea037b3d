"""`cq-edge build`: a pipeline becomes a bundle."""

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from apps.build_apple import APPLE_FOLDER, write_apple_layout
from apps.build_coreml import (
    ATTENTIONS,
    LAYOUTS,
    TARGETS,
    WEIGHTS,
    CoreMLBuild,
    CoreMLOptions,
    check_packages,
    coreml_options,
    export_packages,
    size_warning,
    stored_unet,
    weight_compressor,
)
from apps.build_delegate import DELEGATE_FILE, write_delegate
from apps.build_operators import write_operators
from apps.engines import BACKENDS
from apps.model_options import add_model_arguments, load_model, model_conditions, model_name
from apps.prompts_file import read_prompts
from apps.quiet import quiet_toolchains
from apps.replacing import check_replaceable, written_beside
from apps.whole_number import at_least
from cq_edge import __version__
from cq_edge.checks import CHECKS_FILE, Check, Checks, save_checks
from cq_edge.errors import UsageError
from cq_edge.freed_memory import give_back
from cq_edge.manifest import (
    Defaults,
    GraphEntry,
    ImageSize,
    LatentShape,
    Manifest,
    ReuseTableEntry,
    TokenizerEntry,
    file_sha256,
    write_manifest,
)
from cq_edge.noise_scheduler import NAMES, NoiseScheduleConfig, make_noise_scheduler
from cq_edge.planner import FEWEST_TO_REUSE, too_few_to_reuse
from cq_edge.reuse_table import ReuseTable
from runtime.peak_memory import peak_memory_mib

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from cq_edge.model.capture import Calibration
    from cq_edge.model.optimize import OptimizeConfig, Optimized
    from exporters.graph_spec import GraphSpec
    from exporters.method_bytes import MethodBytes
    from exporters.operator_report import OperatorReport
    from exporters.parity import Arrays, ParityReport
    from exporters.to_executorch import OneGraphAtATime

GRAPHS_FILE = "graphs.pte"
# least parity in dB: float32 graphs differ by rounding alone, int8 ones by their quantisation,
# which at the last timesteps is as large as much of the little noise there is left to predict;
# miscompiled graphs have some 3 dB
_FLOORS_DB = {"none": 60.0, "int8": 10.0}
# where attribute accuracy is best (docs/demo_model.md), and Stable Diffusion's own
_DEMO_GUIDANCE, _USUAL_GUIDANCE = 3.5, 7.5
_DISTILLED_GUIDANCE = 8.5  # diffusers' own for latent consistency models
_UNET_GRAPHS = ("denoise", "denoise_shallow")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_USUAL_STEPS = {"lcm": 4}

_DESCRIPTION = """\
Builds a bundle from a Stable Diffusion pipeline: quantises its UNet, splits it into a full and
a shallow graph, measures on prompts what reusing features costs, exports everything as one
ExecuTorch program or as Core ML packages, and checks each exported graph against the float
module before anything is put in place."""

_EXAMPLES = """\
examples:
  cq-edge build -o demo                              the built-in demo model
  cq-edge build ./stable-diffusion-v1-5 -o sd15      a folder in diffusers layout
  cq-edge build model.safetensors --lora style.safetensors:0.8 -o styled
                                                     a single file, with a LoRA in it
  cq-edge build -o demo --steps 20 --scheduler ddim  calibrated for other defaults
  cq-edge build -o float --quantization none         float32, to compare with
  cq-edge build -o demo --backend executorch,coreml  for both toolchains"""


@dataclass(slots=True)
class _Stages:
    """The build's stages as they end: seconds each took, and the process's peak memory so far."""

    ended: float
    done: dict[str, dict[str, float]] = field(default_factory=dict)

    def end(self, name: str) -> None:
        """Takes down that everything since the last stage's end was this stage."""
        now = perf_counter()
        peak = round(peak_memory_mib(), 1)
        self.done[name] = {"seconds": round(now - self.ended, 1), "peak_memory_mib": peak}
        self.ended = now


@dataclass(frozen=True, slots=True)
class _GraphResult:
    """One exported graph: its shapes, what it takes, how it agrees, where its operators run."""

    spec: "GraphSpec"
    size: "MethodBytes"
    parity: "ParityReport"
    operators: "OperatorReport"

    def entry(self) -> GraphEntry:
        """Returns what the manifest says of it."""
        return GraphEntry(
            file=GRAPHS_FILE,
            method=self.spec.name,
            backend="xnnpack",
            inputs=self.spec.inputs,
            outputs=self.spec.outputs,
            parity_db=self.parity.min_db,
            parity_floor_db=self.parity.floor_db,
            delegated_macs_share=self.operators.delegated_macs_share,
            delegated_ops_share=self.operators.delegated_ops_share,
        )


class _Build(Protocol):
    """What one toolchain made of the graphs."""

    def entries(self) -> dict[str, GraphEntry]:
        """Returns what the manifest says of each graph."""
        ...

    def run(self, graph: str, inputs: Mapping[str, "NDArray[Any]"]) -> "Arrays":
        """Returns a graph's outputs by name."""
        ...

    def summary(self, float32_bytes: int) -> dict[str, Any]:
        """Returns what `--json` prints; `float32_bytes` are the UNet's parameters'.

        `unet_compression` is how much smaller than those the stored weights are;
        `shared_overhead` is what both UNet graphs take together over what the full one takes
        alone.
        """
        ...

    def report(self) -> None:
        """Prints the graphs' table for people."""
        ...


@dataclass(frozen=True, slots=True)
class _ExecuTorchBuild:
    """The graphs in `GRAPHS_FILE`, by name."""

    graphs: "OneGraphAtATime"
    results: Mapping[str, _GraphResult]

    def entries(self) -> dict[str, GraphEntry]:
        """Returns what the manifest says of each graph."""
        return {name: result.entry() for name, result in self.results.items()}

    def run(self, graph: str, inputs: Mapping[str, "NDArray[Any]"]) -> "Arrays":
        """Returns a graph's outputs by name."""
        return self.graphs.run(graph, inputs)

    def summary(self, float32_bytes: int) -> dict[str, Any]:
        """Returns what `--json` prints; sizes count programs too."""
        from exporters.method_bytes import together

        unet = together(self.results[name].size for name in _UNET_GRAPHS)
        return {
            "graphs": {
                name: {
                    "bytes": result.size.total_bytes,
                    "parity_db": round(min(result.parity.min_db, 999.0), 2),
                    "delegated_macs_share": round(result.operators.delegated_macs_share, 5),
                    "delegated_ops_share": round(result.operators.delegated_ops_share, 5),
                    "delegates": result.operators.delegates,
                    "outside": dict(result.operators.outside),
                }
                for name, result in self.results.items()
            },
            "unet_compression": round(float32_bytes / sum(unet.weights.values()), 4),
            "shared_overhead": round(
                unet.total_bytes / self.results["denoise"].size.total_bytes, 5
            ),
        }

    def report(self) -> None:
        """Prints the graphs' table for people."""
        print(f"{'graph':16} {'MB':>7} {'parity dB':>10} {'floor':>6} {'MACs in':>8} "
              f"{'ops in':>7}  outside the delegate")  # fmt: skip
        for name, result in self.results.items():
            ops = result.operators
            outside = ", ".join(f"{n} {op}" for op, n in ops.outside.items()) or "nothing"
            print(
                f"{name:16} {result.size.total_bytes / 1e6:7.2f} {result.parity.min_db:10.1f} "
                f"{result.parity.floor_db:6.0f} {ops.delegated_macs_share:8.2%} "
                f"{ops.delegated_ops_share:7.1%}  {outside}"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge build`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add_model_arguments(parser)
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the bundle's folder")
    add("--force", action="store_true", help="replace a bundle that exists")
    add("--scheduler", choices=NAMES, help="noise scheduler to calibrate for (default: pndm; lcm "
        "for models that come with it, ddim for unconditional ones)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="sampler steps (default: 50; 4 of lcm)")
    add("--also", action="append", default=[], metavar="NAME:N", help="calibrate for this noise "
        "scheduler with N steps too, such as dpmsolver++:20, so that plans can choose it; may be "
        "given more than once")  # fmt: skip
    add("--guidance-scale", type=float, metavar="X", help="(default: "
        f"{_DEMO_GUIDANCE:g} for the demo model, {_USUAL_GUIDANCE:g} for others; 1 of lcm, "
        f"{_DISTILLED_GUIDANCE:g} if it was distilled to follow any)")  # fmt: skip
    add("--full-steps", type=int, metavar="N", help="full steps of the bundle's default plan "
        f"(default: a third of the steps; of {FEWEST_TO_REUSE - 1} or fewer, all)")  # fmt: skip
    add("--max-gap", type=int, default=10, metavar="N", help="the furthest that a feature is "
        "reused, in steps (default: %(default)s)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="prompts to calibrate with, one a line "
        "(default: a shipped set of 8)")  # fmt: skip
    add("--calibration-prompts", type=at_least(1), metavar="N", help="calibrate with the first N "
        "prompts alone: time goes with prompts times steps, at 512×512 an hour a prompt or so "
        "(default: all)")  # fmt: skip
    add("--shallow-layers", type=int, default=1, metavar="N", help="layers of the last up block "
        "in the shallow graph (default: %(default)s)")  # fmt: skip
    add("--quantization", choices=tuple(_FLOORS_DB), default="int8", help="of the UNet (default: "
        "%(default)s)")  # fmt: skip
    add("--backend", type=_backends, default=("executorch",), metavar="NAMES", help="executorch, "
        "coreml, or both with a comma, the first choice first (default: executorch)")  # fmt: skip
    add("--coreml-target", choices=TARGETS, default=TARGETS[0], help="the oldest system that "
        "runs the packages; ios17 cannot keep both UNet graphs in one and gets two (default: "
        "%(default)s)")  # fmt: skip
    add("--coreml-weights", choices=WEIGHTS, default=WEIGHTS[0], help="of the Core ML UNet: one "
        "format for all, or mixed: what --compression asks for (default 4) at least error, "
        "measured (default: %(default)s)")  # fmt: skip
    add("--attention", choices=ATTENTIONS, default=ATTENTIONS[0], help="of the Core ML UNet: "
        "the two others suit the Neural Engine and compute the same "
        "(default: %(default)s)")  # fmt: skip
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="for other apps, beside the "
        "packages: apple is a folder for Apple's Swift StableDiffusionPipeline, which knows no "
        f"shallow graph; executorch is {DELEGATE_FILE}, for apps that link ExecuTorch with its "
        "Core ML delegate (default: %(default)s)")  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--compression", type=float, metavar="X", help="UNet weights at least X "
        "times smaller than float32, up to about 6: four bits in the layers where they cost "
        "least, linear ones first, since a convolution gets slower by it (default: eight bits "
        "everywhere, about 3.9)")  # fmt: skip
    size.add_argument("--target-bytes", type=int, metavar="N", help="the same, as the bytes that "
        "the UNet's weights may take")  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Builds the bundle and returns the exit code 0.

    Raises:
        CQEdgeError: It could not be built; nothing is left behind.
    """
    start = perf_counter()
    stages = _Stages(start)
    check_replaceable(args.output, force=args.force)
    if args.max_gap < 1:
        raise UsageError(f"--max-gap is {args.max_gap}: a shallow step needs 1 or more")
    if args.layout != "cq-edge" and "coreml" not in args.backend:
        raise UsageError(f"--layout {args.layout} is of Core ML: add --backend coreml")
    prompts = None if args.prompts is None else read_prompts(args.prompts)
    # the torch side takes seconds to import: only once the arguments are known to be good
    with quiet_toolchains():
        from cq_edge.model.optimize import OptimizeConfig, calibration_steps, parity_inputs
        from cq_edge.model.prompts import WORLD_PROMPTS, guidance_kind, scene_prompts
        from cq_edge.model.text import tokenizers
        from cq_edge.model.vocabulary import write_vocabulary

        pipeline = load_model(args, narrow=_keeps_narrow(args))
    stages.end("load")
    if prompts is None:
        prompts = tuple(scene_prompts(8)) if args.model is None else WORLD_PROMPTS
    prompts = _first(prompts, args.calibration_prompts)
    kind = guidance_kind(pipeline)
    name, steps = _sampler(args, pipeline, kind)
    scale = args.guidance_scale
    if scale is None:
        scale = _usual_guidance(args, kind, name)
    _check_fits(args, pipeline, kind, scale)
    schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    also = tuple(_other_steps(text) for text in args.also)
    totals = [
        len(make_noise_scheduler(each, count, schedule).timesteps)
        for each, count in ((name, steps), *also)
    ]
    total = totals[0]
    full_steps = _full_steps(args.full_steps, total, args.max_gap)
    few = too_few_to_reuse(total)
    if few is not None:
        print(f"cq-edge: note: {few}", file=sys.stderr)
    config = OptimizeConfig(
        prompts=prompts,
        noise_scheduler=name,
        steps=steps,
        guidance_scale=scale,
        max_gap=args.max_gap,
        shallow_layers=args.shallow_layers,
        quantization=args.quantization,
        compression=_asked_compression(args, pipeline),
        also=also,
    )
    packages = coreml_options(args, config.compression) if "coreml" in args.backend else None
    optimized = _optimize(pipeline, config, args.backend)
    stages.end("optimize")
    defaults = Defaults(name, steps, scale, full_steps)
    builds: dict[str, _Build] = {}
    with written_beside(args.output) as folder:
        specs = _specs(optimized, pipeline)
        exported = None
        if "executorch" in args.backend:
            # lowering holds several copies of the graphs: the float UNet makes room for them
            del pipeline
            optimized = optimized.released()
            exported = _export(optimized, specs, folder)
            optimized = optimized.exported()
            gc.collect()  # the toolchain's graphs refer to themselves
            give_back()
            with quiet_toolchains():
                pipeline = load_model(args, narrow=_keeps_narrow(args))
            optimized = optimized.compared_with(pipeline, config)
        stages.end("export")
        runs = calibration_steps(len(prompts), totals)
        with tqdm(total=runs, desc="calibrate", unit="step") as progress:
            step = progress.update
            calibrations = _calibrate(pipeline, config, optimized, specs, folder, step)
        stages.end("calibrate")
        give_back()
        inputs = parity_inputs(pipeline, config, calibrations[0])
        for backend in args.backend:
            if backend == "coreml" and packages is not None:
                builds[backend] = _coreml(pipeline, optimized, specs, inputs, packages, folder)
            elif exported is not None:
                builds[backend] = _check(
                    optimized, specs, exported, inputs, args.quantization, folder
                )
        _save_checks(optimized, builds, specs, inputs, folder)
        tables = [calibration.table for calibration in calibrations]
        for table in tables:
            table.save(folder / _table_file(table))
        for tokenizer, place in zip(tokenizers(pipeline), _TOKENIZERS, strict=False):
            write_vocabulary(tokenizer, folder / place)
        summaries = {
            backend: build.summary(_float32_bytes(pipeline)) for backend, build in builds.items()
        }
        bits = None if packages is None else 32 / summaries["coreml"]["unet_compression"]
        write_operators(folder, folder / GRAPHS_FILE, optimized, specs, bits)
        conditions = _conditions(args.quantization, summaries, packages)
        conditions |= model_conditions(args)
        manifest = _manifest(
            model_name(args), optimized, pipeline, builds, defaults, tables, conditions
        )
        write_manifest(folder, manifest)
    stages.end("check")
    summary = {
        **_summary(args.output, summaries, perf_counter() - start),
        "unet_float32_bytes": _float32_bytes(pipeline),
        "stages": stages.done,
    }
    _report(args, summary, builds)
    return 0


def _keeps_narrow(args: argparse.Namespace) -> bool:
    """Returns whether the float UNet is only run, and converted part by part."""
    sizes = (args.compression, args.target_bytes)
    plain = args.quantization == "int8" and sizes == (None, None)
    return plain and tuple(args.backend) == ("executorch",)


def _backends(text: str) -> tuple[str, ...]:
    """An argparse type: names of toolchains, each once, with commas."""
    names = tuple(text.split(","))
    if not names or len(set(names)) < len(names) or set(names) - set(BACKENDS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of executorch, coreml, executorch,coreml and coreml,executorch"
        )
    return names


def _other_steps(text: str) -> tuple[str, int]:
    """Returns the noise scheduler and the steps that a `--also` names."""
    name, _, steps = text.partition(":")
    if name not in NAMES or not steps.isdecimal():
        raise UsageError(
            f"--also {text!r} is no noise scheduler with steps, such as dpmsolver++:20; noise "
            f"schedulers are {', '.join(NAMES)}"
        )
    return name, int(steps)


def _first(prompts: tuple[str, ...], asked: int | None) -> tuple[str, ...]:
    """Returns the prompts that calibrate; refuses to find more than there are."""
    if asked is not None and asked > len(prompts):
        raise UsageError(
            f"--calibration-prompts is {asked}, and there are {len(prompts)} prompts: give more "
            "with --prompts FILE"
        )
    return prompts[:asked]


def _full_steps(asked: int | None, total: int, max_gap: int) -> int:
    """Returns how many steps the default plan runs in full; refuses what no plan can have."""
    fewest = -(-total // (max_gap + 1))
    chosen = asked
    if chosen is None:
        chosen = total if total < FEWEST_TO_REUSE else max(fewest, round(total / 3))
    if not fewest <= chosen <= total:
        raise UsageError(
            f"--full-steps is {chosen}: {total} steps with --max-gap {max_gap} take "
            f"{fewest} to {total}"
        )
    return chosen


def _asked_compression(args: argparse.Namespace, pipeline: "DiffusionPipeline") -> float | None:
    """Returns how many times smaller than float32 the UNet's weights are to be."""
    if args.target_bytes is None:
        asked: float | None = args.compression
        return asked
    if args.target_bytes < 1:
        raise UsageError(f"--target-bytes is {args.target_bytes}: it must be 1 or more")
    return _float32_bytes(pipeline) / float(args.target_bytes)


def _sampler(args: argparse.Namespace, pipeline: "DiffusionPipeline", kind: str) -> tuple[str, int]:
    """Returns the noise scheduler and the sampler steps that are asked for, or usual."""
    usual = "ddim" if kind == "none" else "pndm"
    if type(pipeline.scheduler).__name__ == "LCMScheduler":
        usual = "lcm"
    name = usual if args.scheduler is None else args.scheduler
    steps = _USUAL_STEPS.get(name, 50) if args.steps is None else args.steps
    return name, steps


def _usual_guidance(args: argparse.Namespace, kind: str, noise_scheduler: str) -> float:
    if kind == "embedded":
        return _DISTILLED_GUIDANCE
    if kind == "none" or noise_scheduler == "lcm":
        return 1.0
    return _DEMO_GUIDANCE if args.model is None else _USUAL_GUIDANCE


def _check_fits(
    args: argparse.Namespace, pipeline: "DiffusionPipeline", kind: str, scale: float
) -> None:
    """Refuses what the model has no use for."""
    from cq_edge.model.split import context_shapes

    if args.layout == "apple" and list(context_shapes(pipeline.unet)) != ["embeddings"]:
        raise UsageError(
            "--layout apple is for UNets that are told the prompt's embeddings alone: Stable "
            "Diffusion 1.x and 2.x"
        )
    if kind == "none" and scale != 1:
        raise UsageError(f"--guidance-scale is {scale:g}: the model takes no prompt to follow")
    if kind == "none" and args.prompts is not None:
        raise UsageError(f"--prompts {args.prompts}: the model takes no prompts")


def _latent_shape(pipeline: "DiffusionPipeline") -> LatentShape:
    from cq_edge.model.optimize import latents_shape

    return LatentShape(*latents_shape(pipeline))


def _image_size(pipeline: "DiffusionPipeline") -> ImageSize:
    from cq_edge.model.optimize import pixels_per_cell

    latents, scale = _latent_shape(pipeline), pixels_per_cell(pipeline)
    return ImageSize(latents.height * scale, latents.width * scale)


def _optimize(
    pipeline: "DiffusionPipeline", config: "OptimizeConfig", backends: Sequence[str]
) -> "Optimized":
    from cq_edge.model.optimize import float_graphs, optimize

    if "executorch" not in backends:
        return float_graphs(pipeline, config)
    if config.compression is None:
        return optimize(pipeline, config)
    with tqdm(desc="round layers to four bits, then try them", unit="layer") as progress:
        return optimize(pipeline, config, progress.update)


def _specs(optimized: "Optimized", pipeline: "DiffusionPipeline") -> "dict[str, GraphSpec]":
    from cq_edge.model.split import context_shapes
    from cq_edge.model.text import tokenizers
    from exporters.graph_spec import graph_specs

    latents, image = _latent_shape(pipeline), _image_size(pipeline)
    context = context_shapes(pipeline.unet)
    embeddings, pooled = (context.get(name, (None,))[-1] for name in ("embeddings", "pooled"))
    lengths = {tokenizer.model_max_length for tokenizer in tokenizers(pipeline)} or {77}
    return graph_specs(
        (latents.channels, latents.height, latents.width),
        (image.height, image.width),
        embedding_width=embeddings,
        feature_channels=optimized.feature_channels,
        consumed_channels=optimized.consumed_channels,
        token_count=max(lengths),
        pooled_width=pooled,
        takes_guidance="guidance_scale" in context,
    )


def _export(
    optimized: "Optimized", specs: "Mapping[str, GraphSpec]", folder: Path
) -> "Mapping[str, OperatorReport]":
    """Writes the graphs' file and returns where each graph's operators run.

    Raises:
        ExportError: A graph cannot be exported.
    """
    from exporters.to_executorch import example_inputs, export_executorch

    modules = {
        name: (module.eval(), example_inputs(specs[name]))
        for name, module in optimized.edge.items()
    }
    with tqdm(total=1, desc="export", unit="stage") as progress:
        progress.set_postfix_str("lowering to XNNPACK: the longest stage")
        report = export_executorch(modules, folder / GRAPHS_FILE)
        progress.update()
    return report.graphs


def _calibrate(
    pipeline: "DiffusionPipeline",
    config: "OptimizeConfig",
    optimized: "Optimized",
    specs: "Mapping[str, GraphSpec]",
    folder: Path,
    on_step: Callable[[], object],
) -> "tuple[Calibration, ...]":
    """Calibrates on the exported ExecuTorch graphs: what is measured is what ships. Without
    them, on the float modules: the reference interpreter would take hours."""
    from cq_edge.model.optimize import calibrate

    if not (folder / GRAPHS_FILE).exists():
        float_full, float_shallow = (optimized.reference[name] for name in _UNET_GRAPHS)
        return calibrate(pipeline, config, optimized, float_full, float_shallow, on_step)
    from exporters.to_executorch import load_graph, tensor_function

    full, shallow = (
        tensor_function(load_graph(folder / GRAPHS_FILE, specs[name]), specs[name])
        for name in _UNET_GRAPHS
    )
    return calibrate(pipeline, config, optimized, full, shallow, on_step)


def _check(
    optimized: "Optimized",
    specs: "Mapping[str, GraphSpec]",
    exported: "Mapping[str, OperatorReport]",
    inputs: "Mapping[str, list[dict[str, NDArray[Any]]]]",
    quantization: str,
    folder: Path,
) -> _ExecuTorchBuild:
    """Runs every exported graph against its float module and returns what came of each.

    Raises:
        ParityError: An exported graph computes something else than its float module.
    """
    from exporters.method_bytes import method_bytes
    from exporters.module_graph import module_graph
    from exporters.parity import check_parity
    from exporters.to_executorch import OneGraphAtATime

    path, results = folder / GRAPHS_FILE, {}
    graphs = OneGraphAtATime(path, specs)
    sizes = method_bytes(path)
    with tqdm(specs.items(), desc="check", unit="graph") as progress:
        for name, spec in progress:
            progress.set_postfix_str(f"{name} against the float module")
            parity = check_parity(
                name,
                module_graph(optimized.reference[name], spec),
                partial(graphs.run, name),
                inputs[name],
                _FLOORS_DB[quantization if name in _UNET_GRAPHS else "none"],
            )
            results[name] = _GraphResult(spec, sizes[name], parity, exported[name])
    return _ExecuTorchBuild(graphs, results)


def _coreml(
    pipeline: "DiffusionPipeline",
    optimized: "Optimized",
    specs: "Mapping[str, GraphSpec]",
    inputs: "Mapping[str, list[dict[str, NDArray[Any]]]]",
    options: CoreMLOptions,
    folder: Path,
) -> CoreMLBuild:
    """Writes the Core ML packages, checks them, and returns what came of each graph."""
    from cq_edge.model.text import text_graph
    from cq_edge.model.vocabulary import write_vocabulary

    modules, text = dict(optimized.reference), text_graph(pipeline)
    if text is not None:
        modules["encode"] = text
    references = {name: module.eval() for name, module in modules.items()}
    modules = {**references, **stored_unet(references, inputs, options)}
    compress = weight_compressor(optimized.reference["denoise"], inputs["denoise"], options)
    places = export_packages(modules, specs, compress, options, folder)
    warning = size_warning(places["denoise"].weight_bytes, _float32_bytes(pipeline), options)
    if warning is not None:
        print(f"cq-edge: warning: {warning}", file=sys.stderr)
    build = check_packages(optimized.reference, specs, places, inputs, options, folder)
    if options.layout == "executorch":
        write_delegate(references, specs, inputs, options, folder / DELEGATE_FILE)
    if options.layout == "apple":
        write_vocabulary(pipeline.tokenizer, folder / APPLE_FOLDER)
        write_apple_layout(modules, specs, inputs, options, compress, folder / APPLE_FOLDER)
    return build


def _save_checks(
    optimized: "Optimized",
    builds: Mapping[str, _Build],
    specs: "Mapping[str, GraphSpec]",
    inputs: "Mapping[str, list[dict[str, NDArray[Any]]]]",
    folder: Path,
) -> None:
    """Writes an early and a late set of inputs of each graph with what becomes of them."""
    from exporters.module_graph import module_graph

    checks: dict[str, list[Check]] = {}
    for graph, spec in specs.items():
        reference = module_graph(optimized.reference[graph], spec)
        between = max(1, len(inputs[graph]) - 1)
        for arrays in inputs[graph][::between]:
            exported = {
                BACKENDS[backend]: build.run(graph, arrays) for backend, build in builds.items()
            }
            checks.setdefault(graph, []).append(Check(arrays, reference(arrays), exported))
    # nothing but the graphs' files is there yet
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seals = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    save_checks(folder / CHECKS_FILE, Checks(checks, seals))


def _table_file(table: ReuseTable) -> str:
    return f"reuse_{table.noise_scheduler}_{table.steps}.npz"


def _manifest(
    name: str,
    optimized: "Optimized",
    pipeline: "DiffusionPipeline",
    builds: Mapping[str, _Build],
    defaults: Defaults,
    tables: Sequence[ReuseTable],
    conditions: Mapping[str, str | int | float],
) -> Manifest:
    from cq_edge.model.prompts import guidance_kind, zeros_for_empty_prompt
    from cq_edge.model.text import tokenizers

    entries = {backend: build.entries() for backend, build in builds.items()}
    first, *others = entries
    return Manifest(
        name=name,
        cq_edge_version=__version__,
        latents=_latent_shape(pipeline),
        image_px=_image_size(pipeline),
        graphs=entries[first],
        alternatives={BACKENDS[backend]: entries[backend] for backend in others},
        noise_schedule=optimized.noise_schedule,
        defaults=defaults,
        guidance=guidance_kind(pipeline),
        empty_negative_prompt="zeros" if zeros_for_empty_prompt(pipeline) else "encoded",
        tokenizers=tuple(
            TokenizerEntry(
                f"{place}/vocab.json",
                f"{place}/merges.txt",
                tokenizer.model_max_length,
                tokenizer.bos_token,
                tokenizer.eos_token,
                tokenizer.pad_token,
            )
            for tokenizer, place in zip(tokenizers(pipeline), _TOKENIZERS, strict=False)
        ),
        reuse_tables=tuple(
            ReuseTableEntry(_table_file(table), table.noise_scheduler, table.steps)
            for table in tables
        ),
        conditions=conditions,
    )


def _float32_bytes(pipeline: "DiffusionPipeline") -> int:
    parameters: int = sum(p.numel() for p in pipeline.unet.parameters())
    return 4 * parameters


def _conditions(
    quantization: str, summaries: Mapping[str, Mapping[str, Any]], packages: CoreMLOptions | None
) -> dict[str, str | int | float]:
    from importlib.metadata import version

    names = ["torch", "diffusers"]
    names += ["executorch", "torchao"] if "executorch" in summaries else []
    found: dict[str, str | int | float] = {"quantization": quantization}
    first, *_ = summaries.values()
    found["unet_compression"] = first["unet_compression"]
    if packages is not None:
        names.append("coremltools")
        found["coreml_target"], found["coreml_weights"] = packages.target, packages.weights
        found["coreml_attention"] = packages.attention
        found["coreml_unet_compression"] = summaries["coreml"]["unet_compression"]
    found |= {name: version(name) for name in names}
    return {**found, "machine": platform.machine(), "system": platform.system()}


def _summary(
    folder: Path, summaries: Mapping[str, Mapping[str, Any]], seconds: float
) -> dict[str, Any]:
    """Returns what `--json` prints: of the first backend, the others under "alternatives"."""
    first, *others = summaries
    return {
        "bundle": str(folder),
        **summaries[first],
        "alternatives": {backend: summaries[backend] for backend in others},
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "seconds": round(seconds, 1),
    }


def _report(
    args: argparse.Namespace, summary: Mapping[str, Any], builds: Mapping[str, _Build]
) -> None:
    if args.json:
        print(json.dumps(summary))
        return
    first, *_ = builds
    for backend, build in builds.items():
        part = summary if backend == first else summary["alternatives"][backend]
        build.report()
        print(
            f"UNet weights {part['unet_compression']:.2f} times smaller than float32; full and "
            f"shallow take {part['shared_overhead'] - 1:.2%} more than full alone"
        )
    print(
        f"{args.output}: built in {summary['seconds']:.0f} s, "
        f"{summary['peak_memory_mib']:.0f} MiB at most"
    )
