"""``vitmix evaluate RUN --measures ...``: calibration, robustness and localisation of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitmix.errors import InputError
from vitmix.evaluate import measures
from vitmix.plots.measures import measures_figure
from vitmix.plots.style import LIGHT, save_figure, themed
from vitmix.train.config import suggest
from vitmix.train.data import find_source
from vitmix.train.decoding import DECODE_ERRORS, CorruptImageError, centred, pixels_of
from vitmix.train.folder import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.evaluate.checkpoint import OpenedRun
    from vitmix.train.config import TrainConfig
    from vitmix.train.records import Records

__all__ = ["MEASURES", "check_measures", "chosen_measures", "measure", "save_measures"]

BATCH = 64
Figures = dict[str, Any]


def chosen_measures(text: str) -> list[str]:
    """Names between commas, or ``all``.

    Raises:
        InputError: a name that is none, or none at all.
    """
    if text == "all":
        return list(MEASURES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in MEASURES:
            raise InputError(
                f"expected --measures as all or some of {', '.join(MEASURES)} between commas, "
                f"got {name!r}{suggest(name, MEASURES)}"
            )
    return names


def measure(
    run: OpenedRun, names: Sequence[str], limit: int | None
) -> Iterator[tuple[str, Figures]]:
    """Take measures of a model on its test images, one after another.

    Args:
        run: the model and the images.
        names: keys of :data:`MEASURES`.
        limit: go only over so many images, spread evenly over all.

    Raises:
        InputError: images that a measure cannot be taken on.
        UnsupportedModelError: a model without attention that could be read.
    """
    check_measures(names, run.config)
    count = len(run.data.test)
    if limit is not None and limit < count:
        rows = torch.arange(limit) * count // limit
        run = replace(run, data=replace(run.data, test=run.data.test.select(rows)))
    subject = measures.Subject(
        run.model.to(run.device), run.batches, run.prepare, len(run.data.classes),
        run.device, run.config.seed,
    )  # fmt: skip
    for name in names:
        yield name, MEASURES[name](run, subject)


def check_measures(names: Sequence[str], config: TrainConfig) -> None:
    """Refuse at once what would fail behind the measures before it, or behind a training.

    Raises:
        InputError: a library that is not installed, or images without boxes.
    """
    if "corruptions" in names:
        measures.corruption_library()
    if "localisation" in names:
        _records_with_boxes(config)


def save_measures(found: dict[str, Any], folder: Path, title: str) -> list[str]:
    """Write ``evaluation.json`` and ``evaluation.png``; returns lines that sum them up."""
    write_json(folder / "evaluation.json", found)
    with themed(LIGHT):
        save_figure(measures_figure(found, LIGHT, title), folder / "evaluation.png", dpi=130)
    lines = [f"{name:13}{WORDS[name](found[name])}" for name in MEASURES if name in found]
    return [*lines, f"results {folder / 'evaluation.json'}, {folder / 'evaluation.png'}"]


def _plainly(
    take: Callable[[measures.Subject], Figures],
) -> Callable[[OpenedRun, measures.Subject], Figures]:
    return lambda run, subject: take(subject)


def _localisation(run: OpenedRun, subject: measures.Subject) -> Figures:
    rows = run.data.test.rows.tolist()
    boxed = _with_boxes(run, _records_with_boxes(run.config), rows)
    found = measures.localisation(subject, boxed)
    return {**found, "left_out": len(rows) - found["images"]}


def _records_with_boxes(config: TrainConfig) -> Records:
    """What the test images were selected from."""
    source = find_source(config)
    held_out = source.test is None or config.val_share is not None
    records = source.train if source.test is None or held_out else source.test
    if records.box is None:
        raise InputError(
            "expected Parquet files with a column box or bbox (x0, y0, x1, y1 in pixels) for "
            f"--measures localisation, {config.data} has none; leave localisation out"
        )
    return records


def _with_boxes(
    run: OpenedRun, records: Records, rows: list[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of images, labels and the pixels inside of boxes, cut like the images."""
    size, crop = run.data.img_size, run.config.crop_pct
    cut = partial(centred, size=size, crop_pct=crop, interpolation=run.config.interpolation)
    assert records.box is not None
    for start in range(0, len(rows), BATCH):
        images, boxes, kept = [], [], []
        for row in rows[start : start + BATCH]:
            try:
                pixels = pixels_of(records.content(row))
            except DECODE_ERRORS as error:
                raise CorruptImageError.at(records.describe(row)) from error
            left, top, right, bottom = records.box(row)
            box = torch.zeros_like(pixels[:1])
            box[:, int(top) : int(bottom) + 1, int(left) : int(right) + 1] = 255
            inside = centred(box, size, crop, "bilinear")[0] >= 128
            if inside.any():  # the cut may have left it out
                images.append(cut(pixels))
                boxes.append(inside)
                kept.append(row)
        if kept:
            yield torch.stack(images), records.labels[kept], torch.stack(boxes)


MEASURES: dict[str, Callable[[OpenedRun, measures.Subject], Figures]] = {
    "calibration": _plainly(measures.calibration),
    "occlusion": _plainly(measures.occlusion),
    "corruptions": _plainly(measures.corruptions),
    "fgsm": _plainly(measures.fgsm),
    "localisation": _localisation,
}


def _at(values: Sequence[float], places: Sequence[float], wanted: float) -> float:
    """The figure at the place next to a wanted one, in percent."""
    return 100 * values[min(range(len(places)), key=lambda index: abs(places[index] - wanted))]


WORDS: dict[str, Callable[[Figures], str]] = {
    "calibration": lambda found: (
        f"expected error {found['ece']:.3f}, largest {found['mce']:.3f}, Brier {found['brier']:.3f}"
    ),
    "occlusion": lambda found: (
        "top-1 without half of the patches: "
        + ", ".join(
            f"{order} {_at(values, found['shares'], 0.5):.1f}%"
            for order, values in found["accuracy"].items()
        )
    ),
    "corruptions": lambda found: (
        f"top-1 {100 * found['mean']:.1f}%, mean of {len(found['accuracy'])} corruptions at "
        f"{len(found['severities'])} severities ({found['images']} images)"
    ),
    "fgsm": lambda found: (
        "top-1 "
        + ", ".join(
            f"{100 * value:.1f}% at {epsilon:g}/255"
            for epsilon, value in zip(found["epsilons"], found["accuracy"], strict=True)
        )
    ),
    "localisation": lambda found: (
        f"peak in the box {100 * found['pointing']:.1f}%, saliency in it "
        f"{100 * found['share']:.1f}% (even: {100 * found['area']:.1f}%), IoU {found['iou']:.3f}"
    ),
}
