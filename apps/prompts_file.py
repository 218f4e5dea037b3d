"""What `--prompts FILE` holds: one prompt a line."""

from pathlib import Path

from cq_edge.errors import UsageError


def read_prompts(path: Path) -> tuple[str, ...]:
    """Returns the prompts of a file, blank lines left out.

    Raises:
        UsageError: It cannot be read, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"--prompts {path} holds no prompt: write one a line")
    return prompts
