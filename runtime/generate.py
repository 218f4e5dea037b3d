"""A prompt becomes embeddings, a seed becomes noise, latents become a picture."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cq_edge.manifest import TOKEN_INPUTS, Manifest
from runtime.denoise import Context, Guidance
from runtime.engine import Engine
from runtime.tokenizer import ClipTokenizer


def encode_prompt(
    engine: Engine, tokenizers: Sequence[ClipTokenizer], text: str
) -> tuple[dict[str, NDArray[np.float32]], str]:
    """Returns what the UNet is told of a prompt, and the end of it that did not fit.

    Args:
        engine: Runs `encode`.
        tokenizers: One for each of the graph's inputs.
        text: The prompt.

    Returns:
        `embeddings` (1, 77, D) float32, and of two text encoders `pooled` (1, P); and text, ""
        if all of it fitted.
    """
    encoded = [tokenizer.encode(text) for tokenizer in tokenizers]
    ids = {name: each for name, (each, _) in zip(TOKEN_INPUTS, encoded, strict=False)}
    cut = max((cut for _, cut in encoded), key=len)
    return engine.run("encode", ids), cut


def guided_by(
    manifest: Manifest, prompt: Context, negative: Context | None, scale: float
) -> Guidance:
    """Returns the guidance of a bundle's loop.

    Args:
        manifest: Says how the bundle's pictures are guided.
        prompt: What `encode_prompt` gave; nothing where pictures are not prompted.
        negative: The same of the negative prompt; None where there is no such text.
        scale: How strictly to follow the prompt.

    Raises:
        ScheduleError: The scale is no finite number.
    """
    if manifest.branches(scale) == 1:
        told = {"guidance_scale": np.array([scale], np.float32)}
        return Guidance(
            {**prompt, **told} if manifest.guidance == "embedded" else prompt, None, 1.0
        )
    if negative is None:
        negative = {name: np.zeros_like(array) for name, array in prompt.items()}
    return Guidance(prompt, negative, scale)


def needs_negative(manifest: Manifest, negative_prompt: str, scale: float) -> bool:
    """Returns whether the negative prompt, which may be empty, is to be encoded."""
    if manifest.branches(scale) == 1:
        return False
    return bool(negative_prompt) or manifest.empty_negative_prompt == "encoded"


def noises(shape: tuple[int, int, int], seed: int) -> Iterator[NDArray[np.float32]]:
    """Yields the noise that a seed stands for, on every machine the same: standard normal.

    Args:
        shape: (channels, height, width) of the latents.
        seed: 0 or more.

    Returns:
        An iterator without end of (1, channels, height, width) float32: the first starts the
        loop, the others are for noise schedulers that add some after a step.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    while True:
        yield generator.standard_normal((1, *shape), dtype=np.float32)


def initial_latents(
    shape: tuple[int, int, int], seed: int, init_noise_sigma: float
) -> NDArray[np.float32]:
    """Returns the latents that a seed's loop starts from.

    Args:
        shape: (channels, height, width) of the latents.
        seed: 0 or more.
        init_noise_sigma: The noise scheduler's; the standard deviation returned.

    Returns:
        (1, channels, height, width) float32.
    """
    return next(noises(shape, seed)) * np.float32(init_noise_sigma)


def decode_latents(engine: Engine, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns the picture of (1, 4, h, w) latents: (H, W, 3) uint8 RGB."""
    image = engine.run("decode", {"latents": latents})["image"][0]
    levels = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
