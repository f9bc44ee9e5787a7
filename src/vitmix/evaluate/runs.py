"""Finished runs as they lie on the disk, and which of them differ in the seed only."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vitmix.errors import InputError
from vitmix.plots.curves import Series, read_metrics
from vitmix.train.config import TrainConfig
from vitmix.train.resume import FREE, finished_results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "OF_ONE_RUN",
    "Kind",
    "Run",
    "differences",
    "find_runs",
    "in_plain",
    "sort_runs",
    "words",
]

# Settings in which runs of one kind may differ.
OF_ONE_RUN = {"seed", "name", "out", "overwrite"} | (FREE - {"data"})


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    results: dict[str, Any]

    @cached_property
    def config(self) -> TrainConfig:
        """Its settings; those that its version did not know have their defaults."""
        return TrainConfig.from_dict(self.results["config"])

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """Its logged values."""
        return read_metrics(self.folder)

    @property
    def kind(self) -> str:
        """The same for runs that differ in the seed only."""
        shared = {k: v for k, v in self.config.to_dict().items() if k not in OF_ONE_RUN}
        return json.dumps(shared)


@dataclass(frozen=True)
class Kind:
    """Runs that differ in the seed only, and what to call them."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        """Stands for all where one is enough."""
        return self.runs[0]

    @cached_property
    def predictions(self) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
        """Labels and predictions of all runs, and the names of the classes; None without files."""
        paths = [run.folder / "predictions.npz" for run in self.runs]
        found = [np.load(path, allow_pickle=False) for path in paths if path.is_file()]
        if not found:
            return None
        labels, predictions = (
            np.concatenate([file[key] for file in found]) for key in ("labels", "predictions")
        )
        return labels, predictions, [str(name) for name in found[0]["classes"]]


def find_runs(folder: Path) -> list[Run]:
    """The run in a folder, or those of a comparison in the order they were trained in.

    Raises:
        InputError: neither, or not finished.
    """
    results = finished_results(folder)
    if results is not None:
        return [Run(folder, results)]
    below = sorted(path.parent for path in folder.glob("*/results.json"))
    found = [Run(place, results) for place in below if (results := finished_results(place))]
    if found and (folder / "teacher") not in below:  # an unfinished run may hold a teacher's
        return sorted(found, key=lambda run: str(run.results["started"]))
    came = "which is not there" if not folder.is_dir() else "which has no results.json"
    if (folder / "config.yaml").is_file():
        came += f"; finish it with vitmix train --resume {folder}"
    raise InputError(f"expected the folder of a finished run, got {folder}, {came}")


def sort_runs(runs: list[Run]) -> list[Kind]:
    """Runs by kind, each with a name of its own."""
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(run.kind, []).append(run)
    groups = list(kinds.values())
    methods = Counter(group[0].results["method"] for group in groups)
    named = []
    for group in groups:
        name = group[0].results["method"]
        if methods[name] > 1:
            same = [other[0] for other in groups if other[0].results["method"] == name]
            differing = [key for key in differences(same) if key != "method"][:3]
            own = group[0].config.to_dict()
            name += "".join(f", {words(key)} {in_plain(own[key])}" for key in differing)
        named.append(Kind(name, group))
    if len({kind.name for kind in named}) < len(named):
        named = [Kind(str(kind.first.folder), kind.runs) for kind in named]
    return named


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs, those of single runs left out."""
    settings = [run.config.to_dict() for run in runs]
    return [
        key for key in settings[0]
        if key not in OF_ONE_RUN and any(other[key] != settings[0][key] for other in settings)
    ]  # fmt: skip


def words(key: str) -> str:
    """The name of a setting, for people."""
    return key.replace("_", " ")


def in_plain(value: Any) -> str:
    """The value of a setting, for people.

    >>> in_plain(None), in_plain(True), in_plain(0.1), in_plain([0.5, 1.0])
    ('not set', 'yes', '0.1', '[0.5, 1.0]')
    """
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
