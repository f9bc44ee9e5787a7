"""Who is mixed with whom: saliency gain and optimal assignment (TokenMixup, Eq. 4 to 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import wide

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "greedy_assignment",
    "grouped_partners",
    "optimal_assignment",
    "optimal_partners",
    "require_assignment",
    "saliency_gain",
]

# Differences of saliency held at once by the gain: 4 megabytes of float32, or 32.
_HELD_BY_CACHE, _HELD_BY_DEVICE = 1 << 20, 1 << 23
# Ways to cut a batch into groups: with two instead of four, 4,096 samples lose 3.5 instead of 2.8%.
_TURNS = 4


def saliency_gain(saliency: Tensor, candidates: Tensor, rho: float | Tensor) -> Tensor:
    """Saliency that each sample gains from each candidate (TokenMixup, Eq. 6).

    ``G[i, j] = sum_t max(candidates[j, t] - saliency[i, t] - rho, 0)``, some rows at a time: what
    is held of the ``(B', B, N)`` differences stays in the processor's cache.

    Args:
        saliency: ``(B', N)`` of the samples to be mixed.
        candidates: ``(B, N)`` of the samples that can be mixed in.
        rho: least gain for which a token is replaced, in units of saliency.

    Returns:
        ``(B', B)`` gain, not negative, without gradient.

    Raises:
        InputError: shapes that don't fit.

    Example:
        >>> saliency_gain(torch.tensor([[0.1, 0.9]]), torch.tensor([[0.9, 0.1]]), rho=0.0)
        tensor([[0.8000]])
    """
    if saliency.ndim != 2 or candidates.ndim != 2 or saliency.shape[1] != candidates.shape[1]:
        raise InputError(
            "expected `saliency` (B', N) and `candidates` (B, N) over the same tokens, "
            f"got {tuple(saliency.shape)} and {tuple(candidates.shape)}"
        )
    dtype = torch.promote_types(wide(saliency).dtype, wide(candidates).dtype)
    threshold, candidates = saliency.detach().to(dtype) + rho, candidates.detach().to(dtype)
    held = _HELD_BY_CACHE if saliency.device.type == "cpu" else _HELD_BY_DEVICE
    rows = max(1, held // max(1, candidates.numel()))
    gain = threshold.new_empty(len(threshold), len(candidates))
    above = threshold.new_empty(min(rows, len(threshold)), *candidates.shape)
    for start in range(0, len(threshold), rows):
        part = threshold[start : start + rows]
        differences = torch.sub(candidates, part[:, None], out=above[: len(part)])
        torch.sum(differences.clamp_min_(0), -1, out=gain[start : start + rows])
    return gain


def optimal_assignment(gain: Tensor) -> Tensor:
    """Distinct columns that maximise the total gain (TokenMixup, Eq. 7), solved exactly.

    Args:
        gain: ``(B', B)`` with ``B' <= B``, finite.

    Returns:
        ``(B',)`` int64, the column of each row, on the device of ``gain``.

    Raises:
        InputError: more rows than columns, or an entry that is not finite.

    Example:
        >>> optimal_assignment(torch.tensor([[3.0, 2.0], [3.0, 0.0]]))
        tensor([1, 0])
    """
    # Imported here because `import vitmix` must stay as light as `import torch`.
    from scipy.optimize import linear_sum_assignment

    host = _on_host(gain)
    if len(host) == host.shape[1] > 0:
        # Every row and column is taken, so that what is common to one changes nothing but how far
        # the solver has to look.
        host = host - host.max(1, keepdims=True)
        host -= host.max(0)
    _, columns = linear_sum_assignment(host, maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64).to(gain.device, non_blocking=True)


def greedy_assignment(gain: Tensor) -> Tensor:
    """Distinct columns, each the best that the rows before have left.

    O(B' B) instead of the O(B^2 B') of :func:`optimal_assignment`, whose total it misses by 3 to 5%
    on saliency of 512 samples.

    Args:
        gain: ``(B', B)`` with ``B' <= B``, finite.

    Returns:
        ``(B',)`` int64, the column of each row, on the device of ``gain``.

    Raises:
        InputError: as for :func:`optimal_assignment`.

    Example:
        >>> greedy_assignment(torch.tensor([[3.0, 2.0], [3.0, 0.0]]))
        tensor([0, 1])
    """
    host = _on_host(gain)
    columns, taken = np.empty(len(host), dtype=np.int64), np.zeros(host.shape[1])
    for row, values in enumerate(host):
        columns[row] = (values + taken).argmax()
        taken[columns[row]] = -np.inf
    return torch.from_numpy(columns).to(gain.device, non_blocking=True)


def _on_host(gain: Tensor) -> NDArray[np.float64]:
    if gain.ndim != 2 or gain.shape[0] > gain.shape[1]:
        raise InputError(
            f"expected `gain` (B', B) with no more rows than columns, got {tuple(gain.shape)}"
        )
    host = gain.detach().cpu().double().numpy()
    if not np.isfinite(host.sum()):
        raise InputError(
            "expected finite `gain`, got NaN or infinity; check the saliency it was computed from"
        )
    return host


def grouped_partners(
    saliency: Tensor, easy: Tensor, rho: float | Tensor, group_size: int
) -> Tensor:
    """Partners that are optimal within groups of a batch: cost grows with B instead of B^3.

    The batch is cut into equal groups in four ways, one after the other. First every n-th sample is
    in a group, so that copies of an image that lie side by side are not; each group is solved
    exactly. Then others are in a group, with the partners that they have so far, and swap them for
    the best: the total never falls, and every sample has had the choice of four groups. Nothing is
    drawn. What it loses stands in ``docs/scale.md``: with groups of 128 less than 3% for up to
    4,096 samples, unless maps are flat and have nothing in common.

    Args:
        saliency: ``(B, N)``.
        easy: ``(B,)`` bool.
        rho: least gain for which a token is replaced, in units of saliency.
        group_size: samples in a group at most.

    Returns:
        ``(B,)`` int64, distinct among the easy samples; every other sample keeps itself.

    Raises:
        InputError: saliency that is not finite.

    Example:
        >>> saliency = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.8, 0.2], [0.2, 0.8]])
        >>> grouped_partners(saliency, torch.ones(4) > 0, 0.0, group_size=2)
        tensor([2, 3, 0, 1])
    """
    device, count = saliency.device, -(-len(saliency) // group_size)
    numbers = torch.arange(len(saliency))
    partner = numbers.clone()
    for turn in range(_TURNS):
        # Of each line of `count` samples, every group has one.
        group_of = (numbers + turn * (numbers // count)) % count
        order, sizes = group_of.argsort(stable=True), group_of.bincount().tolist()
        place = order.to(device, non_blocking=True)
        others = partner[order].to(device, non_blocking=True)
        parts = (torch.split(t, sizes) for t in (saliency[place], saliency[others], easy[place]))
        gains = [
            (saliency_gain(own, candidates, rho) * mixed[:, None]).flatten()
            for own, candidates, mixed in zip(*parts, strict=True)
        ]
        host = torch.cat(gains).cpu()  # one wait for all groups
        squares = torch.split(host, [len(gain) for gain in gains])
        for group, square in zip(torch.split(order, sizes), squares, strict=True):
            columns = optimal_assignment(square.view(len(group), len(group)))
            partner[group] = partner[group[columns]]
    own = numbers.to(device, non_blocking=True)
    return torch.where(easy, partner.to(device, non_blocking=True), own)


def optimal_partners(
    saliency: Tensor, easy: Tensor, rho: float | Tensor, assignment: str = "exact"
) -> Tensor:
    """Optimal partner of each easy sample (TokenMixup, Eq. 6 to 8); every other keeps itself.

    One operator, ``vitmix::optimal_partners``: how many samples are easy, and the solver on the
    host, stay inside it, so that a compiled graph goes around it in one piece.

    Args:
        saliency: ``(B, N)``.
        easy: ``(B,)`` bool.
        rho: least gain for which a token is replaced, in units of saliency; a number or a scalar.
        assignment: ``"exact"`` (:func:`optimal_assignment`), ``"greedy"``
            (:func:`greedy_assignment`), or ``"grouped:128"`` (:func:`grouped_partners` with that
            group size; exact if one group holds the batch).

    Returns:
        ``(B,)`` int64, distinct among the easy samples.

    Raises:
        InputError: saliency that is not finite, or another assignment.

    Example:
        >>> saliency = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
        >>> optimal_partners(saliency, torch.tensor([True, True, False]), rho=0.0)
        tensor([1, 0, 2])
    """
    require_assignment(assignment)
    least = rho if isinstance(rho, Tensor) else torch.tensor(rho, dtype=torch.float64)
    partners: Tensor = _optimal_partners(saliency.detach(), easy, least, assignment)
    return partners


def require_assignment(assignment: str) -> int | None:
    """The group size of a grouped assignment; None for the others.

    Raises:
        InputError: neither ``exact`` nor ``greedy`` nor ``grouped:SIZE``.
    """
    if assignment in ("exact", "greedy"):
        return None
    kind, _, size = str(assignment).partition(":")
    if kind == "grouped" and size.isdecimal() and int(size) >= 2:
        return int(size)
    raise InputError(
        "expected `assignment` as exact, greedy, or grouped:SIZE with a size of at least 2 such as "
        f"grouped:128 (HorizontalTokenMixup also takes random), got {assignment!r}"
    )


def _solve(saliency: Tensor, easy: Tensor, rho: Tensor, assignment: str) -> Tensor:
    group_size = require_assignment(assignment)
    if group_size is not None and group_size < len(saliency):
        return grouped_partners(saliency, easy, rho, group_size)
    partners = torch.arange(len(saliency), device=saliency.device)
    rows = easy.nonzero().squeeze(1)
    if len(rows):
        solver = greedy_assignment if assignment == "greedy" else optimal_assignment
        partners[rows] = solver(saliency_gain(saliency[rows], saliency, rho))
    return partners


# The solver waits for the device, which no CUDA graph can; PyTorch 2.8 and older have no such tag.
_options: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _options["tags"] = torch.Tag.cudagraph_unsafe
_optimal_partners: Any = torch.library.custom_op(
    "vitmix::optimal_partners",
    _solve,
    mutates_args=(),
    schema="(Tensor saliency, Tensor easy, Tensor rho, str assignment) -> Tensor",
    **_options,
)


@_optimal_partners.register_fake  # type: ignore[untyped-decorator]
def _(saliency: Tensor, easy: Tensor, rho: Tensor, assignment: str) -> Tensor:
    return saliency.new_empty(len(saliency), dtype=torch.int64)
