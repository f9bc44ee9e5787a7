"""One HTML page that needs no other file: table, curves, pictures of what was mixed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vitmix.plots.style import DARK, LIGHT, Theme, themed
from vitmix.train.folder import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["Page", "Picture", "write_page"]

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #5b6570;
  --line: #d5d9de; --band: #f3f5f7; --accent: #0067a3; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --ink: #e6e8ea;
  --soft: #a3adb7; --line: #3a4149; --band: #1e2329; --accent: #6cbcf0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
p { max-width: 44rem; margin: 0.4rem 0 0.8rem; }
.soft, figcaption, footer { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 24rem;
  width: 100%; }
th, td { padding: 0.45rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 0.88rem; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
tr.best td { font-weight: 700; }
tr.best td:first-child::after { content: " (highest)"; font-weight: 400; color: var(--soft); }
figure { margin: 0.8rem 0; }
img { display: block; width: 100%; height: auto; }
.grid { display: grid; gap: 1.4rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
@media (max-width: 26rem) { .grid { grid-template-columns: 1fr; } }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.86em; }
pre { background: var(--band); padding: 0.7rem 0.9rem; border-radius: 6px; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0.5rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 0.8rem; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure, drawn once for each theme when the page is written."""

    draw: Callable[[Theme], Figure]
    words: str  # what can be seen, for those who don't see it
    caption: str = ""
    vector: bool = True


@dataclass
class Page:
    """The content of a report, from top to bottom."""

    title: str
    summary: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None  # row with the highest figure
    curves: list[tuple[str, str, list[Picture]]] = field(default_factory=list)  # title, text, ...
    mixed: list[Picture] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    command: str = ""


def write_page(page: Page, path: Path) -> None:
    """Write the page with all its pictures inside."""
    text = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(page.title)}</title><style>{STYLE}</style></head><body><main>",
        f"<h1>{text(page.title)}</h1><p class=soft>{text(page.summary)}</p>",
        _table(page),
    ]
    for title, words, pictures in page.curves:
        figures = "".join(_figure(picture) for picture in pictures)
        parts.append(f"<h2>{text(title)}</h2><p>{text(words)}</p>")
        parts.append(f"<div class=grid>{figures}</div>")
    if page.mixed:
        parts.append(
            "<h2>What was mixed</h2><p>Blue is the image itself, orange its partner: in the "
            "frames, in the mask, and in the target that the model is trained towards.</p>"
            "<div class=grid>"
        )
        parts += [_figure(picture) for picture in page.mixed]
        parts.append("</div>")
    if page.command:
        parts.append(f"<h2>Do it again</h2><pre>{text(page.command)}</pre>")
    if page.facts:
        parts.append("<h2>Settings</h2><dl>")
        parts += [
            f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in page.facts.items()
        ]
        parts.append("</dl>")
    parts.append("<footer>Written by vitmix.</footer></main></body></html>")
    write_text(path, "\n".join(parts))


def _table(page: Page) -> str:
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in page.header)
    body = []
    for index, row in enumerate(page.rows):
        mark = " class=best" if index == page.best else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr{mark}>{cells}</tr>")
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(picture: Picture) -> str:
    light, dark = _encode(picture, LIGHT), _encode(picture, DARK)
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.words)}">'
        f"</picture>{caption}</figure>"
    )


def _encode(picture: Picture, theme: Theme) -> str:
    buffer = io.BytesIO()
    kind = "svg+xml" if picture.vector else "png"
    with themed(theme):
        figure = picture.draw(theme)
        figure.savefig(
            buffer, format="svg" if picture.vector else "png", dpi=150, transparent=True,
            metadata={"Date": None} if picture.vector else None,
        )  # fmt: skip
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
