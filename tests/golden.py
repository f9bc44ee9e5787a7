"""Finds the recorded arrays: all of them, or the part of them that travels with the tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "data"


def load_golden(name: str) -> Any:
    """Open ``name.npz`` from the folder in ``VITMIX_GOLDEN``, else from ``tests/data``."""
    folder = Path(os.environ.get("VITMIX_GOLDEN", HERE))
    return np.load(folder / f"{name}.npz")
