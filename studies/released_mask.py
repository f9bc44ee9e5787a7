"""The mask of TokenMixup's released code, to measure what its defect does.

The released code takes every sample's mask against the saliency of the first easy sample of the
batch, not against the sample's own (Eq. 9). This stage does so on purpose; labels follow the mask,
as there. It lives here, beside the study, not in the library.

    vitmix train --tokens "{name: horizontal, class: studies/released_mask.py:ReleasedMask}" ...
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import vitmix
from vitmix.functional import HorizontalPlan
from vitmix.tokens import TokenContext, TokenOutcome

__all__ = ["ReleasedMask", "released_plan"]


def released_plan(saliency: Tensor, easy: Tensor, partner: Tensor, rho: float) -> HorizontalPlan:
    """The paper's partners, with masks against the first easy sample.

    Args:
        saliency: ``(B, N)``.
        easy: ``(B,)`` bool, which samples are mixed.
        partner: ``(B,)``.
        rho: least gain of a replaced token.
    """
    first = saliency[easy.to(torch.uint8).argmax()]
    other = saliency[partner]
    mask = (other - first > rho) & easy[:, None]
    kept = torch.where(mask, 0, saliency).sum(1)
    total = kept + torch.where(mask, other, 0).sum(1)
    own = torch.where(mask.any(1) & (total > 0), kept / total, torch.ones_like(total))
    return HorizontalPlan(partner, mask, own)


class ReleasedMask(vitmix.HorizontalTokenMixup):
    """Horizontal TokenMixup with the released code's mask."""

    def plan(self, tokens: Tensor, context: TokenContext) -> TokenOutcome:
        """As the paper plans, then with other masks."""
        if isinstance(self.rho, str) or isinstance(self.tau, str) or self.gather:
            raise vitmix.InputError(
                "expected numbers for `tau` and `rho` and no `gather`, as in the released code, "
                f"got {self}"
            )
        outcome = super().plan(tokens, context)
        saliency, difficulty = outcome.saliency, outcome.difficulty
        assert saliency is not None
        assert difficulty is not None
        easy = difficulty < self.tau
        plan = released_plan(saliency, easy, outcome.plan.partner, self.rho)
        stats = self._stats(difficulty, easy, saliency, plan)
        return replace(outcome, plan=plan, stats=stats)
