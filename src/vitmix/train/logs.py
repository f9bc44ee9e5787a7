"""The table of logged values."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vitmix.train.folder import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["MetricsTable"]


class MetricsTable(Logger):
    """``metrics.csv``: a row for each logged step, a column for each value.

    Every row is in the file at once, and a new column comes in without a moment of half a table,
    which Lightning's ``CSVLogger`` cannot do; nor can that go on with a table.

    Args:
        path: the file.
        steps: rows of a run that goes on are kept up to this step.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            self._rewrite([row for row in self._rows() if int(row["step"]) <= steps])

    def _rows(self) -> list[dict[str, str]]:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # the last line may have been cut off
        return list(csv.DictReader(io.StringIO(whole)))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        write_text(self.path, self._as_text(rows, header=True))

    def _as_text(self, rows: list[dict[str, Any]], *, header: bool = False) -> str:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self.columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return lines.getvalue()

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "metrics"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row."""
        row = {"step": step, **metrics}
        if row.keys() <= set(self.columns):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._as_text([row]))
        else:
            self._rewrite([*(self._rows() if self.path.exists() else []), row])
