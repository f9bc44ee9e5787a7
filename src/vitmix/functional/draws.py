"""Random draws that follow a ``torch.Generator``.

Masks and mixing weights are a few numbers a step, drawn on the host. One number of the
``torch.Generator`` seeds a NumPy generator, so that a draw is fast, can be repeated, and moves the
state of the ``torch.Generator`` by the same amount however many numbers the draw takes.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["host_generator", "stochastic_round"]


def host_generator(generator: torch.Generator | None = None) -> np.random.Generator:
    """Return a NumPy generator seeded by one draw of ``generator`` (the global one if None)."""
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=device)
    return np.random.default_rng(int(seed))


def stochastic_round(value: float, rng: np.random.Generator) -> int:
    """Round to one of the two neighbouring integers, so that the expectation is ``value``."""
    return int(np.floor(value + rng.random()))
