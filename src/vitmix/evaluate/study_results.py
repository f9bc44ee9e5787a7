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

__all__ = ["READING", "Runs", "check_images", "find_run", "find_runs_of", "measures_in", "taken_on"]

# Settings beside ``data`` that say which images there are.
READING = (
    "label_column", "test_split", "test_share", "val_share", "train_limit", "img_size", "crop_pct",
    "interpolation", "skip_corrupt",
)  # fmt: skip

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


def check_images(results: Runs) -> None:
    """Refuse runs that read data of one name in the same way and have other images.

    The name of a run has no more of its data than the name of the folder.

    Raises:
        InputError: names two runs.
    """
    known: dict[str, tuple[str, dict[str, Any]]] = {}
    for cell, runs in results.items():
        for seed, run in runs.items():
            name, keys = f"{cell} seed {seed}", (*READING, "model", "pretrained", "init")
            read = [Path(run["data"]).name, *(run["config"].get(key) for key in keys)]
            other, first = known.setdefault(repr(read), (name, run))
            if run["data_fingerprint"] != first["data_fingerprint"]:
                raise InputError(
                    f"expected the same images in all runs, {name} (of {run['data']}) has others "
                    f"than {other} (of {first['data']}); choose another --out, and other "
                    "--results, for other data"
                )


def measures_in(folder: Path) -> dict[str, Any]:
    """Measures of a finished run that lie in its folder, if they are of it and of its own data."""
    path = folder / "evaluation.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    run = finished_results(folder)
    if run is None or not found:
        return {}
    same = Path(found["run"]).name == folder.name  # not a checkpoint in it
    same &= Path(found["data"]).name == Path(run["data"]).name
    split = run["config"].get("test_split")
    if not same or found.get("test_split", split) != split:
        return {}
    return {name: found[name] for name in (*MEASURES, "commit") if name in found}


def taken_on(measure: dict[str, Any]) -> int:
    """How many images a measure was taken on, with those whose box is cut off."""
    if "images" in measure:
        return int(measure["images"]) + int(measure.get("left_out", 0))
    return sum(each["images"] for each in measure["bins"])


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
