"""The one value that passes between pixels, tokens and labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Mixture"]


class Mixture(NamedTuple):
    """Where the content of every token comes from.

    Attributes:
        sources: ``(B, K)`` int64, samples of the batch that each sample is made of; the first is
            itself. A sample may occur twice.
        shares: ``(B, T, K)`` float32, share of each source in every token of the sequence, prefix
            tokens included. Rows sum to 1.
    """

    sources: Tensor
    shares: Tensor

    @classmethod
    def of_tokens(cls, sources: Tensor, shares: Tensor, num_prefix_tokens: int) -> Mixture:
        """Put prefix tokens, which see the whole image, in front: their share is the mean one."""
        mean = shares.mean(1, keepdim=True).expand(-1, num_prefix_tokens, -1)
        return cls(sources, torch.cat((mean, shares), 1))

    @classmethod
    def unmixed(cls, batch: int, tokens: int, device: torch.device) -> Mixture:
        """Every token of every sample is its own."""
        sources = torch.arange(batch, device=device)[:, None]
        return cls(sources, torch.ones(batch, tokens, 1, device=device))

    def replaced(self, partner: Tensor, replace: Tensor) -> Mixture:
        """Follow whole tokens that are taken from a partner.

        Args:
            partner: ``(B,)`` int64.
            replace: ``(B, N)`` bool, of the tokens behind the prefix.

        Returns:
            A mixture of 2 K sources.
        """
        return self.replaced_from(Mixture(self.sources[partner], self.shares[partner]), replace)

    def replaced_from(self, others: Mixture, replace: Tensor) -> Mixture:
        """Follow whole tokens that are taken from the partners given in ``others``, row by row."""
        missing = self.shares.shape[1] - replace.shape[1]
        gate = F.pad(replace, (missing, 0))[..., None]
        own = torch.where(gate, 0, self.shares)
        other = torch.where(gate, others.shares, 0)
        return self._joined(others.sources, own, other)

    def blended(self, partner: Tensor, own_weight: Tensor) -> Mixture:
        """Follow tokens that are interpolated with a partner's: a mixture of 2 K sources.

        Args:
            partner: ``(B,)`` int64.
            own_weight: ``(B,)`` share of the own token.
        """
        weight = own_weight.to(self.shares.dtype)[:, None, None]
        other = (1 - weight) * self.shares[partner]
        return self._joined(self.sources[partner], weight * self.shares, other)

    def _joined(self, sources: Tensor, own: Tensor, other: Tensor) -> Mixture:
        return Mixture(torch.cat((self.sources, sources), 1), torch.cat((own, other), -1))

    def targets(self, weights: Tensor, targets: Tensor) -> Tensor:
        """Weighted sum of the sources' labels.

        Args:
            weights: ``(B, K)``.
            targets: ``(B, C)``, labels of the unmixed samples.

        Returns:
            ``(B, C)``.
        """
        return (weights.to(targets.dtype)[..., None] * targets[self.sources]).sum(1)
