"""The description of a model that mixing works on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, get_args

from torch import Tensor, nn

from vitmix.errors import InputError, UnsupportedModelError
from vitmix.functional.alignment import pooled_shares
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach

__all__ = [
    "GIVEN",
    "LAYOUTS",
    "POOLINGS",
    "Backbone",
    "Block",
    "Family",
    "Layout",
    "Pooling",
    "Reason",
    "is_made_by",
]

Layout = Literal["tokens", "windows", "channels_last", "channels_first"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Pooling = Literal[
    "class_token",
    "distilled",
    "average",
    "average_all",
    "class_and_average",
    "sequence",
    "attention",
    "attention_all",
    "class_attention",
]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
# Why something cannot be done, for a message that begins "... found"; None if it can.
Reason = str | None
GIVEN = (
    "further tensors given to each block (rotary embeddings, a position bias): a rollout cannot "
    "know what later blocks are given"
)

_CHECKPOINTS = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def is_made_by(model: object, module: str, name: str) -> bool:
    """Whether a model is of the class ``module.name``, without importing a library.

    A library that the process has not imported cannot have made the model.
    """
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and isinstance(model, found)


class Family(Protocol):
    """A module that knows one family of models; ``LOOKS_FOR`` is what it is recognised by."""

    LOOKS_FOR: str

    def describe(self, model: nn.Module) -> Backbone | None:
        """Describe a model of the family; None for any other."""


@dataclass(frozen=True)
class Block:
    """One attention with what belongs to it: a transformer block.

    Attributes:
        module: the block; its first argument and its result are tokens.
        entry: the module inside whose input becomes queries, keys and values (the norm before the
            attention, or the attention itself). Works token by token up to the attention.
        attention: the attention module, whose result is one token for each of its input.
        layout: how the block is given its tokens: ``"tokens"`` (B, T, D), ``"windows"``
            (B, W, M, D), ``"channels_last"`` (B, h, w, D) or ``"channels_first"`` (B, D, h, w).
        order: ``(T,)`` which token of the grid, counted row by row, is at each place of the
            sequence; None if they are in order.
        stride: sides of the first block's token grid over those of this one's.
        width: channels D of a token, or None for ``embed_dim`` of the backbone.
        reach: which tokens attend to which, as a :class:`vitmix.functional.Reach` for a token grid,
            prefix tokens aside; None if all do to all.
        attentions: attention calls of the block, whose results are added up or stand side by side.
        heads: heads of an attention call that has them in its batch, ``(B heads, ..., N, d)``; 0
            for ``(..., heads, N, d)``.
        heads_first: whether heads come before windows, ``(B, heads, windows, N, d)``.
        residual: whether the block adds what goes into the attention to what comes out.
        skip_outside: whether that is done outside of ``module``, which then is no more than the
            attention branch: ``x + module(x)``, with nothing done to its result in between.
    """

    module: nn.Module
    entry: nn.Module
    attention: nn.Module
    layout: Layout = "tokens"
    order: Tensor | None = None
    stride: int = 1
    width: int | None = None
    reach: Callable[[Grid], Reach] | None = None
    attentions: int = 1
    heads: int = 0
    heads_first: bool = False
    residual: bool = True
    skip_outside: bool = False

    def by_heads(self, tensor: Tensor) -> Tensor:
        """Queries, keys, values or maps of an attention call as ``(B', heads, N, d)``."""
        if tensor.ndim == 4 and not (self.heads or self.heads_first):
            return tensor
        if self.heads:
            tensor = tensor.reshape(-1, self.heads, *tensor.shape[1:])
        if self.heads_first:
            tensor = tensor.transpose(1, 2)
        return tensor.flatten(0, -4)

    def as_called(self, result: Tensor, query: Tensor) -> Tensor:
        """A result ``(B', heads, N, d)`` in the order of the call's queries."""
        if query.ndim == 4 and not (self.heads or self.heads_first):
            return result
        if self.heads_first:
            result = result.reshape(-1, query.shape[-3], *result.shape[1:]).transpose(1, 2)
        return result.reshape(*query.shape[:-1], result.shape[-1])

    def flatten(self, tokens: Tensor) -> Tensor:
        """Tokens in the block's layout as ``(B, T, D)``."""
        if self.layout == "channels_first":
            return tokens.flatten(2).transpose(1, 2)
        if self.layout != "tokens":
            tokens = tokens.flatten(1, 2)
        return tokens if self.order is None else tokens[:, self.order.argsort()]

    def restore(self, flat: Tensor, like: Tensor) -> Tensor:
        """Tokens ``(B, T, D)`` in the block's layout, with the sizes of ``like``."""
        if self.layout == "channels_first":
            return flat.transpose(1, 2).reshape(like.shape)
        if self.order is not None:
            flat = flat[:, self.order]
        return flat if self.layout == "tokens" else flat.reshape(like.shape)


@dataclass(frozen=True, repr=False)
class Backbone:
    """What was found in a model; :meth:`summary` says it in words.

    Attributes:
        family: name of the family, e.g. ``"timm VisionTransformer"``.
        blocks: transformer blocks in order.
        embed_dim: width D of a token, where a block has none of its own.
        num_prefix_tokens: tokens in front that stand for no image region.
        class_token: whether the first prefix token is a class token.
        pooling: how the last tokens become the input of the classifier: the ``"class_token"``; the
            mean of class and ``"distilled"`` tokens; the ``"average"`` of image tokens or of all
            (``"average_all"``); ``"class_and_average"``: the class token beside the average of
            image tokens (DINOv2), whose shares count half each; ``"sequence"``: softmax weights
            from ``pool_scores`` (CCT); a learned query that attends to image tokens
            (``"attention"``) or to all (``"attention_all"``); ``"class_attention"``: a class token
            that joins behind the blocks and attends to the tokens in layers of its own.
        grid: token grid ``(h, w)`` at the first block, of an input of ``(height, width)`` pixels.
        patch: height and width in pixels of a patch, where the model leaves out what an image has
            beyond whole ones; None if it does not.
        pool_scores: for ``"sequence"``: module that gives one score ``(B, N, 1)`` a token, of all
            tokens or those behind the prefix.
        class_layers: for ``"class_attention"``: number of those layers.
        recomputes: whether activations are recomputed in the backward pass just now.
        parts: modules around and between blocks, which may be where recomputation begins.
        alignment_reason: why shares cannot be followed to the output, or None if they can.
        vertical_reason: why a block cannot attend to more tokens than its own, or None if it can.
        tokens_reason: why tokens cannot be followed through the model, or None if they can.
        attention_reason: why attention cannot be read, or None if it can.
        rollout_reason: why attention cannot be rolled out over several blocks, or None if nothing
            but the blocks themselves stands in the way.
    """

    family: str
    blocks: tuple[Block, ...]
    embed_dim: int
    num_prefix_tokens: int
    class_token: bool
    pooling: Pooling
    grid: Callable[[tuple[int, int]], Grid]
    patch: Grid | None = None
    pool_scores: nn.Module | None = None
    class_layers: int = 0
    recomputes: Callable[[], bool] = bool
    parts: tuple[nn.Module, ...] = ()
    alignment_reason: Reason = None
    vertical_reason: Reason = None
    tokens_reason: Reason = None
    attention_reason: Reason = None
    rollout_reason: Reason = None

    def __repr__(self) -> str:
        return f"Backbone({self.family!r}, {self.depth} blocks, pooling={self.pooling!r})"

    @property
    def support(self) -> dict[str, Reason]:
        """For each label rule and token stage, why it cannot be used; None where it can."""
        reads = self.tokens_reason or self.attention_reason
        return {
            "area": None,
            "teacher": None,
            "attention": reads,
            "aligned": reads or self.alignment_reason,
            "horizontal": reads,
            "manifold": self.tokens_reason,
            "vertical": reads or self.vertical_reason,
        }

    @property
    def is_readable(self) -> bool:
        """Whether there is attention that can be read."""
        return bool(self.blocks) and (self.tokens_reason or self.attention_reason) is None

    def summary(self, size: tuple[int, int]) -> str:
        """Blocks, tokens, attention, pooling and what is supported, in words.

        Args:
            size: height and width of an input in pixels.
        """
        first = self.grid(size)
        prefix = f"{self.num_prefix_tokens}" if self.num_prefix_tokens else "none"
        lines = [
            f"{self.family}, {size[0]} x {size[1]} pixels",
            f"  prefix      {prefix}{', the first a class token' if self.class_token else ''}",
            f"  pooling     {self.pooling.replace('_', ' ')}",
        ]
        for stage, members in self._stages():
            rows, columns = self.block_grid(members[0], first)
            attention = " and ".join(
                dict.fromkeys(self.reach(index, (rows, columns)).kind for index in members)
            )
            blocks = f"{members[0]}" + (f" to {members[-1]}" if len(members) > 1 else "")
            lines.append(
                f"  blocks      {blocks}: {rows} x {columns} tokens of {stage[1]} channels, "
                f"attention {attention}"
            )
        for name, reason in self.support.items():
            lines.append(f"  {name:<11} {'yes' if reason is None else f'no: {reason}'}")
        return "\n".join(lines)

    def seen(self, size: Grid) -> Grid:
        """Height and width in pixels of what the token grid covers, from the upper left corner."""
        if self.patch is None:
            return size
        return size[0] - size[0] % self.patch[0], size[1] - size[1] % self.patch[1]

    def _stages(self) -> list[tuple[tuple[int, int], list[int]]]:
        stages: list[tuple[tuple[int, int], list[int]]] = []
        for index in range(self.depth):
            if not stages or stages[-1][0] != self.stage(index):
                stages.append((self.stage(index), []))
            stages[-1][1].append(index)
        return stages

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def reads_class_token(self) -> bool:
        """Whether there is a class token, and the classifier is given what became of it."""
        return self.class_token and self.pooling not in ("average", "attention")

    def width(self, index: int) -> int:
        """Channels of a token at a block."""
        return self.blocks[index].width or self.embed_dim

    def stage(self, index: int) -> tuple[int, int]:
        """What blocks of one stage have in common: stride and width."""
        return self.blocks[index].stride, self.width(index)

    def block_grid(self, index: int, grid: Grid) -> Grid:
        """Token grid at a block, for one at the first block."""
        stride = self.blocks[index].stride
        return -(-grid[0] // stride), -(-grid[1] // stride)

    def reach(self, index: int, grid: Grid) -> Reach:
        """Which tokens attend to which in a block, for its token grid."""
        reach = self.blocks[index].reach
        found = Reach(grid) if reach is None else reach(grid)
        return replace(found, num_prefix_tokens=self.num_prefix_tokens)

    def require_block(self, what: str, index: int) -> None:
        """Check that a block exists; negative numbers count from the end.

        Raises:
            InputError: no such block.
        """
        if not -self.depth <= index < self.depth:
            raise InputError(
                f"expected {what} from 0 to {self.depth - 1} for this {self.family} "
                f"of {self.depth} blocks, got {index}"
            )

    def require_tokens(self, *, attention: bool) -> None:
        """Check that tokens can be followed, and with ``attention`` that it can be read.

        Raises:
            UnsupportedModelError: they can't.
        """
        if self.tokens_reason is not None:
            raise UnsupportedModelError(
                f"looked for a {self.family} that keeps all its tokens, found "
                f"{self.tokens_reason}. The model was not changed."
            )
        if attention and self.attention_reason is not None:
            raise UnsupportedModelError(
                f"looked for attention of {self.family} that can be read, found "
                f"{self.attention_reason}. The model was not changed."
            )

    def require_one_stage(self, first: int, last: int) -> None:
        """Check that attention can be rolled out from one block to another.

        Raises:
            UnsupportedModelError: tokens are merged on the way, attention is not global, or blocks
                are no more than their attention, have several, or are given more than tokens.
        """
        if self.rollout_reason is not None:
            raise UnsupportedModelError(
                f"looked for blocks of {self.family} fit for a rollout, found "
                f"{self.rollout_reason}. Use saliency='attention'. The model was not changed."
            )
        blocks = self.blocks[first : last + 1]
        if any(block.skip_outside for block in blocks):
            raise UnsupportedModelError(
                f"looked for whole blocks from {first} to {last} of {self.family} for a rollout, "
                "found attention whose tokens are added and whose MLP is called outside of it. "
                "Use saliency='attention'. The model was not changed."
            )
        stages = {self.stage(index) for index in range(first, last + 1)}
        if len(stages) > 1 or any(block.reach for block in blocks):
            raise UnsupportedModelError(
                f"looked for attention of all tokens to all from block {first} to {last} for a "
                f"rollout, found windows, reduced keys or stages of different grids in "
                f"{self.family}. Use saliency='attention'. The model was not changed."
            )
        attentions = max(block.attentions for block in blocks)
        if attentions > 1:
            raise UnsupportedModelError(
                f"looked for one attention a block from {first} to {last} of {self.family} for a "
                f"rollout, found {attentions} attentions in one. Use saliency='attention'. The "
                "model was not changed."
            )

    def require_part_of(self, model: nn.Module) -> None:
        """Check that a model has the blocks described.

        Raises:
            UnsupportedModelError: a module of the description is not part of the model.
        """
        parts = set(model.modules())
        for index, block in enumerate(self.blocks):
            for role in ("module", "entry", "attention"):
                found = getattr(block, role)
                if found not in parts:
                    raise UnsupportedModelError(
                        f"looked for {role} of block {index} among the modules of "
                        f"{type(model).__name__}, found a {type(found).__name__} that is not part "
                        "of it. The model was not changed."
                    )

    def within(self, model: nn.Module) -> Backbone:
        """The same, with the modules of the model that lie around and between its blocks.

        Activations are recomputed, too, while torch's CheckpointWrapper is around some module.
        """
        blocks = {block.module for block in self.blocks}
        around = [part for part in model.modules() if not blocks.isdisjoint(part.modules())]
        parts = dict.fromkeys(
            child for part in around if part not in blocks for child in part.children()
        )
        return replace(
            self,
            parts=tuple(part for part in parts if part not in blocks),
            recomputes=partial(_recomputes, model, self.recomputes),
        )

    def pool_shares(self, shares: Tensor, scores: Tensor | None = None) -> Tensor:
        """Shares of the representation that the classifier sees.

        Args:
            shares: ``(B, T, K)`` of the tokens after the last block.
            scores: ``(B, N, 1)`` of ``pool_scores``, for sequence pooling.

        Returns:
            ``(B, K)``.
        """
        if self.pooling == "class_token":
            return shares[:, 0]
        if self.pooling == "distilled":
            return shares[:, :2].mean(1)
        if self.pooling == "average":
            return shares[:, self.num_prefix_tokens :].mean(1)
        if self.pooling == "average_all":
            return shares.mean(1)
        if self.pooling == "class_and_average":
            return (shares[:, 0] + shares[:, self.num_prefix_tokens :].mean(1)) / 2
        if scores is None:
            raise InputError(f"expected pooling scores for {self.pooling} pooling, got none")
        weights = scores.detach().float().squeeze(-1).softmax(1)
        return pooled_shares(shares[:, shares.shape[1] - weights.shape[1] :], weights)


def _recomputes(model: nn.Module, own: Callable[[], bool]) -> bool:
    kind = getattr(sys.modules.get(_CHECKPOINTS), "CheckpointWrapper", None)
    wrapped = kind is not None and any(isinstance(part, kind) for part in model.modules())
    return wrapped or own()
