"""The finished runs of a study: in their folders, and as small files that a repository can keep.

A stored run is one JSON file a run, named like the run's folder: its figures, the settings that
these depend on, where they come from, and the measures that were taken of it. A checkpoint is not
needed to read it, so a table can be made, and a study continued, on another machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.evaluate.measured import MEASURES
from vitmix.evaluate.runs import OF_ONE_RUN
from vitmix.train.config import TrainConfig
from vitmix.train.folder import write_text
from vitmix.train.resume import finished_results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitmix.evaluate.study import Cell, Study

__all__ = ["Runs", "find_run", "find_runs_of", "measures_in"]

Runs = dict[str, dict[int, dict[str, Any]]]  # results by cell and seed


def find_runs_of(study: Study, seeds: Sequence[int], out: Path | None, store: Path | None) -> Runs:
    """The finished runs of each cell; arguments as of :func:`find_run`."""
    return {
        cell.name: {
            seed: run for seed in seeds if (run := find_run(cell, seed, out, store)) is not None
        }
        for cell in study.cells
    }


def find_run(cell: Cell, seed: int, out: Path | None, store: Path | None) -> dict[str, Any] | None:
    """The results of a finished run, with its ``measures``; None where there is none.

    What is stored stays as it is: a run in ``out`` is added to the store if that has none of this
    name, and measures are added to a run that is the same one.

    Args:
        cell: of the study.
        seed: of the run.
        out: folder of the run folders.
        store: folder of the stored runs.

    Raises:
        InputError: the run was made with other settings than the cell has now.
    """
    name = cell.folder(seed)
    run = None if out is None else _in_folder(out / name)
    path = None if store is None else store / f"{name}.json"
    stored = None if path is None else _stored(path)
    if stored is None and run is None:
        return None
    _check_settings(cell, stored or run or {}, path if stored is not None else out, name)
    if path is None or run is None:
        return stored or run
    if stored is None:
        found = run
    elif stored["started"] == run["started"]:
        found = stored | {"measures": stored["measures"] | run["measures"]}
    else:
        return stored
    found = _plain(found)
    if found != stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _lines(found))
    return found


def measures_in(folder: Path) -> dict[str, Any]:
    """Measures of a run that lie in its folder."""
    path = folder / "evaluation.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return {name: found[name] for name in (*MEASURES, "commit") if name in found}


def _in_folder(folder: Path) -> dict[str, Any] | None:
    results = finished_results(folder)
    return None if results is None else {**results, "measures": measures_in(folder)}


def _stored(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"expected the results of a run in {path}, got: {error}") from error
    return found


def _check_settings(cell: Cell, run: dict[str, Any], where: Path | None, name: str) -> None:
    """Refuse a run whose settings are others, as after a default has changed."""
    before = TrainConfig.from_dict(run["config"]).to_dict()  # settings since then: their defaults
    for key, value in cell.config.to_dict().items():
        if key not in OF_ONE_RUN | {"data"} and before[key] != value:  # the name has data's
            raise InputError(
                f"expected the settings of cell {cell.name!r} in {where}, the run {name} was made "
                f"with {key} {before[key]!r} instead of {value!r}; set {key} in the study, or "
                "remove the run"
            )


def _plain(run: dict[str, Any]) -> dict[str, Any]:
    """Without what says where files lay."""
    config = {
        key: value for key, value in run["config"].items()
        if key == "seed" or key not in OF_ONE_RUN
    }  # fmt: skip
    data = Path(run["data"]).name
    return {**run, "data": data, "config": config | {"data": data}}


def _lines(run: dict[str, Any]) -> str:
    """JSON with one line a figure and one a measure."""
    measures = (f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in run["measures"].items())
    texts = {key: json.dumps(value) for key, value in run.items()}
    if run["measures"]:
        texts["measures"] = "{\n" + ",\n".join(measures) + "\n  }"
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {text}" for k, text in texts.items()) + "\n}\n"
