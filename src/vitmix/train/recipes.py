"""Recipes: settings by name, what they reproduce, what is published and what is inferred.

Each file of ``vitmix/recipes`` holds several. A recipe names a ``base`` that it takes settings and
notes from; a name with ``_`` in front is there only to be one.
"""

from __future__ import annotations

import importlib.resources
from copy import deepcopy
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import cache
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.train.config import TrainConfig, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Recipe",
    "all_recipes",
    "as_page",
    "as_table",
    "find_recipes",
    "get_recipe",
    "settings_under",
]

# Classes and side of an image of the data sets that recipes are for.
SHAPES = {"CIFAR-10": (10, 32), "CIFAR-100": (100, 32), "ImageNet-1k": (1000, 224)}


# Settings of a recipe that have no meaning beside another choice.
REPLACED = {
    "teacher_maps": ("teacher",),
    "crop_padding": ("scale",),
    "opt": ("opt_kwargs",),
    "model": ("model_kwargs",),
    "init": ("pretrained",),
    "mix": ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
}

_INTRODUCTION = """# Recipes

Settings for every row that the three papers train, by name, and for some of our own.

```sh
vitmix recipes cifar100                        # list those with this in their name
vitmix recipes cct7-cifar100-tokenmixup        # show one: its settings and where they come from
vitmix train --recipe cct7-cifar100-tokenmixup --data PATH
vitmix train --recipe cct7-cifar100-tokenmixup --data fake --max-steps 2    # a dry run
```

Options, and keys of a `--config` file, change single settings of a recipe; another `--method`
replaces its method as a whole, and `--mix` its pixel mixes. The figures are the papers', to
compare with: vitmix follows the papers where their released codes depart from them, and has not
trained these recipes to the end.

This page is written by `vitmix recipes --markdown > docs/recipes.md`.
"""


@dataclass(frozen=True)
class Recipe:
    """Settings of a run with their origin.

    Attributes:
        name: what the user types.
        section: heading that it stands under.
        title: what it trains.
        data: data set that it is for.
        paper: where it comes from.
        source: table of the paper with the figure to compare with.
        top1: that figure, in percent; None where none is published.
        published: settings that the paper or its released code states.
        inferred: settings that they do not state, and where we depart from them.
        settings: values of :class:`vitmix.train.config.TrainConfig`.
    """

    name: str
    section: str
    title: str
    data: str
    paper: str
    source: str
    top1: float | None
    published: tuple[str, ...]
    inferred: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def reference(self) -> str:
        """The figure to compare with, and where it stands.

        >>> get_recipe("cct7-cifar100-tokenmixup").reference
        '83.57 (TokenMixup, Tables 1 and 5)'
        """
        if self.top1 is None:
            return self.source
        return f"{self.top1:.2f} ({self.paper}, {self.source})"

    def fake_data(self) -> str:
        """Random images of the shape of the data, for a dry run.

        >>> get_recipe("cct7-cifar100").fake_data()
        'fake:100x32'
        """
        classes, side = SHAPES[self.data]
        return f"fake:{classes}x{side}"

    def as_yaml(self) -> str:
        """The settings as a file for ``--config``, with the notes as comments."""
        import yaml

        lines = [f"{self.name}: {self.title}", f"data: {self.data}"]
        lines += [f"top-1 to compare with: {self.reference}"]
        for word, notes in (("published", self.published), ("inferred", self.inferred)):
            lines += [f"{word}:", *(f"  - {note}" for note in notes)] if notes else []
        header = "".join(f"# {line}\n" for line in lines)
        settings = {"recipe": self.name, **self.settings}
        return header + yaml.dump(settings, Dumper=_plain_dumper(), sort_keys=False)


