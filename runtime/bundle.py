"""Opens a bundle's folder: what it holds, checked before anything runs."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cq_edge.errors import BundleError
from cq_edge.latency import GRAPHS
from cq_edge.manifest import Manifest, read_manifest, verify_files
from cq_edge.reuse_table import ReuseTable
from runtime.tokenizer import ClipTokenizer


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder and the manifest that describes it."""

    folder: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """Returns where one of the manifest's files lies."""
        return self.folder / relative

    @property
    def graphs(self) -> tuple[str, ...]:
        """The names of the bundle's graphs, in the order in which a picture needs them."""
        return tuple(graph for graph in GRAPHS if graph in self.manifest.graphs)

    def graph_files(self) -> tuple[str, ...]:
        """Returns the files of the graphs, those within packages too."""
        graphs = {entry.file for entry in self.manifest.graphs.values()}
        return tuple(
            name
            for name in sorted(self.manifest.files)
            if any(name == graph or name.startswith(f"{graph}/") for graph in graphs)
        )

    def graphs_sha256(self) -> str:
        """Returns the digest of the graphs: of their file, or where they are several files (as
        packages are) of the list of those files' digests."""
        digests = {name: self.manifest.files[name].sha256 for name in self.graph_files()}
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
        return hashlib.sha256(lines.encode()).hexdigest()

    def for_backend(self, backend: str) -> Self:
        """Returns the bundle as if it had been built for this backend alone.

        Raises:
            BundleError: It has no graphs for it.
        """
        return replace(self, manifest=self.manifest.for_backend(backend))

    def calibrated(self) -> tuple[tuple[str, int], ...]:
        """Returns the (noise scheduler, sampler steps) pairs that have a reuse table."""
        return tuple((t.noise_scheduler, t.steps) for t in self.manifest.reuse_tables)

    def reuse_table(self, noise_scheduler: str, steps: int) -> ReuseTable:
        """Returns the reuse table of a noise scheduler at a number of sampler steps.

        Raises:
            BundleError: The bundle was not calibrated for them (the message names those it
                was calibrated for), or the table's file is of another pair.
        """
        for entry in self.manifest.reuse_tables:
            if (entry.noise_scheduler, entry.steps) == (noise_scheduler, steps):
                table = ReuseTable.load(self.path(entry.file))
                if (table.noise_scheduler, table.steps) != (noise_scheduler, steps):
                    raise BundleError(
                        f"{entry.file} is a reuse table for {table.noise_scheduler} at "
                        f"{table.steps} steps, but the manifest says {noise_scheduler} at "
                        f"{steps} steps: build the bundle again"
                    )
                return table
        known = " or ".join(f"{name} at {count} steps" for name, count in self.calibrated())
        raise BundleError(
            f"{self.folder} is not calibrated for {noise_scheduler} at {steps} steps: "
            + (f"use {known}, or run every step full" if known else "run every step full")
        )

    def reuse_tables(
        self, noise_scheduler: str | None = None, steps: int | None = None
    ) -> tuple[ReuseTable, ...]:
        """Returns the tables to choose a plan from, the default noise scheduler and steps first.

        Args:
            noise_scheduler: Only of this one; None for any.
            steps: Only of so many; None for any.

        Raises:
            BundleError: The bundle was not calibrated for what is asked, or a file is wrong.
        """
        defaults = self.manifest.defaults
        own = (defaults.noise_scheduler, defaults.steps)
        fitting = [
            (name, count)
            for name, count in self.calibrated()
            if noise_scheduler in (None, name) and steps in (None, count)
        ]
        if not fitting:
            return (self.reuse_table(noise_scheduler or own[0], steps or own[1]),)  # says why not
        fitting.sort(key=lambda pair: pair != own)
        return tuple(self.reuse_table(*pair) for pair in fitting)

    def tokenizers(self) -> tuple[ClipTokenizer, ...]:
        """Returns the tokenizers of the bundle's own vocabularies, one for each input of the
        encode graph.

        Raises:
            BundleError: Their files are no CLIP vocabulary.
        """
        return tuple(
            ClipTokenizer.from_files(
                self.path(entry.vocab),
                self.path(entry.merges),
                max_length=entry.max_length,
                bos_token=entry.bos_token,
                eos_token=entry.eos_token,
                pad_token=entry.pad_token,
            )
            for entry in self.manifest.tokenizers
        )


def open_bundle(folder: Path, verify: bool = True) -> Bundle:
    """Returns the bundle in a folder.

    Args:
        folder: Holds manifest.json and the files it names.
        verify: Whether to read every file and compare its sha256; presence and size are
            checked either way.

    Raises:
        BundleError: The folder is no bundle, or a file is missing, truncated or changed.
    """
    manifest = read_manifest(folder)
    if verify:
        verify_files(folder, manifest)
    return Bundle(folder, manifest)
