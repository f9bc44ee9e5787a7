"""Explicit attention matrices of any model, from the calls that it makes itself.

Nothing here uses what is tested: the fused function and the softmax of tensors are replaced by ones
that write down what passes, and ``nn.MultiheadAttention`` is asked for its weights afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import vitmix


class CallRecorder:
    """Attention of every block in the pass that counts, and of a learned query that pools.

    The last calls of a block are the real ones: a look ahead at its queries and keys comes before.
    """

    def __init__(self, mixing: vitmix.MixingModel, patch: pytest.MonkeyPatch) -> None:
        self.attention: dict[int, torch.Tensor] = {}
        self.pool: torch.Tensor | None = None
        self.rows: list[torch.Tensor] = []
        self.scores: torch.Tensor | None = None
        self._index: int | None = None
        self._inside = False
        self._calls: dict[int, list[tuple[Any, ...]]] = {}
        self._maps: dict[int, list[torch.Tensor]] = {}
        self._blocks = mixing.backbone.blocks
        self._multihead: dict[int, tuple[nn.MultiheadAttention, torch.Tensor]] = {}
        self._handles: list[Any] = []
        self._fused = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", self._on_fused)
        self._softmaxes = _Softmaxes(self._on_softmax)
        self._softmaxes.__enter__()
        for index, block in enumerate(mixing.backbone.blocks):
            inner = block.attention
            self._handles += [
                inner.register_forward_pre_hook(lambda m, a, index=index: self._set(index)),
                inner.register_forward_hook(lambda m, a, o: self._set(None), always_call=True),
            ]
            for part in block.module.modules():
                if isinstance(part, nn.MultiheadAttention):
                    self._handles.append(
                        part.register_forward_pre_hook(
                            lambda m, a, index=index: self._multihead.update({index: (m, a[0])})
                        )
                    )

        if mixing.backbone.pool_scores is not None:
            self._handles.append(
                mixing.backbone.pool_scores.register_forward_hook(
                    lambda m, a, o: setattr(self, "scores", o)
                )
            )

    def close(self) -> None:
        self._softmaxes.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        maps = {index: [explicit(*call) for call in calls] for index, calls in self._calls.items()}
        for index, found in {**self._maps, **maps}.items():
            self.attention[index] = self._joined(index, found)
        with torch.no_grad():
            for index, (module, x) in self._multihead.items():
                self.attention[index] = module(x, x, x, average_attn_weights=False)[1]

    def _joined(self, index: int, maps: list[torch.Tensor]) -> torch.Tensor:
        """The last maps of a block side by side, as if they were heads."""
        count = self._blocks[index].attentions
        if count == 1:
            return maps[-1]
        join = torch.cat if maps[0].ndim == 4 else torch.stack
        return join(maps[-count:], 1)

    def _set(self, index: int | None) -> None:
        self._index = index

    def _on_fused(self, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if self._inside:
            return self._fused(query, key, value, *args, **options)
        assert not args
        call = (query.detach(), key.detach(), options.get("attn_mask"), options.get("scale"))
        if self._index is not None:
            self._calls.setdefault(self._index, []).append(call)
        elif query.shape[-2] == 1:
            self.rows.append(explicit(*call))
            self.pool = self.rows[-1].mean(1)[:, 0]
        self._inside = True
        try:
            return self._fused(query, key, value, **options)
        finally:
            self._inside = False

    def _on_softmax(self, result: torch.Tensor) -> None:
        if self._inside:
            return
        if self._index is not None and result.ndim >= 3:
            self._maps.setdefault(self._index, []).append(result.detach())
        elif self._index is None and result.ndim == 4 and result.shape[2] == 1:
            self.rows.append(result.detach())


class _Softmaxes(TorchFunctionMode):
    """Shows every softmax, by whichever of its names it is called."""

    def __init__(self, see: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self._see(result)
        return result


def explicit(query: Any, key: Any, mask: Any, scale: float | None) -> torch.Tensor:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    scores = scores if mask is None else scores + mask.detach()
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)
