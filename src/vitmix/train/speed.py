"""How fast a run is, and how much memory it takes."""

from __future__ import annotations

import sys
import time

import torch

__all__ = ["Speed", "peak_memory"]


class Speed:
    """Time of steps, from the end of one to the end of the next: loading is part of it."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._steps = self._images = 0

    def start(self) -> None:
        """Begin, or go on after a pause."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Leave the step at hand out."""
        self._since = None

    def count(self, images: int) -> None:
        """A step of so many images has ended."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._steps += 1
            self._images += images
        self._since = now

    def read(self, device: torch.device) -> dict[str, float]:
        """Means since the last reading, and the greatest memory so far."""
        values = {"speed/memory_gib": peak_memory(device)}
        if self._seconds:
            values["speed/step_ms"] = 1000 * self._seconds / self._steps
            values["speed/images_per_second"] = self._images / self._seconds
        self._seconds, self._steps, self._images = 0.0, 0, 0
        return values


def peak_memory(device: torch.device) -> float:
    """Greatest memory so far in GiB: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
