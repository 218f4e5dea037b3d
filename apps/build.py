"""`cq-edge build`: a pipeline becomes a bundle."""

import argparse
import json
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from tqdm import tqdm

from apps.replacing import check_replaceable, written_beside
from cq_edge import __version__
from cq_edge.errors import UsageError
from cq_edge.noise_scheduler import NAMES

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from cq_edge.manifest import Manifest
    from cq_edge.model.optimize import OptimizeConfig, Optimized

GRAPHS_FILE = "graphs.pte"
# parity floors in dB: float32 graphs differ by rounding alone, int8 ones by their quantisation
_FLOORS_DB = {"none": 60.0, "int8": 20.0}
_FLOAT_GRAPHS = ("encode", "decode")

_DESCRIPTION = """\
Builds a bundle from a Stable Diffusion pipeline: quantises its UNet, splits it into a full and
a shallow graph, measures on prompts what reusing features costs, exports everything as one
ExecuTorch program, and checks each exported graph against the float module before anything
is written."""

_EXAMPLES = """\
examples:
  cq-edge build -o demo                              the built-in demo model
  cq-edge build ./stable-diffusion-v1-5 -o sd15      a folder in diffusers layout
  cq-edge build -o demo --steps 20 --scheduler ddim  calibrated for other defaults
  cq-edge build -o float --quantization none         float32, to compare with"""


@dataclass(frozen=True, slots=True)
class _GraphResult:
    """What one exported graph weighs and how it was checked."""

    bytes: int
    parity_db: float
    floor_db: float
    delegated_macs_share: float
    delegated_ops_share: float
    outside: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `cq-edge build`."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a diffusers folder or a hub id (default: the "
        "built-in demo model)")  # fmt: skip
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="the bundle's folder")
    add("--force", action="store_true", help="replace a bundle that exists")
    add("--scheduler", choices=NAMES, default="pndm", help="noise scheduler to calibrate for "
        "(default: %(default)s)")  # fmt: skip
    add("--steps", type=int, default=50, metavar="N", help="sampler steps (default: %(default)s)")
    add("--guidance-scale", type=float, default=6.0, metavar="X", help="(default: %(default)s)")
    add("--full-steps", type=int, metavar="N", help="full steps of the bundle's default plan "
        "(default: a third of the steps)")  # fmt: skip
    add("--max-gap", type=int, default=10, metavar="N", help="the furthest that a feature is "
        "reused, in steps (default: %(default)s)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="prompts to calibrate with, one a line "
        "(default: a shipped set)")  # fmt: skip
    add("--shallow-layers", type=int, default=1, metavar="N", help="layers of the last up block "
        "in the shallow graph (default: %(default)s)")  # fmt: skip
    add("--quantization", choices=tuple(_FLOORS_DB), default="int8", help="of the UNet (default: "
        "%(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Builds the bundle and returns the exit code 0.

    Raises:
        CQEdgeError: It could not be built; nothing is left behind.
    """
    start = perf_counter()
    check_replaceable(args.output, force=args.force)
    prompts = _read_prompts(args.prompts) if args.prompts is not None else None
    # the torch side takes seconds to import: only once the arguments are known to be good
    from cq_edge.model.load import load_pipeline
    from cq_edge.model.optimize import OptimizeConfig, optimize
    from cq_edge.model.prompts import WORLD_PROMPTS, scene_prompts
    from cq_edge.noise_scheduler import NoiseScheduleConfig, make_noise_scheduler

    pipeline = load_pipeline(args.model)
    if prompts is None:
        prompts = tuple(scene_prompts(8)) if args.model is None else WORLD_PROMPTS
    config = OptimizeConfig(
        prompts=prompts,
        noise_scheduler=args.scheduler,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        max_gap=args.max_gap,
        shallow_layers=args.shallow_layers,
        quantization=args.quantization,
    )
    schedule = NoiseScheduleConfig.from_diffusers(pipeline.scheduler.config)
    total = len(make_noise_scheduler(args.scheduler, args.steps, schedule).timesteps)
    full_steps = _full_steps(args.full_steps, total, args.max_gap)
    with tqdm(total=total * len(prompts), desc="calibrate", unit="step") as progress:
        optimized = optimize(pipeline, config, on_step=progress.update)
    with written_beside(args.output) as folder:
        results, unet_compression, shared_overhead = _export(optimized, config, folder)
        _write_bundle(folder, pipeline, config, optimized, results, full_steps, _name(args.model))
    _report(args, results, unet_compression, shared_overhead, perf_counter() - start)
    return 0


def _read_prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt: write one a line")
    return prompts


def _full_steps(asked: int | None, total: int, max_gap: int) -> int:
    """Returns how many steps the default plan runs in full; refuses what no plan can have."""
    fewest = -(-total // (max_gap + 1))
    chosen = max(fewest, round(total / 3)) if asked is None else asked
    if not fewest <= chosen <= total:
        raise UsageError(
            f"--full-steps is {chosen}: {total} steps with --max-gap {max_gap} take "
            f"{fewest} to {total}"
        )
    return chosen


def _name(model: str | None) -> str:
    return "cq-edge demo model" if model is None else Path(model).name
