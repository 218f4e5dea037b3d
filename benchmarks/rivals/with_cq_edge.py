"""The project itself: a bundle, by a plan."""

from pathlib import Path

from apps.engines import engine_for
from apps.plan_option import choose_schedule
from benchmarks.rivals.task import LoopRun, Task
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.reuse_table import ReuseTable
from runtime.bundle import open_bundle
from runtime.denoise import Guidance, denoise


class CQEdge:
    """A bundle's graphs.

    Args:
        quantised: Whether it is the int8 bundle or the float32 one.
        planned: Whether it runs by the task's plan for it, or every step full.
    """

    libraries = ("executorch",)
    files = "cq_edge"

    def __init__(self, quantised: bool, planned: bool = False) -> None:
        self._quantised, self._planned = quantised, planned

    def prepare(self, task: Task, work: Path) -> None:
        """Does nothing: bundles are built by `cq-edge build`."""

    def load(self, task: Task, work: Path) -> None:  # noqa: ARG002 - the protocol's
        """Opens the bundle and chooses the cache schedule."""
        folder = task.bundle if self._quantised else task.float32
        if folder is None:
            raise UsageError("no such bundle was given")
        self._task, self._bundle = task, open_bundle(folder)
        self._engine = engine_for(self._bundle, task.threads)
        self._table: ReuseTable | None = None
        if self._planned:
            self._table = self._bundle.reuse_table(task.noise_scheduler, task.steps)
        self._schedule = self._choose(len(task.timesteps))

    def run(self, picture: int, steps: int) -> LoopRun:
        """Runs the project's own loop."""
        task, scheduler = self._task, self._task.make_noise_scheduler()
        negative, prompt = task.branches(picture)
        latents, steps_ms = task.latents(picture), []
        guidance = Guidance(prompt, negative, task.guidance)
        for record in denoise(
            self._engine, scheduler, self._schedule, latents, guidance, self._table
        ):
            latents = record.latents
            steps_ms.append(record.elapsed_ms)
            if record.step + 1 == steps:
                break
        return LoopRun(latents, tuple(steps_ms), self._schedule.to_string()[:steps])

    def modes(self) -> str:
        """Returns the cache schedule of the loop that is meant."""
        return self._choose(len(self._task.whole_timesteps)).to_string()

    def disk_bytes(self) -> int:
        """Returns the size of the graphs (of the text encoder and the decoder too) and, with a
        plan, of the reuse table."""
        files = self._bundle.manifest.files
        names = list(self._bundle.graph_files())
        if self._planned:
            own = (self._task.noise_scheduler, self._task.steps)
            tables = self._bundle.manifest.reuse_tables
            names += [t.file for t in tables if (t.noise_scheduler, t.steps) == own]
        return sum(files[name].bytes for name in names)

    def _choose(self, total: int) -> CacheSchedule:
        """Returns the cache schedule of a loop of so many steps."""
        table = self._table
        if table is None:
            return CacheSchedule.all_full(total)
        plan = self._task.plan if self._quantised else self._task.float32_plan
        return choose_schedule(plan, total, lambda: table)
