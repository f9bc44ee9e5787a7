"""Pictures of what was mixed: whose pixels, whose tokens, and whose label."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.patheffects as effects
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitmix.functional.grids import on_pixels
from vitmix.plots.style import COLOURS, HATCHES, Theme, draw_heat, draw_image, heat_limits
from vitmix.preview import Preview
from vitmix.samples import Sample, Selection, Step, choose_rows, make_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from vitmix import MixingModel, MixOutput
    from vitmix.train.data import ImageData
    from vitmix.train.module import MixingTask

__all__ = ["collect_examples", "examples_figure", "preview_figure", "telling_examples"]

# Inches.
PANEL, GAP, MARGIN = 1.45, 0.1, 0.22
HEAD, CAPTION, TARGET = 0.25, 0.19, 2.7
ROLES = ("own", "partner", "third image", "fourth image")


@torch.no_grad()
def collect_examples(task: MixingTask, data: ImageData, count: int = 4) -> list[Sample]:
    """Mix a few training batches anew, and keep a telling sample of each."""
    images = data.train.images
    if images is None:
        return []
    mixing, config = task.mixing, task.config
    device = next(mixing.parameters()).device
    size = min(config.batch_size, len(images))
    generator = torch.Generator().manual_seed(config.seed)
    chosen: list[Sample] = []
    for draw in range(count):
        rows = torch.randperm(len(images), generator=generator)[:size]
        labels = data.train.labels[rows].to(device)
        maps = data.maps_of(rows) if mixing.labels.needs_maps else None
        batch, maps = task.augment.with_maps(images[rows].to(device), maps)
        shown = mixing.preview(
            batch, labels, maps=maps, classes=data.classes, mean=data.mean, std=data.std,
            samples=1, draws=3, seed=config.seed + 3 * draw,
        )  # fmt: skip
        chosen += [sample for sample in shown.samples if sample.steps]
    return chosen


def telling_examples(
    out: MixOutput,
    images: Tensor,
    labels: Tensor,
    data: ImageData,
    mixing: MixingModel,
    count: int = 4,
) -> list[Sample]:
    """Samples of a training step, those first that are mixed most evenly.

    Args:
        out: result of the step.
        images: ``(B, 3, H, W)`` before mixing.
        labels: ``(B,)``.
        data: names of classes, and how the images were normalised.
        mixing: what took the step.
        count: samples at most.
    """
    rows = choose_rows(out.trace, labels, count)
    names = [data.classes[label] for label in labels.tolist()]
    return make_samples(out.trace, images, names, rows, mixing, data.mean, data.std)


# --- figures


def examples_figure(examples: Sequence[Sample], theme: Theme, title: str = "") -> Figure:
    """One row an example: original, partner, whose pixels, mixed image, target as bars."""
    height = len(examples) * (PANEL + CAPTION + GAP / 2) + (HEAD if title else 0)
    sheet = _Sheet(4, height, theme)
    if title:
        sheet.head(title, bold=True)
    for example in examples:
        panels = [_original(example)]
        panels += [_partner(example, step) for step in example.steps[:1]]
        panels += [_whose("whose", example.shares), _mixed("mixed", example.mixed, example.shares)]
        sheet.target(example, sheet.row(panels), CAPTION + PANEL, compact=True)
    return sheet.figure


def preview_figure(preview: Preview, theme: Theme) -> Figure:
    """Every sample with what each stage did to it, a line a stage, and its target."""
    cards = [_card(sample) for sample in preview.samples]
    columns = max([3, *(len(line.panels) for card in cards for line in card)])
    notes = textwrap.wrap(preview.note, int(_width(columns) / 0.075))
    heights = [
        max(len(card) * (HEAD + CAPTION + PANEL + GAP / 2), _target_height(sample)) + 0.2
        for card, sample in zip(cards, preview.samples, strict=True)
    ]
    top = (HEAD if preview.title else 0) + HEAD + 0.17 * len(notes) + (0.1 if notes else 0)
    sheet = _Sheet(columns, sum(heights) + top, theme)
    if preview.title:
        sheet.head(preview.title, bold=True)
    heated = any(step.saliency is not None for s in preview.samples for step in s.steps)
    sheet.legend(max((len(sample.names) for sample in preview.samples), default=1), heated)
    sheet.notes(notes)
    for card, sample, height in zip(cards, preview.samples, heights, strict=True):
        begin = sheet.rule()
        for line in card:
            sheet.head(line.title)
            sheet.row(line.panels)
        sheet.target(sample, begin, height)
        sheet.top = begin + height
    return sheet.figure


@dataclass(frozen=True)
class _Panel:
    """A picture with its caption, and how it is drawn."""

    caption: str
    draw: Callable[[Axes, Theme], None]


@dataclass(frozen=True)
class _Line:
    """The panels of a stage."""

    title: str
    panels: list[_Panel]


def _card(sample: Sample) -> list[_Line]:
    """What is shown of a sample, stage by stage."""
    lines = []
    for number, step in enumerate(sample.steps):
        panels = [_original(sample)] if number == 0 else []
        panels.append(_partner(sample, step))
        title = "pixels"
        what = "pixel"
        if step.block is not None:
            what, title = "token", f"tokens at block {step.block}"
        if step.blended is not None:
            title += f": blended, {100 * step.blended:.0f}% own"
        if step.replaced is not None:
            count, total = int(step.replaced.sum()), step.replaced.numel()
            title = (
                f"tokens at block {step.block}: {count} of {total} replaced by more salient ones"
            )
            if step.difficulty is not None:
                title += f" (difficulty {step.difficulty:.2f} nats)"
        if step.saliency is not None and step.partner_saliency is not None:
            limits = heat_limits(step.saliency, step.partner_saliency)
            under = sample.steps[number - 1].mixed if number else sample.original
            panels.append(_heat("own saliency", step.saliency, under, limits))
            panels.append(_heat("its saliency", step.partner_saliency, step.partner_image, limits))
        if step.blended is None:
            panels.append(_whose(f"whose {what}", step.shares))
        panels.append(_mixed(f"mixed {what}s", step.mixed, step.shares))
        lines.append(_Line(title, panels))
    if not lines:
        lines.append(_Line("not mixed with any other sample", [_original(sample)]))
    for target in dict.fromkeys(selection.target for selection in sample.selections):
        own = [selection for selection in sample.selections if selection.target == target]
        count = int(own[0].chosen.sum())
        first, last = own[0].block, own[-1].block
        blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
        title = f"vertical: block {target} also attends to the {count} most salient tokens of "
        panels = [_selection(selection) for selection in own]
        lines += [
            _Line("" if start else f"{title}{blocks}", panels[start : start + 6])
            for start in range(0, len(panels), 6)
        ]
    return lines


def _width(columns: int) -> float:
    """Of a sheet with so many panels beside the target."""
    return 2 * MARGIN + columns * (PANEL + GAP) + 0.15 + TARGET


class _Sheet:
    """A figure that is filled from top to bottom; all lengths are inches."""

    def __init__(self, columns: int, height: float, theme: Theme) -> None:
        self.theme = theme
        self.columns = columns
        self.panels = columns * (PANEL + GAP)
        self.width = _width(columns)
        self.height = height + 2 * MARGIN
        self.top = MARGIN
        self.figure = Figure(figsize=(self.width, self.height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without anything, whose upper left corner is there."""
        axis = self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )
        axis.set_axis_off()
        return axis

    def text(self, left: float, top: float, words: str, size: float = 8.5, **style: Any) -> None:
        """Words whose upper left corner is there."""
        style = {"va": "top", "ha": "left", "color": self.theme.ink, **style}
        self.figure.text(left / self.width, 1 - top / self.height, words, fontsize=size, **style)

    def head(self, words: str, bold: bool = False) -> None:
        """A heading."""
        if words:
            weight, size = ("bold", 11.5) if bold else ("bold", 8.5)
            self.text(MARGIN, self.top + 0.04, words, size, weight=weight)
            self.top += HEAD

    def legend(self, count: int, heated: bool) -> None:
        """What colours and hatches stand for."""
        left = MARGIN
        for source in range(min(count, len(ROLES))):
            axis = self.axes(left, self.top + 0.03, 0.26, 0.14)
            _swatch(axis, source)
            words = ROLES[source]
            self.text(left + 0.32, self.top + 0.025, words, 8.5)
            left += 0.32 + 0.075 * len(words) + 0.25
        if heated:
            words = "bright: salient, in multiples of an even spread over all tokens"
            self.text(left + 0.1, self.top + 0.025, words, 8.5)
        self.top += HEAD

    def notes(self, lines: Sequence[str]) -> None:
        """Remarks."""
        for line in lines:
            self.text(MARGIN, self.top, line, 9, style="italic")
            self.top += 0.17
        self.top += 0.1 if lines else 0

    def rule(self) -> float:
        """A line across; returns where what is below it begins."""
        axis = self.axes(MARGIN, self.top + 0.03, self.width - 2 * MARGIN, 0.02)
        axis.axhline(0.5, color=self.theme.faint, linewidth=1.0)
        self.top += 0.1
        return self.top - 0.1

    def row(self, panels: Sequence[_Panel]) -> float:
        """Panels side by side; returns where they begin."""
        begin = self.top
        for place, panel in enumerate(panels):
            left = MARGIN + place * (PANEL + GAP)
            self.text(left, begin + 0.02, panel.caption, 8)
            panel.draw(self.axes(left, begin + CAPTION, PANEL, PANEL), self.theme)
        self.top += CAPTION + PANEL + GAP / 2
        return begin

    def target(self, sample: Sample, top: float, height: float, compact: bool = False) -> None:
        """The label: whose it is, by the rule in use and by others."""
        left = MARGIN + self.panels + 0.15
        axis = self.axes(left, top, TARGET, height)
        axis.set_xlim(0, TARGET)
        axis.set_ylim(height, 0)
        _draw_target(axis, sample, self.theme, compact)


