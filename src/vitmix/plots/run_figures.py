"""Figures beside the results of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitmix.plots.curves import learning_curves, mixing_curves, read_metrics
from vitmix.plots.examples import collect_examples, examples_figure
from vitmix.plots.style import LIGHT, themed
from vitmix.train.folder import replacing
from vitmix.train.methods import method_name

if TYPE_CHECKING:
    from pathlib import Path

    from vitmix.train.run import RunResult

__all__ = ["save_run_figures"]


def save_run_figures(run: RunResult) -> list[Path]:
    """Write ``curves.png``, and where the method has them ``mixing.png`` and ``examples.png``."""
    name = method_name(run.task.config)
    metrics = read_metrics(run.folder)
    with themed(LIGHT):
        figures = {"curves": learning_curves({name: [metrics]})}
        mixing = mixing_curves({name: metrics})
        if mixing is not None:
            figures["mixing"] = mixing
        examples = collect_examples(run.task, run.data)
        if examples:
            figures["examples"] = examples_figure(examples, LIGHT, name)
        paths = []
        for stem, figure in figures.items():
            paths.append(run.folder / f"{stem}.png")
            with replacing(paths[-1]) as temporary:
                figure.savefig(temporary, dpi=160)
    return paths
