"""The frontier of an evaluation as a picture.

    python -m benchmarks.frontier_figure docs/evaluation.json docs/frontier.png

The first file is what `cq-edge evaluate --json` wrote.
"""

import argparse
import json
from pathlib import Path

from apps.evaluate_report import frontier_plot


def main() -> None:
    """Draws the frontier that a file of `cq-edge evaluate --json` holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluation", type=Path, help="of `cq-edge evaluate --json`")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    report = json.loads(args.evaluation.read_text(encoding="utf-8"))
    args.picture.write_bytes(frontier_plot(report["frontier"]))


if __name__ == "__main__":
    main()
