"""Optimisers by timm's names, groups of parameters, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vitmix.errors import InputError
from vitmix.train.config import suggest

if TYPE_CHECKING:
    from vitmix import MixingModel
    from vitmix.train.config import TrainConfig

__all__ = ["check_optimiser", "learning_rate_factor", "make_optimiser", "parameter_groups"]


def make_optimiser(mixing: MixingModel, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that the settings name, for the model and the stages around it."""
    return _create(parameter_groups(mixing, config), config)


def check_optimiser(config: TrainConfig) -> None:
    """Refuse a name or arguments that no optimiser has.

    Raises:
        InputError: with the nearest names, or with what the optimiser says about its arguments.
    """
    from timm.optim import list_optimizers

    known = list_optimizers()
    name = config.opt.lower().removeprefix("lookahead_")
    if name not in known:
        raise InputError(
            f"expected --opt to be an optimiser of timm such as adamw, sgd or lamb, "
            f"got {config.opt!r}{suggest(name, known)}"
        )
    try:
        _create([{"params": [nn.Parameter(torch.zeros(1, 1))]}], config)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"expected --opt-kwargs to be arguments of {config.opt}, "
            f"got {config.opt_kwargs}: {error}"
        ) from error


def _create(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=config.opt, lr=config.peak_lr, **(config.opt_kwargs or {})
    )
    return made


def parameter_groups(mixing: MixingModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters in groups with their own weight decay and, with layer decay, learning rate.

    Matrices and kernels decay; biases, norms, and what the model itself names in
    ``no_weight_decay`` (in timm: positions and class tokens) do not. Layer decay multiplies the
    learning rate of each layer by another factor the further it is from the head; the stages' own
    parameters learn at the full rate.

    Raises:
        InputError: layer decay for a model that does not say what its layers are.
    """
    model: Any = mixing.model
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    named = [entry for entry in mixing.named_parameters() if entry[1].requires_grad]
    if config.layer_decay is None:
        kept = {f"model.{name}" for name in skipped}
        free = [p for name, p in named if p.ndim <= 1 or name in kept]
        decayed = [p for name, p in named if not (p.ndim <= 1 or name in kept)]
        return [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]
    if not hasattr(model, "group_matcher"):
        raise InputError(
            f"expected a timm model for --layer-decay, which tells its layers; got "
            f"{type(model).__name__}, which does not; leave --layer-decay out"
        )
    from timm.optim import param_groups_layer_decay

    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model,
        config.weight_decay,
        no_weight_decay_list=skipped,
        layer_decay=config.layer_decay,
    )
    for group in groups:
        group["lr"] = config.peak_lr * group.pop("lr_scale")
    rest = [p for name, p in named if not name.startswith("model.")]
    return [*groups, {"params": rest, "weight_decay": config.weight_decay}] if rest else groups


def learning_rate_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak rate in a step: linear warm-up, then half a cosine down to ``floor``.

    >>> [round(learning_rate_factor(step, 12, 2, 0.0), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
