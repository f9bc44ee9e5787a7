"""Pictures of what was mixed: original, partner, mask, mixed image, target."""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitmix.plots.style import OWN, PARTNER, Theme

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix import MixOutput
    from vitmix.train.data import ImageData
    from vitmix.train.module import MixingTask

__all__ = ["Example", "collect_examples", "examples_figure", "telling_examples"]


@dataclass(frozen=True)
class Example:
    """One mixed sample; images are ``(H, W, 3)`` in [0, 1]."""

    original: Tensor
    partner: Tensor
    own: Tensor  # (H, W), share of the own image
    mixed: Tensor
    own_class: str
    partner_class: str
    target: list[tuple[str, float]]  # classes and weights, the largest first
    stage: str  # "pixels" or "tokens at block N"


@torch.no_grad()
def collect_examples(task: MixingTask, data: ImageData, count: int = 4) -> list[Example]:
    """Mix a few training batches anew, and keep a telling sample of each.

    Token mixing has no image of its own: the tokens that were replaced are shown as the patches of
    the image that they stand for.
    """
    images = data.train.images
    if images is None:
        return []
    mixing, config = task.mixing, task.config
    device = next(mixing.parameters()).device
    size = min(config.batch_size, len(images))
    generator = torch.Generator().manual_seed(config.seed)
    mixing.train()
    chosen = []
    for _ in range(count):
        rows = torch.randperm(len(images), generator=generator)[:size]
        labels = data.train.labels[rows].to(device)
        maps = data.maps_of(rows) if mixing.labels.needs_maps else None
        batch, maps = task.augment.with_maps(images[rows].to(device), maps)
        best: tuple[float, Example] | None = None
        for _ in range(3):  # draws are often one for a whole batch
            out = mixing(batch, labels, maps=maps)
            found = _most_mixed(out, batch, labels, data, config.smoothing, 1)
            best = max([*found, *([best] if best else [])], key=itemgetter(0), default=None)
        if best is not None:
            chosen.append(best[1])
    mixing.eval()
    return chosen


def telling_examples(
    out: MixOutput,
    images: Tensor,
    labels: Tensor,
    data: ImageData,
    smoothing: float,
    count: int = 4,
) -> list[Example]:
    """Samples of a training step, those first that are mixed most evenly.

    Args:
        out: result of the step.
        images: ``(B, 3, H, W)`` before mixing.
        labels: ``(B,)``.
        data: names of classes, and how the images were normalised.
        smoothing: label smoothing in the targets.
        count: samples at most.
    """
    return [example for _, example in _most_mixed(out, images, labels, data, smoothing, count)]


@torch.no_grad()
def _most_mixed(
    out: MixOutput, images: Tensor, labels: Tensor, data: ImageData, smoothing: float, count: int
) -> list[tuple[float, Example]]:
    """Samples that are mixed most evenly with one of another class, and how evenly."""
    trace = out.trace
    fed = trace.images
    own = torch.ones(len(images), *images.shape[2:], device=images.device)
    partner = torch.arange(len(images), device=images.device)
    stage = ""
    if trace.pixels is not None:
        own = _raster(trace.pixels.own, images.shape).to(images.device)
        partner, stage = trace.pixels.partner.to(images.device), "pixels"
    here = torch.ones(len(images), dtype=torch.bool, device=images.device)
    for block, plan in trace.horizontal.items():
        # With partners from all processes, only those of this one can be shown.
        others = plan.partner - (0 if trace.sources is None else int(trace.sources[0, 0]))
        here &= (others >= 0) & (others < len(images))
        others = others.clamp(0, len(images) - 1)
        replaced = _grid(plan.replace, images.shape)
        fed = torch.where(replaced[:, None], fed[others], fed)
        if not stage:
            own = torch.where(replaced, torch.zeros_like(own), own)
            partner, stage = others, f"tokens at block {block}"
    for block, blend in trace.blended.items():
        weight = blend.own_weight[:, None, None]
        fed = torch.lerp(fed[blend.partner], fed, weight[:, None].to(fed))
        if not stage:
            own, partner = own * weight, blend.partner
            stage = f"tokens at block {block}"
    if not stage:
        return []
    share = own.mean((1, 2))
    evenness = share * (1 - share) * (labels != labels[partner]) * here
    found = []
    for sample in evenness.topk(min(count, len(evenness))).indices.tolist():
        if not evenness[sample] > 0:
            break
        other = int(partner[sample])
        example = Example(
            _shown(images[sample], data), _shown(images[other], data), own[sample].cpu(),
            _shown(fed[sample], data), data.classes[int(labels[sample])],
            data.classes[int(labels[other])], _named(out.targets[sample], data, smoothing), stage,
        )  # fmt: skip
        found.append((float(evenness[sample]), example))
    return found


