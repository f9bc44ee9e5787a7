"""The work of ``vitmix bench``."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vitmix.bench import horizontal, pipeline, pixels, saliency, steps, targets
from vitmix.bench.measure import Comparison, Measured, compare
from vitmix.bench.options import BenchOptions
from vitmix.bench.page import MARK, page_of, text_of, verdict_text
from vitmix.errors import InputError
from vitmix.train.provenance import commit, device_name, versions

__all__ = ["GROUPS", "bench"]

GROUPS: dict[str, Callable[[BenchOptions], Iterator[Comparison]]] = {
    "targets": targets.comparisons,
    "steps": steps.comparisons,
    "saliency": saliency.comparisons,
    "horizontal": horizontal.comparisons,
    "pixels": pixels.comparisons,
    "pipeline": pipeline.comparisons,
}


def bench(
    group: str,
    options: BenchOptions,
    *,
    say: Callable[[str], None] = print,
    json_path: Path | None = None,
    page: Path | None = None,
    command: str = "vitmix bench",
) -> list[Measured]:
    """Run a group of comparisons, or ``"all"``; say what each gave as it ends.

    Args:
        group: one of :data:`GROUPS` or ``"all"``.
        options: what to run, and how long.
        say: is given the text of each comparison.
        json_path: file for every number, or None.
        page: Markdown file whose generated part is replaced, or None.
        command: how the run was called.

    Raises:
        InputError: an unknown group or a page without its mark.
    """
    if group not in (*GROUPS, "all"):
        raise InputError(f"expected one of {', '.join(GROUPS)} or all, got {group!r}")
    kept = "" if page is None else _kept(page)
    start = time.perf_counter()
    say(f"{_device(options.device)}, torch {torch.__version__}\n")
    found: dict[str, Measured] = {}
    for name, comparisons in GROUPS.items():
        if group not in (name, "all"):
            continue
        for comparison in comparisons(options):
            if comparison.key not in found:
                measured = compare(comparison, options.device, options.limits)
                found[comparison.key] = measured
                say(text_of(measured))
    measured_all = list(found.values())
    verdicts = targets.verdicts(measured_all)
    if group in ("targets", "all"):
        say(verdict_text(verdicts))
    machine = {
        "device": _device(options.device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "minutes": (time.perf_counter() - start) / 60,
    }
    if json_path is not None:
        content: dict[str, Any] = {
            "command": command,
            "machine": machine,
            "comparisons": [each.as_dict() for each in measured_all],
            "targets": [
                {
                    "what": each.target.what,
                    "comparison": each.target.key,
                    "bound": each.target.bound,
                    "at_least": each.target.at_least,
                    "ratio": None if each.ratio is None else each.ratio._asdict(),
                    "reached": each.reached,
                }
                for each in verdicts
            ],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(kept + page_of(measured_all, verdicts, machine, command), encoding="utf-8")
    return measured_all


def _kept(page: Path) -> str:
    """What stands above the mark; checked before anything runs."""
    if not page.exists():
        return "# Benchmarks\n\n"
    text = page.read_text(encoding="utf-8")
    if MARK not in text:
        raise InputError(
            f"expected --write to name a page with the line {MARK}, or a new one, got {page}"
        )
    return text.partition(MARK)[0]


def _device(device: str) -> str:
    return device_name(torch.device(device))
