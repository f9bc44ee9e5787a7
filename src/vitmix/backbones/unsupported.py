"""Why known models are not supported: words for messages, nothing more."""

from __future__ import annotations

from torch import nn

__all__ = ["explain", "wrapped"]

_CHANNELS = "attention between channels, which moves no token"
_PARALLEL = "a model in parallel: give the model itself, and wrap the MixingModel"
# Where models that are another one, run in another way, keep it.
_WITHIN = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_STATE = "tokens mixed through a hidden state, which has no map of tokens by tokens"
_ENCODER = "an encoder without a classifier"
_REASONS = {
    "CoaT": "factorised attention, which has no map of tokens by tokens",
    "ConVit": "gated positional attention, a blend of two attention maps a block",
    "CrossVit": "two sequences of tokens of different patch sizes",
    "CvtForImageClassification": "a class token that joins in the last stage",
    "DataParallel": _PARALLEL,
    "DeepseekVitEncoder": _ENCODER,
    "DinatForImageClassification": "attention to neighbours",
    "DistributedDataParallel": _PARALLEL,
    "EdgeNeXt": _CHANNELS,
    "EfficientViM": _STATE,
    "EfficientViMDistilled": _STATE,
    "FullyShardedDataParallel": _PARALLEL,
    "Gemma4VitEncoder": _ENCODER,
    "ImageGPTForImageClassification": "tokens of colours, each of which sees those before it alone",
    "MobileNetV5": "features of several stages, joined behind the last",
    "MobileNetV5Encoder": _ENCODER,
    "MobileViTForImageClassification": "attention between pixels at the same place of patches",
    "MobileViTV2ForImageClassification": "separable attention, which has no map of tokens",
    "OptimizedModule": "a compiled model: give the model itself, and compile the MixingModel",
    "PvtForImageClassification": "a class token that joins in the last stage",
    "Qwen3VitEncoder": _ENCODER,
    "ResNet": "attention between channels at most, which moves no token",
    "Siglip2ForImageClassification": "images that come as rows of patches",
    "SwiftFormerForImageClassification": "additive attention, which has no map of tokens by tokens",
    "TNT": "an inner transformer of pixels in each block",
    "Xcit": _CHANNELS,
}


def explain(model: nn.Module) -> str:
    """What stands in the way, in brackets behind the model's name; empty if not known."""
    reason = _REASONS.get(type(model).__name__)
    if hasattr(model, "get_base_model"):
        reason = "adapters around a model: give what its get_base_model() returns, which has them"
    return "" if reason is None else f" ({reason})"


def wrapped(model: nn.Module) -> nn.Module | None:
    """The model that a compiled one, or one in parallel, runs; None for any other."""
    name = _WITHIN.get(type(model).__name__)
    return None if name is None else model.get_submodule(name)
