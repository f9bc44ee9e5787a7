"""Who is mixed with whom: saliency gain and optimal assignment (TokenMixup, Eq. 4 to 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import wide

__all__ = ["optimal_assignment", "optimal_partners", "saliency_gain"]


def saliency_gain(saliency: Tensor, candidates: Tensor, rho: float) -> Tensor:
    """Saliency that each sample gains from each candidate (TokenMixup, Eq. 6).

    ``G[i, j] = sum_t max(candidates[j, t] - saliency[i, t] - rho, 0)``. Because
    ``max(a, 0) = (a + |a|) / 2`` it is an L1 distance plus sums of rows: no ``(B', B, N)`` tensor.

    Args:
        saliency: ``(B', N)`` of the samples to be mixed.
        candidates: ``(B, N)`` of the samples that can be mixed in.
        rho: least gain for which a token is replaced, in units of saliency.

    Returns:
        ``(B', B)`` gain, not negative.

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
    result = torch.promote_types(wide(saliency).dtype, wide(candidates).dtype)
    # Of two long sums only a small difference is left: in float64, which is no slower here.
    exact = torch.float32 if saliency.device.type == "mps" else torch.float64
    candidates = candidates.to(exact)
    # No candidate is above the greatest: a lower threshold gives the same gain from smaller sums.
    threshold = torch.minimum(saliency.to(exact) + rho, candidates.amax(0))
    total = candidates.sum(1) - threshold.sum(1, keepdim=True)
    gain = (torch.cdist(threshold, candidates, p=1.0) + total) / 2
    return gain.clamp_min(0.0).to(result)


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
    host = gain.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(host).all()):
        raise InputError(
            "expected finite `gain`, got NaN or infinity; check the saliency it was computed from"
        )
    _, columns = linear_sum_assignment(host.numpy(), maximize=True)
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
