"""A page that several benchmarks write, each its own section."""

import re
from pathlib import Path

from apps.replacing import write_whole


def write_section(page: Path, name: str, text: str) -> None:
    """Writes a section of a page between its marks; what stands outside them stays."""
    begin, end = f"<!-- {name}: written by a benchmark -->", f"<!-- end of {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if pattern.search(before):
        after = pattern.sub(lambda _: section, before)
    else:
        after = (f"{before.rstrip()}\n\n" if before.strip() else "") + f"{section}\n"
    write_whole(page, after)
