"""Where a result comes from: versions, commit, machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vitmix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["commit", "device_name", "fingerprint", "pick_device", "versions"]

PACKAGES = ("vitmix", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """Commit of vitmix's own source, with ``+`` if it was changed; None outside a repository.

    That of the first call: what a process runs stays as it was when it began.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not merely inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def pick_device(name: str) -> str:
    """``auto`` resolved; an accelerator that is not there is refused."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}  # fmt: skip
    if name == "auto":
        return "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there.get(name, False):
        raise InputError(f"expected --device {name} to be available, PyTorch finds none; use cpu")
    return name


def device_name(device: torch.device) -> str:
    """A name for people: the GPU's, or the processor's with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A number that changes with any byte or size of these tensors."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(repr(tuple(tensor.shape)).encode(), value)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        value = zlib.crc32(raw.numpy().data, value)
    return value
