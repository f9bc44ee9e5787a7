"""What a model is made of: ``describe(model)``; one file a family.

Nothing here knows a mixing method, and no model library is imported: a family whose library the
process has not imported cannot be what the model is made of.
"""

from __future__ import annotations

from torch import nn

from vitmix.backbones import cct, timm_vit
from vitmix.backbones.base import Backbone, Block, Family
from vitmix.errors import UnsupportedModelError

__all__ = ["Backbone", "Block", "describe"]

_FAMILIES: tuple[Family, ...] = (cct, timm_vit)


def describe(model: nn.Module) -> Backbone:
    """Find the blocks, token grid, prefix tokens and pooling of a model.

    Args:
        model: a model of a supported family; it is only looked at.

    Returns:
        What was found.

    Raises:
        UnsupportedModelError: the model is of no supported family, or has a part that token mixing
            cannot follow; the message names what was looked for and what was found.

    Example:
        >>> from vitmix.models import create_model
        >>> describe(create_model("cct_2_3x2_32", num_classes=10, img_size=32)).num_prefix_tokens
        0
    """
    for family in _FAMILIES:
        backbone = family.describe(model)
        if backbone is not None:
            return backbone
    kind = type(model)
    raise UnsupportedModelError(
        f"looked for one of: {'; '.join(family.LOOKS_FOR for family in _FAMILIES)}. "
        f"Found {kind.__module__}.{kind.__qualname__} with children "
        f"{[name for name, _ in model.named_children()]}. The model was not changed."
    )
