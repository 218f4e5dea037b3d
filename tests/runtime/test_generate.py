import numpy as np

from runtime.bundle import Bundle
from runtime.generate import decode_latents, encode_prompt, initial_latents
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
