"""Which of timm's registered architectures does vitmix support?

Makes every one on the meta device (shapes without numbers), describes it, and runs a training step
of every stage that the description promises. Prints a table by class; with ``--write`` also writes
it to docs/coverage.md and the names to docs/coverage.json. About ten minutes on two CPU cores.

    python benchmarks/coverage.py --write
    python benchmarks/coverage.py "vit_*" --names
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import timm
import torch

from vitmix.survey import STAGES, Surveyed, model_names, survey_model

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = ("attention", "aligned", "horizontal", "vertical")


def strip(found: Surveyed) -> Surveyed:
    """Leave the model itself behind: only words travel between processes."""
    return Surveyed(found.name, found.kind, found.size, None, found.refusal, found.reasons)


def look(name: str) -> Surveyed:
    """Survey one model quietly on one thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return strip(survey_model(name))


def by_class(found: list[Surveyed]) -> dict[str, list[Surveyed]]:
    """Group by class, the one with most supported names first."""
    groups: dict[str, list[Surveyed]] = defaultdict(list)
    for each in found:
        groups[each.kind].append(each)
    return dict(
        sorted(groups.items(), key=lambda item: (-sum(m.is_full for m in item[1]), item[0]))
    )


def remarks(members: list[Surveyed]) -> str:
    """Why some stages or names of a class are refused."""
    reasons = Counter(
        reason
        for each in members
        for reason in {each.refusal, *each.reasons.values()}
        if reason is not None
    )
    return "; ".join(
        reason if count == len(members) else f"{count} x {reason}"
        for reason, count in reasons.items()
    )


def table(found: list[Surveyed]) -> str:
    """The table by class in Markdown, classes without any attention left out."""
    lines = [
        "| class of timm | names | area, teacher | attention | aligned | horizontal | vertical "
        "| found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind, members in by_class(found).items():
        if all(each.refusal == "no transformer that is known" for each in members):
            continue
        counts = [
            sum(bool(each.reasons) and each.reasons[name] is None for each in members)
            for name in COLUMNS
        ]
        lines.append(
            f"| {kind} | {len(members)} | {len(members)} | "
            + " | ".join(str(count) for count in counts)
            + f" | {remarks(members)} |"
        )
    return "\n".join(lines)


def headline(found: list[Surveyed]) -> str:
    """The number of fully supported names."""
    full = sum(each.is_full for each in found)
    vertical = sum(each.is_full and each.reasons["vertical"] is None for each in found)
    return (
        f"timm {timm.__version__}: {full} of {len(found)} registered names take all four label "
        f"rules and horizontal mixing, {vertical} of them vertical mixing too."
    )


def write(found: list[Surveyed]) -> None:
    """Write the table and the names into docs/."""
    text = (
        "# Supported architectures of timm\n\n"
        "Written by `python benchmarks/coverage.py --write`, which runs a training step of every "
        "stage on every registered name.\n"
        "Mixing of pixels with area or teacher labels works on any classifier; classes without "
        "attention are not listed.\n\n"
        f"{headline(found)}\n\n{table(found)}\n"
    )
    (DOCS / "coverage.md").write_text(text)
    names = {
        each.name: sorted(stage for stage in STAGES if each.reasons[stage] is None)
        for each in found
        if each.reasons
    }
    record = {"timm": timm.__version__, "full": sum(each.is_full for each in found), "names": names}
    (DOCS / "coverage.json").write_text(json.dumps(record, indent=0) + "\n")


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="*", help="names to survey (default: all)")
    parser.add_argument("--names", action="store_true", help="list the supported names too")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", action="store_true", help="write docs/coverage.md and .json")
    arguments = parser.parse_args()
    names = [name for name in model_names(arguments.pattern) if timm.is_model(name)]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        found = pool.map(look, names, chunksize=8)
    print(table(found))
    if arguments.names:
        print("\n".join(each.name for each in found if each.is_full))
    print(headline(found))
    if arguments.write:
        write(found)


if __name__ == "__main__":
    main()
