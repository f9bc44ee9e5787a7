"""What becomes of shares behind the last block: the classifier sees tokens pooled."""

from __future__ import annotations

import torch
from torch import Tensor

from vitmix.attention import AttentionCall
from vitmix.backbones import Backbone
from vitmix.errors import UnsupportedModelError
from vitmix.functional.alignment import pooled_shares
from vitmix.functional.precision import wide
from vitmix.functional.saliency import query_key_attention

__all__ = ["SharePooling"]


class SharePooling:
    """Follows shares through a model's pooling, in one pass.

    Args:
        backbone: description of the model.

    Attributes:
        scores: ``(B, N, 1)`` of ``backbone.pool_scores``, once they are seen.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.scores: Tensor | None = None
        self._pooled: Tensor | None = None
        self._seen = 0

    @property
    def _by_attention(self) -> bool:
        return self._backbone.pooling in ("attention", "attention_all", "class_attention")

    @torch.no_grad()
    def see(self, found: AttentionCall | Tensor, shares: Tensor) -> None:
        """Take an attention outside the blocks, if it is one of a query that pools tokens.

        Args:
            found: a fused call, or a map ``(B, H, N, M)`` after softmax.
            shares: ``(B, T, K)`` of the tokens after the last block.
        """
        queries = found.query if isinstance(found, AttentionCall) else found
        if not self._by_attention or queries.shape[-2] != 1:
            return
        if isinstance(found, AttentionCall):
            found = query_key_attention(
                found.query, found.key, scale=found.scale, attn_mask=found.mask
            )
        self._seen += 1
        weights = wide(found.detach()).mean(1)[:, 0]
        weights = weights / weights.sum(1, keepdim=True)
        if self._backbone.pooling == "class_attention":
            # The class token begins as the mean of all, and sees itself in front of the others.
            own = shares.mean(1) if self._pooled is None else self._pooled
            shares = torch.cat((own[:, None], shares), 1)
            self._pooled = (pooled_shares(shares, weights) + own) / 2
        else:
            shares = shares[:, shares.shape[1] - weights.shape[-1] :]
            self._pooled = pooled_shares(shares, weights)

    def shares(self, shares: Tensor) -> Tensor | None:
        """Shares ``(B, K)`` of what the classifier sees, from those of the last tokens."""
        if self._by_attention:
            return self._pooled
        return self._backbone.pool_shares(shares, self.scores)

    def require_seen(self) -> None:
        """Check, after the pass, that the pooling came.

        Raises:
            UnsupportedModelError: it did not.
        """
        backbone = self._backbone
        scored = backbone.pool_scores is None or self.scores is not None
        expected = (backbone.class_layers or 1) if self._by_attention else 0
        if not scored or self._seen != expected:
            raise UnsupportedModelError(
                f"looked for the {backbone.pooling} pooling of {backbone.family}, "
                f"found {self._seen} queries that pool in the pass"
            )
