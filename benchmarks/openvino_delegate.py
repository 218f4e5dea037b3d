"""What ExecuTorch's OpenVINO delegate makes of the demo model's UNet, beside XNNPACK.

Lowers both graphs with the delegate, in float32 and in int8, and judges them in processes of their
own, so that one that crashes is a row too:

    pip install -r benchmarks/openvino-delegate-requirements.txt
    python -m benchmarks.openvino_delegate          # writes a section of docs/benchmarks.md

Files of other versions of openvino that lie in the work folder are tried as well.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.quiet import quiet_toolchains
from benchmarks.page_section import write_section
from benchmarks.unet_graphs import unet_graphs
from cq_edge.checks import Check, Checks, save_checks
from cq_edge.model.load import load_pipeline
from cq_edge.model.optimize import OptimizeConfig, latents_shape, optimize
from cq_edge.model.prompts import embed_prompts, scene_prompts
from cq_edge.model.trajectory import Loop
from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler
from exporters.graph_spec import GraphSpec
from exporters.to_executorch import example_inputs, export_executorch
from runtime.conditions import cores, processor

Samples = dict[str, list[tuple[Tensor, ...]]]
_GRAPHS = ("denoise", "denoise_shallow")
_STEPS, _GUIDANCE, _CALIBRATION_PROMPTS, _CHECKS, _LOADS = 50, 3.5, 6, 20, 50
_FLOAT, _INT8 = "OpenVINO, asked for float32", "OpenVINO int8"
_OURS = {"XNNPACK float32": "none", "XNNPACK int8": "int8"}
_ASKED = {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
_NO_BFLOAT16 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
_REQUIREMENTS = "benchmarks/openvino-delegate-requirements.txt"
_LIBRARIES = ("executorch", "openvino", "nncf", "torch")


def main() -> None:
    """Exports, judges, writes the section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--samples", type=int, default=300, help="to calibrate int8 by (default: %(default)s)")
    add("--rounds", type=int, default=60, help="of timing (default: %(default)s)")
    add("--threads", type=int, default=1, help="of XNNPACK; the delegate takes what it finds")
    add("--work", type=Path, default=Path("out/openvino_delegate"))
    add("--page", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args()
    if find_spec("openvino") is None:
        parser.error(f"openvino is not installed: pip install -r {_REQUIREMENTS}")
    own = args.work / version("openvino")
    own.mkdir(parents=True, exist_ok=True)
    checks = own / "checks.npz"
    files = _export(own, checks, args.samples)
    given = (str(checks), f"--threads={args.threads}")
    judged = {name: _child("judge", str(file), *given) for name, file in files.items()}
    usable = {name: file for name, file in files.items() if not isinstance(judged[name], str)}
    race = _child("race", *map(str, usable.values()), *given, f"--rounds={args.rounds}")
    taken = race if isinstance(race, str) else dict(zip(usable, race["ms"], strict=True))
    text = "\n\n".join(
        [_table(files, judged, taken), _trials(args.work, files, given), _said(args)]
    )
    write_section(args.page, f"openvino {version('openvino')}", text)
    print(text)


def _export(folder: Path, checks: Path, samples: int) -> dict[str, Path]:
    """Writes each row's file where it can be lowered, and what to check it by."""
    with quiet_toolchains():
        pipeline = load_pipeline(None)
    modules, specs = unet_graphs(pipeline.unet)
    *known, unseen = _loops(pipeline, modules["denoise"], specs["denoise_shallow"])
    _save_checks(checks, modules, specs, unseen)
    calibration = {
        graph: _spread([each for loop in known for each in loop[graph]], samples)
        for graph in _GRAPHS
    }
    files = {}
    for name, quantization in _OURS.items():
        config = OptimizeConfig(("",), quantization=quantization)
        edge = optimize(load_pipeline(None), config).edge
        files[name] = folder / f"xnnpack_{quantization}.pte"
        ready = {graph: (edge[graph], example_inputs(specs[graph])) for graph in _GRAPHS}
        export_executorch(ready, files[name])
    traced = {
        graph: torch.export.export(module, example_inputs(specs[graph]), strict=False)
        for graph, module in modules.items()
    }

    def eight_bits() -> Mapping[str, Any]:
        return {
            graph: torch.export.export(
                _quantised(program.module(), calibration[graph]),
                example_inputs(specs[graph]),
                strict=False,
            )
            for graph, program in traced.items()
        }

    rows: dict[str, tuple[str, Callable[[], Mapping[str, Any]]]] = {
        _FLOAT: ("openvino.pte", lambda: traced),
        _INT8: ("openvino_int8.pte", eight_bits),
    }
    for name, (file, programs) in rows.items():
        files[name] = folder / file
        files[name].unlink(missing_ok=True)
        try:
            _lower(programs(), files[name])
        except Exception as error:  # a row of the table
            print(f"{name}: cannot be lowered: {error}", file=sys.stderr)
    return files


@torch.no_grad()
def _loops(pipeline: Any, full: nn.Module, shallow: GraphSpec) -> Iterator[Samples]:
    """Yields each caption's inputs of both graphs, both branches, every step."""
    config = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    noise_scheduler = make_noise_scheduler("pndm", _STEPS, config)
    loop = Loop(full, noise_scheduler, latents_shape(pipeline), _GUIDANCE)
    corrections = tuple(
        (torch.ones if "gain" in each.name else torch.zeros)(each.shape)
        for each in shallow.inputs[4:]
    )
    prompts = embed_prompts(pipeline, scene_prompts(_CALIBRATION_PROMPTS + 1), _GUIDANCE)
    for number, prompt in enumerate(prompts):
        found: Samples = {graph: [] for graph in _GRAPHS}
        anchor: tuple[Tensor, ...] = ()
        for visit in loop.run(number, prompt):
            for branch, context in enumerate(prompt):
                inputs = (visit.seen, visit.timestep.float(), *context)
                found["denoise"].append(inputs)
                if anchor:
                    found["denoise_shallow"].append((*inputs, anchor[branch], *corrections))
            anchor = visit.features
        yield found


def _spread(samples: Sequence[Any], count: int) -> list[Any]:
    kept = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[i] for i in kept]


