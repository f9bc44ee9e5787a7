"""Measure a checkpoint on test images."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from vitmix.errors import InputError
from vitmix.evaluate.measured import chosen_measures, measure, save_measures
from vitmix.train.checkpoint import load_trained
from vitmix.train.data import load_data
from vitmix.train.folder import write_json
from vitmix.train.loading import make_augment, make_loader
from vitmix.train.provenance import commit, pick_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from vitmix.train.config import TrainConfig
    from vitmix.train.data import ImageData

__all__ = ["OpenedRun", "Scores", "evaluate_checkpoint", "evaluate_model", "open_run"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Scores:
    """Test figures: accuracies in percent, cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()  # a model that inference mode moves to a device has no gradients any more
def evaluate_model(
    model: nn.Module,
    loader: DataLoader[Any],
    prepare: Callable[[Tensor], Tensor],
    num_classes: int,
    *,
    device: str = "cpu",
    precision: str = "fp32",
) -> Scores:
    """Top-1, top-5 and loss of a model over a loader of uint8 images."""
    model.eval().to(device)
    top1 = MulticlassAccuracy(num_classes, average="micro").to(device)
    top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro").to(device)
    loss = MeanMetric().to(device)
    count = 0
    half = _AUTOCAST.get(precision)
    for images, labels in tqdm(loader, unit=" batches", leave=False, disable=None):
        labels = labels.to(device)
        with torch.autocast(device, dtype=half) if half is not None else nullcontext():
            logits = model(prepare(images.to(device)))
        logits = logits.float()
        top1.update(logits, labels)
        top5.update(logits, labels)
        loss.update(torch.nn.functional.cross_entropy(logits, labels), weight=len(labels))
        count += len(labels)
    accuracy1, accuracy5 = (round(100 * float(metric.compute()), 4) for metric in (top1, top5))
    return Scores(accuracy1, accuracy5, float(loss.compute()), count)


@dataclass(frozen=True)
class OpenedRun:
    """A trained model, and the test images of a data set as it takes them."""

    model: nn.Module
    config: TrainConfig
    data: ImageData
    prepare: Callable[[Tensor], Tensor]
    device: str
    batch_size: int | None = None

    def batches(self) -> DataLoader[Any]:
        """The test images: ``(B, 3, H, W)`` uint8 and labels ``(B,)``."""
        return make_loader(self.data, self.config, train=False, batch_size=self.batch_size)


def open_run(
    run: str,
    *,
    data: str | None = None,
    test_split: str | None = None,
    model: str | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> OpenedRun:
    """The model of a run with what it is tested on; arguments as of :func:`evaluate_checkpoint`.

    Raises:
        InputError: no usable checkpoint, or data with other classes.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"expected --batch-size to be at least 1, got {batch_size}")
    place = pick_device(device)
    trained = load_trained(run, model=model)
    config = trained.config
    config.teacher_maps = None  # of the training images
    if data is not None:
        if Path(data).name != Path(config.data).name:  # other data, not the same elsewhere
            config.label_column = config.test_split = config.val_share = None
        config.data = data
    if test_split is not None:
        config.test_split, config.val_share = test_split, None
    config.img_size = trained.img_size
    images = load_data(config)
    if images.classes != trained.classes:
        raise InputError(
            f"expected test images of the {len(trained.classes)} classes of {trained.path} "
            f"({trained.classes[0]}, {trained.classes[1]}, ...), got {len(images.classes)} classes "
            f"({images.classes[0]}, ...) from {config.data}; pass --data"
        )
    prepare = make_augment(images, config, torch.Generator(), train=False)
    prepare.mean, prepare.std = trained.mean, trained.std  # as in training, whatever the data
    return OpenedRun(trained.model, config, images, prepare, place, batch_size)


def evaluate_checkpoint(
    run: str,
    *,
    data: str | None = None,
    test_split: str | None = None,
    model: str | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    device: str = "auto",
    json: bool = False,
    measures: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    keep: dict[str, Any] | None = None,
) -> str:
    """Measure the model of a run folder or checkpoint; returns what to print.

    Args:
        run: run folder or checkpoint file.
        data: data set; by default the one that the model was trained on.
        test_split: split of the data to test on; by default as in training.
        model: the model that it must be.
        batch_size: images at a time; 256 or, if that is more, as many as in training.
        precision: ``fp32``, ``bf16`` or ``fp16`` of the accuracies; by default as trained.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        json: give JSON instead of words.
        measures: further ones, between commas, or ``all``: keys of
            :data:`vitmix.evaluate.measured.MEASURES`, in fp32. They are written to
            ``evaluation.json`` and drawn in ``evaluation.png``.
        limit: take the further measures on so many test images, spread evenly.
        out: folder for the two files; by default that of the run.
        keep: measures that were taken before, to stay in the files.

    Raises:
        InputError: no usable checkpoint, data with other classes, or no such measure.
        UnsupportedModelError: a measure of attention, of a model without any that could be read.
    """
    if precision not in (None, "fp32", "bf16", "fp16"):
        raise InputError(f"expected --precision to be fp32, bf16 or fp16, got {precision!r}")
    names = None if measures is None else chosen_measures(measures)
    if names is None and (limit is not None or out is not None):
        raise InputError("expected --limit and --out with --measures; add it, or leave them out")
    if limit is not None and limit < 1:
        raise InputError(f"expected --limit to be at least 1, got {limit}")
    opened = open_run(
        run, data=data, test_split=test_split, model=model, batch_size=batch_size, device=device
    )
    path = Path(run)
    folder = Path(out) if out is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise InputError(f"expected a folder for evaluation.json, there is no {folder}; make it")
    scores = evaluate_model(
        opened.model,
        opened.batches(),
        opened.prepare,
        len(opened.data.classes),
        device=opened.device,
        precision=precision or opened.config.precision,
    )
    if names is None:
        return _as_json(asdict(scores)) if json else _in_words(scores)
    found = {
        "run": str(path), "data": opened.config.data, "test_split": opened.config.test_split,
        "commit": commit(), **asdict(scores), **(keep or {}),
    }  # fmt: skip
    for name, figures in measure(opened, names, limit):
        found[name] = figures
        write_json(folder / "evaluation.json", found)  # what there is, if the next one fails
    lines = save_measures(found, folder, title=f"{opened.config.model}, {path.resolve().name}")
    return _as_json(found) if json else "\n".join([_in_words(scores), *lines])


def _in_words(scores: Scores) -> str:
    return (
        f"top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  loss {scores.loss:.4f}  "
        f"({scores.images} images)"
    )


def _as_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures)
