"""Saliency from attention: of a call that is seen, or of blocks that tokens are about to enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitmix.aside import aside
from vitmix.attention import AttentionCall, read_attention, read_query_key
from vitmix.backbones import Backbone, Block
from vitmix.errors import UnsupportedModelError
from vitmix.functional.reach import Reach
from vitmix.functional.saliency import (
    attention_rollout,
    attention_saliency,
    column_saliency,
    query_key_saliency,
)

__all__ = ["BlockRun", "saliency_ahead", "saliency_of"]


@dataclass(frozen=True)
class BlockRun:
    """Runs a block, or one of its stage, on other tokens as the model does, without its own hooks.

    Attributes:
        block: the block that the model is about to run.
        given: the tokens it is given, in its layout.
        args: what else it is given.
        kwargs: likewise.
    """

    block: Block
    given: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Tokens ``(B, T, D)`` behind ``module``."""
        tokens = self.block.restore(tokens, self.given)
        output: Any = module.forward(tokens, *self.args, **self.kwargs)
        return self.block.flatten(output[0] if isinstance(output, tuple) else output)


def saliency_ahead(
    backbone: Backbone, index: int, reach: Reach, tokens: Tensor, run: BlockRun, steps: int
) -> Tensor:
    """Saliency of tokens from the attention of the blocks they are about to enter.

    Args:
        backbone: description of the model.
        index: the first of the blocks.
        reach: its, for the token grid at hand.
        tokens: ``(B, T, D)``, without gradient.
        run: runs the blocks.
        steps: further blocks that attention is rolled out over.

    Returns:
        ``(B, N)``.

    Raises:
        UnsupportedModelError: a rollout over blocks that are given more than tokens.
    """
    ahead = backbone.blocks[index : index + steps + 1]
    if steps and any(isinstance(value, Tensor) for value in (*run.args, *run.kwargs.values())):
        raise UnsupportedModelError(
            "looked for blocks that take tokens alone, found further tensors given to "
            f"block {index} of {backbone.family}: a rollout cannot know what later "
            "blocks are given. Use saliency='attention'"
        )
    batch = len(tokens)
    with aside([block.module for block in ahead], tokens.device):
        if steps == 0:
            found = read_query_key(ahead[0], tokens, run)
            each = [saliency_of(attention, backbone, reach, batch) for attention in found]
            return torch.stack(each).mean(0)
        maps = []
        for block in ahead:
            tokens, attention = read_attention(block, tokens, run)
            maps.append(attention)
        return saliency_of(attention_rollout(maps)[:, None], backbone, reach, batch)


def saliency_of(
    found: AttentionCall | Tensor, backbone: Backbone, reach: Reach, batch: int
) -> Tensor:
    """Saliency ``(B, N)`` of the tokens that went into an attention, appended ones aside.

    Args:
        found: a fused call, or a map ``(..., H, N, M)`` after softmax.
        backbone: description of the model.
        reach: of the block, for the token grid at hand.
        batch: samples B.
    """
    prefix, by_class_token = backbone.num_prefix_tokens, backbone.reads_class_token
    _, queries, keys = reach.sizes(1)
    if isinstance(found, Tensor):
        found = found.detach().flatten(0, -4)[:, :, :queries, :keys]
        weights = reach.query_weights(found.device)
        saliency = (
            attention_saliency(found, num_prefix_tokens=prefix, class_token=by_class_token)
            if weights is None
            else column_saliency(found, weights.repeat(batch, 1))
        )
    else:
        weights = reach.query_weights(found.query.device)
        mask = found.mask
        saliency = query_key_saliency(
            found.query.detach()[:, :, :queries],
            found.key.detach(),
            scale=found.scale,
            attn_mask=mask if mask is None else mask[..., :queries, :],
            num_prefix_tokens=prefix,
            class_token=by_class_token,
            num_keys=keys,
            query_weights=None if weights is None else weights.repeat(batch, 1),
        )
    return reach.image_saliency(saliency)
