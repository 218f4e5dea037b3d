from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from cq_edge.errors import BundleError
from cq_edge.scenes import scenes
from runtime.tokenizer import ClipTokenizer, without_surrogates
from tests.tiny_bundle import captions
from tools.demo_training.tokenizer import write_clip_vocabulary

HOSTILE = {
    "empty": "",
    "ten thousand characters in one word": "a" * 10_000,
    "ten thousand characters in many words": "red star " * 1111,
    "emoji": "a 🔥 star 👩‍👩‍👧 🇩🇰",
    "control characters": "a\x01\x02\x1b[31mred\x7f star\x85",
    "NUL": "a\x00star\x00",
    "CJK": "赤い星 红色的星星 빨간 별",
    "only whitespace": " \t\r\n\u2003\u00a0 ",
    "special tokens inside": "a <|endoftext|> star<|startoftext|>",
    "special tokens in capitals": "a <|ENDOFTEXT|> star",
    "almost special": "<|endoftext <|end|> |>",
    "decomposed accents": "Zoe\u0308 and Zo\u00eb, i\u0307stanbul \u0130",
    "contractions": "it's we'RE I'll don't o'd 've",
    "digits": "12345 ½ ² ٣ 10,000.50",
    "punctuation runs": "!!!???... --- _under_score_",
    "right to left": "نجمة حمراء כוכב",
    "combining only": "\u0301\u0302",
    "zero width": "re\u200bd st\ufeffar\u00ad",
    "beyond the basic plane": "\U0001d4b6 𐍈 \U0010ffff",
    "the replacement character": "\ufffd",
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_clip_vocabulary(captions(2000), folder)
    return folder


@pytest.fixture(scope="module")
def ours(vocabulary: Path) -> ClipTokenizer:
    return ClipTokenizer.from_files(vocabulary / "vocab.json", vocabulary / "merges.txt")


@pytest.fixture(scope="module")
def theirs(vocabulary: Path) -> Any:
    return CLIPTokenizer.from_pretrained(vocabulary)


def transformers_ids(theirs: Any, text: str) -> list[int]:
    return theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]


def test_a_thousand_captions_tokenise_as_in_transformers(ours: ClipTokenizer, theirs: Any) -> None:
    for scene in islice(scenes(11, held_out=False), 1000):
        caption = scene.caption()
        ids, cut = ours.encode(caption)
        assert ids.shape == (1, 77)
        assert ids.dtype == np.int64
        assert ids[0].tolist() == transformers_ids(theirs, caption), caption
        assert cut == ""


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_strings_tokenise_as_in_transformers(
    ours: ClipTokenizer, theirs: Any, text: str
) -> None:
    assert ours.encode(text)[0][0].tolist() == transformers_ids(theirs, text)


def test_random_strings_of_every_plane_tokenise_as_in_transformers(
    ours: ClipTokenizer, theirs: Any
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top = rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x110000])
        points = rng.integers(0, top, rng.integers(0, 60))
        text = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert ours.encode(text)[0][0].tolist() == transformers_ids(theirs, text), repr(text)


@pytest.mark.parametrize("text", ["\ud800", "red \udfff star", "red\ud800star", "\udc00\ud800"])
def test_a_lone_surrogate_which_transformers_refuses_reads_as_the_replacement_character(
    ours: ClipTokenizer, theirs: Any, text: str
) -> None:
    with pytest.raises(TypeError):
        transformers_ids(theirs, text)
    replaced = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    assert without_surrogates(text) == replaced
    assert ours.encode(text)[0][0].tolist() == transformers_ids(theirs, replaced)


def test_two_surrogates_that_make_a_character_are_that_character() -> None:
    assert without_surrogates("a \ud83d\udd25") == "a 🔥"


def test_an_over_long_prompt_says_what_was_cut_in_the_prompts_own_words(
    ours: ClipTokenizer, theirs: Any
) -> None:
    words = ["Red", "star", "above", "blue", "ring"] * 20  # one token each
    text = " ".join(words)
    ids, cut = ours.encode(text)
    assert cut == " ".join(words[75:])
    # diffusers quotes what these ids decode to
    removed = theirs(text)["input_ids"][76:-1]
    assert theirs.decode(removed) == cut.lower()
    assert ids[0, 0] == theirs.bos_token_id
    assert ids[0, -1] == theirs.eos_token_id


def test_a_prompt_that_just_fits_is_not_cut(ours: ClipTokenizer) -> None:
    assert ours.encode("star " * 75)[1] == ""
    assert ours.encode("star " * 76)[1] == "star"


def test_padding_uses_the_pad_token_where_it_is_not_the_closing_one(vocabulary: Path) -> None:
    tokenizer = ClipTokenizer.from_files(
        vocabulary / "vocab.json", vocabulary / "merges.txt", max_length=6, pad_token="!"
    )
    theirs = CLIPTokenizer(
        vocab=str(vocabulary / "vocab.json"),
        merges=str(vocabulary / "merges.txt"),
        pad_token="!",
    )
    for text in ("star", "star!", "! ring"):
        expected = theirs(text, padding="max_length", max_length=6, truncation=True)["input_ids"]
        assert tokenizer.encode(text)[0][0].tolist() == expected


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (None, "", "{vocab} cannot be read as a vocabulary: [Errno 2] No such file or directory: "
            "'{vocab}'"),
        ("[1]", "", "{vocab} is no vocabulary: it must be a JSON object of token: id"),
        ('{"a": "1"}', "", "{vocab} is no vocabulary: it must be a JSON object of token: id"),
        ('{"a": 1}', "", "{vocab} has no token '<|startoftext|>': it is not this model's file"),
        (
            '{"<|startoftext|>": 0, "<|endoftext|>": 1}',
            "#version: 0.2\na b c\n",
            "{merges}, line 2: 'a b c' is not a pair of symbols",
        ),
        (
            '{"<|startoftext|>": 0, "<|endoftext|>": 1}',
            "#version: 0.2\na b\n",
            "{merges} does not fit its vocabulary: Error while initializing BPE: Token `a` out of "
            "vocabulary",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_vocabulary_are_named(
    tmp_path: Path, vocab: str | None, merges: str, message: str
) -> None:
    vocab_path, merges_path = tmp_path / "vocab.json", tmp_path / "merges.txt"
    if vocab is not None:
        vocab_path.write_text(vocab)
    merges_path.write_text(merges)
    with pytest.raises(BundleError) as caught:
        ClipTokenizer.from_files(vocab_path, merges_path)
    assert str(caught.value) == message.format(vocab=vocab_path, merges=merges_path)


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^vocab_size is 100: it must be at least 514$"):
        write_clip_vocabulary(["a"], tmp_path, 100)


def test_the_same_captions_give_the_same_vocabulary(vocabulary: Path, tmp_path: Path) -> None:
    write_clip_vocabulary(captions(2000), tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (vocabulary / name).read_bytes()
