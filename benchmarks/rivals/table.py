"""The results as a report for programs, and as a section of a Markdown page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.rivals.alternate import Result
from benchmarks.rivals.contenders import REFERENCE
from benchmarks.rivals.quality import Quality

_HEAD = (
    "| | full step, ms | loop, ms | times as fast | peak memory, MiB | on disk, MB | latents, dB | "
    "PSNR, dB | CLIP score |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
_NONE = "–"


def rows(
    results: Sequence[Result], qualities: Mapping[str, Quality], total: int
) -> list[dict[str, Any]]:
    """Returns a row per contender, ready for JSON.

    Args:
        results: In the table's order, failed ones too.
        qualities: By contender, of those that have one.
        total: Steps of the whole loop. Where fewer ran, the loop's time is predicted from the
            steps' medians and says so.
    """
    reference = next((r for r in results if r.name == REFERENCE and r.failure is None), None)
    return [_row(r, reference, qualities.get(r.name), total) for r in results]


def _row(
    result: Result, reference: Result | None, quality: Quality | None, total: int
) -> dict[str, Any]:
    if result.failure is not None:
        return {"name": result.name, "failure": result.failure}
    found: dict[str, Any] = {
        "name": result.name,
        "versions": result.ready["versions"],
        "full_step_ms": _spread(result.step_ms("F")),
        "modes": result.modes,
        "peak_mib": result.peak_mib,
        "disk_bytes": result.ready["disk_bytes"],
    }
    loops, predicted = _loops_ms(result, total), len(result.modes) < total
    if loops is not None:
        found |= {"loop_ms": _spread(loops), "loop_is_predicted": predicted}
        found["loop_modes"] = dict(Counter(result.ready["modes"] if predicted else result.modes))
        against = None if reference is None else _loops_ms(reference, total)
        if against is not None:
            found["speedup"] = _spread([a / b for a, b in zip(against, loops, strict=True)])
    return found if quality is None else found | {"quality": asdict(quality)}


def _loops_ms(result: Result, total: int) -> list[float] | None:
    """Returns the loop's time in each round; where it was cut short, what the medians of its modes
    in that round add up to; None where a mode did not run or only running tells the modes."""
    if len(result.modes) == total:
        return result.loops_ms
    modes = result.ready["modes"]
    if modes is None or not set(modes) <= set(result.modes):
        return None
    counts = Counter(modes)
    return [
        sum(
            count * median(t for t, m in zip(steps, result.modes, strict=True) if m == mode)
            for mode, count in counts.items()
        )
        for steps in result.steps_ms
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the table with its failures and conditions."""
    alive = [row for row in report["rows"] if "failure" not in row]
    failed = [row for row in report["rows"] if "failure" in row]
    lines = [*_HEAD, *(_line(row) for row in alive)]
    lines += [f"| {row['name']} | failed: {_cell(row['failure'])} |{' |' * 7}" for row in failed]
    lines += ["", _conditions(report["conditions"], alive)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(row: Mapping[str, Any]) -> str:
    quality = row.get("quality", {})
    cells = [
        row["name"],
        _figure(row["full_step_ms"], 1),
        _loop(row),
        _figure(row.get("speedup"), 2),
        f"{row['peak_mib']:.0f}",
        f"{row['disk_bytes'] / 1e6:.1f}",
        _decibels(quality.get("latents_db")),
        _decibels(quality.get("psnr_db")),
        _clip(quality),
    ]
    return f"| {' | '.join(cells)} |"


def _loop(row: Mapping[str, Any]) -> str:
    if "loop_ms" not in row:
        return _NONE
    text = _figure(row["loop_ms"], 0)
    if len(row["loop_modes"]) > 1:
        full = sum(row["loop_modes"].get(mode, 0) for mode in "FfDQ")
        text += f", {full} steps full"
    return f"{text}, predicted" if row["loop_is_predicted"] else text


def _figure(spread: Mapping[str, float] | None, digits: int) -> str:
    if spread is None:
        return _NONE
    low, mid, high = (f"{spread[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{mid} ({low}–{high})"


def _decibels(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _clip(quality: Mapping[str, Any]) -> str:
    if quality.get("clip") is None:
        return _NONE
    delta, low, high = quality["clip_delta"]
    return f"{quality['clip']:.2f} ({delta:+.2f}: {low:+.2f} to {high:+.2f})"


def _conditions(conditions: Mapping[str, Any], alive: Sequence[Mapping[str, Any]]) -> str:
    versions = {k: v for row in alive for k, v in row["versions"].items()}
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    cut = ""
    if conditions["steps_run"] < conditions["steps_of_loop"]:
        cut = (
            f" Only {conditions['steps_run']} steps ran: whole loops are predicted from the "
            "medians of a full and of a shallow step, where those tell."
        )
    kept = conditions["kept_loaded"]
    loading = "" if kept else ", loaded anew for each turn"
    warm_up = "one to warm up" if kept else "a step to warm up"
    return (
        f"Conditions: {conditions['processor']}, threads: {conditions['threads']}, "
        f"{conditions['model']}, {conditions['latents']} latents, "
        f"{conditions['noise_scheduler'].upper()}, {conditions['steps']} "
        f"steps (the UNet is asked {conditions['steps_of_loop']} times), guidance "
        f"{conditions['guidance']:g} (two branches a step), {conditions['rounds']} loops of each "
        f"after {warm_up}, in turns, a process each{loading}; figures are medians "
        f"(least–most), ratios are within a round.{cut} Other processes kept "
        f"{conditions['other_cores_busy']:.2f} other cores busy meanwhile. {conditions['date']}. "
        f"{libraries}."
    )
