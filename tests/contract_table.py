"""``pytest --contract-table FILE``: the outcomes of contract tests as tables in Markdown.

A test marked ``contract(table=..., row=..., column=...)`` is a case of a cell. A test that passes
because a refusal, or a limit of the model itself, is as it should be says so by
``record_property("contract", words)``. With pytest-xdist the controller gathers what its workers
report.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

HEAD = """# What works with what

Written by `make contract` from a test run; every cell is one or more tests. Rows are small models
of every supported family (`EVERY_FAMILY` of `tests/contract.py`); columns are methods, and the
machinery of training around the strongest method that a family takes.

- **yes**: tested, and it works.
- **refused**: an error, raised before anything is changed, that says why.
- **model**: the model itself can't, without vitmix.
- **fails**: a known failure, whose test must be changed once it no longer fails.
"""
Cell = tuple[str, ...]  # table, row, column
CELL = "contract-cell"
NOTE = "contract"


class ContractTable:
    """Collects outcomes and writes the file at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[Cell, set[str]] = {}
        self.order: dict[Cell, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if CELL in properties and (report.when == "call" or report.outcome != "passed"):
            position, *names = properties[CELL]
            cell: Cell = tuple(names)
            self.outcomes.setdefault(cell, set()).add(outcome_of(report))
            self.order[cell] = min(position, self.order.get(cell, position))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            outcomes = read(self.path.read_text("utf-8")) if self.path.exists() else {}
            for cell in sorted(self.outcomes, key=self.order.__getitem__):
                outcomes[cell] = self.outcomes[cell]
            self.path.write_text(render(outcomes), "utf-8")


def outcome_of(report: pytest.TestReport) -> str:
    note = dict(report.user_properties).get(NOTE)
    if hasattr(report, "wasxfail") and report.outcome == "skipped":
        return f"fails: {report.wasxfail.removeprefix('reason: ')}"
    if report.outcome == "failed":
        return "FAILED"
    if report.outcome == "skipped":
        reason: Any = report.longrepr
        return f"not run: {str(reason[2]).removeprefix('Skipped: ')}"
    return str(note) if note else "yes"


def render(outcomes: dict[Cell, set[str]]) -> str:
    """Tables, rows and columns in the order of their first cells; reasons as numbered notes."""
    reasons: dict[str, int] = {}
    parts = [HEAD]
    for table in dict.fromkeys(table for table, _, _ in outcomes):
        rows = dict.fromkeys(row for name, row, _ in outcomes if name == table)
        columns = dict.fromkeys(column for name, _, column in outcomes if name == table)
        lines = [
            f"## {table}\n",
            f"| family | {' | '.join(columns)} |",
            f"| --- |{' --- |' * len(columns)}",
        ]
        for row in rows:
            cells = [
                words(outcomes.get((table, row, column), set()), reasons) for column in columns
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    if reasons:
        notes = [f"{number}. {reason}" for reason, number in reasons.items()]
        parts.append("\n".join(["## Reasons\n", *notes]) + "\n")
    return "\n".join(parts)


def read(text: str) -> dict[Cell, set[str]]:
    """Outcomes of all cells of a file that :func:`render` wrote."""
    notes = text.partition("## Reasons\n")[2]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", notes, re.MULTILINE))
    found: dict[Cell, set[str]] = {}
    for table, body in re.findall(r"## (.*)\n\n((?:\|.*\n)+)", text):
        head, _, *rows = (
            [cell.strip() for cell in line[1:-1].split("|")] for line in body.splitlines()
        )
        for row in rows:
            for column, cell in zip(head[1:], row[1:], strict=True):
                if cell:
                    found[table, row[0], column] = {
                        f"{kind}: {reasons[number]}" if number else kind
                        for kind, numbers in re.findall(r"([^,\[]+)(?: \[([^]]*)\])?(?:, |$)", cell)
                        for number in numbers.split(", ")
                    }
    return found


def words(outcomes: set[str], reasons: dict[str, int]) -> str:
    """A cell: each kind of outcome once, with the numbers of its reasons."""
    found: dict[str, list[int]] = {}
    for outcome in sorted(outcomes, key=lambda text: (text != "yes", text)):
        kind, _, reason = outcome.partition(": ")
        numbers = found.setdefault(kind, [])
        if reason:
            numbers.append(reasons.setdefault(" ".join(reason.split()), len(reasons) + 1))
    return ", ".join(
        f"{kind} [{', '.join(map(str, numbers))}]" if numbers else kind
        for kind, numbers in found.items()
    )
