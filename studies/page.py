"""Write the tables and figures of docs/study.md: ``python studies/page.py``.

They are made from the stored results. Nothing is trained and no checkpoint is read, so any machine
makes the same page. What stands above the mark in it is written by hand and stays.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vitmix.cli import COMMANDS
from vitmix.evaluate.compare import parse_seeds
from vitmix.evaluate.study import Study, read_study
from vitmix.evaluate.study_results import Runs, find_runs_of
from vitmix.evaluate.study_tables import NOTE, ROUNDED, as_tables, paired, summaries_of
from vitmix.evaluate.table import as_markdown
from vitmix.options import Parser
from vitmix.plots.study import save_study_figures
from vitmix.train.config import TrainConfig

__all__ = ["COMMANDS_OF_STUDIES", "Section", "make_page", "read_section"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "study.md"
IMAGES = ROOT / "docs" / "images"
MARK = "<!-- below this line: written by python studies/page.py -->"

# Folders of data may lie anywhere; their last name is a part of the runs' names.
COMMANDS_OF_STUDIES = (
    "vitmix study digits --results results/digits",
    "vitmix study studies/mask-digits.yaml --out runs/digits --results results/digits",
    "vitmix study studies/tau-digits.yaml --out runs/digits --results results/digits",
    "vitmix study localisation --data path/to/tiny-imagenet-20 --results results/localisation",
    "vitmix study cifar10-few --data path/to/cifar10-5k --results results/cifar10-few",
    "vitmix study studies/mask-cifar10-few.yaml --data path/to/cifar10-5k "
    "--out runs/cifar10-few --results results/cifar10-few",
    "vitmix study cifar100-gpu --data path/to/cifar100 --jobs 7 --results results/cifar100-gpu",
)
IN_WORDS = {
    "occlusion": "Top-1 against the share of dropped patches, a line a cell",
    "corruptions": "Top-1 against the severity of common corruptions, a line a cell",
    "calibration": "Reliability diagram, and expected calibration error with a dot a seed",
    "fgsm": "Top-1 against the size of one adversarial step, a line a cell",
    "localisation": "Attention against the object's box, a bar a cell with a dot a seed",
}
LEVEL = 0.05
LEAST = 3  # seeds for a sentence about a row


@dataclass(frozen=True)
class Section:
    """A study of the page, with the results that are stored of it."""

    command: str
    store: str
    study: Study
    seeds: list[int]
    results: Runs

    @property
    def name(self) -> str:
        """First part of the names of its figures."""
        return f"study-{self.study.name}"

    @property
    def measures(self) -> dict[str, list[dict[str, Any]]]:
        """By cell, what was measured of its runs."""
        return {
            cell: [run["measures"] for run in runs.values()] for cell, runs in self.results.items()
        }

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All that have finished."""
        return [run for runs in self.results.values() for run in runs.values()]


def read_section(command: str) -> Section:
    """The study that a command trains, and what is stored of it."""
    _, name, *arguments = shlex.split(command)
    parser = Parser(f"vitmix {name}", COMMANDS[name].summary, COMMANDS[name].example)
    COMMANDS[name].configure(parser)
    options = parser.parse(arguments)
    known = {field.name for field in fields(TrainConfig)} - {"out", "seed"}
    given = {key: value for key, value in options.items() if key in known}
    file = options["study"]
    study = read_study(str(ROOT / file) if file.endswith(".yaml") else file, given)
    seeds = parse_seeds(options["seeds"] or str(study.seeds), 0)
    results = find_runs_of(study, seeds, None, ROOT / options["results"])
    return Section(command, options["results"], study, seeds, results)


