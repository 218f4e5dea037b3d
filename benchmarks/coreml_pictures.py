"""`python -m benchmarks.coreml_pictures BUNDLE`: Core ML's pictures against ExecuTorch's.

Of a bundle built with `--backend executorch,coreml`: `cq-edge generate` draws the same prompts
and seeds with both engines, with the full graph at every step and with the bundle's own plan.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apps.cli import main as cq_edge
from cq_edge.errors import CQEdgeError
from cq_edge.metrics import psnr_db

_PROMPTS = ("a large red circle on a plain white background", "a small green ring")
_PLANS = {"every step full": ["--plan", "full"], "the bundle's plan": []}


def main() -> int:
    """Prints the table as Markdown and returns the exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| plan | PSNR of Core ML's picture to ExecuTorch's, dB |")
    print("| --- | --- |")
    for plan, words in _PLANS.items():
        asked = [str(args.bundle), *_PROMPTS, "--seed", str(args.seed), *words]
        pictures = [_drawn([*asked, "--engine", engine]) for engine in ("executorch", "coreml")]
        ratios = [psnr_db(ours, theirs) for ours, theirs in zip(*pictures, strict=True)]
        print(f"| {plan} | {', '.join(f'{db:.1f}' for db in ratios)} |", flush=True)
    return 0


def _drawn(words: Sequence[str]) -> list[np.ndarray]:
    """Returns the pictures that `cq-edge generate` writes, by name."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        code = cq_edge(["generate", *words, "-o", f"{scratch}/"])
        if code != 0:
            raise CQEdgeError(f"cq-edge generate {' '.join(words)} returned {code}")
        return [np.asarray(Image.open(path)) for path in sorted(Path(scratch).glob("*.png"))]


if __name__ == "__main__":
    sys.exit(main())
