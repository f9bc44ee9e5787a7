"""Colours and themes of all figures: safe for colour-blind readers, light and dark."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from vitmix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = [
    "COLOURS",
    "DARK",
    "HATCHES",
    "LIGHT",
    "THEMES",
    "Theme",
    "draw_heat",
    "draw_image",
    "frameless",
    "heat_limits",
    "line_style",
    "pixels_of_figure",
    "save_figure",
    "themed",
]

# Okabe and Ito's palette without yellow and black, which vanish on one of the two grounds.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("", "o", "s", "^", "D")
HATCHES = ("", "/////", ".....", "xxxx", "-----", "|||||")


@dataclass(frozen=True)
class Theme:
    """Ground and ink of a figure; the ground is only used where it cannot be transparent."""

    name: str
    ground: str
    ink: str
    faint: str


LIGHT = Theme("light", "#ffffff", "#1b1f24", "#d5d9de")
DARK = Theme("dark", "#15181c", "#e6e8ea", "#3a4149")
THEMES = (LIGHT, DARK)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and markers of the line with this number: they differ even in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index // len(DASHES) % len(MARKERS)],
        "markersize": 4,
        "markevery": 0.12,
    }


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Draw with this theme."""
    settings: Any = {
        "figure.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "axes.facecolor": "none",
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "font.size": 10,
        "axes.titlesize": 10,
        "svg.fonttype": "path",
    }
    with mpl.rc_context(settings):
        yield


def pixels_of_figure(figure: Figure, dpi: int = 120) -> np.ndarray:
    """A figure as a picture ``(H, W, 3)`` uint8."""
    figure.set_dpi(dpi)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    picture: np.ndarray = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def save_figure(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a figure in the format that the name ends in; returns the path.

    Raises:
        InputError: an unknown format, or a place that cannot be written to.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise InputError(
            f"expected a file name that ends in one of {', '.join(sorted(known))}, got {path}"
        )
    try:
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise InputError(
            f"expected a place to write in, cannot write {path}: {error.strerror}"
        ) from error
    return path


def draw_image(axis: Axes, image: Tensor) -> None:
    """Show an image ``(H, W, 3)`` in [0, 1], and nothing else."""
    axis.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
    frameless(axis)


def draw_heat(
    axis: Axes, image: Tensor, saliency: Tensor, limits: tuple[float, float] | None = None
) -> None:
    """Show saliency ``(h, w)`` over an image in grey: bright is salient.

    Args:
        axis: where to draw.
        image: ``(H, W, 3)`` in [0, 1].
        saliency: of its tokens.
        limits: darkest and brightest value; by default :func:`heat_limits`.
    """
    height, width = image.shape[:2]
    grey = image @ image.new_tensor([0.3, 0.59, 0.11])
    draw_image(axis, grey[..., None].expand(-1, -1, 3))
    low, high = limits or heat_limits(saliency)
    axis.imshow(
        saliency.numpy(), cmap="inferno", alpha=0.72, interpolation="nearest", vmin=low, vmax=high,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )  # fmt: skip


def heat_limits(*saliency: Tensor) -> tuple[float, float]:
    """Darkest and brightest value for maps to be compared; one token may outshine all others."""
    values = np.concatenate([part.numpy().ravel() for part in saliency])
    low, high = np.quantile(values, (0.01, 0.98))
    return float(low), max(float(high), float(low) + 1e-6)


def frameless(axis: Axes) -> None:
    """Take ticks, grid and frame away."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
