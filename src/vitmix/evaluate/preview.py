"""``vitmix preview``: what a method does to some images of a data set, as a picture."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitmix.errors import InputError
from vitmix.models import input_side
from vitmix.preview import Preview
from vitmix.train.checkpoint import load_trained, make_model, read_checkpoint
from vitmix.train.config import TrainConfig
from vitmix.train.data import IMAGENET_MEAN, IMAGENET_STD, find_source, pretrained_statistics
from vitmix.train.decoding import DECODE_ERRORS, CorruptImageError, centred, pixels_of
from vitmix.train.methods import MethodSpec, method_name, method_of
from vitmix.train.provenance import pick_device
from vitmix.train.recipes import get_recipe
from vitmix.train.records import read_pictures
from vitmix.train.stages import build_mixing
from vitmix.train.teachers import named_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix import MixingModel
    from vitmix.train.checkpoint import TrainedModel
    from vitmix.train.records import Source

__all__ = ["BATCH", "Pictures", "PreviewModel", "make_preview", "model_with_pictures"]

BATCH = 16
STAGES = ("method", "mix", "labels", "tokens")
DRAWS = 4  # pixels are often mixed in one proportion for the whole batch


@dataclass(frozen=True)
class Pictures:
    """Some images of a data set, as a model takes them.

    Attributes:
        images: ``(B, 3, H, W)`` normalised.
        labels: ``(B,)``.
        classes: names.
        mean: that they were normalised by.
        std: likewise.
        name: of the data set.
        labelled: whether the data set says what the images show.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    labelled: bool = True


@dataclass(frozen=True)
class PreviewModel:
    """A model with the stages around it, images for it, and what there is to say about them."""

    mixing: MixingModel
    pictures: Pictures
    config: TrainConfig
    weights: str
    notes: tuple[str, ...]


def make_preview(options: dict[str, Any], checkpoint: str | None, samples: int) -> Preview:
    """The picture of a method on a data set.

    Args:
        options: fields of :class:`TrainConfig` that were given.
        checkpoint: run folder or checkpoint, or None for a new model.
        samples: how many samples to show.

    Raises:
        InputError: options, data, model or checkpoint that don't fit.
    """
    if samples < 1:
        raise InputError(f"expected --samples to be at least 1, got {samples}")
    found = model_with_pictures(options, checkpoint)
    pictures, config = found.pictures, found.config
    draws = 1 if found.mixing.mix is None else DRAWS
    shown = found.mixing.preview(
        pictures.images, pictures.labels, classes=pictures.classes, mean=pictures.mean,
        std=pictures.std, samples=samples, draws=draws, seed=config.seed,
        title=f"{method_name(config)} on {pictures.name}: {config.model}, {found.weights}",
    )  # fmt: skip
    return replace(shown, note=" ".join(filter(None, (shown.note, *found.notes))))


def model_with_pictures(options: dict[str, Any], checkpoint: str | None) -> PreviewModel:
    """A model with its stages, new or trained, and images to look at it with.

    Args:
        options: fields of :class:`TrainConfig` that were given.
        checkpoint: run folder or checkpoint, or None for a new model.

    Raises:
        InputError: options, data, model or checkpoint that don't fit.
    """
    trained = None if checkpoint is None else load_trained(checkpoint, model=options.get("model"))
    config, same_stages = _settings(options, trained)
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    spec, notes = method_of(config), []
    torch.manual_seed(config.seed)
    pictures = _read(config, trained)
    side, classes = int(pictures.images.shape[2]), len(pictures.classes)
    if trained is None:
        model = make_model(config, classes, side)
        weights = "pretrained weights" if config.pretrained else "random weights"
        config, note = _opened(config, spec, _chosen(options))
        notes.append(note)
    else:
        model, weights = trained.model, f"run {trained.path.resolve().parent.name}"
    teacher = None
    if spec.needs_teacher:
        config = replace(config, teacher_maps=None)
        if config.teacher == "auto":
            teacher = deepcopy(model)
            notes.append("The model itself stands in for the teacher.")
        else:
            teacher = named_teacher(
                config.teacher, pictures.classes, pictures.name, side,
                mean=pictures.mean, std=pictures.std,
            )  # fmt: skip
    mixing = build_mixing(model, config, num_classes=classes, img_size=side, teacher=teacher)
    if trained is not None and same_stages:
        _load_stages(mixing, trained.path)
    mixing.to(device)
    pictures = replace(
        pictures, images=pictures.images.to(device), labels=pictures.labels.to(device)
    )
    if not pictures.labelled and trained is not None:
        with torch.no_grad():
            predicted = mixing.eval()(pictures.images)
        pictures = replace(pictures, labels=predicted.argmax(1))
        notes.append("The pictures have no classes: their labels are the model's predictions.")
    return PreviewModel(mixing, pictures, config, weights, tuple(filter(None, notes)))


