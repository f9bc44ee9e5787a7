"""Hooks on a model for the length of one pass; they hand on to the flow of that pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.compilation import interpreted
from vitmix.flow import Flow

__all__ = ["Relay"]


class Relay:
    """Hooks that outlive the flow they serve.

    A compiled pass is compiled with them: they have to be the same in every pass.

    Attributes:
        flow: the flow of the pass at hand.
    """

    def __init__(self) -> None:
        self.flow: Flow | None = None
        self._handles: list[Any] = []

    def install(self, flow: Flow) -> None:
        """Register hooks for a flow, if it has anything to do."""
        self.flow = flow
        if not flow.needed:
            return
        backbone = flow.backbone
        keep = self._handles.append
        for index, block in enumerate(backbone.blocks):
            enter, leave = partial(self._enter, index), partial(self._leave, index)
            keep(block.module.register_forward_pre_hook(enter, with_kwargs=True))
            if index in flow.verticals:
                keep(block.entry.register_forward_pre_hook(self._append))
                keep(block.attention.register_forward_hook(self._cut))
            keep(block.module.register_forward_hook(leave))
        for part in backbone.parts if flow.recomputes else ():
            keep(part.register_forward_pre_hook(self._enter_part))
        if flow.follow_shares and backbone.pool_scores is not None:
            keep(backbone.pool_scores.register_forward_hook(self._keep_scores))

    @interpreted
    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.flow = None

    def _enter(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return None if self.flow is None else self.flow.enter(index, args, kwargs)

    def _append(self, module: nn.Module, args: Any) -> Any:
        return None if self.flow is None else self.flow.append(args)

    def _cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self.flow is None else self.flow.cut(output)

    def _leave(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self.flow is None else self.flow.leave(index, output)

    def _keep_scores(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.flow is not None:
            self.flow.keep_scores(output)

    def _enter_part(self, part: nn.Module, args: Any) -> None:
        if self.flow is not None:
            self.flow.enter_part(part, args)
