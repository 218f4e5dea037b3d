r"""How many points of CLIP score a bundle's plan costs, over tens of thousands of captions.

What `cq-edge evaluate` finds over some hundred captions has an interval wider than what it is to
show. Here the bundle draws more of the same captions and seeds, with the plan that an evaluation
ran, in a process per core; the model itself draws float32's pictures in torch, in batches, on a
GPU if there is one. Of the first captions the exported float32 graphs draw the same, which tells
how near both float32 pictures are:

    python -m benchmarks.clip_interval out/evaluate/bundle --reference out/evaluate/float32 \
        --evaluation docs/evaluation.json --captions 20000 --device cuda
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from apps.engines import engine_for
from apps.evaluate import SCENES_SEED, require_same_model
from apps.model_options import DEMO_NAME
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.metrics import finite_psnr_db, mean_interval
from cq_edge.model.graphs import DecodeGraph
from cq_edge.model.load import load_pipeline
from cq_edge.model.scorer import Scorer
from cq_edge.noise_scheduler import make_noise_scheduler
from cq_edge.scenes import scenes
from runtime.bundle import Bundle, open_bundle
from runtime.conditions import library
from runtime.draw import Method, draw, planned
from runtime.generate import initial_latents

_CHUNK = 32
"""Captions that a process draws at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Captions, whose seeds count on from the first one's, with float32's pictures of them."""

    first_seed: int
    captions: list[str]
    pictures: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Of each caption: both CLIP scores, ours' PSNR, and of some the exported float32 graphs'."""

    float32: NDArray[np.float64]
    ours: NDArray[np.float64]
    psnr_db: NDArray[np.float64]
    exported_psnr_db: NDArray[np.float64]


