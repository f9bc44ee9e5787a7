"""What the processes of a distributed run tell each other; in one process, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["alone", "mean_over_processes", "world_size"]

_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Let this process act as if it were the only one: the others don't take part in what it does.

    For extra passes of one process, such as those that make pictures.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Number of processes that act together."""
    if _alone or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def mean_over_processes(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of a scalar over all processes; NaN where all weights are 0."""
    both = torch.stack((value * weight, weight))
    if world_size() > 1:
        dist.all_reduce(both)
    return both[0] / both[1]
