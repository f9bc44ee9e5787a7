"""Figures of a study: one line or bar a cell, its mean over the seeds and their deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitmix.plots.style import COLOURS, LIGHT, line_style, save_figure, themed

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["FIGURES", "save_study_figures"]

Measured = Mapping[str, Sequence[dict[str, Any]]]  # what was measured of each run of a cell


def save_study_figures(cells: Measured, folder: Path, prefix: str) -> list[Path]:
    """Draw each measure that was taken.

    Args:
        cells: by name, the measures of its runs.
        folder: where ``PREFIX-MEASURE.png`` are written.
        prefix: first part of the files' names.
    """
    paths = []
    for name, draw in FIGURES.items():
        found = {
            cell: [run[name] for run in runs if name in run]
            for cell, runs in cells.items()
            if any(name in run for run in runs)
        }
        if found:
            with themed(LIGHT):
                paths.append(save_figure(draw(found), folder / f"{prefix}-{name}.png", dpi=100))
    return paths


def _occlusion(cells: Measured) -> Figure:
    orders = list(next(iter(cells.values()))[0]["accuracy"])
    figure, panels = _panels(len(orders))
    for order, axis in zip(orders, panels, strict=True):
        for place, (cell, runs) in enumerate(cells.items()):
            _line(axis, place, cell, runs[0]["shares"], [run["accuracy"][order] for run in runs])
        axis.set_title("at random" if order == "random" else f"{order} first", loc="left")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("patches dropped")
    return _finished(figure, panels, "top-1")


def _corruptions(cells: Measured) -> Figure:
    figure, panels = _panels(1)
    for place, (cell, runs) in enumerate(cells.items()):
        curves = [np.mean(list(run["accuracy"].values()), axis=0) for run in runs]
        _line(panels[0], place, cell, runs[0]["severities"], curves)
    panels[0].set_xticks(next(iter(cells.values()))[0]["severities"])
    panels[0].set_xlabel("severity, mean of the corruptions")
    return _finished(figure, panels, "top-1")


def _fgsm(cells: Measured) -> Figure:
    figure, panels = _panels(1)
    for place, (cell, runs) in enumerate(cells.items()):
        _line(panels[0], place, cell, runs[0]["epsilons"], [run["accuracy"] for run in runs])
    panels[0].set_xlabel("step of each pixel, 255ths")
    return _finished(figure, panels, "top-1")


def _calibration(cells: Measured) -> Figure:
    figure, (left, right) = _panels(2)
    left.plot([0, 1], [0, 1], color=LIGHT.ink, linewidth=0.9, linestyle=":")
    for place, (cell, runs) in enumerate(cells.items()):
        bins = sorted((each for run in runs for each in run["bins"]), key=lambda b: b["confidence"])
        edges = np.linspace(0, 1, 11)
        where = np.digitize([each["confidence"] for each in bins], edges)
        points = []
        for index in sorted(set(where.tolist())):
            inside = [each for each, here in zip(bins, where, strict=True) if here == index]
            weights = [each["images"] for each in inside]
            points.append([
                np.average([each[key] for each in inside], weights=weights)
                for key in ("confidence", "accuracy")
            ])  # fmt: skip
        left.plot(*np.transpose(points), label=cell, **line_style(place))
        _bar(right, place, [run["ece"] for run in runs])
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.set_xlabel("confidence")
    left.set_ylabel("accuracy")
    left.set_title("reliability, all seeds together", loc="left")
    _name_bars(right, list(cells))
    right.set_title("expected calibration error", loc="left")
    return _finished(figure, [left, right], "accuracy", share=False)


def _localisation(cells: Measured) -> Figure:
    titles = {"pointing": "peak in the box", "share": "saliency in the box", "iou": "best IoU"}
    figure, panels = _panels(len(titles))
    for axis, (key, title) in zip(panels, titles.items(), strict=True):
        for place, runs in enumerate(cells.values()):
            _bar(axis, place, [run[key] for run in runs])
        if key != "iou":
            area = next(iter(cells.values()))[0]["area"]
            axis.axhline(area, color=LIGHT.ink, linewidth=0.9, linestyle=":")
            title += " (dotted: even)"
        _name_bars(axis, list(cells))
        axis.set_title(title, loc="left")
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.2 * count + (1.6 if count == 1 else 0.4), 3.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line(axis: Axes, place: int, cell: str, x: Sequence[float], curves: Sequence[Any]) -> None:
    """Mean of the curves, and a band of one standard deviation where there are several."""
    values = np.array(curves, dtype=float)
    mean, style = values.mean(0), line_style(place)
    axis.plot(x, mean, label=cell, **style)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        look: Any = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        axis.fill_between(x, mean - spread, mean + spread, **look)


def _bar(axis: Axes, place: int, values: Sequence[float]) -> None:
    """Mean, and a dot a seed."""
    colour = COLOURS[place % len(COLOURS)]
    axis.bar(place, float(np.mean(values)), width=0.65, color=colour, alpha=0.55)
    axis.scatter([place] * len(values), values, s=10, color=LIGHT.ink, zorder=3)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def _name_bars(axis: Axes, names: list[str]) -> None:
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8.5)
    axis.grid(False, axis="x")
    axis.set_axisbelow(True)


def _finished(figure: Figure, panels: Sequence[Axes], what: str, share: bool = True) -> Figure:
    """Name the lines once; panels that share a quantity take the same range of it."""
    panels[0].set_ylabel(what)
    for axis in panels if share else panels[:1]:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if share and len(panels) > 1:
        top = max(axis.get_ylim()[1] for axis in panels)
        for axis in panels:
            axis.set_ylim(0, top)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=5 if len(panels) > 1 else 3, fontsize=8.5
    )
    return figure


FIGURES: dict[str, Callable[[Measured], Figure]] = {
    "occlusion": _occlusion,
    "corruptions": _corruptions,
    "calibration": _calibration,
    "fgsm": _fgsm,
    "localisation": _localisation,
}
