"""The graphs' times in a process of their own, round by round.

Where a process's memory lies decides what its runs find in the caches, so that all runs of one
process are faster or slower than those of another, by more than they differ among themselves.
Only runs of several processes show how far times of the same graph spread.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby

from runtime.bundle import Bundle
from runtime.conditions import cores
from runtime.fresh_process import MakeEngine, answers
from runtime.measure import TimedRun, timed_runs
from runtime.noise import NoiseWatch, Watched


@dataclass(frozen=True, slots=True)
class Round:
    """The runs of a round, and what went on in the process's time until its end."""

    runs: tuple[TimedRun, ...]
    watched: Watched


def fresh_rounds(
    make_engine: MakeEngine, bundle: Bundle, threads: int | None, *, rounds: int, at_most_s: float
) -> Generator[Round, None, None]:
    """Returns an iterator of the rounds of a fresh process as they are done, the one that warms
    up first. Closing it ends the process.

    Args:
        make_engine: Named at the top of a module, so that the process can import it.
        bundle: Whose graphs they are.
        threads: Of the engine.
        rounds: See `timed_runs`.
        at_most_s: Likewise.
    """
    given = (make_engine, bundle, threads, rounds, at_most_s)
    return answers(_rounds, *given, does="times the graphs")


def _rounds(
    make_engine: MakeEngine, bundle: Bundle, threads: int | None, rounds: int, at_most_s: float
) -> Iterator[Round]:
    engine = make_engine(bundle, threads)
    watch = NoiseWatch(threads or cores())
    timed = timed_runs(engine, bundle, bundle.graphs, rounds=rounds, at_most_s=at_most_s)
    for _, runs in groupby(timed, key=lambda run: run.round_index):
        done = tuple(runs)
        watch.tick()
        yield Round(done, watch.watched())
