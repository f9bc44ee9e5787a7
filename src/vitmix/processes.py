"""What the processes of a distributed run tell each other; in one process, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitmix.errors import InputError

__all__ = [
    "Exchange",
    "alone",
    "gather",
    "gather_objects",
    "mean_over_processes",
    "process_rank",
    "require_equal_batches",
    "world_size",
]

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


def process_rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_over_processes(value: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of a scalar over all processes; NaN where all weights are 0."""
    both = torch.stack((value * weight, weight))
    if world_size() > 1:
        dist.all_reduce(both)
    return both[0] / both[1]


def gather_objects(value: Any) -> list[Any]:
    """A plain value of each process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather(rows: Tensor) -> Tensor:
    """Rows ``(B, ...)`` of all processes, ``(P * B, ...)`` in the order of the processes.

    Without gradient. Every process must give as many rows, see :func:`require_equal_batches`.
    """
    rows = rows.detach().contiguous()
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def require_equal_batches(like: Tensor) -> None:
    """Check that all processes have as many samples ``(B, ...)``.

    Raises:
        InputError: on all processes, if one has another number.
    """
    sizes = gather(torch.tensor([len(like)], device=like.device)).tolist()
    if len(set(sizes)) > 1:
        raise InputError(
            "expected as many samples on every process to pair them across processes, got batches "
            f"of {', '.join(map(str, sizes))}; leave out the last, uneven batch (drop_last=True)"
        )


class _AllToAll(torch.autograd.Function):
    """``dist.all_to_all_single``, whose gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        ctx.counts = sent, received
        output = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(output, rows.contiguous(), received, sent)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _AllToAll.apply(gradients[0], *ctx.counts), None, None


class Exchange:
    """Fetches samples from the batches of other processes.

    The samples of all processes form one batch, process by process; each sample asks for one of
    them. Only the samples that are asked for travel.

    Args:
        partner: ``(P * B,)`` int64, the sample that each sample of all processes asks for. That of
            the first process counts, so that no two processes can disagree.
        batch: ``B``, samples of this process.
    """

    def __init__(self, partner: Tensor, batch: int) -> None:
        partner = partner.contiguous().clone()
        dist.broadcast(partner, src=0)
        self.partner = partner
        processes, rank = world_size(), process_rank()
        owner = (partner // batch).view(processes, batch)  # [p, i]: who has what p's sample i wants
        mine = owner == rank
        # For p = 0, 1, ..., in the order of its samples.
        self._sent = (partner % batch).view(processes, batch)[mine]
        order = owner[rank].argsort(stable=True)
        self._place = order.argsort()
        self._send_counts: list[int] = mine.sum(1).tolist()
        self._receive_counts: list[int] = torch.bincount(owner[rank], minlength=processes).tolist()

    def own(self, rows: Tensor) -> Tensor:
        """Rows ``(B, ...)`` of this process out of those of all, ``(P * B, ...)``."""
        return rows.view(world_size(), -1, *rows.shape[1:])[process_rank()]

    def fetch(self, rows: Tensor) -> Tensor:
        """What the samples of this process asked for.

        Args:
            rows: ``(B, ...)`` of this process's samples.

        Returns:
            ``(B, ...)``; gradients go back to the processes that the rows came from.
        """
        counts = self._receive_counts, self._send_counts
        received: Tensor = _AllToAll.apply(rows[self._sent], *counts)
        return received[self._place]
