"""What a study is: settings that all cells share, what each cell changes, seeds.

``vitmix study`` reads one from a YAML file. Each run has a name made of its cell, its seed and a
digest of everything that its numbers depend on, so that a run that is there is known as such.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vitmix.errors import InputError
from vitmix.evaluate.runs import OF_ONE_RUN
from vitmix.options import Parser
from vitmix.train.config import TrainConfig, suggest
from vitmix.train.methods import method_of, unused_options
from vitmix.train.recipes import settings_under
from vitmix.train.transfer import with_model

__all__ = ["Cell", "Study", "read_study", "studies"]

KEYS = ("title", "seeds", "against", "settings", "cells")


@dataclass(frozen=True)
class Cell:
    """A row of the table: its name, and the settings that its runs share."""

    name: str
    config: TrainConfig

    def digest(self, seed: int) -> str:
        """Changes with every setting that the numbers depend on and that has not its default.

        So new settings leave it as it is. Of data's place only the last name counts; of a method
        in a file also what the file says.
        """
        config = replace(self.config, seed=seed, data=Path(self.config.data).name)
        defaults = {entry.name: entry.default for entry in fields(config)}
        kept = {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in config.to_dict().items()
            if key == "seed" or (key not in OF_ONE_RUN and value != defaults[key])
        }
        if config.method.endswith((".yaml", ".yml")):
            kept["stages"] = repr(method_of(config))
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
        given: settings that replace those of the study. What a cell sets itself stays, and a cell
            whose method has no use for one does without it.
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"expected YAML in {name}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("cells"), dict):
        raise InputError(f"expected keys {', '.join(KEYS)} in {name}, with cells by name")
    for key in content:
        if key not in KEYS:
            raise InputError(
                f"expected keys {', '.join(KEYS)} in {name}, got {key!r}{suggest(str(key), KEYS)}"
            )
    cells = {str(cell): own for cell, own in content["cells"].items()}
    if not cells:
        raise InputError(f"expected cells in {name}, got none")
    named = content.get("against") or []
    against = tuple(map(str, named if isinstance(named, list) else [named]))
    for cell in (*(only or ()), *against):
        if cell not in cells:
            raise InputError(
                f"expected cells of {name}: {', '.join(cells)}, got {cell!r}{suggest(cell, cells)}"
            )
    chosen = [cell for cell in cells if only is None or cell in only]
    seeds = content.get("seeds", 1)
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"expected `seeds` in {name} as a number of seeds, got {seeds!r}")
    shared = _typed(content.get("settings"), f"`settings` in {name}")
    return Study(
        Path(name).stem,
        str(content.get("title", Path(name).stem)),
        seeds,
        tuple(cell for cell in against if cell in chosen),
        tuple(
            _cell(cell, shared, dict(given or {}), _typed(cells[cell], f"cell {cell!r}"))
            for cell in chosen
        ),
    )


@cache
def _parser() -> Parser:
    """Of the options of vitmix train, whose types the settings of cells have."""
    parser = Parser("vitmix train", "settings", "")
    parser.add_config(TrainConfig)
    return parser


def _typed(settings: Any, where: str) -> dict[str, Any]:
    """Settings of vitmix train as their types say."""
    if not isinstance(settings or {}, dict):
        raise InputError(f"expected settings of vitmix train in {where}, got {settings!r}")
    known = [field.name for field in fields(TrainConfig)]
    for key in settings or {}:
        if key not in known:
            raise InputError(
                f"expected settings of vitmix train in {where}, got {key!r}"
                f"{suggest(str(key), known)}"
            )
    try:
        return _parser().typed(settings or {})
    except InputError as error:
        raise InputError(f"{error}, in {where}") from error


def _cell(name: str, shared: dict[str, Any], given: dict[str, Any], own: dict[str, Any]) -> Cell:
    """A row: what all share, what the user gave instead, and what it is about itself."""
    settings = shared | given | own
    # A recipe of the user's is what rows are compared under, not one of the methods compared.
    beneath = settings_under(settings, whole_method="recipe" in given and "recipe" not in own)
    config = TrainConfig.from_dict(with_model(beneath | settings))
    config.validate()
    spec = method_of(config)
    stages = (*spec.mix, *spec.tokens)
    idle = {*unused_options(spec), *(key for part in stages for key in part.args)}
    return Cell(name, config.without(idle & given.keys() - own.keys()))
