"""The same work on many items, in processes side by side."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from cq_edge.errors import CQEdgeError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    begin: Callable[..., None],
    *given: Any,
) -> Generator[Result, None, None]:
    """Yields what the work makes of each item, in order.

    Closing the iterator ends the processes, and all others that were started meanwhile.

    Args:
        work: Named at the top of a module, so that a process can import it; so is `begin`.
        items: Taken as they are needed, two for each process ahead.
        processes: How many.
        begin: What each process does first.
        given: What `begin` is told.

    Raises:
        CQEdgeError: The work raised it, or a process was killed or could not begin.
    """
    others = {*multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (begin, given))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise CQEdgeError(
            f"one of {processes} processes was killed or could not begin: is there too little "
            "memory for so many? With --keep, the next run goes on from what was drawn"
        ) from None
    else:
        pool.shutdown()  # all is done: each process ends by itself
    finally:
        for process in {*multiprocessing.active_children()} - others:
            process.kill()  # nobody waits for what it may be at
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which ends the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*given)


def _end_with_parent() -> None:
    """Ends this process when the one that waits for it was killed, and will not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
