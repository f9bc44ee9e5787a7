"""The papers' figures: saliency detectors, token fluctuation, difficulty over training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vitmix.plots.curves import Series, smooth
from vitmix.plots.style import (
    COLOURS,
    HATCHES,
    Theme,
    draw_heat,
    draw_image,
    frameless,
    line_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from vitmix.analysis import Detected, Fluctuation

__all__ = ["difficulty_figure", "fluctuation_figure", "saliency_figure"]

OWN, PARTNER = COLOURS[:2]


def saliency_figure(
    images: Tensor, names: Sequence[str], found: Mapping[str, Detected], theme: Theme, title: str
) -> Figure:
    """What each detector finds in some images, and how sharply in all of them.

    Args:
        images: ``(n, H, W, 3)`` in [0, 1], the first of those that the detectors saw.
        names: of their classes.
        found: by detector.
        theme: colours.
        title: heading.
    """
    count = len(images)
    across = 1.7 * (len(found) + 1)
    figure = Figure(figsize=(across + 2.6, 1.75 * count + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=11.5, weight="bold", x=0.01, ha="left")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[across, 2.6])[0]
    grid = left.subplots(count, len(found) + 1, squeeze=False)
    for row, (axes, image, name) in enumerate(zip(grid, images, names, strict=True)):
        draw_image(axes[0], image)
        axes[0].set_title(name, fontsize=8.5, loc="left")
        for axis, (detector, detected) in zip(axes[1:], found.items(), strict=True):
            if detected.maps is None or detected.sharpness is None or detected.top_share is None:
                words = textwrap.fill(detected.reason.partition(". ")[0], 28)
                axis.set_axis_off()
                axis.text(0.5, 0.5, words, fontsize=7, ha="center", transform=axis.transAxes)
                axis.set_title(f"{detector}: none", fontsize=8.5, loc="left")
                continue
            draw_heat(axis, image, detected.maps[row])
            head = f"{detector}\n" if row == 0 else ""
            sharp, top = float(detected.sharpness[row]), float(detected.top_share[row])
            axis.set_title(f"{head}{sharp:.3f} · {top:.0%} in 10%", fontsize=8.5, loc="left")
    top, bottom = right.subplots(2, 1)
    measures = (
        ("sharpness", "sharpness: 1 - entropy / log N", 0.0, ".3f"),
        ("top_share", "share in the top 10% of tokens", 0.1, ".0%"),
    )
    for axis, (measure, words, even, figures) in zip((top, bottom), measures, strict=True):
        for place, detected in enumerate(found.values()):
            values = getattr(detected, measure)
            if values is None:
                continue
            mean = float(values.mean())
            low, high = (float(values.quantile(level)) for level in (0.1, 0.9))
            reach = [[max(0, mean - low)], [max(0, high - mean)]]
            look = {"color": COLOURS[place], "hatch": HATCHES[place], "edgecolor": "white"}
            axis.bar(place, mean, width=0.6, **look)
            axis.errorbar(place, mean, reach, color=theme.ink, capsize=4, linewidth=1.2)
            axis.text(place + 0.06, mean, f" {mean:{figures}}", fontsize=8.5, va="bottom")
        axis.axhline(even, color=theme.ink, linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(found)), list(found), fontsize=8.5)
        axis.set_title(words, loc="left", fontsize=9)
        axis.grid(False, axis="x")
        axis.set_xlim(-0.6, len(found) - 0.4)
    bottom.set_xlabel("mean and 10% to 90% of all images\ndotted: even saliency", fontsize=8)
    return figure


def fluctuation_figure(
    found: Fluctuation, image: Tensor, row: int, theme: Theme, title: str
) -> Figure:
    """The share of the own image in tokens, from block to block: of one sample, and of all.

    Args:
        found: the shares.
        image: ``(H, W, 3)`` in [0, 1] as fed to the model.
        row: of which sample of the batch it is.
        theme: colours.
        title: heading.
    """
    places = len(found.maps)
    shown = sorted({round(k * (places - 1) / 5) for k in range(6)})
    figure = Figure(figsize=(1.45 * (len(shown) + 1) + 0.4, 5.3), layout="constrained")
    figure.suptitle(title, fontsize=11.5, weight="bold", x=0.01, ha="left")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.75, 3.0])[:, 0]
    axes = upper.subplots(1, len(shown) + 1)
    draw_image(axes[0], image)
    axes[0].set_title("mixed image", fontsize=8.5, loc="left")
    ramp = LinearSegmentedColormap.from_list("whose", [PARTNER, "#f4f4f4", OWN])
    for axis, place in zip(axes[1:], shown, strict=True):
        shares = found.maps[place][row]
        drawn = axis.imshow(shares.numpy(), cmap=ramp, vmin=0, vmax=1, interpolation="nearest")
        frameless(axis)
        words = "input" if place == 0 else f"block {place - 1}"
        low, high = float(shares.min()), float(shares.max())
        axis.set_title(f"{words}\n{low:.0%} to {high:.0%}", fontsize=8.5, loc="left")
    bar = upper.colorbar(drawn, ax=axes[-1], fraction=0.06, format=PercentFormatter(1.0))
    bar.set_label("own share", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis = lower.subplots()
    depth = list(range(places))
    lines: list[tuple[str, Tensor, int]] = [
        ("tokens that were own at the input", found.own, 0),
        ("tokens that were the partner's", found.partner, 1),
    ]
    if found.prefix is not None:
        lines.append(("class token", found.prefix, 2))
    for words, values, index in lines:
        style = line_style(index)
        style |= {"marker": "os^"[index], "markevery": 1}
        axis.plot(depth, values.nanmean(1).numpy(), label=words, **style)
        ends = [values.nanquantile(level, dim=1).numpy() for level in (0.1, 0.9)]
        axis.fill_between(depth, *ends, color=style["color"], alpha=0.15, linewidth=0)
    area, label = float(found.area.mean()), float(found.label.mean())
    change = float((found.label - found.area).abs().mean())
    axis.axhline(area, color=theme.ink, linewidth=0.9, linestyle=":")
    axis.text(0.02, area + 0.015, f"area {area:.0%}", fontsize=8.5)
    axis.plot([places - 1], [label], marker="D", color=theme.ink, linestyle="", markersize=6,
              label=f"what the classifier sees: {label:.0%}")  # fmt: skip
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    names = ["input", *(str(place - 1) for place in depth[1:])]
    step = max(1, places // 14)
    axis.set_xticks(depth[::step], names[::step])
    axis.set_xlabel(
        "behind block; bands hold 80% of the samples\n"
        f"the aligned label is {100 * change:.1f} points from the area's on average", fontsize=9,
    )  # fmt: skip
    axis.set_title("share of the own image", loc="left")
    axis.legend(fontsize=8.5)
    return figure


def difficulty_figure(metrics: Mapping[str, Series], theme: Theme, title: str) -> Figure | None:
    """The distribution of ScoreNet's difficulty over training, beside tau and what is mixed.

    Args:
        metrics: the logged values of a run.
        theme: colours.
        title: heading.

    Returns:
        None if the run has none.
    """
    stages = sorted(key.rpartition("/")[0] for key in metrics if key.endswith("/difficulty"))
    if not stages:
        return None
    figure = Figure(figsize=(5.2 * len(stages) + 1.6, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=11.5, weight="bold", x=0.01, ha="left")
    grid = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=[2.2, 1.0])
    for column, stage in enumerate(stages):
        upper, lower = grid[:, column]
        block = stage.rpartition("_")[2]
        _bands(upper, metrics, stage)
        steps, values = _smoothed(metrics[f"{stage}/difficulty"])
        upper.plot(steps, values, color=COLOURS[0], linestyle="--", label="mean", linewidth=1.2)
        if f"{stage}/tau" in metrics:
            steps, values = map(list, zip(*metrics[f"{stage}/tau"], strict=True))
            upper.plot(steps, values, color=COLOURS[1], linewidth=2, label="tau: below is easy")
        upper.set_title(f"difficulty at block {block} (nats)", loc="left")
        upper.set_ylim(bottom=0)
        upper.legend(fontsize=8.5)
        steps, values = _smoothed(metrics[f"{stage}/mixed_share"])
        lower.plot(steps, values, color=COLOURS[2])
        lower.set_ylim(-0.03, 1.03)
        lower.yaxis.set_major_formatter(PercentFormatter(1.0))
        lower.set_title("mixed samples", loc="left")
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _bands(axis: Axes, metrics: Mapping[str, Series], stage: str) -> None:
    """Quantiles as bands, where they were logged."""
    for low, high, strength in ((10, 90, 0.16), (25, 75, 0.28)):
        keys = [f"{stage}/difficulty_q{level}" for level in (low, high)]
        if all(key in metrics for key in keys):
            (steps, bottom), (_, top) = (_smoothed(metrics[key]) for key in keys)
            axis.fill_between(
                steps, bottom, top, color=COLOURS[0], alpha=strength, linewidth=0,
                label=f"{low}% to {high}% of samples",
            )  # fmt: skip
    if f"{stage}/difficulty_q50" in metrics:
        steps, values = _smoothed(metrics[f"{stage}/difficulty_q50"])
        axis.plot(steps, values, color=COLOURS[0], label="median")


def _smoothed(series: Series) -> tuple[list[float], list[float]]:
    return [step for step, _ in series], smooth([value for _, value in series])
