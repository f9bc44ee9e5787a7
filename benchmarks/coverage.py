"""Which of timm's registered architectures does vitmix support?

Makes every one on the meta device (shapes without numbers), describes it, and prints a table by
class: how many are supported, how many of those take vertical mixing and aligned labels too, and
why the others are refused. About two minutes on one CPU core.

    python benchmarks/coverage.py
    python benchmarks/coverage.py "vit_*" --names
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import timm
import torch

import vitmix


@dataclass
class Row:
    """Counts of one class of models.

    Attributes:
        supported: described.
        vertical: of those, blocks can attend to collected tokens.
        aligned: of those, shares can be followed to the output.
        refused: names, with the reason.
    """

    supported: list[str] = field(default_factory=list)
    vertical: int = 0
    aligned: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def reason_of(error: vitmix.UnsupportedModelError) -> str:
    """What was found, without what was looked for."""
    found = str(error).lower().split(" found ", 1)[-1]
    return found.split(" with children")[0].split(". ")[0]


def survey(pattern: str) -> dict[str, Row]:
    """Describe every registered architecture whose name fits the pattern."""
    rows: dict[str, Row] = defaultdict(Row)
    for name in timm.list_models(pattern):
        with torch.device("meta"):
            model = timm.create_model(name)
        row = rows[type(model).__name__]
        try:
            backbone = vitmix.describe(model)
        except vitmix.UnsupportedModelError as error:
            row.refused[name] = reason_of(error)
            continue
        row.supported.append(name)
        row.vertical += backbone.vertical_reason is None
        row.aligned += backbone.alignment_reason is None
    return dict(rows)


def report(rows: dict[str, Row], names: bool) -> None:
    """Print the table, supported classes first."""
    print(f"{'class':<28}{'supported':>10}{'aligned':>9}{'vertical':>10}{'refused':>9}  found")
    for kind, row in sorted(rows.items(), key=lambda item: (-len(item[1].supported), item[0])):
        reasons = "; ".join(reason for reason, _ in Counter(row.refused.values()).most_common(2))
        print(
            f"{kind:<28}{len(row.supported):>10}{row.aligned:>9}{row.vertical:>10}"
            f"{len(row.refused):>9}  {reasons}"
        )
        if names:
            for name in row.supported:
                print(f"    {name}")
    supported = sum(len(row.supported) for row in rows.values())
    refused = sum(len(row.refused) for row in rows.values())
    print(
        f"\ntimm {timm.__version__}: {supported} of {supported + refused} architectures supported, "
        f"{sum(row.aligned for row in rows.values())} with aligned labels, "
        f"{sum(row.vertical for row in rows.values())} with vertical mixing"
    )


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="*", help="names to survey (default: all)")
    parser.add_argument("--names", action="store_true", help="list the supported names too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report(survey(arguments.pattern), arguments.names)


if __name__ == "__main__":
    main()
