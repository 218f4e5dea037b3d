"""The `cq-edge` command: finds the subcommand, turns errors into one sentence and an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cq_edge.errors import CQEdgeError, UsageError

PROG = "cq-edge"
_EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 1, 2, 130

_DESCRIPTION = """\
Makes a text-to-image diffusion model small and fast enough for a phone or a laptop:
quantised, with cached features, planned, exported and checked against the original."""

_EXAMPLES = """\
examples:
  cq-edge build -o demo
      builds a bundle from the built-in demo model
  cq-edge generate demo "a large red star above a small blue ring on a yellow background"
      makes a picture from it, offline

  cq-edge plan demo --budget-ms 500
      shows the best plan for half a second a picture on this machine

`cq-edge COMMAND --help` says the rest.
exit codes: 0 done, 1 failed (one sentence on stderr says why), 2 wrong usage, 130 interrupted"""


class Command(Protocol):
    """What a module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the subcommand's arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Does the work and returns the exit code."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    summary: str
    load: Callable[[], Command]


def _load_build() -> Command:
    from apps import build

    return build


def _load_generate() -> Command:
    from apps import generate

    return generate


def _load_measure() -> Command:
    from apps import measure

    return measure


def _load_plan() -> Command:
    from apps import plan

    return plan


def _load_evaluate() -> Command:
    from apps import evaluate

    return evaluate


def _load_verify() -> Command:
    from apps import verify

    return verify


_COMMANDS = {
    "build": _Entry("turn a pipeline into a bundle", _load_build),
    "measure": _Entry("time a bundle's graphs on a device", _load_measure),
    "plan": _Entry("choose which steps run the full graph, for a budget of time", _load_plan),
    "generate": _Entry("make pictures from a bundle", _load_generate),
    "verify": _Entry("check a bundle's files and graphs again", _load_verify),
    "evaluate": _Entry("compare speed, size and quality with float32", _load_evaluate),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: The arguments after the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(words).parse_args(words)
        return _COMMANDS[args.command].load().run(args)
    except SystemExit as stop:  # argparse printed its help (0) or its complaint (2)
        return stop.code if isinstance(stop.code, int) else _EXIT_USAGE
    except CQEdgeError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return _EXIT_USAGE if isinstance(error, UsageError) else _EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Returns the parser; only the subcommand that is asked for is imported."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, entry in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=entry.summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == asked:
            entry.load().add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
