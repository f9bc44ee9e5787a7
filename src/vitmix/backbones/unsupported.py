"""Why known models are not supported: words for messages, nothing more."""

from __future__ import annotations

from torch import nn

__all__ = ["explain"]

_WINDOWS = "attention within windows"
_STAGES = "stages of different token grids"
_REASONS = {
    "Cait": "talking heads, which mix attention maps behind the softmax",
    "CoaT": "factorised attention, which has no map of tokens by tokens",
    "ConVit": "gated positional attention, a blend of two attention maps a block",
    "CrossVit": "two sequences of tokens of different patch sizes",
    "CvtForImageClassification": "a class token that joins in the last stage",
    "DaViT": f"{_WINDOWS} and between channels",
    "DinatForImageClassification": "attention to neighbours",
    "EfficientVitMsra": f"{_WINDOWS} and {_STAGES}",
    "GlobalContextVit": f"{_WINDOWS} and {_STAGES}",
    "Hiera": f"{_WINDOWS} and {_STAGES}",
    "HieraDet": f"{_WINDOWS} and {_STAGES}",
    "HieraForImageClassification": f"{_WINDOWS} and {_STAGES}",
    "ImageGPTForImageClassification": "tokens of colours, each of which sees those before it alone",
    "LevitForImageClassification": _STAGES,
    "MobileViTForImageClassification": "attention between pixels at the same place of patches",
    "MobileViTV2ForImageClassification": "separable attention, which has no map of tokens",
    "Nest": f"{_WINDOWS} and {_STAGES}",
    "PvtForImageClassification": "a class token that joins in the last stage",
    "Siglip2ForImageClassification": "images that come as rows of patches",
    "SwiftFormerForImageClassification": "additive attention, which has no map of tokens by tokens",
    "TNT": "an inner transformer of pixels in each block",
    "VOLO": "outlook attention and a class token that joins behind the blocks",
    "Xcit": "attention between channels, which moves no token",
}


def explain(model: nn.Module) -> str:
    """What stands in the way, in brackets behind the model's name; empty if not known."""
    reason = _REASONS.get(type(model).__name__)
    return "" if reason is None else f" ({reason})"
