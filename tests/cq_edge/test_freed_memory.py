import mmap
import sys

import pytest

from cq_edge.freed_memory import forget_pages, give_back


def _resident_kib(path):
    """What this process holds of a file in memory."""
    lines = open("/proc/self/smaps").read().splitlines()  # noqa: SIM115, PTH123
    places = [i for i, line in enumerate(lines) if line.endswith(f" {path}")]
    return sum(int(next(x for x in lines[i:] if x.startswith("Rss:")).split()[1]) for i in places)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_pages_of_a_mapped_file_are_let_go_and_read_again_when_needed(tmp_path):
    path = tmp_path / "a file of pages"
    content = bytes(range(256)) * 4096  # 1 MiB
    path.write_bytes(content)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:] == content
        assert _resident_kib(path) >= 1024

        forget_pages(path)

        assert _resident_kib(path) == 0
        assert mapped[:] == content


def test_giving_freed_memory_back_needs_no_particular_system():
    give_back()