def _settings(options: dict[str, Any], trained: TrainedModel | None) -> tuple[TrainConfig, bool]:
    """The settings, on top of those of a run; and whether the stages are those of the run."""
    same = trained is not None and not {*STAGES, "block"} & set(options)
    base: dict[str, Any] = {}
    if trained is not None:
        known = (
            trained.config if not set(STAGES) & set(options) else trained.config.without_method()
        )
        base = {**known.to_dict(), "img_size": trained.img_size, "device": "auto"}
    base |= options
    if "batch_size" not in _chosen(options):
        base["batch_size"] = BATCH
    config = TrainConfig.from_dict(base)
    if trained is not None and config.img_size != trained.img_size:
        raise InputError(
            f"expected --img-size {trained.img_size}, that of {trained.path}, "
            f"got {config.img_size}; leave it out"
        )
    config.validate()
    return config, same


def _chosen(options: dict[str, Any]) -> set[str]:
    """The options that the user gave, without those of a recipe."""
    name = options.get("recipe")
    known = {} if name is None else get_recipe(name).settings
    return {key for key, value in options.items() if known.get(key) != value}


def _opened(config: TrainConfig, spec: MethodSpec, chosen: set[str]) -> tuple[TrainConfig, str]:
    """Thresholds with which a model that knows nothing mixes; what was given stays as it is."""
    horizontal = [part.args for part in spec.tokens if part.name == "horizontal"]
    if not horizontal:
        return config, ""
    given = chosen | (set(horizontal[0]) if set(STAGES) & chosen else set())
    words = []
    if "tau" not in given:
        config = replace(config, tau=math.inf)
        words.append("--tau inf (every sample counts as easy)")
    if "rho" not in given and not config.pretrained:
        config = replace(config, rho="auto:0.3")
        words.append("--rho auto:0.3 (about a third of their tokens is replaced)")
    if not words:
        return config, ""
    what = "ScoreNet is not" if config.pretrained else "Nothing is"
    return config, f"{what} trained yet, hence {' and '.join(words)}."


def _load_stages(mixing: MixingModel, path: Path) -> None:
    """ScoreNets and thresholds of a run."""
    prefix = "mixing.tokens."
    state = {
        key.removeprefix(prefix): value
        for key, value in read_checkpoint(path)["state_dict"].items()
        if key.startswith(prefix)
    }
    own = mixing.tokens.state_dict()
    mixing.tokens.load_state_dict(own | {key: value for key, value in state.items() if key in own})


def _read(config: TrainConfig, trained: TrainedModel | None) -> Pictures:
    """Images of a data set, or of a folder of pictures without classes."""
    source = read_pictures(Path(config.data).expanduser())
    labelled = source is None
    source = source or find_source(config)
    side = config.img_size or input_side(config.model)
    images, rows = _decode(source, config, side)
    labels, classes = source.train.labels[rows], source.classes
    if not labelled:  # each picture is a class of its own
        classes = tuple(source.classes[label] for label in labels.tolist())
        labels = torch.arange(len(rows))
    if trained is not None:
        if labelled and classes != trained.classes:
            raise InputError(
                f"expected images of the {len(trained.classes)} classes of {trained.path}, got "
                f"{len(classes)} classes ({classes[0]}, ...) from {config.data}; pass --data"
            )
        classes = trained.classes
    known = (trained.mean, trained.std) if trained else pretrained_statistics(config)
    mean, std = known or (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = tuple(config.mean or mean), tuple(config.std or std)
    shift, scale = (torch.tensor(values)[:, None, None] for values in (mean, std))
    images = (images.float() / 255 - shift) / scale
    return Pictures(images, labels, classes, mean, std, source.name, labelled)


def _decode(source: Source, config: TrainConfig, side: int) -> tuple[Tensor, list[int]]:
    """Some images at random ``(B, 3, side, side)`` uint8, and their rows."""
    generator = torch.Generator().manual_seed(config.seed)
    images: list[Tensor] = []
    rows: list[int] = []
    for row in torch.randperm(len(source.train), generator=generator).tolist():
        if len(rows) == config.batch_size:
            break
        try:
            pixels = pixels_of(source.train.content(row))
        except DECODE_ERRORS as error:
            if not config.skip_corrupt:
                raise CorruptImageError.at(source.train.describe(row)) from error
            continue
        images.append(centred(pixels, side, config.crop_pct, config.interpolation))
        rows.append(row)
    if len(rows) < 2:
        raise InputError(f"expected at least two images in {config.data}, got {len(rows)}")
    return torch.stack(images), rows
