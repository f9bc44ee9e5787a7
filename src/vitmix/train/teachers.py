"""Teachers: trained classifiers by checkpoint, by timm's name, or by name and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vitmix.errors import InputError
from vitmix.models import cct_names, create_model, input_side, pretrained_facts
from vitmix.train.checkpoint import load_trained
from vitmix.train.data import IMAGENET_MEAN, IMAGENET_STD
from vitmix.weights import read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Teacher", "find_teacher", "named_teacher"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation


@dataclass(frozen=True)
class Teacher:
    """A trained classifier, and the images that it takes."""

    name: str
    model: nn.Module
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_teacher(
    classes: tuple[str, ...],
    data: str,
    *,
    model: str | None = None,
    checkpoint: str | None = None,
    side: int | None = None,
) -> Teacher:
    """A teacher of these classes.

    Args:
        classes: what it must know.
        data: the data set that the classes are of, for messages.
        model: a timm name, taken with its pretrained weights; with ``checkpoint`` any name of
            :func:`vitmix.models.create_model`.
        checkpoint: a run folder or checkpoint of ``vitmix train``; with ``model`` a file of that
            model's weights.
        side: side of the images, where the model takes several; by default that of its training.

    Raises:
        InputError: nothing there, or a classifier of other classes.
    """
    if model is None and checkpoint is None:
        raise InputError("expected a model or a checkpoint as teacher, got neither")
    if model is None and checkpoint is not None:
        trained = load_trained(checkpoint)
        if trained.classes != classes:
            raise InputError(
                f"expected a teacher of the {len(classes)} classes of {data} ({classes[0]}, ...), "
                f"{checkpoint} has {len(trained.classes)} ({trained.classes[0]}, ...)"
            )
        return Teacher(checkpoint, trained.model, trained.img_size, trained.mean, trained.std)
    assert model is not None
    own = model in cct_names()
    facts = None if own else pretrained_facts(model)
    known = None if facts is None else facts.num_classes
    if checkpoint is None and (own or (known is not None and known != len(classes))):
        what = "comes without weights" if own else f"knows {known} other classes"
        raise InputError(
            f"expected a teacher of the {len(classes)} classes of {data}, {model} {what}; "
            "train one and give its checkpoint"
        )
    side = side or input_side(model)
    network = create_model(
        model,
        num_classes=len(classes),
        img_size=side,
        **({} if checkpoint else {"pretrained": True}),
    )
    if checkpoint is not None:
        _load(network, model, checkpoint)
    mean = IMAGENET_MEAN if facts is None else tuple(facts.mean)
    std = IMAGENET_STD if facts is None else tuple(facts.std)
    return Teacher(" ".join(filter(None, (model, checkpoint))), network.eval(), side, mean, std)


def named_teacher(
    teacher: str,
    classes: tuple[str, ...],
    data: str,
    side: int,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> nn.Module:
    """What ``--teacher`` names: a run folder, a checkpoint, or a pretrained model.

    Args:
        teacher: the name.
        classes: what it must know.
        data: the data set that the classes are of, for messages.
        side: side of the images.
        mean: that the images it will be given are normalised by; they are turned into what it was
            trained on. By default they are that already.
        std: likewise.

    Raises:
        InputError: nothing there, or a classifier of other classes or for other images.
    """
    if Path(teacher).exists() or teacher.endswith(".ckpt"):
        found = find_teacher(classes, data, checkpoint=teacher)
    else:
        found = find_teacher(classes, data, model=teacher, side=side)
    if found.side != side:
        raise InputError(
            f"expected a teacher for images of side {side}, {teacher} is for {found.side}"
        )
    given = (tuple(mean or found.mean), tuple(std or found.std))
    if given != (tuple(found.mean), tuple(found.std)):
        found.model.register_forward_pre_hook(_Renormalise(given, (found.mean, found.std)))
    return found.model


class _Renormalise:
    """A hook: a model is given images with the mean and standard deviation that it was trained on.

    Args:
        given: mean and standard deviation by which images come in, a number a channel.
        wanted: those of the model.
    """

    def __init__(self, given: Statistics, wanted: Statistics) -> None:
        mean, std = torch.tensor(given, dtype=torch.float64)
        own_mean, own_std = torch.tensor(wanted, dtype=torch.float64)
        self.scale = (std / own_std)[:, None, None]
        self.shift = ((mean - own_mean) / own_std)[:, None, None]

    def __call__(self, model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale, shift = (t.to(args[0], non_blocking=True) for t in (self.scale, self.shift))
        return (args[0] * scale + shift, *args[1:])


def _load(network: nn.Module, model: str, checkpoint: str) -> None:
    state, expected = read_weights(checkpoint).state, network.state_dict()
    differing = sorted(expected.keys() ^ state.keys()) or [
        key for key, value in expected.items() if value.shape != state[key].shape
    ]
    if differing:
        raise InputError(
            f"expected weights of {model} for these classes in {checkpoint}, "
            f"{len(differing)} tensors differ, first {differing[0]!r}"
        )
    network.load_state_dict(state)
