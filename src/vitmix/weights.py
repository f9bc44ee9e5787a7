"""Files of weights: read those of others, write those that others read."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitmix.backbones.base import is_made_by
from vitmix.errors import InputError, UnsupportedModelError

__all__ = [
    "Weights", "backbone_of", "listed", "read_facts", "read_weights", "write_weights",
]  # fmt: skip

# Entries under which training programs keep weights, in order of preference; averaged ones first.
_AVERAGED = ("state_dict_ema", "model_ema")
_PARTS = ("state_dict", "model_state_dict", "model")
# What wrappers around a whole model put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")
_FACTS = "vitmix"  # the entry of a safetensors file that says more than the weights


class Weights(NamedTuple):
    """Tensors by name, and the entry of the file that held them (empty: the file itself)."""

    state: dict[str, Tensor]
    part: str


def read_weights(source: str | Path | Mapping[str, Any], *, ema: bool = True) -> Weights:
    """Read the weights of a checkpoint, whatever it is wrapped in.

    Args:
        source: a ``.safetensors`` file, a file of ``torch.save``, or what one holds: tensors by
            name, or a dictionary with them under ``"state_dict"``, ``"model_state_dict"`` or
            ``"model"``.
        ema: prefer averaged weights (``"state_dict_ema"``, ``"model_ema"``) where there are any, as
            timm does.

    Returns:
        The weights, by names without ``module.`` or ``_orig_mod.`` in front.

    Raises:
        InputError: no such file, a file that runs code when it is read, or no weights in it.
    """
    content: Any = source if isinstance(source, Mapping) else _read(Path(source))
    what = "the dictionary" if isinstance(source, Mapping) else str(source)
    part = ""
    for key in (*(_AVERAGED if ema else ()), *_PARTS):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, part = content[key], key
            break
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"expected tensors by name in {what}, got {type(content).__name__}")
    foreign = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise InputError(
            f"expected tensors by name in {what}, got something else under {listed(foreign)}; "
            "pass the entry that holds the weights"
        )
    # torch.optim.swa_utils.AveragedModel counts what it has averaged, beside ``module.``.
    state = {name: value for name, value in content.items() if name != "n_averaged"}
    for prefix in (*_PREFIXES, *_PREFIXES):  # wrapped in either order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Weights(state, part)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"expected a checkpoint file, there is no {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"expected a safetensors file, {path} is not one: {error}") from error
    try:
        # timm keeps its command line's Namespace, a plain record, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"expected a checkpoint of tensors and plain values in {path}, got one that needs more "
            f"({_reason(error)}). Reading that runs code from the file: if you trust it, pass "
            "torch.load(path, map_location='cpu', weights_only=False) in place of the path"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"expected a file written by torch.save or safetensors, {path} is neither: {error}"
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """The line of torch's long message that names what was not allowed."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("WeightsUnpickler error:")), lines[0])


def listed(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more there are, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def backbone_of(model: nn.Module) -> nn.Module:
    """A copy of a model that ends before its classifier, as with ``num_classes=0`` in timm.

    Raises:
        UnsupportedModelError: a model that does not tell its classifier.
    """
    backbone: Any = deepcopy(model)
    if not hasattr(backbone, "reset_classifier"):
        raise UnsupportedModelError(
            "looked for a model that tells its classifier by reset_classifier, as those of timm "
            f"do, found {type(model).__name__}"
        )
    backbone.reset_classifier(0)
    return backbone  # type: ignore[no-any-return]


def write_weights(
    model: nn.Module,
    path: str | Path,
    *,
    head: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's weights for other programs.

    Args:
        model: the model itself.
        path: a file ``*.safetensors`` for any model, which
            ``timm.create_model(..., checkpoint_path=path)`` and :func:`vitmix.models.load_released`
            load; or, for a model of transformers, a folder (``config.json`` and
            ``model.safetensors``) for ``from_pretrained``.
        head: with the classifier; without it, the file is for ``timm.create_model(...,
            num_classes=0, checkpoint_path=path)``.
        facts: plain values that :func:`read_facts` finds in the file.

    Returns:
        The path.

    Raises:
        InputError: a path that does not fit, weights spread over processes, or a
            state of more than tensors.
        UnsupportedModelError: no classifier is known to be left out.
    """
    path = Path(path)
    if not head:
        model = backbone_of(model)
    is_folder = path.suffix != ".safetensors"
    if is_folder and not is_made_by(model, "transformers.modeling_utils", "PreTrainedModel"):
        raise InputError(
            f"expected a path that ends in .safetensors for a {type(model).__name__}, got {path}; "
            "folders are for models of transformers"
        )
    if is_folder and path.is_file():
        raise InputError(f"expected a folder or a path that ends in .safetensors, {path} is a file")
    if not path.parent.is_dir():
        raise InputError(f"expected a path in a folder that exists, there is no {path.parent}")
    state = model.state_dict()
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign and not is_folder:
        raise InputError(
            f"expected tensors alone among the weights of a {type(model).__name__}, got something "
            f"else under {listed(foreign)}"
        )
    if any(hasattr(value, "full_tensor") for value in state.values()):
        raise InputError(
            "expected a model whose weights this process holds, got one whose weights are spread "
            "over processes; gather them into a copy of the model by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and export that"
        )
    if is_folder:
        model.save_pretrained(path)  # type: ignore[operator]
        return path
    from safetensors.torch import save_file

    # Copies, since a file holds no two names of one tensor. A reader never sees half a file.
    temporary = path.with_name(path.name + ".tmp")
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    said = {} if facts is None else {_FACTS: json.dumps(facts)}
    save_file(tensors, temporary, {"format": "pt", **said})
    os.replace(temporary, path)
    return path


def read_facts(path: Path) -> dict[str, Any]:
    """What :func:`write_weights` was given to put beside the weights; empty for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return found
