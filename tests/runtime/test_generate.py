from dataclasses import replace

import numpy as np

from runtime.bundle import Bundle
from runtime.generate import (
    decode_latents,
    encode_prompt,
    guided_by,
    initial_latents,
    needs_negative,
    noises,
)
from tests.tiny_bundle import WIDTH, FakeEngine


def test_a_seed_stands_for_the_same_noise_everywhere() -> None:
    noise = initial_latents((4, 2, 3), 7, 2.0)
    again = np.random.Generator(np.random.PCG64(7)).standard_normal((1, 4, 2, 3), np.float32)
    assert noise.dtype == np.float32
    assert np.array_equal(noise, 2 * again)
    assert not np.array_equal(initial_latents((4, 2, 3), 8, 2.0), noise)


def test_a_prompt_becomes_embeddings_and_what_was_cut(bundle: Bundle) -> None:
    told, cut = encode_prompt(FakeEngine(), bundle.tokenizers(), "star " * 80)
    assert told["embeddings"].shape == (1, 77, WIDTH)
    assert cut == "star star star star star"


def test_a_bundle_says_how_its_pictures_are_guided(bundle: Bundle) -> None:
    two, told = bundle.manifest, {"embeddings": np.ones((1, 77, WIDTH), np.float32)}
    given = guided_by(two, told, told, 5.0)
    assert given.branches == (told, told)
    assert given.scale == 5.0
    assert guided_by(two, told, None, 1.0).branches == (told,)
    # without a text to draw away from SDXL's is told zeros
    (zeros, prompt) = guided_by(two, told, None, 5.0).branches
    assert prompt is told
    assert not zeros["embeddings"].any()
    embedded = replace(two, guidance="embedded")
    (branch,) = guided_by(embedded, told, None, 8.5).branches
    assert branch["guidance_scale"].tolist() == [8.5]
    assert guided_by(embedded, told, None, 8.5).scale == 1.0
    assert guided_by(replace(two, guidance="none"), {}, None, 1.0).branches == ({},)


def test_an_empty_negative_prompt_is_encoded_unless_zeros_stand_for_it(bundle: Bundle) -> None:
    zeros = replace(bundle.manifest, empty_negative_prompt="zeros")
    assert needs_negative(bundle.manifest, "", 5.0)
    assert not needs_negative(bundle.manifest, "", 1.0)
    assert not needs_negative(zeros, "", 5.0)
    assert needs_negative(zeros, "blurred", 5.0)
    assert not needs_negative(replace(zeros, guidance="embedded"), "blurred", 5.0)


def test_the_noise_of_a_seed_goes_on_where_its_first_latents_end() -> None:
    fresh = noises((4, 2, 3), 7)
    again = np.random.Generator(np.random.PCG64(7))
    for _ in range(3):
        assert np.array_equal(next(fresh), again.standard_normal((1, 4, 2, 3), np.float32))


def test_latents_become_a_picture_rounded_and_clipped() -> None:
    class Decoder(FakeEngine):
        def _decode(self, latents):
            del latents
            image = np.zeros((1, 3, 2, 4), np.float32)
            image[0, 0], image[0, 1], image[0, 2, 1, 3] = 1.7, -3.0, 100.6 / 255
            return {"image": image}

    picture = decode_latents(Decoder(), np.zeros((1, 4, 1, 1), np.float32))
    assert picture.shape == (2, 4, 3)
    assert picture.dtype == np.uint8
    assert picture[1, 3].tolist() == [255, 0, 101]
    assert picture[0, 0].tolist() == [255, 0, 0]
