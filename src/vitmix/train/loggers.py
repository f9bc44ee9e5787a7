"""Where values and pictures go: a table and TensorBoard always, W&B and MLflow on request."""

from __future__ import annotations

import json
import logging
import os
import secrets
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from vitmix.errors import InputError
from vitmix.train.folder import write_json
from vitmix.train.logs import MetricsTable

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from vitmix.train.config import TrainConfig

__all__ = ["check_loggers", "close_loggers", "log_picture", "make_loggers"]

NAMES = ("wandb", "mlflow")


def _names(config: TrainConfig) -> list[str]:
    return [name.strip() for name in (config.logger or "").split(",") if name.strip()]


def check_loggers(config: TrainConfig) -> None:
    """Refuse loggers that are not known or not installed.

    Raises:
        InputError: names the logger and what to install.
    """
    for name in _names(config):
        if name not in NAMES:
            raise InputError(f"expected --logger to be of {', '.join(NAMES)}, got {name!r}")
        if find_spec(name) is None:
            raise InputError(
                f"expected the package {name} for --logger {name}, it is not installed; "
                f"pip install 'vitmix[{name}]'"
            )


def make_loggers(config: TrainConfig, folder: Path, steps: int) -> list[Logger]:
    """The loggers of a run.

    Args:
        config: the settings, which the loggers on request keep, too.
        folder: of the run.
        steps: optimiser steps that are done; later values of a stopped run are void.
    """
    loggers: list[Logger] = [
        MetricsTable(folder / "metrics.csv", steps),
        TensorBoardLogger(folder, name="tensorboard", version="", purge_step=steps + 1),
    ]
    path = folder / "loggers.json"  # the names that other programs have given to this run
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in _names(config):
        logger = {"wandb": _make_wandb, "mlflow": _make_mlflow}[name](folder, known.get(name))
        if name not in known:
            logger.log_hyperparams(config.to_dict())
            known[name] = str(logger.run_id if isinstance(logger, MLFlowLogger) else logger.version)
            write_json(path, known)
        loggers.append(logger)
    return loggers


def _make_wandb(folder: Path, known: str | None) -> WandbLogger:
    """A W&B run; ``WANDB_MODE=offline`` keeps it on the disk."""
    return WandbLogger(
        name=folder.name,
        id=known or secrets.token_hex(4),
        project=os.environ.get("WANDB_PROJECT", "vitmix"),
        save_dir=folder,
        resume="allow",
    )


def _make_mlflow(folder: Path, known: str | None) -> MLFlowLogger:
    """An MLflow run in ``mlflow.db`` beside the run folders, or where MLflow's variables point."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    store = os.environ.get("MLFLOW_TRACKING_URI")
    pictures = None if store else (folder.parent / "mlflow").resolve().as_uri()
    return MLFlowLogger(
        experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", "vitmix"),
        run_name=folder.name,
        tracking_uri=store or f"sqlite:///{(folder.parent / 'mlflow.db').resolve()}",
        artifact_location=pictures,
        run_id=known,
    )


def close_loggers(loggers: list[Logger]) -> None:
    """End W&B's run: another one of this process would be written into it."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def log_picture(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    """Log a picture ``(H, W, 3)`` uint8; the table of metrics has no place for it."""
    writer: Any = getattr(logger, "experiment", None)
    if isinstance(logger, TensorBoardLogger):
        writer.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [picture])
    elif isinstance(logger, MLFlowLogger):
        writer.log_image(logger.run_id, picture, f"{name}/{step:07}.png")
