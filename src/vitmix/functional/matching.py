"""Who is mixed with whom: saliency gain and optimal assignment (TokenMixup, Eq. 4 to 7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import wide

__all__ = ["optimal_assignment", "optimal_partners", "saliency_gain"]

# Differences of saliency held at once by the gain: 4 megabytes of float32, or 32.
_HELD_BY_CACHE, _HELD_BY_DEVICE = 1 << 20, 1 << 23


def saliency_gain(saliency: Tensor, candidates: Tensor, rho: float) -> Tensor:
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

    if gain.ndim != 2 or gain.shape[0] > gain.shape[1]:
        raise InputError(
            f"expected `gain` (B', B) with no more rows than columns, got {tuple(gain.shape)}"
        )
    host = gain.detach().cpu().double().numpy()
    if not np.isfinite(host.sum()):
        raise InputError(
            "expected finite `gain`, got NaN or infinity; check the saliency it was computed from"
        )
    if len(host) == host.shape[1] > 0:
        # Every row and column is taken, so that what is common to one changes nothing but how far
        # the solver has to look.
        host = host - host.max(1, keepdims=True)
        host -= host.max(0)
    _, columns = linear_sum_assignment(host, maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64).to(gain.device)


def optimal_partners(saliency: Tensor, easy: Tensor, rho: float | Tensor) -> Tensor:
    """Optimal partner of each easy sample (TokenMixup, Eq. 6 to 8); every other keeps itself.

    One operator, ``vitmix::optimal_partners``: how many samples are easy, and the solver on the
    host, stay inside it, so that a compiled graph goes around it in one piece.

    Args:
        saliency: ``(B, N)``.
        easy: ``(B,)`` bool.
        rho: least gain for which a token is replaced, in units of saliency; a number or a scalar.

    Returns:
        ``(B,)`` int64, distinct among the easy samples.

    Raises:
        InputError: saliency that is not finite.

    Example:
        >>> saliency = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.5, 0.5]])
        >>> optimal_partners(saliency, torch.tensor([True, True, False]), rho=0.0)
        tensor([1, 0, 2])
    """
    least = rho if isinstance(rho, Tensor) else torch.tensor(rho, dtype=torch.float64)
    partners: Tensor = _optimal_partners(saliency.detach(), easy, least)
    return partners


def _solve(saliency: Tensor, easy: Tensor, rho: Tensor) -> Tensor:
    partners = torch.arange(len(saliency), device=saliency.device)
    rows = easy.nonzero().squeeze(1)
    if len(rows):
        partners[rows] = optimal_assignment(saliency_gain(saliency[rows], saliency, float(rho)))
    return partners


# The solver waits for the device, which no CUDA graph can; PyTorch 2.8 and older have no such tag.
_options: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _options["tags"] = torch.Tag.cudagraph_unsafe
_optimal_partners: Any = torch.library.custom_op(
    "vitmix::optimal_partners",
    _solve,
    mutates_args=(),
    schema="(Tensor saliency, Tensor easy, Tensor rho) -> Tensor",
    **_options,
)


@_optimal_partners.register_fake  # type: ignore[untyped-decorator]
def _(saliency: Tensor, easy: Tensor, rho: Tensor) -> Tensor:
    return saliency.new_empty(len(saliency), dtype=torch.int64)
