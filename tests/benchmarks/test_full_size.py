from benchmarks.full_size import page
from benchmarks.page_section import write_section

_FIGURES = {"p50_ms": 2000.0, "p10_ms": 1900.0, "p90_ms": 2300.0, "peak_memory_mib": 2048.0}
_FOUND = {
    "build": {
        "unet_float32_bytes": 3_438_083_856,
        "unet_compression": 3.99,
        "peak_memory_mib": 8192.0,
        "seconds": 750.0,
        "stages": {"load": {"seconds": 20.0, "peak_memory_mib": 5120.0}},
        "prompts": 1,
        "steps": 4,
        "max_gap": 3,
        "processor": "a processor",
        "cores": 1,
    },
    "measure": {
        "graphs": {
            "encode": _FIGURES,
            "denoise": _FIGURES,
            "denoise_shallow": {**_FIGURES, "p50_ms": 200.0},
            "decode": _FIGURES,
        },
        "conditions": {"rounds": 3, "threads": 1, "engine": "xnnpack", "noise": "quiet"},
    },
    "verify": {"good": True},
}


def test_a_row_says_what_was_found_and_leaves_open_what_was_not():
    text = page({"sd15, int8": _FOUND})
    assert (
        "| sd15, int8 | 862 | 3.99 | 8.00 | 12 | – | 2000 (1900–2300) | 200 (1900–2300) | 10.0% |"
    ) in text
    assert "stages, with the peak by their end: load 20 s (5.0 GiB)." in text
    assert "1 thread, xnnpack; the machine: quiet." in text
    assert text.endswith("`cq-edge verify` finds it good.")


def test_a_section_is_written_between_its_marks_and_the_rest_of_the_page_stays(tmp_path):
    page_file = tmp_path / "benchmarks.md"
    page_file.write_text("# Benchmarks\n\nOurs.\n")
    write_section(page_file, "one", "first")
    write_section(page_file, "two", "second")
    before, end = page_file.read_text().split("first")
    assert before.startswith("# Benchmarks\n\nOurs.\n\n")

    write_section(page_file, "one", "third")

    assert page_file.read_text() == f"{before}third{end}"
