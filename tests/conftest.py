"""Settings for all tests: one thread for each process, no network, no windows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from contract_table import CELL, ContractTable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contract-table", type=Path, help="write outcomes of contract tests to this Markdown file"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--contract-table")
    if path is not None:
        config.pluginmanager.register(ContractTable(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let reports carry their cell, also from a worker process to the controller, and its place."""
    for position, item in enumerate(items):
        mark = item.get_closest_marker("contract")
        if mark is not None:
            names = (mark.kwargs[key] for key in ("table", "row", "column"))
            item.user_properties.append((CELL, (position, *names)))
