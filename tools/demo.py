"""`make demo`: the built-in demo model becomes a bundle, and the bundle a few pictures, offline."""

import argparse
import os
from pathlib import Path

PROMPTS = (
    "a large red star above a small blue ring on a yellow striped background",
    "a green circle to the left of a purple cross on a plain white background",
    "a big white triangle on a blue checked background",
    "an orange square on a black gradient background",
)


def main() -> int:
    """Builds, then generates each prompt with the bundle's plan beside every step full."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/demo"))
    folder = parser.parse_args().folder
    # the demo proves that nothing is fetched: the libraries are told so before they load
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from apps import cli

    bundle = str(folder / "bundle")
    failed = cli.main(["build", "--output", bundle, "--force"])
    if failed:
        return failed
    pictures = str(folder / "pictures")
    return cli.main(["generate", bundle, *PROMPTS, "-o", pictures, "--compare-full", "--force"])


if __name__ == "__main__":
    raise SystemExit(main())
