"""``vitmix figure``: the papers' figures of a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.analysis import follow_origins, saliency_by_detector
from vitmix.errors import InputError
from vitmix.evaluate.preview import PreviewModel, model_with_pictures
from vitmix.plots.curves import mixing_curves, read_metrics
from vitmix.plots.papers import difficulty_figure, fluctuation_figure, saliency_figure
from vitmix.plots.style import LIGHT, save_figure, themed
from vitmix.preview import looking
from vitmix.samples import choose_rows, shown_as
from vitmix.tokens import HorizontalTokenMixup
from vitmix.train.config import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "make_figure"]

Options = dict[str, Any]
BATCH = 64


def make_figure(kind: str, run: str, options: Options, out: str | None, block: int | None) -> Path:
    """Draw one of the figures; returns its path.

    Args:
        kind: a key of :data:`FIGURES`.
        run: run folder or checkpoint.
        options: fields of ``TrainConfig`` that were given: which images to look at.
        out: file to write; ``KIND.png`` by default.
        block: at which saliency is looked at; that of the run's method, or a quarter of the depth.

    Raises:
        InputError: no such figure, or a run that has nothing to show in it.
    """
    if kind not in FIGURES:
        raise InputError(
            f"expected a figure ({', '.join(FIGURES)}), got {kind!r}{suggest(kind, FIGURES)}"
        )
    if block is not None and kind != "saliency":
        raise InputError(f"expected no --block for the figure of {kind}; leave it out")
    path = Path(out or f"{kind}.png")
    with themed(LIGHT):
        figure = FIGURES[kind](run, {"batch_size": BATCH, **options}, block)
        return save_figure(figure, path, dpi=130)


def _saliency(run: str, options: Options, block: int | None) -> Figure:
    found = model_with_pictures(options, run)
    mixing, pictures = found.mixing, found.pictures
    if block is None:
        stages = [s.block for s in mixing.tokens if isinstance(s, HorizontalTokenMixup)]
        block = stages[0] if stages else mixing.backbone.depth // 4
    mixing.backbone.require_block("--block", block)
    detected = saliency_by_detector(mixing, pictures.images, pictures.labels, block=block)
    shown = shown_as(pictures.images[:4], pictures.mean, pictures.std)
    names = [pictures.classes[label] for label in pictures.labels[:4].tolist()]
    title = f"saliency at block {block}: {found.config.model}, {found.weights}"
    return saliency_figure(shown, names, detected, LIGHT, title)


def _fluctuation(run: str, options: Options, block: int | None) -> Figure:
    found = model_with_pictures(options, run)
    if found.mixing.mix is None:
        found = _with_cutmix(found, options, run)
    mixing, pictures = found.mixing, found.pictures
    with looking(mixing, found.config.seed):
        out = mixing(pictures.images, pictures.labels, record=True)
    rows = choose_rows(out.trace, pictures.labels, 1)
    if not rows:
        raise InputError(
            f"expected a draw that mixes two classes, seed {found.config.seed} mixes none; "
            "give another --seed, or more pictures"
        )
    row = rows[0]
    fluctuation = follow_origins(out.trace.record, mixing.backbone.num_prefix_tokens)
    (image,) = shown_as(out.trace.images[[row]], pictures.mean, pictures.std)
    title = f"token fluctuation: {found.config.model}, {found.weights}"
    return fluctuation_figure(fluctuation, image, row, LIGHT, title)


def _with_cutmix(found: PreviewModel, options: Options, run: str) -> PreviewModel:
    """The model with boxes mixed in the pixels: without, there is no partner at the input."""
    return replace(
        model_with_pictures({**options, "method": "cutmix", "mix": {"name": "cutmix", "align": True,
                                                                   "draw": "element"}}, run),
        weights=f"{found.weights}, with CutMix",
    )  # fmt: skip


def _folder(run: str) -> Path:
    """The folder whose logs are drawn."""
    path = Path(run)
    folder = path if path.is_dir() else path.parent
    if not (folder / "metrics.csv").is_file():
        raise InputError(f"expected a run folder with its metrics.csv, there is none in {folder}")
    return folder


def _mixing(run: str, options: Options, block: int | None) -> Figure:
    folder = _folder(run)
    figure = mixing_curves({folder.resolve().name: read_metrics(folder)})
    if figure is None:
        raise InputError(f"expected a run of horizontal TokenMixup, {folder} mixed no tokens")
    return figure


def _difficulty(run: str, options: Options, block: int | None) -> Figure:
    folder = _folder(run)
    title = f"difficulty over training: {folder.resolve().name}"
    figure = difficulty_figure(read_metrics(folder), LIGHT, title)
    if figure is None:
        raise InputError(
            f"expected a run of horizontal TokenMixup, {folder} has logged no difficulty"
        )
    return figure


FIGURES: dict[str, Callable[[str, Options, int | None], Figure]] = {
    "saliency": _saliency,
    "mixing": _mixing,
    "fluctuation": _fluctuation,
    "difficulty": _difficulty,
}
