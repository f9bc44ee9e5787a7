"""Which of timm's registered architectures does vitmix support?

Makes every one on the meta device (shapes without numbers), describes it, and runs those described
once: every block must be given the tokens that the description promises, and attend once over all
of them. Prints a table by class: how many are supported, how many of those take aligned labels and
vertical mixing, and why the others are refused. About seven minutes on one CPU core.

    python benchmarks/coverage.py
    python benchmarks/coverage.py "vit_*" --names
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vitmix
from vitmix.attention import AttentionCall, AttentionTap


@dataclass
class Row:
    """Counts of one class of models.

    Attributes:
        supported: described, and true to it in a pass.
        vertical: of those, blocks can attend to collected tokens.
        aligned: of those, shares can be followed to the output.
        refused: names, with the reason.
    """

    supported: list[str] = field(default_factory=list)
    vertical: int = 0
    aligned: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def reason_of(error: vitmix.UnsupportedModelError) -> str:
    """What was found, without what was looked for and without the model's own name."""
    found = re.split(r"(?i) found ", str(error), maxsplit=1)[-1]
    if not found.startswith("timm.models."):
        return found.split(". ")[0]
    known = re.search(r" \((.*)\) with children", found)
    return known.group(1) if known else "of no supported family"


def check(model: Any, backbone: vitmix.Backbone) -> None:
    """Run a model on the meta device and compare what passes with its description.

    Raises:
        vitmix.UnsupportedModelError: other tokens, or other attention than described.
    """
    size = model.default_cfg["input_size"]
    rows, columns = backbone.grid(size[1:])
    tokens = backbone.num_prefix_tokens + rows * columns
    entered: list[tuple[int, ...]] = []
    attended: list[tuple[int, ...]] = []
    inside: list[bool] = [False]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(tuple(args[0].shape))
        inside[0] = True

    def leave(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        inside[0] = False

    def fused(call: AttentionCall) -> Tensor:
        if inside[0]:
            attended.append((call.query.shape[-2], call.key.shape[-2]))
        return call.run()

    def softmax(attention: Tensor) -> None:
        if inside[0]:
            attended.append((attention.shape[-2], attention.shape[-1]))

    handles = []
    for block in backbone.blocks:
        handles.append(block.module.register_forward_pre_hook(enter))
        handles.append(block.module.register_forward_hook(leave))
    with torch.no_grad(), AttentionTap(fused, softmax):
        model(torch.empty(2, *size, device="meta"))
    for handle in handles:
        handle.remove()
    if entered != [(2, tokens, backbone.embed_dim)] * backbone.depth:
        raise vitmix.UnsupportedModelError(
            f"looked for {tokens} tokens at each block, found {sorted(set(entered))}"
        )
    if attended != [(tokens, tokens)] * backbone.depth:
        raise vitmix.UnsupportedModelError(
            f"looked for {tokens} x {tokens} attention in each block, found {sorted(set(attended))}"
        )


def survey(pattern: str) -> dict[str, Row]:
    """Describe every registered architecture whose name fits the pattern."""
    rows: dict[str, Row] = defaultdict(Row)
    for name in timm.list_models(pattern):
        with torch.device("meta"):
            model = timm.create_model(name)
        row = rows[type(model).__name__]
        try:
            backbone = vitmix.describe(model)
            check(model, backbone)
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
        reasons = "; ".join(f"{n} {reason}" for reason, n in Counter(row.refused.values()).items())
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
