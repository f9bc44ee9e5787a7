"""Finds the recorded arrays: all of them, or the part of them that travels with the tests."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "data"
FOLDER = os.environ.get("VITMIX_GOLDEN")


class Part:
    """A file of the part in ``tests/data``, read like what `numpy.load` gives.

    Many recorded arrays are the same (models share their weights), so `arrays.npz` holds each once
    and `index.json` says which is which. `make_data.py` writes both.
    """

    def __init__(self, name: str) -> None:
        self._index: dict[str, str] = json.loads((HERE / "index.json").read_text())[name]
        self._arrays = np.load(HERE / "arrays.npz")
        self.files = list(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __getitem__(self, key: str) -> Any:
        return self._arrays[self._index[key]]


def load_golden(name: str) -> Any:
    """Open ``name.npz`` from the folder in ``VITMIX_GOLDEN``, else its part in ``tests/data``."""
    return np.load(Path(FOLDER) / f"{name}.npz") if FOLDER else Part(name)