def _named(target: Tensor, data: ImageData, smoothing: float) -> list[tuple[str, float]]:
    """The classes of a target and their weights without smoothing, three at most."""
    weights, classes = ((target.float() - smoothing / len(data.classes)) / (1 - smoothing)).topk(
        min(3, len(data.classes))
    )
    return [
        (data.classes[int(index)], float(weight))
        for weight, index in zip(weights, classes, strict=True)
        if weight > 0.005
    ]


def _raster(cells: Tensor, shape: torch.Size) -> Tensor:
    """Shares ``(B or 1, h, w)`` on the pixels ``(B, H, W)``."""
    rows = torch.arange(shape[2]) * cells.shape[1] // shape[2]
    columns = torch.arange(shape[3]) * cells.shape[2] // shape[3]
    return cells.cpu()[:, rows][:, :, columns].expand(shape[0], -1, -1)


def _grid(replace: Tensor, shape: torch.Size) -> Tensor:
    """Replaced tokens ``(B, N)`` as pixels; the grid is as square as the image."""
    side = round((replace.shape[1] * shape[2] / shape[3]) ** 0.5)
    cells = replace.view(len(replace), side, -1)
    return _raster(cells.float(), shape).to(replace.device) > 0.5


def _shown(image: Tensor, data: ImageData) -> Tensor:
    """A normalised image as it looks."""
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    return (image.cpu().permute(1, 2, 0) * std + mean).clamp(0, 1)


def examples_figure(examples: list[Example], theme: Theme, title: str = "") -> Figure:
    """One row an example: original, partner, mask, mixed image, target as bars."""
    count = len(examples)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = Figure(figsize=(6.4, 1.15 * count + 0.5), layout=layout)
    grid = figure.subplots(count, 5, squeeze=False, width_ratios=[1, 1, 1, 1, 1.7])
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    for row, (axes, example) in enumerate(zip(grid, examples, strict=True)):
        panels: list[tuple[Any, str | None]] = [
            (example.original, OWN), (example.partner, PARTNER), (example.own, None),
            (example.mixed, None),
        ]  # fmt: skip
        heads = ("original", "partner", "mask", "mixed", "target")
        for axis, (picture, frame) in zip(axes, panels, strict=False):
            if picture.ndim == 2:
                axis.imshow(picture.numpy(), cmap=ListedColormap(_ramp()), vmin=0, vmax=1)
            else:
                axis.imshow(picture.numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(frame is not None)
                if frame is not None:
                    spine.set_color(frame)
                    spine.set_linewidth(2.5)
        _bars(axes[4], example, theme)
        if row == 0:
            for axis, head in zip(axes, heads, strict=True):
                side = "left" if head == "target" else "center"
                axis.set_title(head, fontsize=9, loc=side)
    return figure


def _ramp() -> list[Any]:
    """Colours from all partner to all own."""
    from matplotlib.colors import to_rgb

    low, high = to_rgb(PARTNER), to_rgb(OWN)
    return [
        tuple(a + (b - a) * step / 63 for a, b in zip(low, high, strict=True)) for step in range(64)
    ]


def _bars(axis: Any, example: Example, theme: Theme) -> None:
    names = [name for name, _ in example.target]
    weights = [100 * weight for _, weight in example.target]
    colours = [
        OWN if name == example.own_class else PARTNER if name == example.partner_class
        else theme.faint for name in names
    ]  # fmt: skip
    places = list(range(len(names)))
    axis.barh(places, weights, color=colours, height=0.5)
    for place, (name, weight) in enumerate(zip(names, weights, strict=True)):
        axis.text(0, place - 0.32, f"{name}  {weight:.0f}%", fontsize=8.5, va="bottom")
    share = 100 * float(example.own.mean())
    axis.text(0, len(names) - 0.3, f"{share:.0f}% of the area is own", fontsize=7.5, va="center")
    axis.set_xlim(0, 100)
    axis.set_ylim(2.9, -0.85)
    axis.axis("off")
