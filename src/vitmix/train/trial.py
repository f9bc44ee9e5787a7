"""One step on blank images: what does not fit shows before anything is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vitmix.train.checkpoint import make_model
from vitmix.train.loading import check_crops
from vitmix.train.methods import method_of
from vitmix.train.optimiser import parameter_groups
from vitmix.train.stages import build_mixing

if TYPE_CHECKING:
    from vitmix.mixing import MixingModel
    from vitmix.train.config import TrainConfig
    from vitmix.train.data import ImageData

__all__ = ["try_method", "try_step"]


def try_method(config: TrainConfig, data: ImageData) -> None:
    """Build the model and the method of a run that is to come, and take a step.

    Raises:
        InputError: settings that do not fit the model or the data.
        UnsupportedModelError: a model that the method cannot follow.
    """
    check_crops(data, config)
    model = make_model(config, len(data.classes), data.img_size)
    teacher = model if method_of(config).needs_teacher else None
    mixing = build_mixing(
        model, config, num_classes=len(data.classes), img_size=data.img_size, teacher=teacher,
        maps=data.maps,
    )  # fmt: skip
    try_step(mixing, data)
    parameter_groups(mixing, config)  # refuses what the optimiser cannot do


def try_step(mixing: MixingModel, data: ImageData) -> None:
    """One forward pass in training mode, which leaves the model as it was."""
    mixing.train()
    side = data.img_size
    before = [buffer.clone() for buffer in mixing.buffers()]
    maps = torch.zeros(2, dtype=torch.long) if mixing.labels.needs_maps else None
    mixing(torch.zeros(2, 3, side, side), torch.tensor([0, 1]), maps=maps)
    for buffer, value in zip(mixing.buffers(), before, strict=True):
        buffer.copy_(value)  # running means and thresholds start with real images
