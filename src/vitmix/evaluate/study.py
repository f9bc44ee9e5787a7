"""``vitmix study`` and ``vitmix ablate``: a table of settings over seeds, trained cell by cell.

A study is a YAML file: settings that all cells share, and what each cell changes. Each run lies in
a folder named after its cell, its seed and a digest of everything that its numbers depend on, so
that the same command later trains what is missing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import yaml
from scipy import stats

from vitmix.errors import InputError
from vitmix.evaluate.checkpoint import evaluate_checkpoint
from vitmix.evaluate.measured import MEASURES, chosen_measures
from vitmix.evaluate.runs import OF_ONE_RUN
from vitmix.evaluate.table import as_markdown, as_text, spread, summarise
from vitmix.train.config import TrainConfig, suggest
from vitmix.train.data import load_data
from vitmix.train.folder import MARKER, write_json, write_text
from vitmix.train.methods import method_of
from vitmix.train.provenance import commit, versions
from vitmix.train.recipes import settings_under
from vitmix.train.resume import finished_results
from vitmix.train.run import Interrupted, train_run

if TYPE_CHECKING:
    from vitmix.train.data import ImageData

__all__ = [
    "Cell",
    "Study",
    "measure_runs",
    "paired",
    "read_study",
    "run_study",
    "show",
    "studies",
    "write_tables",
]

KEYS = ("title", "seeds", "against", "settings", "cells")


@dataclass(frozen=True)
class Cell:
    """A row of the table: its name, and the settings that its runs share."""

    name: str
    config: TrainConfig

    def digest(self, seed: int) -> str:
        """Changes with every setting that the numbers depend on and that has not its default.

        So new settings leave it as it is. Of data's place only the last name counts.
        """
        config = replace(self.config, seed=seed, data=Path(self.config.data).name)
        defaults = {entry.name: entry.default for entry in fields(config)}
        kept = {
            key: value
            for key, value in config.to_dict().items()
            if key == "seed" or (key not in OF_ONE_RUN and value != defaults[key])
        }
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self, seed: int) -> str:
        """Name of the folder of a run."""
        words = "".join(sign if sign.isalnum() else "-" for sign in self.name)
        return f"{words}-seed{seed}-{self.digest(seed)}"


@dataclass(frozen=True)
class Study:
    """What is trained, over which seeds, and which rows others are compared with."""

    name: str
    title: str
    seeds: int
    against: tuple[str, ...]
    cells: tuple[Cell, ...]


def studies() -> dict[str, Any]:
    """The files of the studies that come with vitmix, by name."""
    found = sorted(files("vitmix.studies").iterdir(), key=lambda entry: entry.name)
    return {e.name.removesuffix(".yaml"): e for e in found if e.name.endswith(".yaml")}


def read_study(
    name: str, given: Mapping[str, Any] | None = None, only: Sequence[str] | None = None
) -> Study:
    """A study of vitmix by name, or one in a YAML file.

    Args:
        name: of a study, or a file.
        given: settings that replace those of the study in every cell.
        only: names of cells; all by default.

    Raises:
        InputError: no such study, or one that is not well formed; every cell is checked.
    """
    known = studies()
    if name not in known and not name.endswith((".yaml", ".yml")):
        raise InputError(
            f"expected a study ({', '.join(known)}) or a YAML file, got {name!r}"
            f"{suggest(name, known)}"
        )
    try:
        text = (known[name] if name in known else Path(name).expanduser()).read_text("utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"expected a study in {name}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"expected YAML in {name}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("cells"), dict):
        raise InputError(f"expected keys {', '.join(KEYS)} in {name}, with cells by name")
    for key in content:
        if key not in KEYS:
            raise InputError(
                f"expected keys {', '.join(KEYS)} in {name}, got {key!r}{suggest(str(key), KEYS)}"
            )
    cells = content["cells"]
    for cell in (*(only or ()), *content.get("against", ())):
        if cell not in cells:
            raise InputError(
                f"expected cells of {name}: {', '.join(cells)}, got {cell!r}{suggest(cell, cells)}"
            )
    chosen = [cell for cell in cells if only is None or cell in only]
    settings = dict(content.get("settings") or {})
    return Study(
        Path(name).stem,
        str(content.get("title", Path(name).stem)),
        int(content.get("seeds", 1)),
        tuple(cell for cell in content.get("against", ()) if cell in chosen),
        tuple(_cell(cell, settings | (cells[cell] or {}) | dict(given or {})) for cell in chosen),
    )


def _cell(name: str, settings: dict[str, Any]) -> Cell:
    known = [field.name for field in fields(TrainConfig)]
    for key in settings:
        if key not in known:
            raise InputError(
                f"expected settings of vitmix train in cell {name!r}, got {key!r}"
                f"{suggest(str(key), known)}"
            )
    config = TrainConfig.from_dict(settings_under(settings) | settings)
    config.validate()
    method_of(config)
    return Cell(str(name), config)


def paired(runs: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Differences seed by seed: their mean, deviation, 95% interval and two-sided t-test.

    Args:
        runs: a figure a seed.
        others: the same, of what it is compared with.

    Returns:
        ``mean``; with two seeds or more ``sd``, ``half_width`` of the interval, and ``p``, which is
        None where all differences are the same.

    Example:
        >>> found = paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
        >>> found["mean"], found["sd"], round(found["p"], 4)
        (2.0, 1.0, 0.0742)
    """
    differences = [one - other for one, other in zip(runs, others, strict=True)]
    count = len(differences)
    found: dict[str, Any] = {"mean": fmean(differences), "seeds": count}
    if count < 2:
        return found
    deviation = stdev(differences)
    found["sd"] = deviation
    found["half_width"] = float(stats.t.ppf(0.975, count - 1)) * deviation / sqrt(count)
    found["p"] = float(stats.ttest_rel(runs, others).pvalue) if deviation else None
    return found