def _target_height(sample: Sample) -> float:
    return 0.55 + 0.2 * len(sample.names) + 0.42 * len(sample.labels)


# --- panels


def _original(sample: Sample) -> _Panel:
    return _framed(sample.names[0], sample.original, 0)


def _partner(sample: Sample, step: Step) -> _Panel:
    return _framed(sample.names[step.partner], step.partner_image, step.partner)


def _framed(name: str, image: Tensor, source: int) -> _Panel:
    """An image in the colour of a source."""

    def draw(axis: Axes, theme: Theme) -> None:
        draw_image(axis, image)
        frame = Rectangle(
            (0, 0), 1, 1, transform=axis.transAxes, fill=False, clip_on=False,
            edgecolor=_colour(source), linewidth=3, linestyle=("-", (0, (2.2, 1)))[source > 0],
        )  # fmt: skip
        axis.add_patch(frame)

    role = ROLES[min(source, len(ROLES) - 1)]
    return _Panel(f"{role}: {_short(name, 23 - len(role))}", draw)


def _whose(what: str, shares: Tensor) -> _Panel:
    """Whose pixel is whose, in flat colours and hatches."""

    def draw(axis: Axes, theme: Theme) -> None:
        colours = torch.tensor([to_rgb(_colour(k)) for k in range(shares.shape[2])])
        draw_image(axis, shares @ colours)
        main = shares.argmax(2)
        fine = max(1, 224 // max(main.shape))
        mask = main.repeat_interleave(fine, 0).repeat_interleave(fine, 1).numpy()
        height, width = main.shape
        rows = (np.arange(mask.shape[0]) + 0.5) / fine - 0.5
        columns = (np.arange(mask.shape[1]) + 0.5) / fine - 0.5
        for source in range(1, shares.shape[2]):
            if (mask == source).any():
                drawn = axis.contourf(
                    columns, rows, (mask == source).astype(float), levels=[0.5, 1.5],
                    colors="none", hatches=[HATCHES[source % len(HATCHES)]],
                )  # fmt: skip
                drawn.set_edgecolor("white")
                drawn.set_linewidth(0)
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)

    return _Panel(f"{what}: {100 * float(shares[..., 0].mean()):.0f}% own", draw)


