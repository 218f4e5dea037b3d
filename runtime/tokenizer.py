"""CLIP tokenisation from a bundle's own vocab.json and merges.txt."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cq_edge.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Turns a prompt into the token ids that CLIP's text tower reads.

    Equal to transformers' `CLIPTokenizer`, token for token, without transformers.
    """

    def __init__(self, tokenizer: "Tokenizer", max_length: int, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._pad_id = pad_id

    @classmethod
    def from_files(
        cls,
        vocab: Path,
        merges: Path,
        *,
        max_length: int = 77,
        bos_token: str = "<|startoftext|>",
        eos_token: str = "<|endoftext|>",
        pad_token: str = "<|endoftext|>",
    ) -> "ClipTokenizer":
        """Returns the tokenizer that two files describe.

        Args:
            vocab: JSON object, token → id.
            merges: One pair of symbols a line, the first line "#version: …".
            max_length: Ids per prompt, the first and last token included; 3 or more.
            bos_token: Opens every prompt; in the vocabulary.
            eos_token: Closes every prompt, and stands for unknown symbols; in the vocabulary.
            pad_token: Fills up after the closing token; in the vocabulary.

        Raises:
            BundleError: A file is missing or is no vocabulary, or lacks one of the tokens.

        Source: `CLIPTokenizer` of transformers 5.23.0 (normaliser, word pattern, special tokens).
        """
        ids = _read_vocab(vocab)
        for token in (bos_token, eos_token, pad_token):
            if token not in ids:
                raise BundleError(f"{vocab} has no token {token!r}: it is not this model's file")
        if max_length < 3:
            raise BundleError(f"max_length is {max_length}: a prompt needs at least 3 tokens")
        tokenizer = _assemble(ids, _read_merges(merges), merges, (bos_token, eos_token, pad_token))
        return cls(tokenizer, max_length, ids[pad_token])

    def encode(self, text: str) -> tuple[NDArray[np.int64], str]:
        """Returns the ids of a prompt, and what of it did not fit.

        Args:
            text: Any string. A lone surrogate, which is no character and which transformers
                refuses with a TypeError, is read as U+FFFD, the replacement character.

        Returns:
            (1, max_length) int64, cut or padded; and the end of `text` from the first token
            that was cut, "" where nothing was.
        """
        text = without_surrogates(text)
        encoding = self._tokenizer.encode(text)
        ids, room = encoding.ids, self._max_length
        cut = ""
        if len(ids) > room:
            # the closing token takes the last place, so the token that stood there is cut too
            cut = text[encoding.offsets[room - 1][0] :].strip()
            ids = [*ids[: room - 1], ids[-1]]
        padded = ids + [self._pad_id] * (room - len(ids))
        return np.array([padded], np.int64), cut


def without_surrogates(text: str) -> str:
    """Returns `text` with every lone surrogate replaced by U+FFFD, so that it can be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as a vocabulary: {error}") from error
    if not isinstance(content, dict) or not all(type(value) is int for value in content.values()):
        raise BundleError(f"{path} is no vocabulary: it must be a JSON object of token: id")
    return content


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as merges: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        pair = line.rstrip("\r").split(" ")
        if pair == [""] or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2:
            raise BundleError(f"{path}, line {number}: {line!r} is not a pair of symbols")
        merges.append((pair[0], pair[1]))
    return merges


def _assemble(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    merges_path: Path,
    special_tokens: tuple[str, str, str],
) -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    bos, eos, _ = special_tokens
    try:
        model = BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=eos,
        )
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"{merges_path} does not fit its vocabulary: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (eos, vocab[eos]), (bos, vocab[bos]), trim_offsets=False, add_prefix_space=False
    )
    unique = dict.fromkeys(special_tokens)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in unique])
    return tokenizer
