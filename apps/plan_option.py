"""What `--plan` may say, and the cache schedule it stands for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.planner import best_with_full_steps
from cq_edge.reuse_table import ReuseTable

PLAN_HELP = (
    "full; uniform:N (a full step every N); full-steps:N (the best plan with N full steps, by "
    "the reuse table); a mode per step, such as FSKfsD (F full, S shallow, K skip, small letters "
    "without the negative prompt, D and Q full twice and four times); or a JSON file "
    'with such modes, {"modes": "FSSFS"}'
)


def choose_schedule(
    plan: str, total_steps: int, reuse_table: Callable[[], ReuseTable]
) -> CacheSchedule:
    """Returns the cache schedule that a `--plan` text stands for.

    Args:
        plan: See `PLAN_HELP`.
        total_steps: T, the steps of the loop.
        reuse_table: Loads the table; called only by plans that are chosen by it.

    Raises:
        UsageError: The text is none of the forms, or its file cannot be read.
        ScheduleError: The schedule cannot be had.
        BundleError: There is no table and the plan needs one.
    """
    form, _, number = plan.partition(":")
    if plan == "full":
        return CacheSchedule.all_full(total_steps)
    if form == "uniform" and number.isdecimal():
        return CacheSchedule.uniform(total_steps, int(number))
    if form == "full-steps" and number.isdecimal():
        return best_with_full_steps(reuse_table().reuse_errors(), int(number))
    if re.fullmatch("[FSKfsDQ]+", plan):
        return CacheSchedule.from_string(plan)
    if plan.endswith(".json"):
        return _from_file(Path(plan))
    raise UsageError(f"--plan {plan!r} is none of: {PLAN_HELP}")


def _from_file(path: Path) -> CacheSchedule:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--plan {path} cannot be read as JSON: {error}") from error
    modes = content.get("modes") if isinstance(content, dict) else None
    if not isinstance(modes, str):
        raise UsageError(f'--plan {path} must hold an object such as {{"modes": "FSSFS"}}')
    return CacheSchedule.from_string(modes)
