"""One training pass through a model: what hooks do to tokens, and what a tap reads of attention.

A flow lives for one forward pass; :class:`vitmix.relay.Relay` tells it where the pass is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from vitmix.attention import AttentionCall, AttentionTap
from vitmix.backbones import Backbone, Block
from vitmix.errors import UnsupportedModelError
from vitmix.functional.alignment import (
    attend_with_shares,
    attended_by_keys,
    attended_shares,
)
from vitmix.functional.grids import Grid, coarsen, spread
from vitmix.functional.mixture import Mixture
from vitmix.functional.reach import Reach
from vitmix.functional.vertical import salient_indices, take_tokens
from vitmix.pooling import SharePooling
from vitmix.replay import (
    BlockRecord,
    PartRecord,
    Replay,
    add_to_tokens,
    first_tokens,
    require_graph,
    tokens_of,
    unseen_by_checkpoint,
)
from vitmix.saliency import BlockRun, saliency_ahead, saliency_of
from vitmix.tokens import Given, TokenContext, TokenMixer, TokenOutcome, VerticalTokenMixup

__all__ = ["Flow"]


class Flow:
    """Carries the mixture through one forward pass of a model.

    Args:
        backbone: description of the model.
        mixture: sources and shares at the model's input.
        targets: ``(B, C)`` labels of the samples as mixed at the input.
        grid: token grid at the first block.
        mixers: stages that mix samples and what each was given, by the block they act at.
        verticals: stages that extend keys and values, by block.
        follow_shares: whether shares are carried through attention.
        attention_block: block whose saliency is kept in ``attention``, or None.
        recomputes: whether blocks run a second time in the backward pass (gradient checkpointing).
        keep_history: whether to keep the mixture after every block.

    Attributes:
        mixture: sources and shares as they are now.
        targets: ``(B, C)`` labels as the token stages have mixed them so far.
        outcomes: what each mixer decided, by block.
        attention: ``(B, N)`` saliency of ``attention_block``, on the grid of the first block.
        selected: for each vertical stage, by the block that tokens come from, the positions
            ``(B, kappa)`` of those that were selected in the sequence.
        history: with ``keep_history``, the token grid and the mixture at the input, then behind
            every block.
        replay: with ``recomputes``, the hooks that do again in the backward pass what is done in
            this one; None where nothing is.
    """

    def __init__(
        self,
        backbone: Backbone,
        mixture: Mixture,
        targets: Tensor,
        grid: Grid,
        *,
        mixers: dict[int, list[tuple[TokenMixer, Given]]],
        verticals: dict[int, list[VerticalTokenMixup]],
        follow_shares: bool,
        attention_block: int | None,
        recomputes: bool = False,
        keep_history: bool = False,
    ) -> None:
        self.backbone = backbone
        self.mixture = mixture
        self.history: list[tuple[Grid, Mixture]] | None = (
            [(grid, mixture)] if keep_history else None
        )
        self.targets = targets
        self.outcomes: list[tuple[int, TokenMixer, TokenOutcome]] = []
        self.attention: Tensor | None = None
        self._mixers = mixers
        self.verticals = verticals
        self.follow_shares = follow_shares
        self._attention_block = attention_block
        self.recomputes = recomputes
        self._records: dict[int, BlockRecord] = {}
        self._parts: dict[nn.Module, list[PartRecord]] = {}
        self.replay = (
            Replay(backbone, self._records, self._parts)
            if recomputes and (mixers or verticals)
            else None
        )
        self._collected: dict[VerticalTokenMixup, list[tuple[Tensor, Tensor]]] = {
            stage: [] for stages in verticals.values() for stage in stages
        }
        self.selected: dict[VerticalTokenMixup, dict[int, Tensor]] = {
            stage: {} for stage in self._collected
        }
        self._last_vertical = max(verticals, default=-1)
        self._paused = False
        self._pooling = SharePooling(backbone) if follow_shares else None
        self._passed: list[int] = []
        self._grid = grid
        self._grids = [grid]
        self._reaches = [
            backbone.reach(index, backbone.block_grid(index, grid))
            for index in range(backbone.depth)
        ]
        # Of the block at hand:
        self._index: int | None = None
        self._reach = Reach(grid)
        self._tokens = targets
        self._added: Tensor | None = None
        self._saliency: Tensor | None = None
        self._appended: Tensor | None = None
        self._attended: list[Tensor] = []
        self._attentions = 0

    @property
    def needed(self) -> bool:
        """Whether there is anything to do in the pass."""
        return bool(self._mixers) or self._reads_attention

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read attention while the model runs inside the context.

        Raises:
            UnsupportedModelError: at the end, if something that should have happened did not.
        """
        with self._tap():
            yield
        if self.needed:
            self._check_passed()

    def _tap(self) -> AbstractContextManager[object]:
        if not self._reads_attention:
            return nullcontext()
        return AttentionTap(
            self._on_fused, self._on_softmax, lambda: self._paused, self._block_at_hand
        )

    def _block_at_hand(self) -> Block | None:
        return None if self._index is None else self.backbone.blocks[self._index]

    def pooled_shares(self) -> Tensor | None:
        """``(B, K)`` shares of what the classifier sees, after the pass; None if not followed."""
        return None if self._pooling is None else self._pooling.shares(self.mixture.shares)

    @property
    def _reads_attention(self) -> bool:
        return self.follow_shares or self._attention_block is not None or bool(self.verticals)

    # Hooks, in the order in which they are called within a block.

    def enter(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Mix what a block is given."""
        block = self.backbone.blocks[index]
        given = tokens_of(block.module, args)
        self._move_to(self.backbone.block_grid(index, self._grids[0]))
        self._require_tokens(index, given)
        if self.recomputes:
            self._record(index, given)
        tokens = before = block.flatten(given)
        for stage, draws in self._mixers.get(index, ()):
            run = BlockRun(block, given, args[1:], kwargs)
            tokens = self._mix(stage, draws, tokens, index, run)
        self._index, self._tokens = index, tokens
        self._reach = self._reaches[index]
        self._saliency, self._appended = None, None
        self._attended, self._attentions = [], 0
        mixed = given if tokens is before else block.restore(tokens, given)
        self._added = mixed - given if block.skip_outside and mixed is not given else None
        return (mixed, *args[1:]), kwargs

    def _move_to(self, grid: Grid) -> None:
        """Follow tokens that were merged, or left out, on the way to a coarser grid."""
        if grid == self._grid:
            return
        if self.follow_shares:
            prefix = self.backbone.num_prefix_tokens
            shares = coarsen(self.mixture.shares, self._grid, grid, num_prefix_tokens=prefix)
            self.mixture = self.mixture._replace(shares=shares)
        self._grid = grid
        self._grids.append(grid)

    def _require_tokens(self, index: int, given: Tensor) -> None:
        layout = self.backbone.blocks[index].layout
        batch, prefix = len(self.targets), self.backbone.num_prefix_tokens
        rows, columns = self._grid
        maps = {"channels_last": (1, 2), "channels_first": (2, 3)}
        if layout in maps:
            fits = (
                given.ndim == 4 and tuple(given.shape[side] for side in maps[layout]) == self._grid
            )
        else:
            ndim = 3 if layout == "tokens" else 4
            fits = given.ndim == ndim and given.shape[1:-1].numel() == prefix + rows * columns
        if not fits or len(given) != batch:
            raise UnsupportedModelError(
                f"looked for {batch} samples of {rows} x {columns} tokens behind {prefix} prefix "
                f"tokens at block {index} of {self.backbone.family} ({layout}), found "
                f"{tuple(given.shape)}"
            )

    def append(self, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put collected tokens behind the block's own (TokenMixup, Eq. 13).

        Rows of attention are independent, so that the own tokens' rows are those of attention from
        own tokens over own and collected ones; the others' rows are cut off behind the attention.
        """
        if self._paused or self._index is None:
            return None
        own = tokens_of(self.backbone.blocks[self._index].entry, args)
        parts = [part for stage in self.verticals[self._index] for part in self._collected[stage]]
        self._appended = torch.cat([shares for _, shares in parts], 1)
        extra = torch.cat([tokens.to(own.dtype) for tokens, _ in parts], 1)
        if self.recomputes:
            require_graph()
            record = self._records[self._index]
            record.extra, record.extended = _without_graph(extra), TensorWeakRef(own)
        return (torch.cat((own, extra), 1), *args[1:])

    def cut(self, output: Any) -> Any:
        """Drop the appended tokens' rows behind the attention."""
        if self._paused or self._index is None:
            return None
        return first_tokens(output, self._tokens.shape[1])

    def leave(self, index: int, output: Any) -> Any:
        """Check and keep what a block did."""
        block = self.backbone.blocks[index]
        if self._reads_attention and self._attentions != block.attentions:
            raise UnsupportedModelError(
                f"looked for {block.attentions} scaled_dot_product_attention, or softmax over "
                f"(B, H, N, N), in block {index} of {self.backbone.family}, found "
                f"{self._attentions}"
            )
        if index == self._attention_block and self._saliency is not None:
            self.attention = self._saliency
            for old, new in zip(self._grids[-2::-1], self._grids[:0:-1], strict=True):
                self.attention = spread(self.attention, new, old)
        self._collect(index)
        self._move_shares(block)
        self._passed.append(index)
        self._index = None
        if self.replay is not None:
            self.replay.wait_for(output)
        return None if self._added is None else add_to_tokens(output, self._added)

    def _move_shares(self, block: Block) -> None:
        """Half of what a token was, half of what it attended to (TL-Align)."""
        if self._attended:
            own = self._reach.own_shares(self.mixture.shares)
            attended = torch.stack(self._attended).mean(0)
            shares = (attended + own) / 2 if block.residual else attended
            self.mixture = self.mixture._replace(shares=shares)
        if self._reach.result_grid != self._grid:
            self._grid = self._reach.result_grid
            self._grids.append(self._grid)
        if self.history is not None:
            self.history.append((self._grid, self.mixture))

    def keep_scores(self, output: Tensor) -> None:
        """Keep the scores of the pooling."""
        assert self._pooling is not None
        self._pooling.scores = output

    def enter_part(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember what a part that may be checkpointed is given."""
        if args and isinstance(args[0], Tensor):
            call = PartRecord([TensorWeakRef(args[0])], len(self._passed))
            self._parts.setdefault(part, []).append(call)

    # What happens at a block.

    def _record(self, index: int, tokens: Tensor) -> None:
        """Remember a block's input for the second pass."""
        require_graph()
        self._records[index] = BlockRecord([TensorWeakRef(tokens)])

    def _mix(
        self, stage: TokenMixer, given: Given, tokens: Tensor, index: int, run: BlockRun
    ) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        context = TokenContext(
            targets=self.targets,
            num_prefix_tokens=prefix,
            attention_saliency=partial(self._saliency_ahead, index, tokens.detach(), run),
            given=given,
        )
        with self._own_graph():
            outcome = stage.plan(tokens, context)
        if self.recomputes:
            self._records[index].outcomes.append(replace(outcome, loss=None))
        self.outcomes.append((index, stage, outcome))
        self.targets = outcome.mix_targets(self.targets)
        if self.follow_shares:
            self.mixture = outcome.mix_shares(self.mixture)
            self._collected = {
                kept: [(old, outcome.pad_shares(shares)) for old, shares in parts]
                for kept, parts in self._collected.items()
            }
        with self._own_graph():
            return outcome.mix_tokens(tokens, prefix)

    def _own_graph(self) -> AbstractContextManager[object]:
        """Keeps what is differentiable here apart from what a checkpoint runs again."""
        return unseen_by_checkpoint() if self.recomputes else nullcontext()

    def _collect(self, index: int) -> None:
        """Keep the most salient tokens of a block's input for later blocks."""
        if self._saliency is None:
            return
        prefix = self.backbone.num_prefix_tokens
        for stage, parts in self._collected.items():
            target = stage.blocks[0]
            if index < target and self.backbone.stage(index) == self.backbone.stage(target):
                tokens = self._tokens.detach() if stage.stop_gradient else self._tokens
                chosen = salient_indices(self._saliency, stage.kappa, num_prefix_tokens=prefix)
                with self._own_graph():
                    kept = take_tokens(tokens, chosen)
                parts.append((kept, take_tokens(self.mixture.shares, chosen)))
                self.selected[stage][index] = chosen

    @torch.no_grad()
    def _saliency_ahead(self, index: int, tokens: Tensor, run: BlockRun, steps: int) -> Tensor:
        self._paused = True
        try:
            return saliency_ahead(self.backbone, index, self._reaches[index], tokens, run, steps)
        finally:
            self._paused = False

    # What the tap sees.

    def _on_fused(self, call: AttentionCall) -> Tensor:
        if self._index is None:
            self._see_pooling(call)
            return call.run()
        self._require_reach(call.query, call.key)
        self._require_sight(call)
        with torch.no_grad():
            self._note(call)
        if not self.follow_shares:
            return call.run()
        options: dict[str, Any] = {
            "attn_mask": call.attn_mask,
            "is_causal": call.is_causal,
            "scale": call.scale,
        }
        shares = self._key_shares()
        if self.recomputes:  # the model's own call stays as it is
            self._keep_attended(attended_by_keys(call.query, call.key, shares, **options))
            return call.run()
        output, attended = attend_with_shares(
            call.query, call.key, call.value, shares, dropout_p=call.dropout_p, **options
        )
        self._keep_attended(attended)
        return call.as_given(output)

    def _on_softmax(self, attention: Tensor) -> None:
        if self._index is None:
            self._see_pooling(attention)
            return
        self._require_reach(attention, attention.transpose(-2, -1))
        with torch.no_grad():
            self._note(attention)
            if self.follow_shares:
                self._keep_attended(attended_shares(attention, self._key_shares()))

    def _see_pooling(self, found: AttentionCall | Tensor) -> None:
        """Attention outside the blocks may be a query that pools tokens."""
        if self._pooling is not None:
            self._pooling.see(found, self.mixture.shares)

    def _keep_attended(self, attended: Tensor) -> None:
        """Keep the own tokens' rows; those of appended tokens are cut off."""
        _, queries, _ = self._reach.sizes(1)
        self._attended.append(self._reach.merged(attended[:, :queries]))

    def _note(self, found: AttentionCall | Tensor) -> None:
        """Take what is wanted from the attention of the block at hand."""
        self._attentions += 1
        collects = self._index is not None and self._index < self._last_vertical
        if collects or self._index == self._attention_block:
            saliency = saliency_of(found, self.backbone, self._reach, len(self.targets))
            # Of several attentions of a block, the mean.
            before = 0.0 if self._saliency is None else self._saliency
            self._saliency = before + (saliency - before) / self._attentions

    def _key_shares(self) -> Tensor:
        shares = self._reach.key_shares(self.mixture.shares)
        return shares if self._appended is None else torch.cat((shares, self._appended), 1)

    def _require_reach(self, query: Tensor, key: Tensor) -> None:
        extra = 0 if self._appended is None else self._appended.shape[1]
        batch, queries, keys = self._reach.sizes(len(self.targets))
        expected = (batch, queries + extra, keys + extra)
        found = (query.shape[:-3].numel(), query.shape[-2], key.shape[-2])
        if found != expected:
            raise UnsupportedModelError(
                "looked for attention of {} x {} queries to {} keys".format(*expected)
                + f" at block {self._index} of {self.backbone.family}, found "
                + "{} x {} to {}".format(*found)
            )

    def _require_sight(self, call: AttentionCall) -> None:
        """Check that a block's own tokens see what was appended."""
        if self._appended is None:
            return
        mask, sides = call.attn_mask, (call.query.shape[-2], call.key.shape[-2])
        fits = mask is None or all(
            length in (1, side) for length, side in zip(mask.shape[-2:], sides, strict=True)
        )
        if call.is_causal or not fits:
            found = "is_causal=True" if mask is None else f"a mask {tuple(mask.shape)}"
            raise UnsupportedModelError(
                f"looked for attention that sees tokens appended by VerticalTokenMixup at block "
                f"{self._index} of {self.backbone.family}, {sides[0]} x {sides[1]}, found {found}"
            )

    def _check_passed(self) -> None:
        if self._passed != list(range(self.backbone.depth)):
            raise UnsupportedModelError(
                f"looked for a pass through all {self.backbone.depth} blocks of "
                f"{self.backbone.family} in order, found {self._passed}"
            )
        if self._pooling is not None:
            self._pooling.require_seen()


def _without_graph(tokens: Tensor) -> Tensor:
    """The same values, which ask for a gradient if these do, so that as much is saved for it."""
    return tokens.detach().requires_grad_(tokens.requires_grad)
