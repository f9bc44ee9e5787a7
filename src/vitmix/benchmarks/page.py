"""Print what was measured, and write it down: text, JSON, docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vitmix.benchmarks.measure import Measured, Ratio
from vitmix.benchmarks.targets import Verdict
from vitmix.evaluate.table import as_markdown, as_text

__all__ = ["MARK", "measured_rows", "page_of", "target_rows", "text_of", "verdict_text"]

# What stands above this line in the page is written by hand and kept.
MARK = "<!-- written by vitmix bench from here on -->"

_TITLES = {
    "steps": "Whole training steps",
    "saliency": "The saliency step",
    "pixels": "The pixel stage",
    "gain": "The gain matrix",
    "horizontal": "Horizontal mixing alone",
    "growth": "Horizontal mixing in groups",
    "pipeline": "The input pipeline",
}
_TARGET_HEAD = ("what", "target", "clock", "quartiles", "processor", "noise", "")


def measured_rows(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a comparison's table."""
    figures = list(dict.fromkeys(name for row in measured.rows.values() for name in row.figures))
    head = ["variant", "ms", "clock", "quartiles", "processor", "quartiles", "peak MiB"]
    head += ["beyond results"] if measured.group in ("gain", "horizontal", "growth") else []
    head += ["images/s"] if measured.images and measured.group == "steps" else []
    rows = []
    for name, row in measured.rows.items():
        cells = [name, _plain(row.milliseconds)]
        for kind in ("clock", "processor"):
            ratio = measured.ratio(name, kind=kind)
            cells += [f"{_plain(ratio.median)} x", _quartiles(ratio)]
        cells.append(_mebibytes(row.memory.peak))
        if "beyond results" in head:
            cells.append(_mebibytes(row.memory.working))
        if "images/s" in head:
            cells.append(_plain(1e3 * measured.images / row.milliseconds))
        rows.append(cells + [_plain(row.figures.get(figure, math.nan)) for figure in figures])
    return head + figures, rows


def target_rows(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Cells of the table of targets; ratios that wait for a GPU share one row."""
    rows, waiting = [], 0
    for verdict in verdicts:
        target, ratio = verdict.target, verdict.ratio
        sign = "at least" if target.at_least else "at most"
        bound = f"{sign} {target.bound:.3g} {target.unit}"
        cells = [f"{target.what} ({target.key.partition(': ')[2]})", bound]
        if ratio is not None:
            others = (
                "" if each is None else f"{_plain(each.median)} x"
                for each in (verdict.processor, verdict.noise)
            )
            found = f"{_plain(ratio.median)} {target.unit}"
            rows.append([*cells, found, _quartiles(ratio), *others, _said(verdict)])
        elif not target.on_gpu:
            rows.append([*cells, "", "", "", "", "not measured"])
        elif target.unit == "x":
            waiting += 1
        else:
            rows.append([*cells, "", "", "", "", "waits for a GPU"])
    if waiting:
        what = f"GPU: {waiting} ratios of TL-Align, horizontal and vertical steps in bf16"
        rows.append([what, "at most 1.03 x or 1.05 x", "", "", "", "", "waits for a GPU"])
    return rows


def _said(verdict: Verdict) -> str:
    if verdict.reached:
        return "reached"
    return "reached by processor time" if verdict.reached_by_processor else "not reached"


def text_of(measured: Measured) -> str:
    """A comparison for a terminal."""
    rounds = len(next(iter(measured.rows.values())).clock)
    return f"{measured.key} ({rounds} rounds)\n{as_text(*measured_rows(measured))}\n"


def verdict_text(verdicts: Sequence[Verdict]) -> str:
    """The targets for a terminal."""
    return as_text(_TARGET_HEAD, target_rows(verdicts))


def page_of(
    found: Sequence[Measured], verdicts: Sequence[Verdict], machine: dict[str, Any], command: str
) -> str:
    """The generated part of docs/benchmarks.md."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{MARK}\n",
        f"Written by `{command}` on {machine['date']}, in {machine['minutes']:.0f} minutes: "
        f"{machine['device']}; {versions}.\n",
    ]
    if any(verdict.ratio is not None for verdict in verdicts):
        lines += ["## Targets\n", as_markdown(_TARGET_HEAD, target_rows(verdicts))]
    for group, title in _TITLES.items():
        mine = [each for each in found if each.group == group]
        if mine:
            lines.append(f"## {title}\n")
        for each in mine:
            rounds = len(next(iter(each.rows.values())).clock)
            lines.append(f"{each.title}; {rounds} rounds:\n")
            lines.append(as_markdown(*measured_rows(each)))
    return "\n".join(lines)


def _plain(value: float) -> str:
    """Four figures, or as many as stand before the point."""
    if math.isnan(value):
        return ""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def _quartiles(ratio: Ratio) -> str:
    return f"{_plain(ratio.low)} to {_plain(ratio.high)}"


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:.1f}"
