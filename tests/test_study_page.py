"""The page of the studies: made of the stored results, and never older than these."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vitmix.plots.study import FIGURES, save_study_figures

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("study_page", ROOT / "studies" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_page"] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_results_say(page: Any) -> None:
    text = page.PAGE.read_text("utf-8")
    sections = [page.read_section(command) for command in page.COMMANDS_OF_STUDIES]
    assert text.partition(page.MARK)[1:] == (
        page.MARK, page.make_page(sections).removeprefix(page.MARK)
    ), "run python studies/page.py"  # fmt: skip
    pictures = re.findall(r"\(images/(study-[\w.-]+)\)", text)
    assert set(pictures) == {path.name for path in page.IMAGES.glob("study-*.png")}


def test_figures_quoted_elsewhere_are_those_of_the_page(page: Any) -> None:
    cells = [line.strip("| ").split(" | ") for line in page.PAGE.read_text("utf-8").splitlines()]
    rows = {(row[0], row[2], row[4], row[5].strip()) for row in cells if len(row) > 5}
    quoted = re.findall(
        r"^\| ([\w+-]+) \| (\d\S+ ± \S+) \| (\S+ ± \S+) \| ?(.*?) \|$",
        (ROOT / "README.md").read_text("utf-8"), re.MULTILINE,
    )  # fmt: skip
    assert len(quoted) > 3
    assert set(quoted) <= rows
    accuracies = {row[1] for row in rows}
    for file in (ROOT / "docs" / "methods").glob("*.md"):
        assert set(re.findall(r"\d\d\.\d\d ± \d\.\d\d", file.read_text("utf-8"))) <= accuracies


def test_every_stored_result_is_on_the_page(page: Any) -> None:
    """No file is left over from settings that a study has no more."""
    used = set()
    for command in page.COMMANDS_OF_STUDIES:
        section = page.read_section(command)
        for cell in section.study.cells:
            used |= {f"{section.store}/{cell.folder(seed)}.json" for seed in section.seeds}
    stored = {path.relative_to(ROOT).as_posix() for path in (ROOT / "results").rglob("*.json")}
    assert stored <= used


def test_correction_for_several_rows(page: Any) -> None:
    values = {"a": 0.001, "b": 0.04, "c": 0.02, "d": 0.5}
    assert page._holm(values, 4) == {"a"}  # 0.001 x 4, then 0.02 x 3 is no more below 0.05
    assert page._holm(values | {"c": 0.016, "b": 0.024}, 4) == {"a", "c", "b"}
    assert page._holm({"a": 0.012}, 4) == {"a"}
    assert page._holm({"a": 0.012}, 5) == set()  # a row without a test is one of the family


def test_released_mask_minus_the_papers(page: Any) -> None:
    section = page.read_section(page.COMMANDS_OF_STUDIES[1])
    section.results["horizontal"].clear()
    section.results["released mask"].clear()
    for seed, (own, other) in enumerate([(90.0, 89.0), (91.0, 90.5), (90.5, 90.5)]):
        section.results["horizontal"][seed] = {"top1": own, "loss": 1.0}
        section.results["released mask"][seed] = {"top1": other, "loss": 1.5 - seed / 2}
    (table,) = page._mask_table(section)
    row = "| released mask, top-1 % | 3 | -0.50 | 0.50 | -1.74 to +0.74, p 0.225 (n.s.) |"
    assert f"{row} -1.00, -0.50, +0.00 |" in table


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_figure_of_each_measure(page: Any, seeds: int, tmp_path: Path) -> None:
    run = {
        "occlusion": {"shares": [0.0, 0.5], "accuracy": {"random": [0.9, 0.5], "salient": [1, 0]}},
        "corruptions": {"severities": [1, 2], "accuracy": {"fog": [0.5, 0.4], "snow": [0.3, 0.2]}},
        "calibration": {
            "ece": 0.1, "bins": [{"images": 3, "confidence": 0.4, "accuracy": 0.5},
                                 {"images": 1, "confidence": 0.45, "accuracy": 1.0}],
        },
        "fgsm": {"epsilons": [0, 1], "accuracy": [0.9, 0.2]},
        "localisation": {"pointing": 0.5, "share": 0.4, "iou": 0.3, "area": 0.35},
    }  # fmt: skip
    cells = {"none": [run] * seeds, "cutmix": [run] * seeds, "waits": []}
    paths = save_study_figures(cells, tmp_path, "study")
    assert [path.name for path in paths] == [f"study-{measure}.png" for measure in FIGURES]
    assert list(page.IN_WORDS) == list(FIGURES)
    assert all(path.stat().st_size > 5_000 for path in paths)
    assert not save_study_figures({"none": []}, tmp_path, "nothing")
