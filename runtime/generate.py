"""A prompt becomes embeddings, a seed becomes noise, latents become a picture."""

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Engine
from runtime.tokenizer import ClipTokenizer


def encode_prompt(
    engine: Engine, tokenizer: ClipTokenizer, text: str
) -> tuple[NDArray[np.float32], str]:
    """Returns a prompt's embeddings, and the end of it that did not fit.

    Returns:
        (1, 77, D) float32; and text, "" if all of it fitted.
    """
    ids, cut = tokenizer.encode(text)
    return engine.run("encode", {"input_ids": ids})["embeddings"], cut


def initial_latents(
    shape: tuple[int, int, int], seed: int, init_noise_sigma: float
) -> NDArray[np.float32]:
    """Returns the noise that a seed stands for, on every machine the same.

    Args:
        shape: (channels, height, width) of the latents.
        seed: 0 or more.
        init_noise_sigma: The noise scheduler's; the standard deviation returned.

    Returns:
        (1, channels, height, width) float32.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    noise = generator.standard_normal((1, *shape), dtype=np.float32)
    return noise * np.float32(init_noise_sigma)


def decode_latents(engine: Engine, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns the picture of (1, 4, h, w) latents: (H, W, 3) uint8 RGB."""
    image = engine.run("decode", {"latents": latents})["image"][0]
    levels = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))
