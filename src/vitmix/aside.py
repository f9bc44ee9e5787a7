"""Extra passes through parts of a model that leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

__all__ = ["aside"]


@contextmanager
def aside(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Let modules run once more without a trace in a training step.

    Dropout draws what it would have drawn without the pass (but in a compiled pass, which has an
    order of draws of its own), and the running statistics of batch normalisation stay as they are.
    Autocast keeps none of the casts of weights: older PyTorch hands those made without a graph to
    the step's own pass, which then trains no weight (pytorch/pytorch#112583).

    Args:
        modules: what will run.
        device: where it runs.
    """
    norms = [
        part
        for module in modules
        for part in module.modules()
        if isinstance(part, nn.modules.batchnorm._NormBase) and part.training
    ]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in statistics]
    try:
        with nullcontext() if torch.compiler.is_compiling() else _untraced(device):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)


@contextmanager
def _untraced(device: torch.device) -> Iterator[None]:
    """Leave random generators, and autocast's cache of weights, as they are."""
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
