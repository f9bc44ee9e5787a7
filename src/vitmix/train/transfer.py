"""Weights to start from: of a run, or of a file that others wrote, on another data set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.models.cct import CCT
from vitmix.models.released import fitted_positions
from vitmix.train.checkpoint import (
    LAST,
    newest_checkpoint,
    origin_of,
    read_checkpoint,
    trained_state,
)
from vitmix.train.data import ImageData, pretrained_statistics
from vitmix.train.provenance import fingerprint
from vitmix.weights import backbone_of, listed, read_facts, read_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from vitmix.train.config import TrainConfig

__all__ = ["Start", "freeze_backbone", "load_start", "normalised", "read_start", "with_model"]


@dataclass(frozen=True)
class Start:
    """Weights, and what is known about them.

    Attributes:
        path: the file.
        state: tensors by name.
        origin: see :func:`vitmix.train.checkpoint.origin_of`; empty where the file does not tell.
    """

    path: Path
    state: dict[str, Tensor]
    origin: dict[str, Any]


def read_start(path: str | Path) -> Start:
    """Read what ``--init`` names.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint ``*.ckpt`` of one, of which the
            averaged weights are taken where it has them; or a file that
            :func:`vitmix.weights.read_weights` reads.

    Raises:
        InputError: none of these.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(
            f"expected --init to be a run folder, a checkpoint or a file of weights, there is no "
            f"{path}"
        )
    if path.is_dir() or path.suffix == ".ckpt":
        found = newest_checkpoint(path) if path.is_dir() else None
        if found is None:
            path = path / LAST if path.is_dir() else path
            found = path, read_checkpoint(path)
        path, content = found
        return Start(path, trained_state(content), origin_of(content["vitmix"]))
    state, origin = read_weights(path).state, read_facts(path)
    if origin.pop("part", None) == "features":
        raise InputError(
            f"expected weights of a model or a backbone in {path}, got those of a feature "
            "extractor; give the run, or what vitmix export writes without --part features"
        )
    return Start(path, state, origin)


def with_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the ``model`` and ``model_kwargs`` of the weights to start from.

    They are added where nobody chose others; the arguments only to the model that they belong to.

    Args:
        settings: those that were chosen, and no others.

    Raises:
        InputError: weights are given, but neither they nor the settings name a model.
    """
    if settings.get("init") is None or {"model", "model_kwargs"} <= settings.keys():
        return dict(settings)
    origin = read_start(settings["init"]).origin
    known, chosen = origin.get("model"), settings.get("model")
    if known is None and chosen is None:
        raise InputError(
            f"expected --model beside --init {settings['init']}, which holds weights but not the "
            "name of their model"
        )
    if known is None or chosen not in (None, known):
        return dict(settings)
    return {"model": known, "model_kwargs": origin["model_kwargs"], **settings}


def normalised(data: ImageData, config: TrainConfig, origin: Mapping[str, Any]) -> ImageData:
    """The data, normalised as the weights were trained with where the settings do not say how.

    For weights that do not tell, it is timm's normalisation for the model, if timm has any.
    """
    known = pretrained_statistics(replace(config, pretrained=True)) or (data.mean, data.std)
    mean, std = (origin.get(key) or known[place] for place, key in enumerate(("mean", "std")))
    return replace(data, mean=tuple(config.mean or mean), std=tuple(config.std or std))


def load_start(model: nn.Module, start: Start, classes: Sequence[str]) -> dict[str, Any]:
    """Load weights into a model for these classes.

    The classifier is taken where the weights are for the same classes, or, if they do not tell,
    for as many; it stays as it is otherwise. Where shapes differ, timm's ``checkpoint_filter_fn``
    resamples what depends on the image size (positions, tables of relative positions); for CCT
    positions are interpolated.

    Returns:
        Plain values for people and for ``results.json``: where the weights come from, a digest of
        them, how many tensors were ``taken``, which ones are ``new`` and which were ``resampled``.

    Raises:
        InputError: weights that do not fit; nothing was loaded then.
    """
    expected = model.state_dict()
    head = _head_names(model)
    told = start.origin.get("classes")
    state = start.state
    if any(_differs(state.get(name), expected[name]) for name in expected.keys() - head):
        state = _resampled(model, state)
    same = told is None or tuple(told) == tuple(classes)
    if not same or any(_differs(state.get(name), expected[name]) for name in head):
        state = {name: value for name, value in state.items() if name not in head}
    taken = {name: value for name, value in state.items() if name in expected}
    _require_fit(model, start, state, head)
    model.load_state_dict({**expected, **taken})
    return {
        "path": str(start.path),
        **{key: start.origin.get(key) for key in ("model", "data", "commit")},
        "weights": fingerprint(start.state.values()),
        "taken": len(taken),
        "new": [name for name in expected if name not in taken],
        "resampled": [
            f"{name} {_size(start.state[name])} to {_size(value)}"
            for name, value in taken.items()
            if name in start.state and _differs(start.state[name], value)
        ],
    }


def freeze_backbone(model: nn.Module) -> None:
    """Let only the classifier learn: the rest gets no gradient and is in evaluation mode."""
    head = _head_names(model)
    model.eval()
    for place in {name.rpartition(".")[0] for name in head}:
        model.get_submodule(place).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)


def _head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors."""
    return model.state_dict().keys() - backbone_of(model).state_dict().keys()


def _resampled(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for images of another size brought to this model's; as they are where that fails."""
    if isinstance(model, CCT):
        name = "classifier.positional_emb"
        return state if name not in state else {**state, name: fitted_positions(model, state[name])}
    fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if fit is None:
        return state
    try:
        return dict(fit(dict(state), model))
    except Exception:  # whatever it stumbles over does not fit, and is named by the caller
        return state


def _require_fit(
    model: nn.Module, start: Start, state: Mapping[str, Tensor], head: set[str]
) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and name not in head]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} {_size(value)} for {_size(expected[name])}"
        for name, value in state.items()
        if name in expected and _differs(value, expected[name])
    ]
    faults = [
        f"{what} {listed(names)}"
        for what, names in (("without", missing), ("with unknown", unknown), ("with", shapes))
        if names
    ]
    if faults:
        known = ""
        if start.origin:
            known = f"of {start.origin['model']} for {start.origin['img_size']} pixels "
        raise InputError(
            f"expected weights that fit the model in {start.path}, got weights "
            f"{known}{' and '.join(faults)}; give the --model, --model-kwargs and --img-size that "
            "they were made with"
        )


def _differs(value: Tensor | None, expected: Tensor) -> bool:
    return value is None or value.shape != expected.shape


def _size(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "1"
