"""What ``torch.compile`` may and may not do around a pass."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from vitmix.errors import UnsupportedModelError

__all__ = ["uncompiled"]


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled models eagerly: hooks of one pass are no part of a compiled graph.

    Raises:
        UnsupportedModelError: the caller itself is being compiled.
    """
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    refusal = (
        "looked for a MixingModel that is not compiled itself, found torch.compile around it. "
        "Compile the model inside (model.compile()): it runs compiled wherever no stage acts in it"
    )
    if torch.compiler.is_compiling():
        raise UnsupportedModelError(refusal)
    try:
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:  # inside a compiled region that broke up before this call
        raise UnsupportedModelError(refusal) from error
    return stance