@torch.no_grad()
def _save_checks(
    path: Path, modules: Mapping[str, nn.Module], specs: Mapping[str, GraphSpec], samples: Samples
) -> None:
    """Writes inputs with the float modules' noise predictions, as bundles carry them."""
    graphs: dict[str, list[Check]] = {}
    for graph, module in modules.items():
        names = [each.name for each in specs[graph].inputs]
        graphs[graph] = []
        for inputs in _spread(samples[graph], _CHECKS):
            result = module(*inputs)
            noise_pred = result[0] if isinstance(result, tuple) else result
            arrays = dict(zip(names, map(Tensor.numpy, inputs), strict=True))
            graphs[graph].append(Check(arrays, {"noise_pred": noise_pred.numpy()}, {}))
    save_checks(path, Checks(graphs, {}))


def _quantised(graph: Any, samples: Sequence[tuple[Tensor, ...]]) -> nn.Module:
    """Returns the graph with int8 weights and activations, by the delegate's own quantiser."""
    from executorch.backends.openvino.quantizer.quantizer import QuantizationMode, quantize_model

    found: nn.Module = quantize_model(
        graph,
        samples,
        mode=QuantizationMode.INT8_TRANSFORMER,
        subset_size=len(samples),
        smooth_quant=True,
        transform_fn=lambda inputs: inputs,
    )
    return found


def _lower(programs: Mapping[str, Any], path: Path) -> None:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    asked = [CompileSpec(key, value.encode()) for key, value in _ASKED.items()]
    with quiet_toolchains(), redirect_stdout(sys.stderr):
        edge = to_edge_transform_and_lower(
            dict(programs),
            partitioner=[OpenvinoPartitioner(asked)],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        program = edge.to_executorch()
    with path.open("wb") as file:
        program.write_to_file(file)


def _child(*words: str, env: Mapping[str, str] | None = None) -> dict[str, Any] | str:
    """Returns what a process of its own found, or how it ended."""
    import openvino

    libs = Path(openvino.__file__).parent / "libs"
    library = next(iter(sorted(libs.glob("libopenvino_c.so*"))), libs)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.openvino_delegate_run", *words],
        env={**os.environ, "OPENVINO_LIB_PATH": str(library), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _table(
    files: Mapping[str, Path],
    judged: Mapping[str, dict[str, Any] | str],
    taken: Mapping[str, Mapping[str, list[float]]] | str,
) -> str:
    lines = [
        "| graphs | file, MB | full, dB | full step, ms | times XNNPACK float32's "
        "| shallow, dB | shallow step, ms | times XNNPACK float32's |",
        "| --- " * 8 + "|",
    ]
    for name, file in files.items():
        found = judged[name]
        if isinstance(found, str) or isinstance(taken, str):
            failure = taken if isinstance(taken, str) else found
            lines.append(f"| {name} | failed: {failure} |" + " |" * 6)
            continue
        cells = [name, f"{file.stat().st_size / 1e6:.1f}"]
        for graph in _GRAPHS:
            own, ours = taken[name][graph], taken["XNNPACK float32"][graph]
            ratios = [a / b for a, b in zip(own, ours, strict=True)]
            cells += [f"{found['db'][graph]:.1f}", _stated(own), _stated(ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stated(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _trials(work: Path, files: Mapping[str, Path], given: Sequence[str]) -> str:
    """Returns the table of what stands in the way, or no longer does."""
    file = str(files[_FLOAT])
    trials = {
        "opened by its path, as the project's engine does": _child(
            "judge", file, *given, "--by-path"
        ),
        f"loaded, run and freed {_LOADS} times, from bytes that are kept": _child(
            "judge", file, *given, f"--loads={_LOADS}"
        ),
        "on a processor without bfloat16 (ONEDNN_MAX_CPU_ISA=AVX2)": _child(
            "judge", file, *given, env=_NO_BFLOAT16
        ),
    }
    for other in sorted(work.glob(f"*/{Path(file).name}")):
        if other != files[_FLOAT]:
            title = f"written by openvino {other.parent.name}, read by {version('openvino')}"
            trials[title] = _child("judge", str(other), *given)
    lines = [f"| the file of “{_FLOAT}” | what happens |", "| --- | --- |"]
    for title, found in trials.items():
        says = found if isinstance(found, str) else f"runs: full {found['db']['denoise']:.1f} dB"
        lines.append(f"| {title} | {says} |")
    return "\n".join(lines)


def _said(args: argparse.Namespace) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    wanted = next((r for r in requires("executorch") or () if r.startswith("openvino")), "none")
    return (
        f"dB: the worst of {_CHECKS} steps and branches of a caption that did not calibrate, "
        f"against the float module; int8 by ExecuTorch's OpenVINOQuantizer (INT8_TRANSFORMER, "
        f"SmoothQuant), calibrated on {args.samples} inputs of {_CALIBRATION_PROMPTS} captions. "
        f"Times: batch 1, medians (least–most) of {args.rounds} rounds in turns, one process, "
        f"ratios within a round; {processor()}, {args.threads} threads asked for, {cores()} cores. "
        f"{libraries}; executorch asks for {wanted.split(';')[0].strip()}. "
        f"{datetime.now(UTC).isoformat(timespec='seconds')}."
    )


if __name__ == "__main__":
    main()