def main() -> None:
    """Draws both sides until all captions or the time are done, prints and writes the interval."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--reference", type=Path, help="the float32 bundle; without it nothing "
        "tells how near torch's pictures are to the exported graphs'")  # fmt: skip
    parser.add_argument("--evaluation", type=Path, required=True, help="whose plan `ours` is run")
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--exported", type=int, default=_CHUNK, help="captions that the exported "
        "float32 graphs draw too")  # fmt: skip
    parser.add_argument("--at-most-s", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--device", default="cpu", help="of torch, for float32's pictures")
    parser.add_argument("--batch", type=int, default=256, help="captions at once there")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the result for programs")
    args = parser.parse_args()
    plan, bundle = _plan(args.evaluation), open_bundle(args.bundle)
    if bundle.manifest.name != DEMO_NAME:
        raise UsageError(
            f"{args.bundle} is of {bundle.manifest.name}: only the demo model is drawn"
        )
    if args.reference is not None:
        require_same_model(open_bundle(args.reference), bundle)
    world = islice(scenes(SCENES_SEED, held_out=True), args.captions)
    captions = (scene.caption() for scene in world)
    until, found = monotonic() + args.at_most_s, []
    context = multiprocessing.get_context("spawn")
    started = (args.bundle, args.reference, plan, args.exported)
    _Process(*started)  # says here what is missing: a pool would start it again and again
    with context.Pool(args.processes, _start, started) as pool:
        chunks = _float32(bundle, captions, torch.device(args.device), args.batch)
        with closing(tqdm(total=args.captions, unit="caption")) as bar:
            for part in pool.imap(_compare, chunks):
                found.append(part)
                bar.update(len(part.ours))
                if monotonic() > until:
                    break
    result = _result(found) | {"plan": plan, "conditions": _conditions(args, bundle)}
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _plan(evaluation: Path) -> dict[str, Any]:
    variants = json.loads(evaluation.read_text(encoding="utf-8"))["variants"]
    plan: dict[str, Any] = next(v["plan"] for v in variants if v["name"] == "ours")
    return plan


@torch.no_grad()
def _float32(
    bundle: Bundle, captions: Iterator[str], device: torch.device, batch: int
) -> Iterator[_Chunk]:
    """Yields the demo model's own pictures of the captions, every step full."""
    torch.backends.cudnn.allow_tf32 = False  # which rounds to 11 bits
    defaults, size = bundle.manifest.defaults, bundle.manifest.latents
    pipeline = load_pipeline().to(device)
    decode = DecodeGraph(pipeline.vae)
    noise_scheduler = make_noise_scheduler(
        defaults.noise_scheduler, defaults.steps, bundle.manifest.noise_schedule
    )
    (tokenizer,) = bundle.tokenizers()

    def embeddings(texts: list[str]) -> torch.Tensor:
        ids = np.concatenate([tokenizer.encode(text)[0] for text in texts])
        hidden: torch.Tensor = pipeline.text_encoder(torch.from_numpy(ids).to(device))[0]
        return hidden

    nothing = embeddings([""])
    for first in count(0, batch):
        told = list(islice(captions, batch))
        if not told:
            return
        seeds = range(first, first + len(told))
        both = torch.cat([nothing.expand(len(told), -1, -1), embeddings(told)])
        shape = (size.channels, size.height, size.width)
        starts = [initial_latents(shape, s, noise_scheduler.init_noise_sigma) for s in seeds]
        latents, history = torch.from_numpy(np.concatenate(starts)).to(device), ()
        for step, timestep in enumerate(noise_scheduler.timesteps):
            seen = noise_scheduler.model_input(latents, step).repeat(2, 1, 1, 1)
            predicted = pipeline.unet(seen, float(timestep), encoder_hidden_states=both)
            negative, prompt = predicted.sample.chunk(2)
            guided = negative + defaults.guidance_scale * (prompt - negative)
            latents, history = noise_scheduler.advance(latents, guided, step, history)
        levels = (decode(latents) * 255).round().to(torch.uint8)
        pictures = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        for start in range(0, len(told), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield _Chunk(first + start, told[part], pictures[part])


class _Process:
    """What a process draws and judges with."""

    def __init__(
        self, folder: Path, reference: Path | None, plan: dict[str, Any], exported: int
    ) -> None:
        bundle = open_bundle(folder)
        name, steps = plan["noise_scheduler"], plan["steps"]
        table = bundle.reuse_table(name, steps)
        schedule = CacheSchedule.from_string(plan["modes"])
        self._ours = planned(bundle, engine_for(bundle, 1), table, schedule)
        self._float32 = None if reference is None else _every_step_full(open_bundle(reference))
        self._exported, self._scorer = exported, Scorer.load()

    def compare(self, chunk: _Chunk) -> _Found:
        """Draws a chunk's captions and compares."""
        prompts = list(enumerate(chunk.captions, start=chunk.first_seed))
        ours = [draw(self._ours, caption, seed).picture for seed, caption in prompts]
        exported = [
            draw(self._float32, caption, seed).picture
            for seed, caption in prompts
            if self._float32 is not None and seed < self._exported
        ]
        return _Found(
            self._scorer.clip_scores(chunk.pictures, chunk.captions),
            self._scorer.clip_scores(np.stack(ours), chunk.captions),
            np.array([finite_psnr_db(*pair) for pair in zip(chunk.pictures, ours, strict=True)]),
            np.array(
                [finite_psnr_db(*pair) for pair in zip(chunk.pictures, exported, strict=False)]
            ),
        )


def _every_step_full(bundle: Bundle) -> Method:
    defaults = bundle.manifest.defaults
    table = bundle.reuse_table(defaults.noise_scheduler, defaults.steps)
    full = CacheSchedule.all_full(len(table.timesteps))
    return Method(bundle, engine_for(bundle, 1), defaults.steps, full, None)


_process: _Process


def _start(folder: Path, reference: Path | None, plan: dict[str, Any], exported: int) -> None:
    global _process
    torch.set_num_threads(1)
    _process = _Process(folder, reference, plan, exported)


def _compare(chunk: _Chunk) -> _Found:
    return _process.compare(chunk)


def _result(found: list[_Found]) -> dict[str, Any]:
    float32 = np.concatenate([part.float32 for part in found])
    ours = np.concatenate([part.ours for part in found])
    deltas = ours - float32
    exported = np.concatenate([part.exported_psnr_db for part in found])
    return {
        "captions": len(deltas),
        "clip_float32": float(float32.mean()),
        "clip_ours": float(ours.mean()),
        "clip_delta": float(deltas.mean()),
        "clip_delta_ci": mean_interval(deltas),
        "clip_delta_sd": float(deltas.std()),
        "psnr_db": float(np.concatenate([part.psnr_db for part in found]).mean()),
        "exported_float32": {
            "captions": len(exported),
            "least_psnr_db": float(exported.min()) if len(exported) else None,
        },
    }


def _conditions(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    return {
        "bundle": str(args.bundle),
        "float32": f"the model in torch {torch.__version__} on {device}",
        **bundle.manifest.conditions,
        "guidance_scale": bundle.manifest.defaults.guidance_scale,
        "engine": library(bundle.manifest.graph("denoise").backend),
        "processes": args.processes,
        "confidence": "95 %, paired bootstrap",
    }


if __name__ == "__main__":
    main()
