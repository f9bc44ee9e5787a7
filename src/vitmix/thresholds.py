"""A threshold given as a number, or as the share of values that it is to let through."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitmix.errors import InputError
from vitmix.functional.thresholds import RunningQuantile, follow_quantile
from vitmix.processes import mean_over_processes

__all__ = ["ShareThreshold", "share_threshold"]

_AUTO = "auto:"


def share_threshold(name: str, given: float | str) -> ShareThreshold | None:
    """What ``"auto:0.5"`` stands for; None for a number.

    Raises:
        InputError: neither a number nor ``auto:`` with a share between 0 and 1.
    """
    if not isinstance(given, str):
        if math.isnan(given):
            raise InputError(f"expected `{name}` as a number or auto:SHARE, got NaN")
        return None
    try:
        share = float(given.removeprefix(_AUTO))
    except ValueError:
        share = math.nan
    if not given.startswith(_AUTO) or not 0 < share < 1:
        raise InputError(
            f"expected `{name}` as a number, or auto:SHARE with a share between 0 and 1 such as "
            f"auto:0.5, got {given!r}"
        )
    return ShareThreshold(share)


class ShareThreshold(nn.Module):
    """Keeps a share of values below a threshold while the values drift.

    The state is in float32 buffers, so that checkpoints carry it. In a distributed run all
    processes move the same threshold: by the mean of their quantiles and of their shares.

    Args:
        share: share of values to lie below, in (0, 1).
    """

    value: Tensor
    level: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        start = RunningQuantile.start(share)
        self.register_buffer("value", start.value)
        self.register_buffer("level", start.level)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.to(torch.float32))  # too fine for half precision
        return self

    def extra_repr(self) -> str:
        """Name the share."""
        return f"share={self.share}"

    @torch.no_grad()
    def follow(self, values: Tensor) -> Tensor:
        """See a batch of values, NaN for those that don't count; return the new threshold."""
        state = RunningQuantile(self.value, self.level)
        new = follow_quantile(state, values, self.share, mean=mean_over_processes)
        self.value.copy_(new.value)
        self.level.copy_(new.level)
        return new.value
