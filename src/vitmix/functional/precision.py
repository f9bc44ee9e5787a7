"""Saliency, gains and labels stay in float32, also where a step runs in lower precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["no_autocast", "wide"]


def no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Context in which products of float32 tensors on the device of ``like`` stay float32."""
    if like.device.type == "meta":  # shapes without numbers know no autocast
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def wide(tensor: Tensor) -> Tensor:
    """Float32 at least: rho is near the resolution of bfloat16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
