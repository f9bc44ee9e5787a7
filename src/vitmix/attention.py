"""The tap: sees the attention of any model while its fused kernels stay on.

A ``TorchFunctionMode`` sees every call of ``scaled_dot_product_attention`` inside a model that
knows nothing of it, and every ``softmax`` of models that write attention by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitmix.backbones.base import Block
from vitmix.errors import UnsupportedModelError
from vitmix.functional.saliency import query_key_attention

__all__ = ["AttentionCall", "AttentionTap", "Run", "read_attention", "read_query_key"]

Run = Callable[[nn.Module, Tensor], Tensor]

_FUSED = F.scaled_dot_product_attention
# The function behind nn.MultiheadAttention hands itself to a mode as a whole, and calls its kernel
# where no mode sees it: this is the same function, but for not handing itself over.
_OPEN_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda arguments: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax, torch.special.softmax)


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one ``scaled_dot_product_attention``.

    Attributes:
        given: the call as the model made it and the block that did, if it was rearranged.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    given: tuple[AttentionCall, Block] | None = None

    @property
    def mask(self) -> Tensor | None:
        """``attn_mask``, or that which ``is_causal`` stands for."""
        if not self.is_causal:
            return self.attn_mask
        sides = (self.query.shape[-2], self.key.shape[-2])
        return torch.ones(sides, dtype=torch.bool, device=self.query.device).tril()

    def within(self, block: Block | None) -> AttentionCall:
        """The same with ``(B', H, N, d)`` queries, keys and values of as many heads each.

        Raises:
            UnsupportedModelError: no axis of heads.
        """
        if block is None:
            return self
        if self.query.ndim < (3 if block.heads else 4):
            raise UnsupportedModelError(
                f"looked for attention (B, H, N, d) in {type(block.module).__name__}, found "
                f"queries {tuple(self.query.shape)}"
            )
        query, key, value = map(block.by_heads, (self.query, self.key, self.value))
        mask = self.attn_mask
        if mask is not None and query is not self.query:
            mask = block.by_heads(mask.expand(*self.query.shape[:-1], self.key.shape[-2]))
        heads = query.shape[1]
        if key.shape[1] == 1:
            key, value = (each.expand(-1, heads, -1, -1) for each in (key, value))
        elif self.enable_gqa:
            key, value = (
                each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value)
            )
        return replace(
            self,
            query=query,
            key=key,
            value=value,
            attn_mask=mask,
            enable_gqa=False,
            given=(self, block),
        )

    def as_given(self, result: Tensor) -> Tensor:
        """A result ``(B', H, N, d)`` as the model takes it."""
        if self.given is None:
            return result
        call, block = self.given
        return block.as_called(result, call.query)

    def run(self) -> Tensor:
        """Compute what the model asked for, as it asked for it."""
        if self.given is not None:
            return self.given[0].run()
        options: dict[str, Any] = {"enable_gqa": True} if self.enable_gqa else {}
        return F.scaled_dot_product_attention(
            self.query,
            self.key,
            self.value,
            attn_mask=self.attn_mask,
            dropout_p=self.dropout_p,
            is_causal=self.is_causal,
            scale=self.scale,
            **options,
        )


class AttentionTap(TorchFunctionMode):
    """Hand every attention inside the context to its owner.

    Args:
        on_fused: takes a fused call and returns its result.
        on_softmax: takes an attention map ``(..., H, N, M)`` after softmax.
        paused: whether to let everything pass unseen for now.
        block: the block that calls, or None outside of blocks: knows where heads are.
    """

    def __init__(
        self,
        on_fused: Callable[[AttentionCall], Tensor],
        on_softmax: Callable[[Tensor], None],
        paused: Callable[[], bool] = bool,
        block: Callable[[], Block | None] = lambda: None,
    ) -> None:
        super().__init__()
        self._paused = paused
        self._block = block
        self._on_fused = on_fused
        self._on_softmax = on_softmax

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused():
            return func(*args, **kwargs)
        if func is _FUSED:
            return self._on_fused(AttentionCall(*args, **kwargs).within(self._block()))
        if func is F.multi_head_attention_forward:
            with self:
                return _OPEN_ATTENTION(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SOFTMAX:
            block = self._block()
            if result.ndim >= (3 if block is not None and block.heads else 4):
                self._on_softmax(result if block is None else block.by_heads(result))
        return result


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass that has shown what was wanted."""


def read_query_key(block: Block, tokens: Tensor, run: Run) -> list[AttentionCall | Tensor]:
    """Run a block up to its last attention and no further.

    Args:
        block: transformer block.
        tokens: ``(B, T, D)``.
        run: runs the block on tokens as the model does, without the block's own hooks.

    Returns:
        Of each attention the fused call, or the map ``(B', H, T, T)`` of a hand-written one.

    Raises:
        UnsupportedModelError: the block ran to its end with fewer.
    """
    found: list[AttentionCall | Tensor] = []

    def note(seen: AttentionCall | Tensor) -> None:
        found.append(seen)
        if len(found) == block.attentions:
            raise _Stop

    def fused(call: AttentionCall) -> Tensor:
        note(call)
        return call.run()

    try:
        with AttentionTap(fused, note, block=lambda: block):
            run(block.module, tokens)
    except _Stop:
        return found
    raise UnsupportedModelError(
        f"looked for {block.attentions} scaled_dot_product_attention or softmax over (B, H, N, N) "
        f"in {type(block.module).__name__}, found {len(found)}"
    )


def read_attention(block: Block, tokens: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Run a block and read its attention map.

    Args:
        block: transformer block.
        tokens: ``(B, T, D)``.
        run: runs the block on tokens as the model does, without the block's own hooks.

    Returns:
        Output tokens ``(B, T, D)`` and the head mean of attention ``(B, 1, T, T)``.

    Raises:
        UnsupportedModelError: not exactly one attention was seen.
    """
    maps: list[Tensor] = []

    def fused(call: AttentionCall) -> Tensor:
        attention = query_key_attention(call.query, call.key, scale=call.scale, attn_mask=call.mask)
        maps.append(attention.mean(1, keepdim=True))
        return call.run()

    def softmax(attention: Tensor) -> None:
        maps.append(attention.float().mean(1, keepdim=True))

    with AttentionTap(fused, softmax, block=lambda: block):
        output = run(block.module, tokens)
    if len(maps) != 1:
        raise UnsupportedModelError(
            f"looked for one attention in {type(block.module).__name__}, found "
            f"{len(maps)} attentions"
        )
    return output, maps[0]