def _mixed(caption: str, image: Tensor, shares: Tensor) -> _Panel:
    """A mixed image, with lines where its sources meet."""

    def draw(axis: Axes, theme: Theme) -> None:
        draw_image(axis, image)
        if float(shares.max(2).values.min()) > 0.5:
            _outline(axis, shares.argmax(2).numpy())

    return _Panel(caption, draw)


def _heat(caption: str, saliency: Tensor, image: Tensor, limits: tuple[float, float]) -> _Panel:
    """Saliency over a grey image: bright is salient."""

    def draw(axis: Axes, theme: Theme) -> None:
        draw_heat(axis, image, saliency, limits)

    return _Panel(f"{caption} {float(saliency.min()):.1f}–{float(saliency.max()):.1f}×", draw)


def _selection(selection: Selection) -> _Panel:
    """Selected tokens in full colour, the others faded."""

    def draw(axis: Axes, theme: Theme) -> None:
        image = selection.image
        chosen = on_pixels(selection.chosen[None], (image.shape[0], image.shape[1]))[0]
        ground = image.new_tensor(to_rgb(theme.ground))
        faded = 0.42 * image.mean(2, keepdim=True) + 0.58 * ground
        draw_image(axis, torch.where(chosen[..., None], image, faded))
        main = selection.shares.argmax(2)
        _outline(axis, torch.where(chosen, main + 1, 0).numpy(), shift=1)

    return _Panel(f"tokens of block {selection.block}", draw)


