"""What families with attention in windows and stages of their own have in common."""

from __future__ import annotations

from vitmix.backbones.base import Reason

__all__ = ["WINDOWED", "average_reason"]

WINDOWED = (
    "attention within windows: a token that is put behind the others has no place in a window"
)


def average_reason(pooling: str) -> Reason:
    """Why shares cannot be followed through a pooling that is not the average."""
    if pooling in ("avg", "fast"):
        return None
    return f"pooling {pooling!r} is not a weighted mean of tokens; use global_pool='avg'"
