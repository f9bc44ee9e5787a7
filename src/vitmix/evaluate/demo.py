"""The demonstration behind ``make demo``: five methods on scikit-learn's handwritten digits."""

from __future__ import annotations

from pathlib import Path

from vitmix.errors import InputError
from vitmix.evaluate.compare import compare
from vitmix.train.config import TrainConfig

__all__ = ["METHODS", "demo"]

METHODS = ("none", "cutmix", "tokenmix", "tl-align", "tokenmixup")

# Few training images, so that regularisation matters; few epochs, so that it takes minutes.
SETTINGS = TrainConfig(
    data="digits",
    train_limit=600,
    model="cct_2_3x2_32",
    epochs=20,
    batch_size=32,
    lr=2e-3,
    warmup_epochs=2,
    crop_padding=2,
    channels_last=True,
)


def demo(out: str, *, epochs: int | None = None) -> Path:
    """Train, compare and write ``out/report.html``; returns its path.

    Raises:
        InputError: ``out`` holds something that is not an earlier demo.
    """
    folder = Path(out).expanduser()
    settings = TrainConfig.from_dict(SETTINGS.to_dict())
    settings.epochs = settings.epochs if epochs is None else epochs
    settings.out, settings.name, settings.overwrite = str(folder.parent), folder.name, True
    if folder.name in ("", ".", ".."):
        raise InputError(f"expected --out to be a folder of its own, got {out!r}")
    comparison = compare(
        settings, METHODS, [0], title="Five ways of mixing handwritten digits", command="make demo"
    )
    return comparison.report
