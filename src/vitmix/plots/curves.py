"""Curves: accuracy over the epochs, and what TokenMixup mixes over the steps."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitmix.plots.style import line_style

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = [
    "LEARNING_PANELS",
    "MIXING_PANELS",
    "Series",
    "learning_curves",
    "mixing_curves",
    "read_metrics",
    "smooth",
]

Series = list[tuple[float, float]]  # (epoch or step, value)


def read_metrics(folder: Path) -> dict[str, Series]:
    """The logged values of a run: test figures by epoch, everything else by step."""
    found: dict[str, Series] = {}
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            place = float(row.get("epoch") or row["step"])
            for key, value in row.items():
                if value and key not in ("epoch", "step"):
                    found.setdefault(key, []).append((place, float(value)))
    return found


LEARNING_PANELS = {"val/top1": "test top-1 (%)", "train/epoch_loss": "training loss"}
MIXING_PANELS = {
    "mixed_samples": "mixed samples a batch",
    "mixed_tokens": "replaced tokens a mixed sample",
}


def _panels(titles: Mapping[str, str]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A figure with one panel for each title, side by side."""
    count = len(titles)
    figure = Figure(figsize=(4.2 if count == 1 else 3.8 * count, 3.3), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set_title(title, loc="left")
    return figure, list(zip(titles, axes, strict=True))


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Series]]],
    titles: Mapping[str, str] = LEARNING_PANELS,
) -> Figure:
    """Test top-1 and training loss by epoch; the band is the range over the seeds.

    Args:
        runs: for each method the metrics of its runs, one a seed.
        titles: the panels to draw, titles by logged value.
    """
    figure, panels = _panels(titles)
    for key, axis in panels:
        tops = []
        for index, (method, seeds) in enumerate(runs.items()):
            series = [dict(run[key]) for run in seeds if key in run]
            # Some may test less often than others.
            epochs = sorted(set.intersection(*map(set, series))) if series else []
            if not epochs:
                continue
            columns = [[values[epoch] for values in series] for epoch in epochs]
            style = line_style(index)
            mean = [fmean(column) for column in columns]
            if len(epochs) == 1:  # no line can be seen
                style["marker"] = "o"
            axis.plot(epochs, mean, label=method, **style)
            if len(series) > 1:
                low, high = [min(c) for c in columns], [max(c) for c in columns]
                axis.fill_between(epochs, low, high, color=style["color"], alpha=0.18, linewidth=0)
            tops.append(mean)
        if key == "val/top1" and len(tops) > 1:
            axis.set_ylim(*_zoom(tops))
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = panels[0][1].get_legend_handles_labels()
    if len(labels) > 1:
        columns_of_legend = min(5 if len(panels) > 1 else 3, len(labels))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns_of_legend, handlelength=2.6
        )
    return figure


def _zoom(curves: list[list[float]]) -> tuple[float, float]:
    """Limits that leave out the steep beginning, so that the ends can be told apart."""
    ends = [value for curve in curves for value in curve[len(curve) * 2 // 5 :]]
    low, high = min(ends), max(ends)
    margin = max(1.0, 0.15 * (high - low))
    return max(0.0, low - margin), min(100.5, high + margin)


def mixing_curves(
    runs: Mapping[str, Mapping[str, Series]], titles: Mapping[str, str] = MIXING_PANELS
) -> Figure | None:
    """Mixed samples a batch, and replaced tokens a mixed sample, over the steps.

    These are the curves of TokenMixup's Figure 4. Returns None if no run mixes tokens.
    """
    chosen = {
        method: metrics
        for method, metrics in runs.items()
        if any(key.endswith("/mixed_samples") for key in metrics)
    }
    if not chosen:
        return None
    figure, panels = _panels(titles)
    for suffix, axis in panels:
        lines = [
            (method, key, metrics[key])
            for method, metrics in chosen.items()
            for key in sorted(key for key in metrics if key.endswith("/" + suffix))
        ]
        for index, (method, key, series) in enumerate(lines):
            steps = [step for step, _ in series]
            values = [value for _, value in series]
            style = line_style(index)
            block = key.split("/")[0].rpartition("_")[2]
            if len(values) > 40:
                axis.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.8)
            axis.plot(steps, smooth(values), label=f"{method}, block {block}", **style)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    return figure


def smooth(values: list[float]) -> list[float]:
    """Mean over a window of a thirtieth of the curve."""
    reach = len(values) // 60
    return [
        fmean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))
    ]
