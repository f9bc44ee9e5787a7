"""Thresholds that keep a share: a running quantile of values that drift as the model learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitmix.errors import InputError

__all__ = ["RunningQuantile", "follow_quantile"]

# A sort of this many values is all that one step may cost; of more, every second, third, ... is
# looked at.
MOST_VALUES = 1 << 20


class RunningQuantile(NamedTuple):
    """A threshold and the level of the quantile that it is heading for.

    Attributes:
        value: scalar, the threshold; NaN as long as nothing has been seen.
        level: scalar in [0, 1], level of the quantile of each batch that ``value`` follows.
    """

    value: Tensor
    level: Tensor

    @classmethod
    def start(cls, share: float) -> RunningQuantile:
        """Nothing seen yet."""
        return cls(torch.tensor(torch.nan), torch.tensor(float(share)))


def follow_quantile(
    state: RunningQuantile,
    values: Tensor,
    share: float,
    *,
    rate: float = 0.2,
    gain: float = 0.1,
    mean: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> RunningQuantile:
    """Move a threshold so that in the long run ``share`` of the values lie below it.

    The threshold follows the batches' own quantiles by an exponential mean. Alone, that would lag
    behind values that drift and would be off for small batches; so the level of those quantiles is
    corrected by what is missing from the share, as in adaptive conformal inference (Gibbs and
    Candès, NeurIPS 2021). The first batch's own quantile is taken as it is. There is no draw, and
    nothing waits for the device.

    Args:
        state: the threshold so far.
        values: a batch of values of any shape; NaN marks those that do not count. A batch without
            any leaves the state as it is.
        share: share of values that is to lie below the threshold, in (0, 1).
        rate: weight of the batch's quantile, in (0, 1].
        gain: change of the level for each unit of missing share.
        mean: takes the mean over processes of a scalar with a weight; none in one process.

    Returns:
        The new state, in which ``values`` are already seen.

    Raises:
        InputError: a share outside (0, 1).

    Example:
        >>> state = follow_quantile(RunningQuantile.start(0.5), torch.tensor([1.0, 2.0, 6.0]), 0.5)
        >>> state.value
        tensor(2.)
    """
    if not 0 < share < 1:
        raise InputError(f"expected a share between 0 and 1, got {share}")
    flat = values.detach().float().flatten()
    flat = flat[:: -(-len(flat) // MOST_VALUES) or 1]
    counted = (~flat.isnan()).sum()
    own = torch.nanquantile(flat, state.level)
    if mean is not None:
        own = mean(own.nan_to_num(), (counted > 0).float())
    value = torch.where(state.value.isnan(), own, torch.lerp(state.value, own, rate))
    value = torch.where(own.isnan(), state.value, value)
    below = (flat < value).sum() / counted
    if mean is not None:
        below = mean(below.nan_to_num(), counted.float())
    level = (state.level + gain * (share - below)).clamp(0, 1)
    return RunningQuantile(value, torch.where(below.isnan(), state.level, level))
