"""The exceptions that vitmix raises.

A message says what was expected, what came, and what to do.
"""

from __future__ import annotations

__all__ = ["InputError", "UnsupportedModelError", "VitmixError"]


class VitmixError(Exception):
    """Base class of all errors raised by vitmix."""


class InputError(VitmixError, ValueError):
    """An argument, a tensor or a file is not what was expected."""


class UnsupportedModelError(VitmixError, TypeError):
    """A model lacks what a stage needs; nothing was changed when it is raised."""
