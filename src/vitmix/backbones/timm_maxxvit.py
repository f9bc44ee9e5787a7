"""timm's ``MaxxVit``: CoAtNet, MaxViT and their relatives.

Global attention on maps whose first block of a stage merges tokens, or attention within windows,
by turns of neighbouring and of distant tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block
from vitmix.backbones.staged import (
    MAPPED,
    StagedFamily,
    attends,
    describe_staged,
    in_stages,
    to_reduced,
)
from vitmix.errors import UnsupportedModelError
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "timm MaxxVit"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a timm MaxxVit; None if the model is something else."""
    return describe_staged(_FAMILIES, model)


def _block(module: Any) -> Block | None:
    kind = type(module).__name__
    if kind == "ParallelPartitionAttention":
        raise UnsupportedModelError(
            "looked for one attention a block in timm MaxxVit, found one within windows beside "
            "one to distant tokens (ParallelPartitionAttention). The model was not changed."
        )
    if kind == "TransformerBlock2d":
        if not hasattr(module.norm1, "down"):
            return attends(module, layout="channels_first")
        # Tokens are merged in front of the attention, and beside it.
        merging = partial(to_reduced, 2, 2)
        return attends(module, layout="channels_first", reach=merging, stride=2)
    if kind == "PartitionAttentionCl":
        return attends(module, layout="channels_last", reach=partial(_partition, module))
    if kind == "PartitionAttention2d":
        return attends(module, layout="channels_first", reach=partial(_partition, module))
    return None


def _partition(block: Any, grid: Grid) -> Reach:
    size = tuple(block.partition_size)
    return Reach(grid, windows=windows(grid, size, dilated=not block.partition_block))


_FAMILIES = {"MaxxVit": StagedFamily("timm.models.maxxvit", in_stages(_block), MAPPED)}
