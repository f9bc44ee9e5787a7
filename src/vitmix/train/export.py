"""The weights of a run as a file for other programs, whole or as far as dense tasks need them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitmix.errors import InputError
from vitmix.models import cct_names, create_model
from vitmix.train.checkpoint import TrainedModel, load_trained
from vitmix.weights import write_weights

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Part", "export_run"]

Part = Literal["all", "backbone", "features"]


def export_run(run: str | Path, path: str | Path, part: Part = "all") -> TrainedModel:
    """Write the weights of a run, averaged ones where it has them.

    The file says beside the weights what they belong to: model, classes, image size and
    normalisation, which ``vitmix train --init`` reads.

    Args:
        run: run folder or checkpoint.
        path: file to write, ``*.safetensors``.
        part: ``"all"``; ``"backbone"`` for ``timm.create_model(..., num_classes=0)``;
            ``"features"`` for ``timm.create_model(..., features_only=True)``. All load with strict
            checking.

    Returns:
        The model of the run.

    Raises:
        InputError: no run, a path that does not fit, or a model without such a part.
    """
    trained = load_trained(run)
    model = _features_of(trained) if part == "features" else trained.model
    write_weights(model, path, head=part != "backbone", facts={**trained.origin, "part": part})
    return trained


def _features_of(trained: TrainedModel) -> nn.Module:
    """The feature extractor of timm around the trained layers, by its default choice of levels."""
    name = trained.config.model
    if name in cct_names():
        raise InputError(
            f"expected a timm model for --part features, got {name}; take --part backbone, and "
            "forward_features of the model"
        )
    state: dict[str, Any] = trained.model.state_dict()
    classes = len(trained.classes)
    try:
        return create_model(
            name,
            num_classes=classes,
            img_size=trained.img_size,
            features_only=True,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": classes},
            **(trained.config.model_kwargs or {}),
        )
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"expected a model that timm takes features from, {name} is none: {error}"
        ) from error
