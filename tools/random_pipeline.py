"""Writes a whole diffusers folder of a published architecture with random weights.

Where no hub can be reached, this is what size, speed, memory and export are measured on: real
configurations, as many parameters as the published models, weights drawn as diffusers and
transformers initialise them, so that activations stay finite. Nothing about pictures can be
learned from it: they are noise.

    python -m tools.random_pipeline sd15 models/sd15            # 2.1 GB, as published: float16
    python -m tools.random_pipeline sdxl models/sdxl --dtype float32
    python -m tools.random_pipeline sd21 models/tiny --tiny     # seconds to convert, for tests
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.quiet import quiet_toolchains
from apps.replacing import written_beside
from cq_edge.errors import CQEdgeError, OutputExistsError
from tools.architectures import ARCHITECTURES, Architecture, tiny

if TYPE_CHECKING:
    import torch

DTYPES = ("float16", "bfloat16", "float32")
_CAPTIONS, _VOCABULARY = 20_000, 2048  # what the tokenizer learns from, and how many tokens
_SCENE_SEED = 0


def main() -> int:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("architecture", choices=tuple(ARCHITECTURES), help="whose configuration")
    add("folder", type=Path, help="where it goes")
    add("--tiny", action="store_true", help="few channels and layers, for tests")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    add("--force", action="store_true", help="replace a pipeline that exists")
    args = parser.parse_args()
    architecture = ARCHITECTURES[args.architecture]
    try:
        _check_replaceable(args.folder, force=args.force)
        with quiet_toolchains(), written_beside(args.folder) as folder:
            counts = write_pipeline(
                tiny(architecture) if args.tiny else architecture,
                folder,
                dtype=args.dtype,
                seed=args.seed,
                on_part=lambda part: print(f"{part} …", file=sys.stderr),
            )
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except CQEdgeError as error:
        parser.exit(1, f"random_pipeline: {error}\n")
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in counts.items())
    print(f"{args.folder}: {size / 1e6:.0f} MB; parameters: {parts}")
    return 0


def write_pipeline(
    architecture: Architecture,
    folder: Path,
    *,
    dtype: str = "float16",
    seed: int = 0,
    on_part: Callable[[str], object] = lambda _: None,
) -> dict[str, int]:
    """Writes model_index.json and every component, and returns how many parameters each has.

    The same architecture, dtype and seed give the same weights.

    Args:
        architecture: Of the pipeline.
        folder: Exists and is empty.
        dtype: Of the weights: `DTYPES`. Peak memory is that of all weights in it.
        seed: Of the weights; each component takes the next.
        on_part: Called with each component's name before it is made.
    """
    import diffusers
    import torch
    import transformers

    from cq_edge.model.vocabulary import write_vocabulary

    on_part("tokenizer")
    tokenizers = _tokenizers(architecture, folder / "vocabulary")
    texts = architecture.texts
    classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    made: dict[str, Any] = {}
    with _default_dtype(getattr(torch, dtype)):
        for number, (config, kind) in enumerate(zip(texts, classes, strict=False)):
            name = "text_encoder" if number == 0 else "text_encoder_2"
            on_part(name)
            torch.manual_seed(seed + number)
            made[name] = kind(transformers.CLIPTextConfig(**config)).eval()
        for name, kind, config in (
            ("unet", diffusers.UNet2DConditionModel, _unet_config(architecture)),
            ("vae", diffusers.AutoencoderKL, architecture.vae),
        ):
            on_part(name)
            torch.manual_seed(seed + len(made))
            made[name] = kind(**config).eval()
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in made.items()}
    made["scheduler"] = getattr(diffusers, architecture.scheduler)(**architecture.schedule)
    made |= tokenizers
    on_part("files")
    if len(texts) == 1:
        pipeline = diffusers.StableDiffusionPipeline(
            **made, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    else:
        pipeline = diffusers.StableDiffusionXLPipeline(**made)
    pipeline.save_pretrained(folder)
    for name, tokenizer in tokenizers.items():
        write_vocabulary(tokenizer, folder / name)
    _forget_where_from(folder)
    return counts


def _unet_config(architecture: Architecture) -> dict[str, Any]:
    return {"sample_size": architecture.latents, **architecture.unet}


def _tokenizers(architecture: Architecture, scratch: Path) -> dict[str, Any]:
    """Returns a CLIP tokenizer for each text encoder, of one vocabulary: words of the demo
    model's captions and of the shipped prompts. `scratch` is made and removed."""
    from transformers import CLIPTokenizer

    from cq_edge.model.prompts import WORLD_PROMPTS
    from cq_edge.scenes import scenes
    from tools.demo_training.tokenizer import write_clip_vocabulary

    captions = (s.caption() for s in islice(scenes(_SCENE_SEED, held_out=False), _CAPTIONS))
    write_clip_vocabulary(chain(captions, WORLD_PROMPTS), scratch, _VOCABULARY)
    names = ("tokenizer", "tokenizer_2")[: len(architecture.pads)]
    found = {
        name: CLIPTokenizer.from_pretrained(scratch, **({} if pad is None else {"pad_token": pad}))
        for name, pad in zip(names, architecture.pads, strict=True)
    }
    shutil.rmtree(scratch)
    return found


@contextmanager
def _default_dtype(dtype: "torch.dtype") -> Iterator[None]:
    """Makes weights of a dtype from the start: SDXL's would be 14 GB in float32 on the way."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_replaceable(folder: Path, *, force: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "model_index.json").is_file():
        raise OutputExistsError(f"{folder} exists and is no diffusers pipeline: name a new folder")
    if not force:
        raise OutputExistsError(f"{folder} exists already: give --force to replace it")


def _forget_where_from(folder: Path) -> None:
    """Drops from every config the path of the folder it was made in."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
