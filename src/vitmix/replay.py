"""Gradient checkpointing: do in the second pass exactly what was done in the first.

A checkpointed block forgets its activations and runs again during the backward pass, long after the
flow has ended. What was mixed must then be mixed again, from the plans of the first pass, and must
leave the same tensors to the checkpoint; reading attention must have left none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ReferenceType, WeakMethod, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from vitmix.backbones import Backbone
from vitmix.errors import UnsupportedModelError
from vitmix.tokens import TokenOutcome

__all__ = [
    "BlockRecord",
    "PartRecord",
    "Replay",
    "add_to_tokens",
    "first_tokens",
    "require_graph",
    "tokens_of",
    "unseen_by_checkpoint",
]


def unseen_by_checkpoint() -> torch.autograd.graph.saved_tensors_hooks:
    """Context whose saved tensors are kept: no checkpoint counts or drops them.

    They are kept without their graph, which a saved result would keep alive in a circle.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def require_graph() -> None:
    """Check that a first pass under gradient checkpointing keeps its graph.

    Raises:
        UnsupportedModelError: it does not.
    """
    if not torch.is_grad_enabled():
        raise UnsupportedModelError(
            "looked for gradient checkpointing that keeps the graph, found the reentrant kind: "
            "turn it on with use_reentrant=False"
        )


@dataclass
class BlockRecord:
    """What the first pass did at a block.

    Attributes:
        entered: the block's input, by which a second pass is told from that of another step; in
            nested checkpoints, each time it runs.
        outcomes: what was mixed in front of the block.
        extra: ``(B, M, D)`` tokens appended in front of the attention, or None.
        extended: the tokens that they were appended to. A checkpoint inside the block's own hooks
            (transformers) runs again from these, and calls no hook of the block.
    """

    entered: list[TensorWeakRef]
    outcomes: list[TokenOutcome] = field(default_factory=list)
    extra: Tensor | None = None
    extended: TensorWeakRef | None = None


@dataclass
class PartRecord:
    """A call of a module around or between blocks, from which a second pass may begin.

    Attributes:
        entered: its input, as for a block.
        passed: blocks that had been called before.
    """

    entered: list[TensorWeakRef]
    passed: int


class Replay:
    """Hooks for the second pass of one step; gone with the backward pass that frees its graph.

    Args:
        backbone: description of the model.
        records: what was done, by block.
        parts: what modules around and between blocks were given.
    """

    def __init__(
        self,
        backbone: Backbone,
        records: dict[int, BlockRecord],
        parts: dict[nn.Module, list[PartRecord]],
    ) -> None:
        self._backbone = backbone
        self._records = records
        self._parts = parts
        self._handles: list[Any] = []
        self._awaited: ReferenceType[object] | None = None
        self._index: int | None = None
        self._left: int | None = None
        self._own = 0
        self._added: Tensor | None = None
        self._inside = False

    @property
    def awaited(self) -> bool:
        """Whether a second pass may still come: the graph of the first is alive."""
        return self._awaited is not None and self._awaited() is not None

    def wait_for(self, output: Any) -> None:
        """Stay until a backward pass that frees its graph has come to a result of the first pass.

        Of several results, the first one with a graph counts. Nothing here refers to the graph, so
        that one that is thrown away is freed.
        """
        tokens = output[0] if isinstance(output, tuple) else output
        if self._awaited is None and tokens.requires_grad:
            hook = partial(_call, WeakMethod(self._finish))
            tokens.register_hook(hook)  # gone with the graph
            self._awaited = ref(hook)

    def install(self) -> None:
        """Register the hooks."""
        for index, block in enumerate(self._backbone.blocks):
            keep = self._handles.append
            enter = partial(self._enter, index)
            keep(block.module.register_forward_pre_hook(enter, with_kwargs=True))
            if self._records[index].extra is not None:
                keep(block.entry.register_forward_pre_hook(partial(self._append, index)))
                keep(block.attention.register_forward_hook(self._cut))
            keep(block.module.register_forward_hook(self._leave))
        for part in self._parts:
            self._handles.append(part.register_forward_pre_hook(self._enter_part))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._awaited = None

    def _finish(self) -> None:
        """Leave at the end of the backward pass at hand, unless another one may follow."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            torch.autograd.Variable._execution_engine.queue_callback(self.remove)

    def _enter_part(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        """Find out behind which block a second pass begins."""
        if not args or not _in_backward():
            return
        for call in self._parts[part]:
            if _is_one_of(args[0], call.entered):
                self._left = call.passed - 1
                return
        for call in self._parts[part]:
            if self._left == call.passed - 1:
                call.entered.append(TensorWeakRef(args[0]))
                return

    def _enter(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        record = self._records[index]
        known = _is_one_of(args[0], record.entered)
        if not _in_backward() or not (known or self._left == index - 1):
            self._index = self._left = self._added = None
            return None
        if not known:
            record.entered.append(TensorWeakRef(args[0]))
        self._index, self._left = index, None
        block, given = self._backbone.blocks[index], args[0]
        tokens = block.flatten(given)
        self._own, self._added = tokens.shape[1], None
        if record.outcomes:
            with unseen_by_checkpoint():
                for outcome in record.outcomes:
                    tokens = outcome.mix_tokens(tokens, self._backbone.num_prefix_tokens)
            mixed = block.restore(tokens, given)
            self._added = mixed - given if block.skip_outside else None
            given = mixed
        return (given, *args[1:]), kwargs

    def _append(
        self, index: int, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        record = self._records[index]
        if self._index is None:
            if record.extended is None or args[0] is not record.extended():
                return None
            self._own, self._inside = args[0].shape[1], True
        assert record.extra is not None
        return (torch.cat((args[0], record.extra.to(args[0].dtype)), 1), *args[1:])

    def _cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._index is None and not self._inside:
            return None
        self._inside = False
        return first_tokens(output, self._own)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._index, self._left = None, self._index
        return None if self._added is None else add_to_tokens(output, self._added)


def tokens_of(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """Tokens that a module is given.

    Raises:
        UnsupportedModelError: its first argument is not a tensor, or has come by keyword.
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    found = type(args[0]).__name__ if args else "none: pass them without a keyword"
    raise UnsupportedModelError(
        f"looked for tokens as the first argument of {type(module).__name__}, found {found}"
    )


def add_to_tokens(output: Any, added: Tensor) -> Any:
    """Add to what a block returns, which may be a tuple that starts with its tokens."""
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    return output + added


def _in_backward() -> bool:
    """Whether a backward pass is going on here: no other pass is a second one."""
    return torch._C._current_graph_task_id() != -1


def _is_one_of(given: object, references: list[TensorWeakRef]) -> bool:
    return any(given is reference() for reference in references)


def first_tokens(output: Any, count: int) -> Any:
    """The first tokens of an attention's result, which may be a tuple that starts with it."""
    if isinstance(output, tuple):
        return (output[0][:, :count], *output[1:])
    return output[:, :count]


def _call(method: WeakMethod[Any], gradient: Tensor) -> None:
    alive = method()
    if alive is not None:
        alive()
