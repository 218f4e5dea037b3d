from itertools import islice

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from cq_edge.errors import ModelError
from cq_edge.model.load import DEMO_MODEL
from cq_edge.model.vocabulary import write_vocabulary
from cq_edge.scenes import scenes
from runtime.tokenizer import ClipTokenizer


def test_the_two_files_read_back_as_the_same_tokenizer(tmp_path):
    original = CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")
    write_vocabulary(original, tmp_path)
    ours = ClipTokenizer.from_files(
        tmp_path / "vocab.json",
        tmp_path / "merges.txt",
        max_length=77,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    for scene in islice(scenes(8, held_out=True), 50):
        caption = scene.caption()
        theirs = original(caption, padding="max_length", truncation=True)["input_ids"]
        assert ours.encode(caption)[0][0].tolist() == theirs


def test_the_shipped_files_are_those_of_the_shipped_tokenizer(tmp_path):
    write_vocabulary(CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer"), tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (DEMO_MODEL / "tokenizer" / name).read_bytes()


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError) as caught:
        write_vocabulary(words, tmp_path)
    assert str(caught.value) == (
        "the tokenizer's model is WordLevel: cq-edge needs CLIP's byte-pair encoding"
    )
