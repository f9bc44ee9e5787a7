"""What the tests of models with stages or windows need to know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIDE = 64


@dataclass(frozen=True)
class Staged:
    """A family with what its tests need to know.

    Attributes:
        make: makes the model for images of ``side`` pixels.
        block: a block in the middle that horizontal mixing acts at.
        vertical: a block that vertical mixing may act at, or None if it is refused.
        side: side of the images in pixels.
    """

    make: Callable[[], Any]
    block: int = 3
    vertical: int | None = None
    side: int = SIDE
