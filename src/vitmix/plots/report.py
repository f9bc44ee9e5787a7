"""One HTML page that needs no other file: tables, curves, pictures, for light and dark screens."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from vitmix.plots.style import DARK, LIGHT, Theme, themed
from vitmix.train.folder import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["Page", "Picture", "Section", "Table", "draw", "photograph", "write_page"]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows, the others hold figures unless ``words``."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    best: int | None = None  # row with the highest figure
    words: bool = False  # columns of text, aligned to the left


@dataclass(frozen=True)
class Picture:
    """A picture as ``data:`` addresses; without ``dark`` it lies on white paper."""

    light: str
    words: str  # what can be seen, for those who don't see it
    dark: str | None = None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with text, tables, pictures or facts below; ``folded`` until a reader opens it."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    facts: dict[str, str] = field(default_factory=dict)
    parts: Sequence[Section] = ()
    code: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Page:
    """The content of a report, from top to bottom."""

    title: str
    summary: str
    sections: Sequence[Section]


def write_page(page: Page, path: Path) -> None:
    """Write the page with all its pictures inside."""
    environment = Environment(
        loader=PackageLoader("vitmix.plots", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template("report.html").render(page=page))


def draw(make: Callable[[Theme], Figure], words: str, caption: str = "") -> Picture:
    """A figure as vectors, drawn once for each theme."""
    return Picture(_vectors(make, LIGHT), words, _vectors(make, DARK), caption)


def _vectors(make: Callable[[Theme], Figure], theme: Theme) -> str:
    buffer = io.BytesIO()
    with themed(theme):
        make(theme).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _address("svg+xml", buffer)


def photograph(path: Path, words: str, caption: str = "", width: int = 768) -> Picture:
    """A picture file, packed tightly and no wider than ``width`` pixels."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((width, image.height))
        image.convert("RGB").save(buffer, "WEBP", quality=80)
    return Picture(_address("webp", buffer), words, caption=caption)


def _address(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
