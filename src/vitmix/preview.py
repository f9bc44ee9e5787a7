"""What a training step would do to a batch, as a picture.

It is made in three parts: a step that leaves everything as it was, here; samples of it followed
through the stages, in :mod:`vitmix.samples`; the drawing, in :mod:`vitmix.plots.examples`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.mixing import MixingModel
from vitmix.samples import Sample, choose_rows, evenness, make_samples
from vitmix.step import MixTrace
from vitmix.tokens import HorizontalTokenMixup, TokenMixer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitmix.plots.style import Theme

__all__ = ["Preview", "looking", "preview"]

NOT_MIXED = (
    "This method mixes no samples: nothing comes from a partner. Vertical mixing works within one."
)


@dataclass(frozen=True)
class Preview:
    """Samples of a step as arrays, and as a picture.

    Attributes:
        samples: those that are shown.
        note: what the picture cannot tell, such as why nothing was mixed; empty if nothing.
        title: heading of the picture.
    """

    samples: tuple[Sample, ...]
    note: str = ""
    title: str = ""

    def figure(self, theme: Theme | None = None) -> Figure:
        """The picture, as a figure of matplotlib (``pip install 'vitmix[train]'``)."""
        from vitmix.plots.examples import preview_figure
        from vitmix.plots.style import LIGHT, themed

        theme = theme or LIGHT
        with themed(theme):
            return preview_figure(self, theme)

    def save(self, path: str | Path, *, dpi: int = 110) -> Path:
        """Write the picture in the format that the name ends in, such as ``.png`` or ``.pdf``.

        Raises:
            InputError: an unknown format, or a place that cannot be written to.
        """
        from vitmix.plots.style import save_figure

        return save_figure(self.figure(), Path(path), dpi=dpi)

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        buffer = io.BytesIO()
        self.figure().savefig(buffer, dpi=110)
        return buffer.getvalue()


def preview(
    mixing: MixingModel,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | Sequence[int] = 3,
    draws: int = 1,
    seed: int = 0,
    title: str = "",
) -> Preview:
    """What a training step would do to a batch; see :meth:`vitmix.MixingModel.preview`."""
    if classes is not None and len(classes) != mixing.num_classes:
        raise InputError(
            f"expected {mixing.num_classes} names in `classes`, got {len(classes)}: "
            "one for each class of the model"
        )
    count = samples if isinstance(samples, int) else len(samples)
    if count < 1 or draws < 1:
        raise InputError(f"expected `samples` and `draws` of at least 1, got {samples} and {draws}")
    if (mean is None) != (std is None):
        raise InputError(
            f"expected both `mean` and `std`, or neither, got {'mean' if std is None else 'std'} "
            "alone"
        )
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    steps = []
    for attempt in range(draws):
        with looking(mixing, seed + attempt):
            steps.append(mixing(images, targets, maps=maps, record=True))
    out = max(steps, key=lambda step: float(evenness(step.trace, labels).max()))
    if classes is None:
        classes = [f"class {label}" for label in range(mixing.num_classes)]
    if mean is None or std is None:  # their range of values is stretched
        low, high = float(images.min()), float(images.max())
        mean, std = [low] * images.shape[1], [max(high - low, 1e-6)] * images.shape[1]
    if isinstance(samples, int):
        rows = choose_rows(out.trace, labels, samples)
        rows += [row for row in range(len(images)) if row not in rows][: samples - len(rows)]
    else:
        rows = list(samples)
        if not all(0 <= row < len(images) for row in rows):
            raise InputError(
                f"expected `samples` as places in the batch from 0 to {len(images) - 1}, got {rows}"
            )
    names = [classes[label] for label in labels.tolist()]
    chosen = make_samples(out.trace, images, names, rows, mixing, mean, std)
    return Preview(tuple(chosen), _note(mixing, out.trace), title)


@contextmanager
def looking(mixing: MixingModel, seed: int) -> Iterator[None]:
    """Let a step be taken that leaves everything as it was: modes, draws, thresholds.

    The model itself is in evaluation mode, so that nothing is dropped out.
    """
    modes = {module: module.training for module in mixing.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in mixing.tokens.buffers()]
    generator = mixing.generator
    devices = [p.device for p in mixing.parameters() if p.device.type == "cuda"][:1]
    try:
        mixing.eval()
        mixing.training = True
        mixing.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        mixing.generator = generator
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _note(mixing: MixingModel, trace: MixTrace) -> str:
    """Why a step mixed less than one might expect."""
    notes = []
    if mixing.mix is None and not any(isinstance(s, TokenMixer) for s in mixing.tokens):
        notes.append(NOT_MIXED)
    if trace.pixels is not None and bool((trace.pixels.lam > 0.999).all()):
        notes.append("The pixels were left unmixed in this draw.")
    taus = {s.block: s.tau for s in mixing.tokens if isinstance(s, HorizontalTokenMixup)}
    for block, plan in trace.horizontal.items():
        mixed = plan.replace.any(1)
        if bool(mixed.any()):
            continue
        difficulty = trace.difficulty[block]
        low, high, tau = float(difficulty.min()), float(difficulty.max()), taus[block]
        if isinstance(tau, float | int) and low >= tau:
            notes.append(
                f"No tokens were mixed at block {block}: ScoreNet finds no sample easy. Their "
                f"difficulty is {low:.2f} to {high:.2f} nats, tau is {tau:g}; a higher tau mixes "
                "more, inf mixes all."
            )
        else:
            follows = isinstance(tau, str)
            gate = "no sample is below tau, which follows the batches, or " if follows else ""
            notes.append(
                f"No tokens were replaced at block {block}: {gate}no partner has one that is "
                "more salient by rho; a smaller rho replaces more."
            )
    return " ".join(notes)