def run_study(study: Study, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """Train the runs that are missing in a folder; write ``study.json`` and ``study.md``.

    Both are written anew after every run. Teachers of ``tokenmix`` with ``teacher: auto`` are the
    runs of a cell ``none`` with the same seed, where there is one.

    Args:
        study: the study.
        seeds: of every cell, seed by seed, so that a study that is stopped has whole tables.
        out: folder of the runs.

    Returns:
        A summary a cell.

    Raises:
        InputError: data or settings that do not fit.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[int, dict[str, Any]]] = {cell.name: {} for cell in study.cells}
    plain: dict[int, Path] = {}
    data: ImageData | None = None
    read_as = None
    order = [(seed, cell) for seed in seeds for cell in study.cells]
    for seed, cell in order:
        found = finished_results(out / cell.folder(seed))
        if found is not None:
            results[cell.name][seed] = found
    missing = len(order) - sum(map(len, results.values()))
    print(f"study   {study.name}: {len(order)} runs, {missing} to train, in {out}", flush=True)
    number = 0
    for seed, cell in sorted(order, key=lambda each: (each[0], each[1].name != "none")):
        folder = out / cell.folder(seed)
        if cell.name == "none":
            plain[seed] = folder
        if seed in results[cell.name]:
            continue
        number += 1
        if data is None or _reading(cell.config) != read_as:
            data, read_as = load_data(cell.config), _reading(cell.config)
        try:
            run = train_run(
                replace(cell.config, seed=seed, out=str(out), name=folder.name, overwrite=False),
                data=data,
                teacher_run=plain.get(seed),
                resume=folder if (folder / MARKER).is_file() else None,
                label=f"[{number}/{missing}] {cell.name} seed {seed}  ",
                verbose=False,
            )
        except Interrupted:
            raise Interrupted("the same command goes on") from None
        results[cell.name][seed] = run.results
        write_tables(study, results, out)
    return write_tables(study, results, out)


def _reading(config: TrainConfig) -> tuple[Any, ...]:
    """What the images in memory depend on."""
    names = (
        "data", "label_column", "test_split", "test_share", "val_share", "train_limit", "img_size",
        "crop_pct", "interpolation", "mean", "std", "teacher_maps",
    )  # fmt: skip
    return tuple(repr(getattr(config, name)) for name in names)


def write_tables(
    study: Study, results: Mapping[str, Mapping[int, dict[str, Any]]], out: Path
) -> list[dict[str, Any]]:
    """Write what there is so far; returns a summary a cell that has a run."""
    summaries = []
    for cell in study.cells:
        runs = results[cell.name]
        if not runs:
            continue
        row = summarise(cell.name, [runs[seed] for seed in sorted(runs)])
        row["against"] = {}
        for other in study.against:
            common = sorted(runs.keys() & results[other].keys())
            if other != cell.name and common:
                row["against"][other] = paired(
                    [runs[seed]["top1"] for seed in common],
                    [results[other][seed]["top1"] for seed in common],
                )
        row["folders"] = [cell.folder(seed) for seed in sorted(runs)]
        summaries.append(row)
    _write(study, summaries, out)
    return summaries


def _write(study: Study, summaries: Sequence[dict[str, Any]], out: Path) -> None:
    """Write both files, with the measures that lie in the folders of the runs."""
    for row in summaries:
        row["measures"] = {}
        for folder in row["folders"]:
            for key, value in _key_figures(_measured(out / folder)).items():
                row["measures"].setdefault(key, []).append(value)
    document = {
        "study": study.name, "title": study.title, "cells": summaries, "commit": commit(),
        "versions": versions(),
        "settings": {cell.name: cell.config.to_dict() for cell in study.cells},
    }  # fmt: skip
    write_json(out / "study.json", document)
    tables = [f"# {study.title}", as_markdown(*_table(study, summaries)), NOTE]
    keys = list(dict.fromkeys(key for row in summaries for key in row["measures"]))
    if keys:
        lines = [
            [row["method"], *(spread(row["measures"].get(key, [])) for key in keys)]
            for row in summaries
        ]
        tables.append(as_markdown(["cell", *keys], lines))
    write_text(out / "study.md", "\n\n".join(tables) + "\n")


def _measured(folder: Path) -> dict[str, Any]:
    """Measures of a run that were taken before."""
    path = folder / "evaluation.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def measure_runs(
    study: Study, summaries: Sequence[dict[str, Any]], out: Path, names: str, limit: int | None
) -> list[dict[str, Any]]:
    """Take measures of every run that has none yet; write their table behind the other one.

    Args:
        study: the study.
        summaries: of :func:`run_study`.
        out: folder of the runs.
        names: of measures, as for ``vitmix evaluate``.
        limit: take them on so many test images.

    Returns:
        The summaries, with ``measures`` of each cell: a list a figure, by the order of its seeds.
    """
    chosen = chosen_measures(names)
    for folder in (out / name for row in summaries for name in row["folders"]):
        before = [name for name in MEASURES if name in _measured(folder)]
        if not set(chosen) <= set(before):
            print(f"measure {folder.name}", flush=True)
            wanted = dict.fromkeys((*before, *chosen))  # the file is written anew
            evaluate_checkpoint(str(folder), measures=",".join(wanted), limit=limit)
    _write(study, summaries, out)
    return list(summaries)


def _key_figures(found: Mapping[str, Any]) -> dict[str, float]:
    """One figure of each measure, or a few; accuracies and shares in percent."""
    figures: dict[str, float] = {}
    if "calibration" in found:
        figures["calibration error %"] = 100 * found["calibration"]["ece"]
    if "occlusion" in found:
        shares = found["occlusion"]["shares"]
        for order, accuracy in found["occlusion"]["accuracy"].items():
            figures[f"half dropped, {order} %"] = 100 * accuracy[shares.index(0.5)]
    if "corruptions" in found:
        figures["corruptions %"] = 100 * found["corruptions"]["mean"]
    if "fgsm" in found:
        figures["FGSM 1/255 %"] = (
            100 * found["fgsm"]["accuracy"][found["fgsm"]["epsilons"].index(1.0)]
        )
    if "localisation" in found:
        figures["peak in box %"] = 100 * found["localisation"]["pointing"]
        figures["saliency in box %"] = 100 * found["localisation"]["share"]
    return figures


NOTE = (
    "Means and standard deviations over the seeds. Differences are those of runs with the same "
    "seed: mean ± half of the 95% interval, with the p-value of a paired t-test; (n.s.) where it "
    "is 0.05 or more, so that chance is a fair explanation. No correction for the number of rows."
)


def _table(study: Study, summaries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    head = ["cell", "seeds", "top-1 %", "top-5 %", "test loss"]
    head += [f"against {other}" for other in study.against]
    rows = []
    for row in summaries:
        cells = [row["method"], str(len(row["seeds"]))]
        for key, digits in (("top1", 2), ("top5", 2), ("loss", 3)):
            cells.append(spread(row[f"{key}_runs"], digits))
        cells += [_difference(row["against"].get(other)) for other in study.against]
        rows.append(cells)
    return head, rows


def _difference(found: dict[str, Any] | None) -> str:
    """A paired difference, for people.

    >>> _difference({"mean": 1.0, "seeds": 1}), _difference(paired([1.0, 1.5], [0.0, 1.0]))
    ('+1.00', '+0.75 ± 3.18, p 0.205 (n.s.)')
    """
    if found is None:
        return ""
    text = f"{found['mean']:+.2f}"
    if found["seeds"] < 2:
        return text
    text += f" ± {found['half_width']:.2f}"
    if found["p"] is None:
        return text
    return f"{text}, p {found['p']:.3f}{' (n.s.)' if found['p'] >= 0.05 else ''}"


def show(study: Study, summaries: Sequence[dict[str, Any]]) -> str:
    """The table for a terminal."""
    return as_text(*_table(study, summaries))
