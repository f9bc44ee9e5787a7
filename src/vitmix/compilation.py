"""What ``torch.compile`` takes of a training step: the pass through the model, in one piece.

Everything around the pass (draws, mixing pixels, hooks, labels) stays with the interpreter. Dynamo,
the part of ``torch.compile`` that reads Python, is told so once, where a function is defined; that
costs nothing afterwards, and imports nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from vitmix.errors import UnsupportedModelError

__all__ = ["inlined", "interpreted", "passed_over", "uncompiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def interpreted(function: Function) -> Function:
    """Leave a function, and all that it calls, to the interpreter."""
    return _marked(function, "SKIP")


def passed_over(function: Function) -> Function:
    """Leave a function to the interpreter, but not what it calls."""
    return _marked(function, "DEFAULT")


def _marked(function: Function, what_it_calls: str) -> Function:
    # torch.compiler.disable would import the compiler, and put a wrapper around the function that
    # fullgraph=True does not pass over.
    dynamo: Any = torch._C._dynamo.eval_frame
    if not hasattr(dynamo, "set_code_exec_strategy"):  # PyTorch 2.6
        return function
    action = dynamo._FrameAction
    strategy = dynamo._FrameExecStrategy(action.SKIP, getattr(action, what_it_calls))
    dynamo.set_code_exec_strategy(function.__code__, strategy)
    return function


def inlined() -> UnsupportedModelError:
    """The refusal to become a part of somebody else's graph."""
    return UnsupportedModelError(
        "looked for torch.compile(mixing) or mixing.compile(), with PyTorch 2.7 or newer, found a "
        "function compiled in one piece that calls the MixingModel: draws are no part of a graph"
    )


def uncompiled() -> AbstractContextManager[object]:
    """Run a model that was compiled by itself eagerly: it knows nothing of a pass's hooks."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