def _plain_dumper() -> Any:
    """A dumper that writes shared values out instead of naming them."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Plain


@cache
def all_recipes() -> Mapping[str, Recipe]:
    """Every recipe by its name, in the order of the files."""
    import yaml

    entries: dict[str, dict[str, Any]] = {}
    folder = importlib.resources.files("vitmix").joinpath("recipes")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            entries |= yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: _resolve(name, entries) for name in entries if not name.startswith("_")}


def _resolve(name: str, entries: dict[str, dict[str, Any]]) -> Recipe:
    """A recipe with everything that it has from its bases."""
    chain: list[dict[str, Any]] = []
    above = name
    while above:
        chain.insert(0, entries[above])
        above = chain[0].get("base", "")
    settings: dict[str, Any] = {}
    for entry in chain:
        settings |= entry.get("settings", {})

    def latest(key: str) -> Any:
        return next((entry[key] for entry in reversed(chain) if key in entry), "")

    def collected(key: str) -> tuple[str, ...]:
        return tuple(note for entry in chain for note in entry.get(key, ()))

    own = entries[name]
    return Recipe(
        name=name,
        section=latest("section"),
        title=own["title"],
        data=latest("data"),
        paper=latest("paper"),
        source=own["source"],
        top1=own.get("top1"),
        published=collected("published"),
        inferred=collected("inferred"),
        settings=settings,
    )


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    recipes = all_recipes()
    if name not in recipes:
        raise InputError(
            f"expected --recipe to be a recipe, got {name!r}{suggest(name, recipes)}; "
            "vitmix recipes lists them"
        )
    return recipes[name]


def find_recipes(pattern: str | None) -> list[Recipe]:
    """Recipes whose name holds the pattern, or fits it where it has ``*`` or ``?``.

    Raises:
        InputError: none does; the message names the nearest.
    """
    recipes = all_recipes()
    wild = pattern is not None and any(sign in pattern for sign in "*?[")
    shape = pattern if wild else f"*{pattern or ''}*"
    found = [recipe for name, recipe in recipes.items() if fnmatch(name, str(shape).lower())]
    if not found:
        raise InputError(
            f"expected a part of a recipe's name, got {pattern!r}"
            f"{suggest(str(pattern), recipes)}; vitmix recipes lists them"
        )
    return found


def settings_under(given: Mapping[str, Any], *, whole_method: bool = False) -> dict[str, Any]:
    """What the recipe in ``given`` sets, to be overridden by everything else in ``given``.

    Another method replaces the recipe's as a whole; so do other choices that go with what the
    recipe sets beside them.

    Args:
        given: what the user chose in files and options.
        whole_method: leave the recipe's method out whatever the user chose.

    Raises:
        InputError: there is no such recipe.
    """
    if given.get("recipe") is None:
        return {}
    recipe = get_recipe(given["recipe"])
    left_out = {name for choice, names in REPLACED.items() if choice in given for name in names}
    if whole_method or "method" in given:
        left_out |= {e.name for e in fields(TrainConfig) if e.metadata["group"] == "Method"}
    return deepcopy({key: val for key, val in recipe.settings.items() if key not in left_out})


def as_table(recipes: Sequence[Recipe]) -> str:
    """Names, models, data and published figures in columns."""
    rows = [("recipe", "model", "data", "top-1", "what")]
    rows += [
        (
            recipe.name,
            str(recipe.settings["model"]).partition(".")[0],
            recipe.data,
            "-" if recipe.top1 is None else f"{recipe.top1:.2f}",
            recipe.title,
        )
        for recipe in recipes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) + "\n"
        for row in rows
    )


def as_page() -> str:
    """A Markdown page with every recipe: ``docs/recipes.md``."""
    lines = [_INTRODUCTION]
    sections: dict[str, list[Recipe]] = {}
    for recipe in all_recipes().values():
        sections.setdefault(recipe.section, []).append(recipe)
    for section, recipes in sections.items():
        lines += [f"## {section}", "", "| recipe | what | model | top-1 % to compare with |"]
        lines += ["| --- | --- | --- | --- |"]
        for r in recipes:
            lines += [f"| `{r.name}` | {r.title} | `{r.settings['model']}` | {r.reference} |"]
        for word, heading in (("published", "Published"), ("inferred", "Inferred, and departures")):
            lines += ["", f"{heading}:", ""]
            for note, names in _notes(recipes, word).items():
                whose = f" ({', '.join(names)})" if len(names) < len(recipes) else ""
                lines += [f"- {note}{whose}"]
        lines += [""]
    return "\n".join(lines)


def _notes(recipes: Sequence[Recipe], word: str) -> dict[str, list[str]]:
    """Each note once, with the recipes that it is about."""
    notes: dict[str, list[str]] = {}
    for recipe in recipes:
        for note in getattr(recipe, word):
            notes.setdefault(note, []).append(f"`{recipe.name}`")
    return notes
