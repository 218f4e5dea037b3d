"""Runs a command of `cq-edge` in a process of its own and sends it Ctrl-C."""

import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def interrupted(words: Sequence[str], stage: str) -> tuple[int, str]:
    """Sends Ctrl-C once what the command says on stderr matches `stage`; returns its exit code
    and all that it said there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.cli", *words],
        cwd=_ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a shell's background jobs, which tests may be among, ignore Ctrl-C, and so would theirs
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    try:
        while not re.search(stage, said):
            read = process.stderr.read(1) if process.stderr else ""
            assert read, said
            said += read
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said + rest
