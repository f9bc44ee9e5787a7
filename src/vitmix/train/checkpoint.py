"""Reading checkpoints: the model of a run, built again from what its file says about itself."""

from __future__ import annotations

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitmix.errors import InputError
from vitmix.train.config import TrainConfig
from vitmix.train.methods import method_of
from vitmix.train.provenance import commit, device_name, fingerprint, pick_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from vitmix.train.data import ImageData

__all__ = [
    "BEST",
    "FORMAT",
    "LAST",
    "PREVIOUS",
    "TrainedModel",
    "load_trained",
    "make_facts",
    "make_model",
    "newest_checkpoint",
    "origin_of",
    "read_checkpoint",
    "trained_state",
]

FORMAT = 1
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_PREFIX = "mixing.model."


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights and what belongs to them."""

    path: Path
    model: nn.Module
    config: TrainConfig
    classes: tuple[str, ...]
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    metrics: dict[str, float]
    origin: dict[str, Any]  # see `origin_of`


def make_model(config: TrainConfig, num_classes: int, img_size: int) -> nn.Module:
    """The network that the settings name."""
    from vitmix.models import cct_names, create_model

    own = config.model in cct_names()
    options: dict[str, Any] = dict(config.model_kwargs or {})
    if config.pretrained:
        if own:
            raise InputError(
                f"expected a timm model for --pretrained, got {config.model}, "
                "which comes without weights"
            )
        options["pretrained"] = True
    if config.drop_path is not None:
        options["stochastic_depth" if own else "drop_path_rate"] = config.drop_path
    try:
        model: nn.Module = create_model(
            config.model, num_classes=num_classes, img_size=img_size, **options
        )
    except TypeError as error:
        if not config.model_kwargs:
            raise
        raise InputError(
            f"expected --model-kwargs to be arguments of {config.model}, "
            f"got {config.model_kwargs}: {error}"
        ) from error
    return model


def make_facts(
    config: TrainConfig,
    data: ImageData,
    tokens: list[str],
    teacher: nn.Module | None = None,
    init: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain values that go into every checkpoint of a run; ``tokens`` are its token stages."""
    import vitmix

    return {
        "format": FORMAT,
        "version": str(getattr(vitmix, "__version__", "")),
        "commit": commit(),
        "config": config.to_dict(),
        "init": init,
        "classes": list(data.classes),
        "img_size": data.img_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "made_from": {
            "data": fingerprint(
                tensor
                for split in (data.train, data.test)
                for tensor in (split.labels, split.images)
                if tensor is not None
            ),
            "method": repr(method_of(config)),
            "token stages": tokens,
            "teacher": None if teacher is None else fingerprint(teacher.state_dict().values()),
            "maps": None if data.maps is None else repr(data.maps.facts),
        },
        "made_on": {
            "torch": str(torch.__version__),
            "device": device_name(torch.device(pick_device(config.device))),
        },
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file, every byte of it checked.

    Raises:
        InputError: no checkpoint, a damaged one, or not one of vitmix.
    """
    if not path.is_file():
        raise InputError(f"expected a run folder or a checkpoint, there is no {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many kinds for a file that is not theirs
        raise InputError(
            f"expected a checkpoint of plain tensors in {path}, it cannot be read as one; "
            "give last.ckpt or best.ckpt of a run"
        ) from error
    facts = content.get("vitmix") if isinstance(content, dict) else None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(
            f"expected a checkpoint that vitmix train wrote, {path} is not one; "
            "give last.ckpt or best.ckpt of a run"
        )
    return dict(content)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, with its path; None if there is none yet.

    A damaged one is passed over for the one before, and a line on standard error says so.

    Raises:
        InputError: none can be read.
    """
    paths = [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except InputError:
            if path == paths[-1]:
                raise
            print(f"vitmix: {path} is damaged, taking {paths[-1].name} before it", file=sys.stderr)
    return None


def origin_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's facts tell whoever uses its weights elsewhere, as plain values."""
    config = facts["config"]
    return {
        "model": config["model"],
        "model_kwargs": config.get("model_kwargs"),
        "data": config["data"],
        "commit": facts.get("commit"),
        **{key: facts[key] for key in ("classes", "img_size", "mean", "std")},
    }


def trained_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the model itself in a checkpoint, the averaged ones where there are any."""
    return content["vitmix"].get("averaged") or {
        key.removeprefix(_PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(_PREFIX)
    }


def load_trained(path: str | Path, *, model: str | None = None) -> TrainedModel:
    """Build the model of a run folder or checkpoint file.

    Args:
        path: a checkpoint, or a run folder (its newest checkpoint).
        model: the model that the checkpoint should be of; by default whichever it is.

    Raises:
        InputError: no checkpoint, not one of vitmix, or of another model.
    """
    path = Path(path)
    found = newest_checkpoint(path) if path.is_dir() else None
    if found is None:
        path = path / LAST if path.is_dir() else path
        found = path, read_checkpoint(path)
    path, content = found
    facts = content["vitmix"]
    config = TrainConfig.from_dict(facts["config"])
    stored = config.model
    config.model = model or config.model
    config.pretrained, config.init = False, None
    network = make_model(config, len(facts["classes"]), facts["img_size"])
    state = trained_state(content)
    expected = network.state_dict()
    differing = sorted(expected.keys() ^ state.keys()) or [
        key for key, value in expected.items() if value.shape != state[key].shape
    ]
    if differing:
        raise InputError(
            f"expected a checkpoint of {config.model} in {path}, got one of {stored} "
            f"({len(differing)} tensors differ, first {differing[0]!r}); "
            f"give the model that it was trained with"
        )
    network.load_state_dict(state)
    return TrainedModel(
        path,
        network.eval(),
        config,
        tuple(facts["classes"]),
        facts["img_size"],
        tuple(facts["mean"]),
        tuple(facts["std"]),
        dict(facts["metrics"]),
        origin_of(facts),
    )
