"""Which model a command works on, and what is done to it before anything else."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from cq_edge.noise_scheduler import PREDICTION_TYPES

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


DEMO_NAME = "cq-edge demo model"
"""Of the bundles of the built-in model."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares MODEL and the options that change it."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a diffusers folder, a hub id, or a single-file "
        ".safetensors checkpoint (default: the built-in demo model)")  # fmt: skip
    add("--lora", action="append", default=[], type=_lora, metavar="PATH[:WEIGHT]", help="LoRA "
        "weights (.safetensors) to add to the model's, with a factor (default: 1); may be given "
        "more than once")  # fmt: skip
    add("--vae", metavar="PATH", help="a VAE in place of the model's own: a diffusers folder, a "
        "hub id (AutoencoderTiny, such as TAESD, too), or a .safetensors file")  # fmt: skip
    add("--prediction-type", choices=PREDICTION_TYPES, help="what the UNet gives (default: what "
        "the model says; single files of Stable Diffusion 2.x often say nothing, and are taken "
        "for 2.1 with v_prediction)")  # fmt: skip
    add("--config", type=Path, metavar="DIR", help="for a single file of unusual shapes: a "
        "diffusers folder with its configurations")  # fmt: skip


def load_model(args: argparse.Namespace, *, narrow: bool = False) -> "DiffusionPipeline":
    """Returns the pipeline that the arguments ask for; `narrow` as `load_pipeline` takes it.

    Raises:
        ModelError: It cannot be had.
    """
    from cq_edge.model.load import load_pipeline
    from cq_edge.model.lora import Lora

    return load_pipeline(
        args.model,
        config=args.config,
        prediction_type=args.prediction_type,
        vae=args.vae,
        loras=[Lora(path, weight) for path, weight in args.lora],
        narrow=narrow,
    )


def model_name(args: argparse.Namespace) -> str:
    """Returns what to call the model, for people."""
    if args.model is None:
        return DEMO_NAME
    return Path(args.model).name.removesuffix(".safetensors")


def model_conditions(args: argparse.Namespace) -> dict[str, str | int | float]:
    """Returns what was done to the model, for the manifest's conditions."""
    found: dict[str, str | int | float] = {}
    if args.lora:
        found["lora"] = ", ".join(f"{path.name}:{weight:g}" for path, weight in args.lora)
    if args.vae is not None:
        found["vae"] = Path(args.vae).name
    return found


def _lora(text: str) -> tuple[Path, float]:
    """An argparse type: a path, and a factor behind its last colon."""
    path, _, factor = text.rpartition(":")
    try:
        weight = float(factor)
    except ValueError:
        return Path(text), 1.0
    if not path or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text!r} is no PATH or PATH:WEIGHT")
    return Path(path), weight
