"""Run folders: made new, never written over by accident."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vitmix.errors import InputError

__all__ = ["claim_folder", "write_json", "write_yaml"]

MARKER = "config.yaml"  # what makes a folder one of ours


def claim_folder(out: str, name: str | None, default: str, overwrite: bool) -> Path:
    """A new, empty folder ``out/name``; without a name, ``out/default`` with a number if taken.

    Raises:
        InputError: the folder has contents and may not be replaced.
    """
    parent = Path(out).expanduser()
    if parent.exists() and not parent.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {parent}")
    if name is None:
        if not overwrite:
            return _first_free(parent, default)
        name = default
    folder = parent / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise InputError(
                f"expected a new run folder, {folder} exists and is not empty; "
                "choose another --name, or pass --overwrite to replace it"
            )
        if not (folder / MARKER).is_file():
            raise InputError(
                f"expected an earlier run to overwrite, {folder} holds something else; "
                "choose another --name"
            )
        shutil.rmtree(folder)
    _make(folder)
    return folder


def _first_free(parent: Path, default: str) -> Path:
    number = 1
    while True:
        folder = parent / (default if number == 1 else f"{default}-{number}")
        if not folder.exists():
            _make(folder)
            return folder
        number += 1


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected --out to be a place to write in, cannot make {folder}: {error.strerror}"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    _write(path, json.dumps(content, indent=2, allow_nan=True) + "\n")


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write settings in their own order."""
    import yaml

    _write(path, yaml.safe_dump(content, sort_keys=False))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
