"""Going on with a run that was stopped: which settings, from which checkpoint, on what."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.train.config import TrainConfig
from vitmix.train.folder import MARKER, read_settings

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_origin", "finished_results", "resumed_settings"]

# Settings that may be others when a run goes on, as no number depends on them: where the same data
# lies now (its contents are compared), how it is read, how often something is written or tested.
FREE = frozenset(
    ("data", "data_root", "download", "workers", "log_interval", "checkpoint_steps",
     "checkpoint_minutes", "eval_epochs", "image_epochs", "logger")
)  # fmt: skip


def resumed_settings(
    folder: Path, given: dict[str, Any], *, comparison: bool = False
) -> dict[str, Any]:
    """The settings that ``folder`` began with, with those ``given`` anew that change no number.

    Args:
        folder: of a run or of a comparison.
        given: settings from the command line.
        comparison: which of the two the folder should be.

    Raises:
        InputError: not such a folder, or a setting that would make it another run.
    """
    stored = read_settings(folder)
    if ("methods" in stored) != comparison:
        what, other = ("a comparison", "train") if comparison else ("one run", "compare")
        raise InputError(
            f"expected the folder of {what}, got {folder}; use vitmix {other} --resume {folder}"
        )
    settings = TrainConfig.from_dict(stored).to_dict()
    settings |= {key: stored[key] for key in ("methods", "seeds") if key in stored}
    for name, value in given.items():
        if name not in FREE and value != settings.get(name):
            raise InputError(
                f"expected the settings that {folder / MARKER} began with, got "
                f"--{name.replace('_', '-')} {value} instead of {settings.get(name)}; "
                "leave the option out, or train anew without --resume"
            )
    return settings | given


def finished_results(folder: Path) -> dict[str, Any] | None:
    """What a finished run has left, or None."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def check_origin(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with other data, another method or another teacher.

    Another PyTorch or processor is only remarked on, on standard error: sums may be rounded
    differently there.

    Args:
        before: the facts of the checkpoint.
        now: the facts of the run that is to go on.

    Raises:
        InputError: names what is different.
    """
    for key, value in before["made_from"].items():
        if now["made_from"][key] != value:
            raise InputError(
                f"expected the {key} that the run began with, now there is something else; "
                f"bring the old {key} back, or train anew without --resume"
            )
    for key, value in before["made_on"].items():
        if now["made_on"][key] != value:
            print(
                f"vitmix: the run began with {key} {value}, this is {now['made_on'][key]}; "
                "the last digits may differ from those of a run that was never stopped",
                file=sys.stderr,
            )
