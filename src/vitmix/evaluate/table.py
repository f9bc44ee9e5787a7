"""The table of a comparison: mean and standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

__all__ = ["as_markdown", "as_text", "best_row", "header", "spread", "summarise", "table_rows"]


def header(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the columns; differences are against the first method."""
    against = f"top-1 vs. {summaries[0]['method']}"
    return ["method", "seeds", "top-1 %", "top-5 %", "test loss", against, "time"]


def summarise(method: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations of a method's results; the deviation of one run is None."""
    row: dict[str, Any] = {"method": method, "seeds": [run["seed"] for run in runs]}
    for key in ("top1", "top5", "loss", "best_top1", "seconds"):
        values = [run[key] for run in runs]
        row[key] = fmean(values)
        row[f"{key}_sd"] = stdev(values) if len(values) > 1 else None
        row[f"{key}_runs"] = values
    return row


def table_rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table, one row a method."""
    first = summaries[0]
    rows = []
    for row in summaries:
        gain = "" if row is first else f"{row['top1'] - first['top1']:+.2f}"
        rows.append(
            [
                row["method"],
                str(len(row["seeds"])),
                spread(row["top1_runs"], 2),
                spread(row["top5_runs"], 2),
                spread(row["loss_runs"], 3),
                gain,
                f"{row['seconds']:.0f} s",
            ]
        )
    return rows


def best_row(summaries: Sequence[dict[str, Any]]) -> int:
    """Position of the method with the highest top-1."""
    return max(range(len(summaries)), key=lambda index: float(summaries[index]["top1"]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation, for people; empty without values.

    >>> spread([1.0, 2.0]), spread([1.0]), spread([])
    ('1.50 ± 0.71', '1.00', '')
    """
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in columns, for a terminal."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [
        "| " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * (len(head) - 1),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
