"""Another VAE in a pipeline's place for its own: AutoencoderKL, or the small AutoencoderTiny."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline

from cq_edge.errors import ModelError
from cq_edge.model.pickled import refuse_pickle, refuse_pickled_component
from cq_edge.model.single_file import read_header

Vae: TypeAlias = AutoencoderKL | AutoencoderTiny
_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def replace_vae(pipeline: DiffusionPipeline, source: str | Path) -> None:
    """Puts another VAE into a pipeline; pictures are then as large as that VAE makes them.

    Args:
        pipeline: With a VAE.
        source: A folder in diffusers layout (the VAE's own, or a pipeline's with a `vae` in it),
            a hub id, or a `.safetensors` file of an AutoencoderKL in Stable Diffusion's original
            layout and of the same shapes as the pipeline's own.

    Raises:
        ModelError: There is none, it is of another kind, or its latents are not the UNet's.
    """
    own = getattr(pipeline, "vae", None)
    if own is None:
        raise ModelError(f"--vae {source}: a {type(pipeline).__name__} has no VAE to replace")
    path = Path(source)
    refuse_pickle(path)
    vae = _from_file(path, own) if path.suffix == ".safetensors" else _from_diffusers(source)
    channels, wanted = vae.config.latent_channels, pipeline.unet.config.out_channels
    if channels != wanted:
        raise ModelError(
            f"the VAE of {source} decodes latents of {channels} channels, and the UNet makes "
            f"{wanted}: give one that was made for this kind of model"
        )
    pipeline.register_modules(vae=vae.eval())
    pipeline.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)


def _from_diffusers(source: str | Path) -> Vae:
    folder = Path(source)
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    if folder.exists():
        inner = folder / (subfolder or "")
        if not (inner / "config.json").is_file():
            raise ModelError(f"{source} is no VAE in diffusers layout: it has no config.json")
        refuse_pickled_component(inner)
    try:
        config = AutoencoderKL.load_config(str(source), subfolder=subfolder)
        kind = str(config.get("_class_name"))
        if kind not in _CLASSES:
            allowed = " and ".join(_CLASSES)
            raise ModelError(f"{source} holds a {kind}: a VAE can be replaced by {allowed}")
        vae: Vae = _CLASSES[kind].from_pretrained(
            str(source), subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the VAE of {source} could not be loaded: {error}") from error
    return vae


def _from_file(path: Path, own: Vae) -> AutoencoderKL:
    if not path.is_file():
        raise ModelError(f"{path} is no file: there is no VAE")
    if not any("decoder.conv_in." in key for key in read_header(path).shapes):
        raise ModelError(
            f"{path} is no VAE in Stable Diffusion's layout: it has no decoder.conv_in; give one "
            "of another kind, such as TAESD, as a folder in diffusers layout"
        )
    if not isinstance(own, AutoencoderKL):
        raise ModelError(
            f"{path} says nothing of its shapes, and the model's own {type(own).__name__} has "
            "others: give the VAE as a folder in diffusers layout"
        )
    with TemporaryDirectory() as folder:
        own.save_config(folder)
        try:
            vae: AutoencoderKL = AutoencoderKL.from_single_file(
                str(path), config=folder, local_files_only=True, torch_dtype=torch.float32
            )
        except NotImplementedError as error:  # what had no weight was to be copied
            raise ModelError(f"{path} lacks weights that the model's own VAE has") from error
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{path} does not hold a VAE of this model: {error}") from error
    return vae
