"""A CLIP vocabulary for captions of our own: few words, but every byte still has a token."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
MAX_LENGTH = 77
_END_OF_WORD = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_clip_vocabulary(captions: Iterable[str], folder: Path, vocab_size: int = 1024) -> None:
    """Writes a tokenizer that `CLIPTokenizer.from_pretrained(folder)` loads.

    The layout of the vocabulary is CLIP's: 256 byte symbols, the same 256 ending a word, one
    token per merge, `<|startoftext|>`, `<|endoftext|>`. The same captions give the same files.

    Args:
        captions: Texts to learn merges from; must end.
        folder: Gets vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json;
            made if it is not there, files of these names are replaced.
        vocab_size: Tokens at most, 514 or more; there are fewer where the captions' words are
            all whole tokens already.

    Raises:
        ValueError: `vocab_size` is below 514.

    Source: the layout of OpenAI CLIP's simple_tokenizer.py.
    """
    letters = _byte_symbols()
    symbols = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    room = vocab_size - len(symbols) - 2
    if room < 0:
        raise ValueError(f"vocab_size is {vocab_size}: it must be at least {len(symbols) + 2}")
    merges = _learn_merges(captions, room)
    tokens = [*symbols, *(left + right for left, right in merges), BOS_TOKEN, EOS_TOKEN]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
    }
    _write_json(folder / "special_tokens_map.json", special)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    _write_json(folder / "tokenizer_config.json", config)


def _learn_merges(captions: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Returns at most `count` merges, the most useful first."""
    learner = Tokenizer(BPE(end_of_word_suffix=_END_OF_WORD, continuing_subword_prefix=""))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # 512: the most symbols there can be before the first merge
    trainer = BpeTrainer(
        vocab_size=512 + count,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=_END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges[:count]]


def _byte_symbols() -> list[str]:
    """Returns the printable stand-in of each byte, printable bytes first, as CLIP orders them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
