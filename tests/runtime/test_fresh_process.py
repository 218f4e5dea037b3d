import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from apps.engines import ENGINES
from cq_edge.errors import BundleError
from runtime.bundle import open_bundle
from runtime.fresh_process import load_and_run
from tests.tiny_bundle import FakeEngine


class Hoarder(FakeEngine):
    """Keeps 64 MiB when it loads a graph."""

    def load(self, graph):
        if graph not in self.loaded:
            super().load(graph)
            self.kept = np.ones(8 * 2**20)


class Fallen(FakeEngine):
    """Ends its process."""

    def load(self, _):
        os._exit(9)


class Refusing(FakeEngine):
    """Says why it cannot."""

    def load(self, graph):
        raise BundleError(f"no {graph} today")


def test_a_real_graph_is_loaded_and_run_in_another_process(real_bundle):
    found = load_and_run(ENGINES["xnnpack"], real_bundle, 1, "denoise", cold=False)
    assert 0 < found.load_ms < 5_000
    assert 0 <= found.peak_memory_mib < 200


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_a_cold_load_reads_the_disk(real_bundle, tmp_path):
    # of its own: what another engine in this process has mapped cannot be dropped
    bundle = open_bundle(shutil.copytree(real_bundle.folder, tmp_path / "bundle"))

    def read_mib(*, cold):
        return load_and_run(ENGINES["xnnpack"], bundle, 1, "decode", cold=cold).read_mib

    # a system that is short of memory lets go of the libraries' pages, and reads them again
    assert any(read_mib(cold=False) == 0 for _ in range(5))
    if tmp_path.stat().st_dev != Path("/dev/shm").stat().st_dev:
        assert read_mib(cold=True) > 0


def test_the_peak_is_what_the_graph_adds(bundle):
    found = load_and_run(Hoarder, bundle, None, "encode", cold=False)
    assert 60 < found.peak_memory_mib < 80


def test_a_process_that_falls_is_told(bundle):
    with pytest.raises(BundleError, match="loads graph encode ended with exit code 9: is there"):
        load_and_run(Fallen, bundle, None, "encode", cold=False)


def test_an_engines_own_sentence_comes_through(bundle):
    with pytest.raises(BundleError, match=r"^no encode today$"):
        load_and_run(Refusing, bundle, None, "encode", cold=False)
