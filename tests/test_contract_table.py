"""The table of the contract: what the plugin writes, and that docs/contract.md is of this code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import contract_table
import test_contract
import test_distributed
from contract import EVERY_FAMILY, TABLES

HERE = Path(__file__).parent
CASES = """
import pytest

def cell(row, column, table="First"):
    return pytest.mark.contract(table=table, row=row, column=column)

@cell("b", "two")
def test_passes(): pass

@cell("a", "one")
@pytest.mark.parametrize("fine", [True, pytest.param(False, marks=pytest.mark.xfail(
    reason="some day", strict=True))])
def test_known(fine): assert fine

@cell("a", "two")
def test_refused(record_property): record_property("contract", "refused: too  wide")

@cell("b", "one")
@pytest.mark.xfail(reason="not any more", strict=True)
def test_repaired(): pass

@cell("b", "three")
def test_fails(): assert False

@cell("a", "three")
def test_skipped(): pytest.skip("no device")

@pytest.fixture
def broken(): raise ValueError

@cell("c", "two")
def test_broken(broken): pass

@cell("a", "x", "Second")
def test_second(record_property): record_property("contract", "model: some day")

def test_outside(): pass
"""
TABLE = """## First

| family | two | one | three |
| --- | --- | --- | --- |
| b | yes | FAILED | FAILED |
| a | refused [1] | yes, fails [2] | not run [3] |
| c | FAILED |  |  |

## Second

| family | x |
| --- | --- |
| a | model [2] |

## Reasons

1. too wide
2. some day
3. no device
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_outcomes_become_cells(tmp_path: Path, processes: int) -> None:
    """Alone, and gathered from worker processes."""
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "contract_table.py").write_text((HERE / "contract_table.py").read_text())
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = contract\n")
    arguments = ["--contract-table", "table.md", *(["-n", str(processes)] if processes else [])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# What works with what")
    assert text[text.index("## First") :] == TABLE
    assert contract_table.render(contract_table.read(text)) == text


def test_the_docs_list_every_family_and_column() -> None:
    """Otherwise: `make contract`."""
    assert test_contract.test_step
    assert test_distributed.test_data_parallel  # both enter their columns
    text = (HERE.parent / "docs" / "contract.md").read_text()
    for table, columns in TABLES.items():
        lines = text.split(f"## {table}\n\n")[1].split("\n\n")[0].splitlines()
        cells = [[entry.strip() for entry in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["family", *columns]
        assert sorted(row[0] for row in cells[2:]) == sorted(EVERY_FAMILY)
        assert not [row for row in cells[2:] if "" in row or "FAILED" in row]
