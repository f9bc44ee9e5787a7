"""The work of ``vitmix bench``."""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vitmix.benchmarks import horizontal, pipeline, pixels, saliency, steps, targets
from vitmix.benchmarks.measure import Job, Limits, Measured, compare
from vitmix.benchmarks.options import BenchOptions
from vitmix.benchmarks.page import MARK, page_of, text_of, verdict_text
from vitmix.errors import InputError, VitmixError
from vitmix.train.provenance import commit, device_name, versions

__all__ = ["GROUPS", "bench"]

GROUPS: dict[str, Callable[[BenchOptions], Iterator[Job]]] = {
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
    measured_all: list[Measured] = []
    done: set[tuple[Any, ...]] = set()
    for name, jobs in GROUPS.items():
        for job in jobs(options) if group in (name, "all") else ():
            if job[:2] in done:
                continue
            done.add(job[:2])
            run = _run_apart if options.isolate else _run
            measured_all.append(run(job, options.device, options.limits(job.seconds)))
            say(text_of(measured_all[-1]))
    verdicts = targets.verdicts(measured_all)
    if group in ("targets", "all"):
        say(verdict_text(verdicts))
    machine = {
        "device": _device(options.device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
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
                    "processor": None if each.processor is None else each.processor._asdict(),
                    "reached": each.reached,
                    "reached_by_processor": each.reached_by_processor,
                }
                for each in verdicts
            ],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        page.write_text(kept + page_of(measured_all, verdicts, machine, command), encoding="utf-8")
    return measured_all


def _run(job: Job, device: str, limits: Limits) -> Measured:
    return compare(job.make(*job.args), device, limits)


def _run_apart(job: Job, device: str, limits: Limits) -> Measured:
    """Run a job in a process of its own: what memory the one before has used is not felt.

    Raises:
        VitmixError: what was raised there, or the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    args = (sender, torch.get_num_threads(), job, device, limits)
    process = context.Process(target=_send, args=args)
    process.start()
    sender.close()
    try:
        found: Measured | Exception = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        raise VitmixError(
            f"expected a comparison to end, its process ended with status {process.exitcode}; "
            "was there enough memory? Choose a smaller batch"
        ) from None
    finally:
        process.terminate()
    if isinstance(found, Exception):
        raise found
    return found


def _send(sender: Any, threads: int, job: Job, device: str, limits: Limits) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send(_run(job, device, limits))
    except Exception as error:
        sender.send(error)


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
