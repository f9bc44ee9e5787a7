"""Which registered models are supported, and with which stages: ``vitmix models``.

Models are made on the meta device, where tensors have shapes but no numbers, and every stage that a
description promises is run there once: hooks, tap and shapes are those of a real step.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitmix.backbones import Backbone, describe
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.labels import AttentionLabels, TokenAlignedLabels
from vitmix.mixing import MixingModel
from vitmix.models import cct_names, create_model, input_side
from vitmix.pixels import CutMix
from vitmix.tokens import HorizontalTokenMixup, ManifoldMixup, VerticalTokenMixup

__all__ = ["STAGES", "Surveyed", "model_names", "survey_model", "table_row"]

# Each stage by the name that ``Backbone.support`` gives it; ``block`` is one that it may act at.
STAGES: dict[str, Callable[[int], dict[str, Any]]] = {
    "attention": lambda block: {"mix": CutMix(), "labels": AttentionLabels()},
    "aligned": lambda block: {"mix": CutMix(), "labels": TokenAlignedLabels()},
    "horizontal": lambda block: {"tokens": [HorizontalTokenMixup(block, tau=math.inf)]},
    "manifold": lambda block: {"tokens": [ManifoldMixup(block)]},
    "vertical": lambda block: {"tokens": [VerticalTokenMixup(block, kappa=1)]},
}
_CLASSES = 10


@dataclass(frozen=True)
class Surveyed:
    """What was found out about a registered model.

    Attributes:
        name: its registered name.
        kind: its class.
        size: height and width of its input in pixels.
        backbone: its description, or None.
        refusal: why there is none, or None.
        reasons: for each label rule and token stage, why it cannot be used; None where it can.
            Empty without a description.
    """

    name: str
    kind: str
    size: tuple[int, int]
    backbone: Backbone | None
    refusal: str | None
    reasons: dict[str, str | None]

    @property
    def is_full(self) -> bool:
        """Whether all label rules and horizontal mixing can be used."""
        needed = ("area", "teacher", "attention", "aligned", "horizontal")
        return bool(self.reasons) and all(self.reasons[name] is None for name in needed)

    def details(self) -> str:
        """What was found, in several lines."""
        if self.backbone is None:
            return f"{self.name} ({self.kind}): not supported, {self.refusal}"
        described = replace(
            self.backbone,
            alignment_reason=self.reasons["aligned"],
            vertical_reason=self.reasons["vertical"],
        )
        return f"{self.name}: {described.summary(self.size)}"


def table_row(found: Surveyed) -> str:
    """One line: the name, the stages that can be used, and why others cannot."""
    if found.backbone is None:
        return f"{found.name:<44} no ({found.refusal})"
    usable = [stage for stage in STAGES if found.reasons[stage] is None]
    refused = dict.fromkeys(r.partition(":")[0] for r in found.reasons.values() if r)
    return f"{found.name:<44} {' '.join(usable)}{''.join(f' ({r})' for r in refused)}"


def model_names(pattern: str = "*") -> list[str]:
    """Registered names of vitmix and timm that fit a pattern."""
    import timm

    own = [name for name in cct_names() if fnmatch.fnmatch(name, pattern)]
    return own + list(timm.list_models(pattern))


def survey_model(name: str) -> Surveyed:
    """Make a model without numbers, describe it, and run what is supported.

    Raises:
        InputError: no model has this name.
    """
    model, size = _make(name)
    kind = type(model).__name__
    try:
        backbone = describe(model)
    except UnsupportedModelError as error:
        return Surveyed(name, kind, size, None, _found(str(error)), {})
    reasons = dict(backbone.support)
    promised = [stage for stage in STAGES if reasons[stage] is None]
    # All are tried in one pass, and each alone only where that fails.
    if _try(model, backbone, size, _joined(promised, backbone)) is not None:
        for stage in promised:
            reasons[stage] = _try(model, backbone, size, _joined([stage], backbone))
    return Surveyed(name, kind, size, backbone, None, reasons)


def _make(name: str) -> tuple[nn.Module, tuple[int, int]]:
    if name in cct_names():
        side = input_side(name)
        with torch.device("meta"):
            return create_model(name, num_classes=_CLASSES, img_size=side), (side, side)
    import timm

    if not timm.is_model(name):
        raise InputError(f"expected the name of a model of vitmix or timm, got {name!r}")
    with torch.device("meta"):
        try:
            model = timm.create_model(name, num_classes=_CLASSES)
        except TypeError:  # an encoder that takes no classes
            model = timm.create_model(name)
    _, height, width = model.default_cfg["input_size"]
    return model, (height, width)


class _AttendedLabels(TokenAlignedLabels):
    """Aligned labels that have the last block's saliency read as well."""

    attention_block = -1


def _joined(stages: list[str], backbone: Backbone) -> dict[str, Any]:
    """Arguments of a ``MixingModel`` with several stages at once."""
    made = [STAGES[stage](_block_for(stage, backbone)) for stage in stages]
    joined: dict[str, Any] = {key: value for each in made for key, value in each.items()}
    joined["tokens"] = [stage for each in made for stage in each.get("tokens", ())]
    if {"attention", "aligned"} <= set(stages):
        joined["labels"] = _AttendedLabels()
    return joined


def _block_for(stage: str, backbone: Backbone) -> int:
    if stage != "vertical":
        return backbone.depth // 2
    stages = [backbone.stage(index) for index in range(backbone.depth)]
    return next(
        index for index in reversed(range(1, backbone.depth)) if stages[index] in stages[:index]
    )


def _try(
    model: Any, backbone: Backbone, size: tuple[int, int], stages: dict[str, Any]
) -> str | None:
    """Run one training step; why it is refused, or None."""
    channels = getattr(model, "default_cfg", {"input_size": (3,)})["input_size"][0]
    images = torch.empty(2, channels, *size, device="meta")
    targets = torch.zeros(2, dtype=torch.long, device="meta")
    try:
        mixing = MixingModel(model, num_classes=_CLASSES, backbone=backbone, **stages)
        mixing.train()(images, targets)
    except (UnsupportedModelError, InputError) as error:
        return _found(str(error))
    return None


def _found(message: str) -> str:
    """What was found, without what was looked for and without the model's own name."""
    found = re.split(r"(?i)\bfound ", message, maxsplit=1)[-1]
    if re.match(r"(timm|vitmix)\.", found):
        known = re.search(r" \((.*)\) with children", found)
        return known.group(1) if known else "no transformer that is known"
    return found.split(". ")[0].removesuffix(".")
