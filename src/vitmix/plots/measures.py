"""One picture of all measures of a run: calibration, robustness, localisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vitmix.plots.style import COLOURS, HATCHES, Theme, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["measures_figure"]

Figures = dict[str, Any]


def measures_figure(found: Figures, theme: Theme, title: str) -> Figure:
    """A panel for each measure that was taken.

    Args:
        found: figures by measure, as in ``evaluation.json``.
        theme: colours.
        title: heading.
    """
    names = [name for name in _PANELS if name in found]
    widths = [_WIDTHS.get(name, 3.4) for name in names]
    figure = Figure(figsize=(sum(widths) + 0.4, 3.7), layout="constrained")
    figure.suptitle(title, fontsize=11.5, weight="bold", x=0.01, ha="left")
    panels = figure.subplots(1, len(names), squeeze=False, width_ratios=widths)[0]
    for name, axis in zip(names, panels, strict=True):
        _PANELS[name](axis, found[name], theme)
    return figure


def _percent(axis: Axes, what: str = "top-1") -> None:
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylabel(what)


def _calibration(axis: Axes, found: Figures, theme: Theme) -> None:
    bins = found["bins"]
    confidence, accuracy = ([each[key] for each in bins] for key in ("confidence", "accuracy"))
    images = np.array([each["images"] for each in bins], dtype=float)
    axis.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.9, linestyle=":")
    axis.plot(confidence, accuracy, color=COLOURS[0], linewidth=1.2)
    sizes = 12 + 220 * images / images.sum()
    look: Any = {"color": COLOURS[0], "edgecolor": theme.ground, "zorder": 3, "clip_on": False}
    axis.scatter(confidence, accuracy, s=sizes, **look)
    axis.set_xlim(0, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("confidence (dots: share of the images)")
    _percent(axis, "accuracy")
    axis.set_title(f"calibration: expected error {found['ece']:.3f}", loc="left")


def _occlusion(axis: Axes, found: Figures, theme: Theme) -> None:
    for place, (order, accuracy) in enumerate(found["accuracy"].items()):
        words = order if order == "random" else f"{order} first"
        axis.plot(found["shares"], accuracy, label=words, **line_style(place))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("patches dropped")
    _percent(axis)
    axis.legend(fontsize=8.5)
    axis.set_title("occlusion", loc="left")


def _corruptions(axis: Axes, found: Figures, theme: Theme) -> None:
    names = sorted(found["accuracy"], key=lambda name: -float(np.mean(found["accuracy"][name])))
    table = np.array([found["accuracy"][name] for name in names])
    rows = range(len(names))
    axis.barh(list(rows), table.mean(1), color=COLOURS[0], height=0.62)
    for severity, accuracy in zip(found["severities"], table.T, strict=True):
        for row, value in zip(rows, accuracy, strict=True):
            axis.text(value, row, str(severity), fontsize=7, ha="center", va="center",
                      color=theme.ink, bbox={"boxstyle": "circle,pad=0.12", "fc": theme.ground,
                                             "ec": theme.faint, "lw": 0.6})  # fmt: skip
    axis.set_yticks(list(rows), [name.replace("_", " ") for name in names], fontsize=8.5)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlim(0, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("top-1: mean, and by severity")
    axis.set_title(f"common corruptions: {found['mean']:.1%}", loc="left")


def _fgsm(axis: Axes, found: Figures, theme: Theme) -> None:
    style = {**line_style(0), "marker": "o", "markevery": 1}
    axis.plot(found["epsilons"], found["accuracy"], **style)
    axis.set_xlabel("step of each pixel, 255ths")
    _percent(axis)
    axis.set_title("adversarial step (FGSM)", loc="left")


def _localisation(axis: Axes, found: Figures, theme: Theme) -> None:
    bars = {"peak\nin box": "pointing", "saliency\nin box": "share", "IoU": "iou"}
    for place, key in enumerate(bars.values()):
        look: Any = {"color": COLOURS[place], "hatch": HATCHES[place], "edgecolor": theme.ground}
        axis.bar(place, found[key], width=0.6, **look)
        axis.text(place, found[key], f"{found[key]:.1%}", ha="center", va="bottom", fontsize=9)
    axis.plot([-0.4, 1.4], [found["area"]] * 2, color=theme.ink, linestyle=":")
    axis.text(1.42, found["area"], "even", fontsize=8.5, va="center")
    axis.set_xticks(range(len(bars)), list(bars))
    axis.grid(False, axis="x")
    _percent(axis, "")
    axis.set_title("localisation by attention", loc="left")


_WIDTHS = {"corruptions": 4.6}
_PANELS: dict[str, Callable[[Axes, Figures, Theme], None]] = {
    "calibration": _calibration,
    "occlusion": _occlusion,
    "fgsm": _fgsm,
    "localisation": _localisation,
    "corruptions": _corruptions,
}
