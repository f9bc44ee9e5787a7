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
    "DaViT": f"{_WINDOWS} and between channels",
    "EfficientVitMsra": f"{_WINDOWS} and {_STAGES}",
    "GlobalContextVit": f"{_WINDOWS} and {_STAGES}",
    "Hiera": f"{_WINDOWS} and {_STAGES}",
    "HieraDet": f"{_WINDOWS} and {_STAGES}",
    "Nest": f"{_WINDOWS} and {_STAGES}",
    "TNT": "an inner transformer of pixels in each block",
    "VOLO": "outlook attention and a class token that joins behind the blocks",
    "Xcit": "attention between channels, which moves no token",
}


def explain(model: nn.Module) -> str:
    """What stands in the way, in brackets behind the model's name; empty if not known."""
    reason = _REASONS.get(type(model).__name__)
    return "" if reason is None else f" ({reason})"
