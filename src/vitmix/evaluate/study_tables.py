"""The tables of a study: means, deviations, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from scipy import stats

from vitmix.evaluate.table import as_markdown, as_text, spread, summarise
from vitmix.train.folder import write_json, write_text
from vitmix.train.provenance import commit, versions

if TYPE_CHECKING:
    from vitmix.evaluate.study import Study
    from vitmix.evaluate.study_results import Runs

__all__ = ["NOTE", "ROUNDED", "as_tables", "paired", "show", "summaries_of", "write_tables"]


ROUNDED = 1e-4  # accuracies in percent are rounded to this


def paired(runs: Sequence[float], others: Sequence[float], rounded: float = 0.0) -> dict[str, Any]:
    """Differences seed by seed: their mean, deviation, 95% interval and two-sided t-test.

    Args:
        runs: a figure a seed.
        others: the same, of what it is compared with.
        rounded: what the figures are rounded to; a deviation up to that is none.

    Returns:
        ``mean``; with two seeds or more ``sd``, ``half_width`` of the interval, and ``p``, which is
        None where all differences are the same.

    Example:
        >>> found = paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
        >>> found["mean"], found["sd"], round(found["p"], 4)
        (2.0, 1.0, 0.0742)
    """
    differences = [one - other for one, other in zip(runs, others, strict=True)]
    count = len(differences)
    found: dict[str, Any] = {"mean": fmean(differences), "seeds": count}
    if count < 2:
        return found
    deviation = stdev(differences)
    deviation = deviation if deviation > rounded else 0.0
    found["sd"] = deviation
    found["half_width"] = float(stats.t.ppf(0.975, count - 1)) * deviation / sqrt(count)
    found["p"] = float(stats.ttest_rel(runs, others).pvalue) if deviation else None
    return found


def summaries_of(study: Study, results: Runs) -> list[dict[str, Any]]:
    """A summary of each cell that has a run: figures, paired differences, measures."""
    summaries = []
    for cell in study.cells:
        runs = results[cell.name]
        if not runs:
            continue
        row = summarise(cell.name, [runs[seed] for seed in sorted(runs)])
        row["against"] = {}
        for other in study.against:
            common = sorted(runs.keys() & results[other].keys())
            if other != cell.name and common:
                row["against"][other] = paired(
                    [runs[seed]["top1"] for seed in common],
                    [results[other][seed]["top1"] for seed in common],
                    ROUNDED,
                )
        row["folders"] = [cell.folder(seed) for seed in sorted(runs)]
        row["measures"] = {}
        for seed in sorted(runs):
            for key, value in _key_figures(runs[seed]["measures"]).items():
                row["measures"].setdefault(key, []).append(value)
        summaries.append(row)
    return summaries


def write_tables(study: Study, results: Runs, seeds: int, out: Path) -> None:
    """Write ``study.json`` and ``study.md``.

    Args:
        study: the study.
        results: the runs that have finished.
        seeds: how many of each cell there are to be.
        out: folder of the two files.
    """
    summaries = summaries_of(study, results)
    document = {
        "study": study.name, "title": study.title, "cells": summaries, "commit": commit(),
        "versions": versions(),
        "settings": {cell.name: cell.config.to_dict() for cell in study.cells},
    }  # fmt: skip
    write_json(out / "study.json", document)
    tables = as_tables(study, summaries, seeds)
    write_text(
        out / "study.md", "\n".join([f"# {study.title}\n", tables[0], NOTE + "\n", *tables[1:]])
    )


def as_tables(study: Study, summaries: Sequence[dict[str, Any]], seeds: int) -> list[str]:
    """The table of accuracies in Markdown, and that of the measures where there are any."""
    tables = [as_markdown(*_table(study, summaries, seeds))]
    keys = list(dict.fromkeys(key for row in summaries for key in row["measures"]))
    if keys:
        measured = [row for row in summaries if row["measures"]]
        lines = []
        for row in measured:
            runs = max(map(len, row["measures"].values()))
            figures = (spread(row["measures"].get(key, [])) for key in keys)
            lines.append([row["method"], str(runs), *figures])
        tables.append(as_markdown(["cell", "seeds", *keys], lines))
    return tables


def _key_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """One figure of each measure, or a few; accuracies and shares in percent."""
    figures: dict[str, float] = {}
    if "calibration" in found:
        figures["calibration error %"] = 100 * found["calibration"]["ece"]
    if "occlusion" in found:
        shares = found["occlusion"]["shares"]
        for order, accuracy in found["occlusion"]["accuracy"].items():
            figures[f"half dropped, {order} %"] = 100 * accuracy[shares.index(0.5)]
    if "corruptions" in found:
        figures["corruptions %"] = 100 * found["corruptions"]["mean"]
    if "fgsm" in found:
        figures["FGSM 1/255 %"] = (
            100 * found["fgsm"]["accuracy"][found["fgsm"]["epsilons"].index(1.0)]
        )
    if "localisation" in found:
        figures["peak in box %"] = 100 * found["localisation"]["pointing"]
        figures["saliency in box %"] = 100 * found["localisation"]["share"]
    return figures


FIGURES = (("top1", 2), ("top5", 2), ("loss", 3))
NOTE = (
    "Means and standard deviations over the seeds. Differences are those of runs with the same "
    "seed: mean ± half of the 95% interval, with the p-value of a paired t-test; (n.s.) where it "
    "is 0.05 or more, so that chance is a fair explanation. No correction for the number of rows."
)


def _table(
    study: Study, summaries: Sequence[dict[str, Any]], seeds: int
) -> tuple[list[str], list[list[str]]]:
    """Head and rows; a cell that waits for its first run has a row of its own."""
    head = ["cell", "seeds", "top-1 %", "top-5 %", "test loss"]
    head += [f"against {other}" for other in study.against]
    found = {row["method"]: row for row in summaries}
    rows = []
    for cell in study.cells:
        row = found.get(cell.name)
        if row is None:
            rows.append([cell.name, f"0 of {seeds}", *[""] * (len(head) - 2)])
            continue
        count = len(row["seeds"])
        figures = [spread(row[f"{key}_runs"], digits) for key, digits in FIGURES]
        differences = [_difference(row["against"].get(other)) for other in study.against]
        done = f"{count} of {seeds}" if count < seeds else str(count)
        rows.append([cell.name, done, *figures, *differences])
    return head, rows


def _difference(found: dict[str, Any] | None) -> str:
    """A paired difference, for people.

    >>> _difference({"mean": 1.0, "seeds": 1}), _difference(paired([1.0, 1.5], [0.0, 1.0]))
    ('+1.00', '+0.75 ± 3.18, p 0.205 (n.s.)')
    >>> _difference(paired([1.0, 2.001, 3.0], [0.0, 1.0, 2.0]))
    '+1.00 ± 0.00, p < 0.001'
    """
    if found is None:
        return ""
    text = f"{found['mean']:+.2f}"
    if found["seeds"] < 2:
        return text
    text += f" ± {found['half_width']:.2f}"
    if found["p"] is None:
        return text
    p = "p < 0.001" if found["p"] < 0.0005 else f"p {found['p']:.3f}"
    return f"{text}, {p}{' (n.s.)' if found['p'] >= 0.05 else ''}"


def show(study: Study, results: Runs, seeds: int) -> str:
    """The table for a terminal; arguments as of :func:`write_tables`."""
    return as_text(*_table(study, summaries_of(study, results), seeds))
