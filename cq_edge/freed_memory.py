"""Memory that is not needed goes back to the system, instead of waiting for the next need."""

import ctypes
import mmap
import sys
from pathlib import Path


def give_back() -> None:
    """Asks the C library to give freed memory back; nothing where it is not glibc.

    After large buffers were freed, glibc keeps later ones on its heap: 400 MB of an unloaded
    Stable Diffusion 1.5 would stay with the process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def forget_pages(path: Path) -> None:
    """Lets go of what this process has in memory of a file that it maps; the system reads again
    what is needed again. Does nothing where the system has no /proc.

    ExecuTorch locks a program's constants into memory, and copies most of them: a program of
    Stable Diffusion 1.5 holds 145 MB of token embeddings, that of the decoder too.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    library, file = ctypes.CDLL(None), str(path.resolve())
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, permissions, *_, mapped = line.split(maxsplit=5)
        if mapped != file or "w" in permissions:
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        place = (ctypes.c_void_p(start), ctypes.c_size_t(end - start))
        library.munlock(*place)
        library.madvise(*place, mmap.MADV_DONTNEED)