def _outline(axis: Axes, index: np.ndarray, shift: int = 0) -> None:
    """Lines where neighbouring pixels belong to different sources, in the foreign one's colour.

    Args:
        axis: where to draw.
        index: ``(H, W)`` number of the source of each pixel, plus ``shift``.
        shift: what is added to the numbers.
    """
    lines: dict[int, list[tuple[tuple[float, float], tuple[float, float]]]] = {}
    for turn, field in enumerate((index, index.T)):
        for row, column in np.argwhere(field[1:] != field[:-1]).tolist():
            foreign = int(max(field[row, column], field[row + 1, column]))
            ends = ((column - 0.5, row + 0.5), (column + 0.5, row + 0.5))
            if turn:
                ends = ((row + 0.5, column - 0.5), (row + 0.5, column + 0.5))
            lines.setdefault(foreign - shift, []).append(ends)
    for source, ends_of_all in lines.items():
        drawn = LineCollection(ends_of_all, colors=_colour(source), linewidths=1.0)
        drawn.set_path_effects(
            [effects.Stroke(linewidth=2.0, foreground="white"), effects.Normal()]
        )
        axis.add_collection(drawn)


def _colour(source: int) -> str:
    return COLOURS[source % len(COLOURS)]


def _swatch(axis: Axes, source: int) -> None:
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.add_patch(_block(0, 0, 1, 1, source))


def _block(x: float, y: float, width: float, height: float, source: int) -> Rectangle:
    """A rectangle in the colour and hatch of a source."""
    return Rectangle(
        (x, y), width, height, facecolor=_colour(source), edgecolor="white", linewidth=0.6,
        hatch=HATCHES[source % len(HATCHES)],
    )  # fmt: skip


def _draw_target(axis: Axes, sample: Sample, theme: Theme, compact: bool) -> None:
    """Bars of the label's weights, one a rule, the rule in use first; then whose they are."""
    weights = next(iter(sample.labels.values()))
    top = 0.16 if not compact else CAPTION + 0.05
    axis.text(
        0, top, f"target: by {sample.rule}", fontsize=8.5, weight="bold", va="center",
        color=theme.ink,
    )  # fmt: skip
    top += 0.12
    _bar(axis, weights, top, 0.24)
    top += 0.42
    columns = 2 if compact else 1
    for source, (name, weight) in enumerate(zip(sample.names, weights.tolist(), strict=True)):
        left = source % columns * TARGET / columns
        axis.add_patch(_block(left, top - 0.06, 0.26, 0.13, source))
        words = f"{100 * weight:.0f}%  {_short(name, 26 // columns)}"
        axis.text(left + 0.34, top, words, fontsize=8.5, va="center", color=theme.ink)
        if source % columns == columns - 1 or source == len(sample.names) - 1:
            top += 0.2
    others = list(sample.labels.items())[1 : 2 if compact else None]
    for name, other in others:
        top += 0.04
        axis.text(0, top, f"by {name}", fontsize=7.5, va="center", color=theme.ink)
        _bar(axis, other, top + 0.08, 0.15, small=True)
        top += 0.34


def _bar(axis: Axes, weights: Tensor, top: float, height: float, small: bool = False) -> None:
    """A bar of all weights, with their figures where there is room."""
    total = max(1.0, float(weights.clamp_min(0).sum()))
    left = 0.0
    for source, weight in enumerate(weights.clamp_min(0).tolist()):
        width = TARGET * 0.97 * weight / total
        axis.add_patch(_block(left, top, width, height, source))
        if width > (0.34 if small else 0.4):
            axis.text(
                left + width / 2, top + height / 2 + 0.005, f"{100 * weight:.0f}%",
                fontsize=6.5 if small else 8, ha="center", va="center",
                color="white" if source in (0, 2) else "black",
                bbox={"facecolor": _colour(source), "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
        left += width


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
