"""vitmix: token-level mixing augmentation for vision transformers."""

from vitmix._version import __version__

__all__ = ["__version__"]
