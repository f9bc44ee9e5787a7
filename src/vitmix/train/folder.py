"""Run folders: made new, never written over by accident, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MARKER",
    "claim_folder",
    "held",
    "read_settings",
    "replacing",
    "write_json",
    "write_text",
]

MARKER = "config.yaml"  # what makes a folder one of ours


def claim_folder(
    out: str, name: str | None, default: str, overwrite: bool, settings: dict[str, Any]
) -> Path:
    """A new folder ``out/name`` that holds nothing but ``settings`` in its ``config.yaml``.

    Without a name it is ``out/default``, with a number if taken. The folder and its settings appear
    in one moment, so whatever stops the program, the folder is either a run's or not there.

    Raises:
        InputError: the folder has contents and may not be replaced, or a process trains in it.
    """
    parent = Path(out).expanduser()
    if parent.exists() and not parent.is_dir():
        raise InputError(f"expected --out to be a folder, got the file {parent}")
    if name is None:
        if not overwrite:
            return _first_free(parent, default, settings)
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
        for marker in folder.rglob(MARKER):  # of runs below, too: of a comparison, or a teacher's
            with held(marker.parent):
                pass
        shutil.rmtree(folder)
    return _make(folder, settings)


def _first_free(parent: Path, default: str, settings: dict[str, Any]) -> Path:
    number = 1
    while True:
        folder = parent / (default if number == 1 else f"{default}-{number}")
        if not folder.exists():
            return _make(folder, settings)
        number += 1


def _make(folder: Path, settings: dict[str, Any]) -> Path:
    import yaml

    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        (beside / MARKER).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except OSError as error:
        raise InputError(
            f"expected --out to be a place to write in, cannot make {folder}: {error.strerror}"
        ) from error
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process while it trains; a process that is killed lets it go.

    Raises:
        InputError: another process trains in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / MARKER).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"expected a run that nothing else trains, {folder} is in use by another process; "
                "wait for it or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder was made with.

    Raises:
        InputError: the folder is not one of ours.
    """
    import yaml

    try:
        settings = yaml.safe_load((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"expected a run folder with its {MARKER}, got {folder}: {_in_short(error)}"
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"expected settings in {folder / MARKER}, got {settings!r}")
    return settings


def _in_short(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file that takes the place of ``path`` when it is complete and on the disk."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    yield temporary
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
