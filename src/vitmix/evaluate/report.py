"""One page about finished runs: what was trained, how well, on what, and what went wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from vitmix.errors import InputError
from vitmix.evaluate.runs import OF_ONE_RUN, differences, find_runs, in_plain, sort_runs, words
from vitmix.evaluate.table import best_row, header, summarise, table_rows
from vitmix.plots.curves import (
    LEARNING_PANELS,
    MIXING_PANELS,
    learning_curves,
    mixing_curves,
)
from vitmix.plots.report import Page, Picture, Section, Table, draw, photograph, write_page
from vitmix.train.config import TrainConfig
from vitmix.train.methods import in_words, method_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from vitmix.evaluate.runs import Kind, Run
    from vitmix.plots.style import Theme

__all__ = ["write_report"]

EPOCHS = 4  # with a picture, a kind of run
PICTURES = 3_000_000  # characters of all pictures of mixed samples together
WORST = 10  # classes


def write_report(
    folders: Sequence[Path], path: Path, *, title: str = "", command: str = ""
) -> Path:
    """Write one HTML file about the runs; returns its path.

    Args:
        folders: of finished runs, or of comparisons, which stand for all of theirs.
        path: the file to write.
        title: heading.
        command: what the page says the runs were made by.

    Raises:
        InputError: a folder is no finished run, or the file cannot be written.
    """
    if path.suffix not in (".html", ".htm") or path.is_dir():
        raise InputError(f"expected --out to be an HTML file, such as report.html, got {path}")
    runs = [run for folder in folders for run in find_runs(folder)]
    if not runs:
        raise InputError("expected folders of finished runs, got none")
    kinds = sort_runs(list({run.folder.resolve(): run for run in runs}.values()))
    page = Page(title or _title(kinds), _summary(kinds), _sections(kinds, command))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    return path


def _title(kinds: Sequence[Kind]) -> str:
    data = ", ".join(dict.fromkeys(Path(kind.first.config.data).name for kind in kinds))
    if len(kinds) == 1:
        return f"{kinds[0].name} on {data}"
    different = len({kind.first.results["method"] for kind in kinds}) == len(kinds)
    return f"{len(kinds)} {'ways of mixing' if different else 'kinds of run'} on {data}"


def _summary(kinds: Sequence[Kind]) -> str:
    """What was trained on what, and how large a difference may be chance."""

    def all_of(key: str) -> str:
        return " or ".join(dict.fromkeys(str(kind.first.results[key]) for kind in kinds))

    counts = sorted({len(kind.runs) for kind in kinds})
    seeds = "one seed" if counts == [1] else f"{' or '.join(map(str, counts))} seeds each"
    share = min(max(run.results["top1"] for kind in kinds for run in kind.runs) / 100, 0.99)
    tests = min(sum(run.results["test_images"] for run in kind.runs) for kind in kinds)
    chance = 100 * 2 * (2 * share * (1 - share) / tests) ** 0.5
    text = (
        f"{all_of('model')} trained for {all_of('epochs')} epochs on {all_of('train_images')} "
        f"images, tested on {all_of('test_images')}; {seeds}. Figures are those of the last epoch."
    )
    if len(kinds) > 1:
        text += (
            f" With so many test images, differences up to about {chance:.1f} points may be chance."
        )
    return text


def _sections(kinds: Sequence[Kind], command: str) -> list[Section]:
    found = [
        _results(kinds),
        _settings_apart(kinds),
        _learning(kinds),
        _mixing(kinds),
        _previews(kinds),
        _confusions(kinds),
        Section("Do it again", code=command) if command else None,
        _settings(kinds),
    ]
    return [section for section in found if section is not None]


def _results(kinds: Sequence[Kind]) -> Section:
    summaries = [summarise(kind.name, [run.results for run in kind.runs]) for kind in kinds]
    best = best_row(summaries) if len(kinds) > 1 else None
    head = ["run", "method", "seed", "top-1 %", "best top-1 %", "test loss", "time", "images/s"]
    rows = [
        [
            run.folder.name, kind.name, str(run.results["seed"]), f"{run.results['top1']:.2f}",
            f"{run.results['best_top1']:.2f} (epoch {run.results['best_epoch']})",
            f"{run.results['loss']:.3f}", f"{run.results['seconds']:.0f} s",
            f"{run.results['images_per_second']:.0f}",
        ]
        for kind in kinds
        for run in kind.runs
    ]  # fmt: skip
    spread = any(len(kind.runs) > 1 for kind in kinds)
    text = "Mean ± standard deviation over the seeds (of a sample, n - 1)." if spread else ""
    every = Section("Every run", tables=[Table(head, rows)], folded=True)
    table = Table(header(summaries), table_rows(summaries), best=best)
    return Section("Results", text, [table], parts=[every])


def _settings_apart(kinds: Sequence[Kind]) -> Section | None:
    """Settings, machines and versions in which the kinds differ."""
    if len(kinds) == 1:
        return None
    columns = [kind.first.config.to_dict() for kind in kinds]
    rows = [
        [words(key), *(in_plain(column[key]) for column in columns)]
        for key in differences([kind.first for kind in kinds])
    ]
    origins = [_origin(kind.first) for kind in kinds]
    for key in dict.fromkeys(key for origin in origins for key in origin):
        values = [origin.get(key, "unknown") for origin in origins]
        if len(set(values)) > 1:
            rows.append([key, *values])
    table = Table(["setting", *(kind.name for kind in kinds)], rows, words=True)
    return Section("What differs", "Everything else is the same in all of them.", [table])


def _origin(run: Run) -> dict[str, str]:
    return {
        "parameters": f"{run.results['parameters']:,}",
        "device": run.results["device"],
        "commit of vitmix": run.results["commit"] or "not in a repository",
        **run.results["versions"],
    }


def _learning(kinds: Sequence[Kind]) -> Section:
    metrics = {kind.name: [run.metrics for run in kind.runs] for kind in kinds}
    text = (
        "Test accuracy is measured on images as they are. The training loss is that of the "
        "mixed images against mixed targets, so it stays higher the more is mixed."
    )
    if any(len(kind.runs) > 1 for kind in kinds):
        text += " Bands show the range over the seeds."

    def make(panels: dict[str, str], theme: Theme) -> Figure:
        return learning_curves(metrics, panels)

    pictures = [
        draw(partial(make, {key: title}), f"{title} by epoch")
        for key, title in LEARNING_PANELS.items()
    ]
    return Section("Learning curves", text, pictures=pictures)


def _mixing(kinds: Sequence[Kind]) -> Section | None:
    metrics = {kind.name: kind.first.metrics for kind in kinds}
    if mixing_curves(metrics) is None:
        return None

    def make(panels: dict[str, str], theme: Theme) -> Figure:
        figure = mixing_curves(metrics, panels)
        assert figure is not None
        return figure

    return Section(
        "What TokenMixup mixes",
        "ScoreNet lets a sample be mixed once the model finds it easy, so the number of mixed "
        "samples rises as the model learns. Replaced tokens are those that a partner shows more "
        "saliently.",
        pictures=[
            draw(partial(make, {key: title}), f"{title} by step")
            for key, title in MIXING_PANELS.items()
        ],
    )


def _previews(kinds: Sequence[Kind]) -> Section | None:
    """The pictures that the first run of each kind has kept, of as many epochs as there is room."""
    for count in range(EPOCHS, 0, -1):
        shown = {kind.name: _photographs(kind.first, count) for kind in kinds}
        if sum(len(p.light) for pictures in shown.values() for p in pictures) <= PICTURES:
            break
    parts = [
        Section(kind.name, _explain(kind.first.config), pictures=shown[kind.name])
        for kind in kinds
        if shown[kind.name]
    ]
    if not parts:
        return None
    text = (
        "Samples of training batches, as they were mixed. The image itself is blue, its partner "
        "orange and hatched: in the frames, in the mask, and in the target that the model is "
        "trained towards. Replaced tokens are shown as the image patches they stand for."
    )
    return Section("What was mixed", text, parts=parts)


def _photographs(run: Run, count: int) -> list[Picture]:
    """Pictures of the first and the last epoch that has one, and of some between."""
    files = sorted((run.folder / "images").glob("epoch-*[0-9].png"))  # not what a kill left over
    if len(files) > count:
        files = [files[round(place)] for place in np.linspace(len(files) - 1, 0, count)[::-1]]
    return [
        photograph(
            path,
            "Original, partner, mask, mixed image and target of some samples in epoch "
            f"{int(path.stem.rpartition('-')[2])}",
        )
        for path in files
    ]


def _explain(config: TrainConfig) -> str:
    try:
        return in_words(method_of(config))
    except InputError:  # the method was a file that is gone
        return ""


def _confusions(kinds: Sequence[Kind]) -> Section | None:
    """The classes that are recognised worst, and what they are taken for."""
    known = [(kind, kind.predictions) for kind in kinds]
    right = {
        kind.name: _accuracies(predictions)
        for kind, predictions in known
        if predictions is not None
    }
    if not right:
        return None
    parts = []
    for kind, predictions in known:
        if predictions is not None:
            own = right[kind.name]
            worst = sorted(own, key=lambda name: own[name])[:WORST]
            rows = [[name, f"{own[name]:.1f}", _mistaken(predictions, name)] for name in worst]
            table = Table(["class", "right %", "taken for"], rows, words=True)
            parts.append(Section(kind.name, tables=[table], folded=len(right) > 1))
    tables = []
    names = set.intersection(*(set(own) for own in right.values()))
    if len(right) > 1 and names:
        mean = {name: fmean(own[name] for own in right.values()) for name in sorted(names)}
        rows = [
            [name, *(f"{own[name]:.1f}" for own in right.values())]
            for name in sorted(mean, key=lambda name: mean[name])[:WORST]
        ]
        tables.append(Table(["class", *right], rows, "Right, in % of the class's test images"))
    text = "Classes that are recognised least often after the last epoch, over all seeds."
    return Section("The worst classes", text, tables, parts=parts)


def _accuracies(predictions: tuple[np.ndarray, np.ndarray, list[str]]) -> dict[str, float]:
    """Percentage of right predictions of every class that has test images."""
    labels, predicted, classes = predictions
    total = np.bincount(labels, minlength=len(classes))
    hits = np.bincount(labels[labels == predicted], minlength=len(classes))
    return {
        name: 100 * float(hit) / float(count)
        for name, hit, count in zip(classes, hits, total, strict=True)
        if count
    }


def _mistaken(predictions: tuple[np.ndarray, np.ndarray, list[str]], name: str) -> str:
    """The three classes that images of this one are most often taken for."""
    labels, predicted, classes = predictions
    label = classes.index(name)
    mine = predicted[labels == label]
    counts = Counter(mine[mine != label].tolist()).most_common(3)
    if not counts:
        return "never wrong"
    return ", ".join(f"{classes[other]} ({100 * n / len(mine):.1f}%)" for other, n in counts)


def _settings(kinds: Sequence[Kind]) -> Section:
    """What all kinds share: the settings by group, machine and versions."""
    different = {*differences([kind.first for kind in kinds]), *OF_ONE_RUN}
    config = kinds[0].first.config
    groups: dict[str, dict[str, str]] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name not in different and value is not None:
            groups.setdefault(entry.metadata["group"], {})[words(entry.name)] = in_plain(value)
    origins = [_origin(kind.first) for kind in kinds]
    groups["Origin"] = {
        key: value for key, value in origins[0].items()
        if all(origin.get(key) == value for origin in origins)
    }  # fmt: skip
    parts = [Section(name, facts=facts) for name, facts in groups.items() if facts]
    return Section("All settings", parts=parts, folded=True)
