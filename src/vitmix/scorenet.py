"""ScoreNet: how difficult is a sample? (TokenMixup, Sec. 3.1)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vitmix.errors import InputError

__all__ = ["Pool", "ScoreNet"]

Pool = Literal["auto", "average", "attention", "class_token"]


class ScoreNet(nn.Module):
    """Pool intermediate tokens and classify them with one linear layer.

    Args:
        embed_dim: width of a token.
        num_classes: number of classes.
        pool: ``"class_token"`` (released ViT), ``"attention"``: a learned softmax over the tokens
            (released CCT), ``"average"`` of image tokens, or ``"auto"``: the class token where
            there is one (within a ``MixingModel`` the average, if that is what the model classifies
            by and not the class token), else attention.
        num_prefix_tokens: tokens in front that stand for no image region.
        class_token: whether the first of them is a class token.

    Raises:
        InputError: an unknown pool, or the class token of a model that has none.

    Example:
        >>> import torch
        >>> ScoreNet(embed_dim=8, num_classes=3)(torch.rand(2, 5, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        pool: Pool = "auto",
        num_prefix_tokens: int = 0,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        if pool == "auto":
            pool = "class_token" if class_token else "attention"
        if pool not in ("average", "attention", "class_token"):
            raise InputError(
                "expected ScoreNet's `pool` 'auto', 'average', 'attention' or 'class_token', "
                f"got {pool!r}"
            )
        if pool == "class_token" and not class_token:
            raise InputError(
                "expected a model with a class token for pool='class_token', "
                "got one without; use pool='attention' or 'average'"
            )
        self.pool = pool
        self.num_prefix_tokens = num_prefix_tokens
        self.attention_pool = nn.Linear(embed_dim, 1) if pool == "attention" else None
        self.fc = nn.Linear(embed_dim, num_classes)
        for layer in (self.attention_pool, self.fc):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify: tokens ``(B, T, D)`` to logits ``(B, C)``."""
        if self.pool == "class_token":
            pooled = tokens[:, 0]
        elif self.attention_pool is None:
            pooled = tokens[:, self.num_prefix_tokens :].mean(1)
        else:
            image_tokens = tokens[:, self.num_prefix_tokens :]
            weights = self.attention_pool(image_tokens).softmax(1)
            pooled = (weights.transpose(1, 2) @ image_tokens).squeeze(1)
        logits: Tensor = self.fc(pooled)
        return logits