def make_page(sections: list[Section]) -> str:
    """The part of the page below the mark."""
    parts = [MARK, f"{NOTE} The sentences above the tables say what holds after Holm's."]
    for section in sections:
        parts += [f"## {section.study.title}", f"```sh\n{_folded(section.command)}\n```"]
        parts.append(_origin(section))
        if not section.runs:
            continue
        first, *others = as_tables(
            section.study, summaries_of(section.study, section.results), len(section.seeds)
        )
        of_masks = "released mask" in section.results
        parts += [*(_mask_table(section) if of_masks else _findings(section)), first]
        if others:
            parts += [_measured_on(section), *others]
            parts += [
                f"![{words}: {section.study.title}](images/{section.name}-{measure}.png)"
                for measure, words in IN_WORDS.items()
                if any(measure in run["measures"] for run in section.runs)
            ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _folded(command: str) -> str:
    """A long command over two lines."""
    head, _, rest = command.partition(" --")
    return command if len(command) < 90 else f"{head} \\\n    --{rest}"


def _origin(section: Section) -> str:
    """Seeds, how many runs have finished, and where these come from."""
    count = len(section.seeds) * len(section.study.cells)
    seeds = ", ".join(map(str, section.seeds))
    runs = section.runs
    text = f"Seeds {seeds}; {len(runs)} of {count} runs have finished, a file each in "
    text += f"`{section.store}`."
    if len(runs) < count:
        waiting = [
            f"{cell} ({len(section.seeds) - len(found)})"
            for cell, found in section.results.items()
            if len(found) < len(section.seeds)
        ]
        text += (
            " **The others wait** and are trained by the same command, with the number of runs of "
            f"each cell: {', '.join(waiting)}."
        )
    if runs:
        hours = sum(run["seconds"] for run in runs) / 3600
        text += (
            f" {runs[0]['train_images']} training and {runs[0]['test_images']} test images "
            f"(fingerprint {_all(runs, 'data_fingerprint')}); {_all(runs, 'device')}; "
            f"torch {', '.join(sorted({run['versions']['torch'] for run in runs}))}; "
            f"commit {', '.join(sorted({_short(run['commit']) for run in runs}))}; "
            f"{hours:.1f} hours of training."
        )
    return text


def _all(runs: list[dict[str, Any]], key: str) -> str:
    return " and ".join(sorted({str(run[key]) for run in runs}))


def _short(commit: str | None) -> str:
    return "not known" if commit is None else f"`{commit[:9]}`" + "+" * commit.endswith("+")


def _findings(section: Section) -> list[str]:
    """Which rows differ from the ones they are compared with, by Holm's correction too."""
    lines = []
    for other in section.study.against:
        found = {
            row["method"]: row["against"][other]
            for row in summaries_of(section.study, section.results)
            if row["against"].get(other, {"seeds": 0})["seeds"] >= LEAST
        }
        if not found:
            continue
        # The same difference at every seed has no test; its row counts as one of the family.
        tested = {cell: each for cell, each in found.items() if each["p"] is not None}
        kept = _holm({cell: each["p"] for cell, each in tested.items()}, len(found))
        words = []
        for what, sign in (("above", 1), ("below", -1)):
            cells = [
                f"`{cell}`{'' if cell in kept else ' (not after correction)'}"
                for cell, each in tested.items()
                if each["p"] < LEVEL and sign * each["mean"] > 0
            ]
            words.append(f"{what}: {', '.join(cells) or 'no row'}")
        rest = [f"`{cell}`" for cell, each in tested.items() if each["p"] >= LEVEL]
        same = [f"`{cell}`" for cell in found if cell not in tested]
        words += [f"the same difference at every seed: {', '.join(same)}"] if same else []
        lines.append(
            f"- Against `{other}`, at p < {LEVEL} (Holm's correction over {len(found)} rows): "
            f"{'; '.join(words)}; no significant difference: {', '.join(rest) or 'no row'}."
        )
    return ["\n".join(lines)] if lines else []


def _holm(values: dict[str, float], family: int) -> set[str]:
    """Which p-values stay below the level after Holm's step-down correction for a family."""
    kept: set[str] = set()
    for place, (name, value) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        if value * (family - place) >= LEVEL:
            break
        kept.add(name)
    return kept


def _mask_table(section: Section) -> list[str]:
    """The released mask minus the paper's mask, seed by seed."""
    rows = []
    for cell in section.results:
        if "released mask" not in cell:
            continue
        released = section.results[cell]
        paper = section.results[cell.replace("released mask", "horizontal")]
        seeds = sorted(released.keys() & paper.keys())
        for key, what, digits in (
            (("top1", "top-1 %", 2), ("loss", "test loss", 3)) if seeds else ()
        ):
            ours, theirs = ([runs[s][key] for s in seeds] for runs in (paper, released))
            found = paired(theirs, ours, ROUNDED if key == "top1" else 0.0)
            each = (f"{released[s][key] - paper[s][key]:+.{digits}f}" for s in seeds)
            name = f"{cell}, {what}"
            mean = f"{found['mean']:+.{digits}f}"
            rows.append([name, str(len(seeds)), mean, *_spread_of(found, digits), ", ".join(each)])
    head = ["released minus paper's mask", "seeds", "mean", "sd", "95% interval, p", "each seed"]
    return [as_markdown(head, rows)] if rows else []


def _spread_of(found: dict[str, Any], digits: int) -> list[str]:
    if "sd" not in found:
        return ["", ""]
    low, high = (found["mean"] + sign * found["half_width"] for sign in (-1, 1))
    text = f"{low:+.{digits}f} to {high:+.{digits}f}"
    if found["p"] is not None:
        text += f", p {found['p']:.3f}{' (n.s.)' if found['p'] >= LEVEL else ''}"
    return [f"{found['sd']:.{digits}f}", text]


def _measured_on(section: Section) -> str:
    """How the measures were taken."""
    measures = [run["measures"] for run in section.runs]
    names = [name for name in IN_WORDS if any(name in each for each in measures)]
    images = min(
        figures.get("images", section.runs[0]["test_images"])
        for each in measures
        for figures in (each[name] for name in names if name in each)
    )
    limit = f" --limit {images}" if images < section.runs[0]["test_images"] else ""
    options = f"--measures {','.join(names)}{limit}"
    return (
        f"With `{options}` ([what they are](how-to/measure.md)); bands and deviations are over the "
        "seeds:"
    )


def main() -> None:
    """Write the page and its figures."""
    sections = [read_section(command) for command in COMMANDS_OF_STUDIES]
    above, _, _ = PAGE.read_text("utf-8").partition(MARK)
    PAGE.write_text(above + make_page(sections), "utf-8")
    for section in sections:
        for path in save_study_figures(section.measures, IMAGES, section.name):
            print(path.relative_to(ROOT))
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
