"""CLIP's two vocabulary files, from whatever form a tokenizer was loaded in."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from cq_edge.errors import ModelError


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes `vocab.json` and `merges.txt` of a byte-pair tokenizer; makes the folder.

    transformers 5 keeps both in one `tokenizer.json`; the two files are what CLIP published
    and what every other runtime reads.

    Raises:
        ModelError: If the tokenizer is not a byte-pair one.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"the tokenizer's model is {model.get('type')}: cq-edge needs CLIP's byte-pair encoding"
        )
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    text = json.dumps(vocabulary, ensure_ascii=False, indent=0)
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    lines = ["#version: 0.2", *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
