"""One training pass through a model: hooks that mix tokens and a tap that reads attention.

A flow lives for one forward pass. It registers its hooks when the pass starts and removes them when
it ends, by an exception too, so that a model carries no trace of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from vitmix.attention import AttentionCall, AttentionTap, read_attention, read_query_key
from vitmix.backbones import Backbone
from vitmix.compilation import uncompiled
from vitmix.errors import UnsupportedModelError
from vitmix.functional.alignment import align_shares, attend_with_shares, pooled_shares
from vitmix.functional.mixture import Mixture
from vitmix.functional.saliency import (
    attention_rollout,
    attention_saliency,
    query_key_attention,
    query_key_saliency,
)
from vitmix.functional.vertical import salient_indices, take_tokens
from vitmix.replay import (
    BlockRecord,
    Replay,
    call_after_backward,
    first_tokens,
    unseen_by_checkpoint,
)
from vitmix.tokens import Given, TokenContext, TokenMixer, TokenOutcome, VerticalTokenMixup

__all__ = ["Flow"]


class Flow:
    """Carries the mixture through one forward pass of a model.

    Args:
        backbone: description of the model.
        mixture: sources and shares at the model's input.
        targets: ``(B, C)`` labels of the samples as mixed at the input.
        mixers: stages that mix samples and what each was given, by the block they act at.
        verticals: stages that extend keys and values, by block.
        follow_shares: whether shares are carried through attention.
        attention_block: block whose saliency is kept in ``attention``, or None.
        recomputes: whether blocks run a second time in the backward pass (gradient checkpointing).

    Attributes:
        mixture: sources and shares as they are now.
        targets: ``(B, C)`` labels as the token stages have mixed them so far.
        outcomes: what each mixer decided, by block.
        attention: ``(B, N)`` saliency of ``attention_block``.
        replay: with ``recomputes``, the hooks that wait for the backward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        mixture: Mixture,
        targets: Tensor,
        *,
        mixers: dict[int, list[tuple[TokenMixer, Given]]],
        verticals: dict[int, list[VerticalTokenMixup]],
        follow_shares: bool,
        attention_block: int | None,
        recomputes: bool = False,
    ) -> None:
        self.backbone = backbone
        self.mixture = mixture
        self.targets = targets
        self.outcomes: list[tuple[int, TokenMixer, TokenOutcome]] = []
        self.attention: Tensor | None = None
        self._mixers = mixers
        self._verticals = verticals
        self._follow = follow_shares
        self._attention_block = attention_block
        self._recomputes = recomputes
        self._records: dict[int, BlockRecord] = {}
        self.replay: Replay | None = None
        self._collected: dict[VerticalTokenMixup, list[tuple[Tensor, Tensor]]] = {
            stage: [] for stages in verticals.values() for stage in stages
        }
        self._last_vertical = max(verticals, default=-1)
        self._paused = False
        self._scores: Tensor | None = None
        self._pooled: Tensor | None = None
        self._passed: list[int] = []
        # Of the block at hand:
        self._index: int | None = None
        self._tokens = targets
        self._shares_in = mixture.shares
        self._saliency: Tensor | None = None
        self._appended: Tensor | None = None
        self._attentions = 0

    @property
    def needed(self) -> bool:
        """Whether there is anything to do in the pass."""
        return bool(
            self._mixers or self._verticals or self._follow or self._attention_block is not None
        )

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Let hooks and tap act while the model runs inside the context.

        Raises:
            UnsupportedModelError: at the end, if something that should have happened did not.
        """
        if not self.needed:
            yield
            return
        handles: list[Any] = []
        try:
            for index, block in enumerate(self.backbone.blocks):
                enter, leave = partial(self._enter, index), partial(self._leave, index)
                handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
                if index in self._verticals:
                    append, cut = self._append, self._cut
                    handles.append(block.entry.register_forward_pre_hook(append))
                    handles.append(block.attention.register_forward_hook(cut))
                handles.append(block.module.register_forward_hook(leave))
            if self._follow and self.backbone.pool_scores is not None:
                handles.append(self.backbone.pool_scores.register_forward_hook(self._keep_scores))
            with uncompiled(), self._tap():
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._check_passed()
        if self.replay is not None:
            self.replay.install()

    def _tap(self) -> AbstractContextManager[object]:
        if not self._reads_attention:
            return nullcontext()
        return AttentionTap(self._on_fused, self._on_softmax, lambda: self._paused)

    def pooled_shares(self) -> Tensor | None:
        """``(B, K)`` shares of what the classifier sees, after the pass; None if not followed."""
        if not self._follow:
            return None
        if self.backbone.pooling == "attention":
            return self._pooled
        return self.backbone.pool_shares(self.mixture.shares, self._scores)

    @property
    def _reads_attention(self) -> bool:
        return self._follow or self._attention_block is not None or bool(self._verticals)

    # Hooks, in the order in which they are called within a block.

    def _enter(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = args[0]
        expected = self.mixture.shares.shape[:2]
        if tokens.ndim != 3 or tokens.shape[:2] != expected:
            raise UnsupportedModelError(
                f"looked for tokens ({expected[0]}, {expected[1]}, D) at block {index} of "
                f"{self.backbone.family}, found {tuple(tokens.shape)}"
            )
        if self._recomputes:
            tokens = self._record(index, tokens)
        for stage, given in self._mixers.get(index, ()):
            run = partial(_forward, args[1:], kwargs)
            tokens = self._mix(stage, given, tokens, index, run)
        self._index, self._tokens = index, tokens
        self._saliency, self._appended, self._attentions = None, None, 0
        return (tokens, *args[1:]), kwargs

    def _append(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put collected tokens behind the block's own (TokenMixup, Eq. 13).

        Rows of attention are independent, so that the own tokens' rows are those of attention from
        own tokens over own and collected ones; the others' rows are cut off behind the attention.
        """
        if self._paused or self._index is None:
            return None
        parts = [part for stage in self._verticals[self._index] for part in self._collected[stage]]
        self._appended = torch.cat([shares for _, shares in parts], 1)
        extra = torch.cat([tokens.to(args[0].dtype) for tokens, _ in parts], 1)
        if self._recomputes:
            _require_graph()
            record = self._records[self._index]
            record.extra, record.extended = extra, TensorWeakRef(args[0])
        return (torch.cat((args[0], extra), 1), *args[1:])

    def _cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._paused or self._index is None:
            return None
        return first_tokens(output, self._tokens.shape[1])

    def _leave(self, index: int, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._reads_attention and self._attentions != 1:
            raise UnsupportedModelError(
                "looked for one scaled_dot_product_attention, or one softmax over (B, H, N, N), "
                f"in block {index} of {self.backbone.family}, found {self._attentions}"
            )
        if index == self._attention_block:
            self.attention = self._saliency
        self._collect(index)
        self._passed.append(index)
        self._index = None

    def _keep_scores(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._scores = output

    # What happens at a block.

    def _record(self, index: int, tokens: Tensor) -> Tensor:
        """Remember a block's input for the second pass."""
        _require_graph()
        if not self._records:
            self.replay = Replay(self.backbone, self._records)
        self._records[index] = BlockRecord(TensorWeakRef(tokens))
        if index == 0 and self.replay is not None:
            return call_after_backward(tokens, self.replay.remove)
        return tokens

    def _mix(
        self, stage: TokenMixer, given: Given, tokens: Tensor, index: int, run: partial[Tensor]
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
        if self._recomputes:
            self._records[index].outcomes.append(outcome)
        self.outcomes.append((index, stage, outcome))
        self.targets = outcome.mix_targets(self.targets)
        if self._follow:
            self.mixture = outcome.mix_shares(self.mixture)
            self._collected = {
                kept: [(old, outcome.pad_shares(shares)) for old, shares in parts]
                for kept, parts in self._collected.items()
            }
        with self._own_graph():
            return outcome.mix_tokens(tokens, prefix)

    def _own_graph(self) -> AbstractContextManager[object]:
        """Keeps what is differentiable here apart from what a checkpoint runs again."""
        return unseen_by_checkpoint() if self._recomputes else nullcontext()

    def _collect(self, index: int) -> None:
        """Keep the most salient tokens of a block's input for later blocks."""
        if index >= self._last_vertical or self._saliency is None:
            return
        prefix = self.backbone.num_prefix_tokens
        for stage, parts in self._collected.items():
            if index < stage.blocks[0]:
                tokens = self._tokens.detach() if stage.stop_gradient else self._tokens
                chosen = salient_indices(self._saliency, stage.kappa, num_prefix_tokens=prefix)
                with self._own_graph():
                    kept = take_tokens(tokens, chosen)
                parts.append((kept, take_tokens(self._shares_in, chosen)))

    @torch.no_grad()
    def _saliency_ahead(
        self, index: int, tokens: Tensor, run: partial[Tensor], steps: int
    ) -> Tensor:
        """Saliency of tokens from the attention of the blocks they are about to enter."""
        self._paused = True
        try:
            ahead = [block.module for block in self.backbone.blocks[index : index + steps + 1]]
            # Dropout in these extra passes must not shift that of the real one.
            devices = [tokens.device] if tokens.device.type == "cuda" else []
            own_draws = torch.random.fork_rng(devices, enabled=steps > 0 or self._recomputes)
            if steps == 0:
                with own_draws:
                    found = read_query_key(ahead[0], tokens, run)
                return self._saliency_of(found, tokens.shape[1])
            if any(isinstance(value, Tensor) for value in (*run.args[0], *run.args[1].values())):
                raise UnsupportedModelError(
                    "looked for blocks that take tokens alone, found further tensors given to "
                    f"block {index} of {self.backbone.family}: a rollout cannot know what later "
                    "blocks are given. Use saliency='attention'"
                )
            maps = []
            with own_draws:
                for module in ahead:
                    tokens, attention = read_attention(module, tokens, run)
                    maps.append(attention)
            return self._saliency_of(attention_rollout(maps)[:, None], tokens.shape[1])
        finally:
            self._paused = False

    def _saliency_of(self, found: AttentionCall | Tensor, tokens: int) -> Tensor:
        """Saliency of the first ``tokens`` keys from the first ``tokens`` queries."""
        prefix = self.backbone.num_prefix_tokens
        class_token = self.backbone.class_token
        if isinstance(found, Tensor):
            return attention_saliency(
                found.detach()[:, :, :tokens, :tokens],
                num_prefix_tokens=prefix,
                class_token=class_token,
            )
        return query_key_saliency(
            found.query.detach()[:, :, :tokens],
            found.key.detach(),
            scale=found.scale,
            attn_mask=found.attn_mask,
            num_prefix_tokens=prefix,
            class_token=class_token,
        )

    # What the tap sees.

    def _on_fused(self, call: AttentionCall) -> Tensor:
        if self._index is None:
            return self._on_pooling(call)
        self._require_square(call.query.shape[-2], call.key.shape[-2])
        with torch.no_grad():
            self._note(call)
        if not self._follow:
            return call.run()
        if call.enable_gqa or call.query.ndim != 4:
            raise UnsupportedModelError(
                "looked for attention (B, H, N, d) with as many key heads as query heads, found "
                f"{tuple(call.query.shape)} and {tuple(call.key.shape)}"
            )
        output, attended = attend_with_shares(
            call.query,
            call.key,
            call.value,
            self._key_shares(),
            attn_mask=call.attn_mask,
            dropout_p=call.dropout_p,
            is_causal=call.is_causal,
            scale=call.scale,
            separate=self._recomputes,
        )
        shares = self.mixture.shares
        moved = (attended[:, : shares.shape[1]] + shares) / 2
        self.mixture = self.mixture._replace(shares=moved)
        return output

    def _on_softmax(self, attention: Tensor) -> None:
        rows, columns = attention.shape[-2:]
        if self._index is None:
            if self._follow and self.backbone.pooling == "attention" and rows == 1:
                self._pool(attention.detach().float().mean(1))
            return
        self._require_square(rows, columns)
        with torch.no_grad():
            self._note(attention)
            if self._follow:
                shares = self.mixture.shares
                own_rows = attention[:, :, : shares.shape[1]].float()
                own_rows = own_rows / own_rows.sum(-1, keepdim=True)
                moved = align_shares(shares, own_rows, key_shares=self._key_shares())
                self.mixture = self.mixture._replace(shares=moved)

    def _note(self, found: AttentionCall | Tensor) -> None:
        """Take what is wanted from the attention of the block at hand."""
        self._attentions += 1
        self._shares_in = self.mixture.shares
        collects = self._index is not None and self._index < self._last_vertical
        if collects or self._index == self._attention_block:
            self._saliency = self._saliency_of(found, self._tokens.shape[1])

    def _key_shares(self) -> Tensor:
        if self._appended is None:
            return self.mixture.shares
        return torch.cat((self.mixture.shares, self._appended), 1)

    def _on_pooling(self, call: AttentionCall) -> Tensor:
        """Attention outside the blocks: the learned query that pools tokens."""
        if self._follow and self.backbone.pooling == "attention" and call.query.shape[-2] == 1:
            with torch.no_grad():
                attention = query_key_attention(call.query, call.key, scale=call.scale)
                self._pool(attention.mean(1))
        return call.run()

    def _pool(self, weights: Tensor) -> None:
        shares = self.mixture.shares
        shares = shares[:, shares.shape[1] - weights.shape[-1] :]
        self._pooled = pooled_shares(shares, weights[:, 0])

    def _require_square(self, queries: int, keys: int) -> None:
        extra = 0 if self._appended is None else self._appended.shape[1]
        expected = self._tokens.shape[1] + extra
        if (queries, keys) != (expected, expected):
            raise UnsupportedModelError(
                f"looked for self-attention over all {expected} tokens at block {self._index} of "
                f"{self.backbone.family}, found {queries} queries and {keys} keys"
            )

    def _check_passed(self) -> None:
        if self._passed != list(range(self.backbone.depth)):
            raise UnsupportedModelError(
                f"looked for a pass through all {self.backbone.depth} blocks of "
                f"{self.backbone.family} in order, found {self._passed}"
            )
        scored = self.backbone.pool_scores is None or self._scores is not None
        pooled = self.backbone.pooling != "attention" or self._pooled is not None
        if self._follow and not (scored and pooled):
            raise UnsupportedModelError(
                f"looked for the {self.backbone.pooling} pooling of {self.backbone.family}, "
                "found none in the pass"
            )


def _forward(
    args: tuple[Any, ...], kwargs: dict[str, Any], block: nn.Module, tokens: Tensor
) -> Tensor:
    """Run a block as the model does, without the hooks of the block itself."""
    output: Any = block.forward(tokens, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _require_graph() -> None:
    """Check that a first pass under gradient checkpointing keeps its graph."""
    if not torch.is_grad_enabled():
        raise UnsupportedModelError(
            "looked for gradient checkpointing that keeps the graph, found the reentrant kind: "
            "turn it on with use_reentrant=False"
        )
