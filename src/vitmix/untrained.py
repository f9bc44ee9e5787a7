"""A word to those whose optimiser has the model's parameters, but not ScoreNet's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitmix.tokens import HorizontalTokenMixup

__all__ = ["UntrainedWatch"]

PASSES = 200


class UntrainedWatch:
    """Compares a parameter of ScoreNet, and one of the model, with what they were at first.

    Values are compared after 200 passes, and seldom again: a difference in versions, which needs no
    device, says that a parameter has changed, but fused optimisers change it without one.
    Parameters spread over processes are left alone.
    """

    def __init__(self) -> None:
        self._over = False
        self._passes, self._until = 0, PASSES
        self._first: list[tuple[nn.Parameter, int, Tensor]] = []
        self._block: int | None = None

    def look(self, model: nn.Module, stages: Iterable[nn.Module]) -> None:
        """Count a training pass, and warn once if the model is trained and ScoreNet is not.

        Args:
            model: the model.
            stages: token stages, of which the first with a ScoreNet that matters is watched.
        """
        if self._over or not torch.is_grad_enabled():
            return
        if not all(parameter.requires_grad for parameter, _, _ in self._first):
            self._first = []
        if not self._first:
            self._begin(model, stages)
            return
        self._passes += 1
        if self._passes < self._until:
            return
        self._until *= 2
        scorenet, other = (_has_changed(*each) for each in self._first)
        self._over = scorenet or other
        if other and not scorenet:
            warnings.warn(
                f"ScoreNet of HorizontalTokenMixup(block={self._block}) is what it was "
                f"{self._passes} training passes ago, while the model has changed: which samples "
                "are easy is left to a network that is not trained. Optimise mixing.parameters(), "
                "which has ScoreNet's, instead of model.parameters(); or freeze ScoreNet by "
                "requires_grad_(False)",
                stacklevel=2,
            )

    def _begin(self, model: nn.Module, stages: Iterable[nn.Module]) -> None:
        for stage in stages:
            if isinstance(stage, HorizontalTokenMixup) and stage.tau != math.inf:
                assert stage.scorenet is not None
                if stage.scorenet_weight == 0:
                    return
                watched = [*_last_trained(stage.scorenet), *_last_trained(model)]
                if len(watched) == 2:
                    self._first = [(each, each._version, each.detach().clone()) for each in watched]
                    self._passes, self._until, self._block = 0, PASSES, stage.block
                return


def _last_trained(module: nn.Module) -> list[nn.Parameter]:
    """The last parameter that is trained; none that is spread over processes."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [parameter for parameter in trained[-1:] if type(parameter) is nn.Parameter]


def _has_changed(parameter: nn.Parameter, version: int, values: Tensor) -> bool:
    return parameter._version != version or not torch.equal(parameter, values.to(parameter))
