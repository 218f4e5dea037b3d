"""The project itself: a bundle, by a plan."""

import json
from pathlib import Path

from apps.engines import engine_for
from apps.plan_option import choose_schedule
from benchmarks.rivals.task import LoopRun, Task
from cq_edge.cache_schedule import CacheSchedule
from cq_edge.errors import UsageError
from cq_edge.reuse_table import ReuseTable
from runtime.bundle import open_bundle
from runtime.denoise import Guidance, denoise

_SIZES = "unet_bytes.json"


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
        """Notes what the UNet takes of the bundles' graphs; `cq-edge build` has made those."""
        from exporters.method_bytes import method_bytes, together

        sizes = {}
        for name, folder in (("float32", task.float32), ("int8", task.bundle)):
            if folder is not None:
                methods = method_bytes(folder / "graphs.pte")
                found = together(methods[graph] for graph in ("denoise", "denoise_shallow"))
                sizes[name] = found.total_bytes
        (work / _SIZES).write_text(json.dumps(sizes), encoding="utf-8")

    def load(self, task: Task, work: Path) -> None:
        """Opens the bundle and chooses the cache schedule."""
        self._sizes: dict[str, int] = json.loads((work / _SIZES).read_text(encoding="utf-8"))
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
        negative, prompt = ({"embeddings": told} for told in task.branches(picture))
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
        """Returns the size of the full and the shallow graph, shared weights once, and with a plan
        of the reuse table."""
        size = self._sizes["int8" if self._quantised else "float32"]
        own = (self._task.noise_scheduler, self._task.steps)
        for table in self._bundle.manifest.reuse_tables:
            if self._planned and (table.noise_scheduler, table.steps) == own:
                size += self._bundle.manifest.files[table.file].bytes
        return size

    def _choose(self, total: int) -> CacheSchedule:
        """Returns the cache schedule of a loop of so many steps."""
        table = self._table
        if table is None:
            return CacheSchedule.all_full(total)
        plan = self._task.plan if self._quantised else self._task.float32_plan
        return choose_schedule(plan, total, lambda: table)
