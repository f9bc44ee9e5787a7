"""What the user of ``vitmix bench`` chooses."""

from __future__ import annotations

from dataclasses import dataclass

from vitmix.benchmarks.measure import Limits
from vitmix.errors import InputError

__all__ = ["BenchOptions", "numbers", "words"]


@dataclass(frozen=True)
class BenchOptions:
    """Options of a run; empty ones stand for the group's own.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        precision: ``"fp32"``, or ``"bf16"`` by autocast.
        compile: compile training steps.
        models: names of models.
        batch_sizes: numbers of samples.
        tokens: numbers of tokens, for horizontal mixing.
        variants: names of variants of the group.
        rounds: most rounds of a comparison.
        seconds: time for each comparison; each has its own by default.
        quick: fewer and smaller comparisons, few rounds.
        data: data set of the input pipeline, as ``--data`` of ``vitmix train``.
        recipe: settings of the input pipeline.
        workers: loading processes of the input pipeline.
        isolate: whether each comparison has a process of its own.
    """

    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    models: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    rounds: int = 25
    seconds: float | None = None
    quick: bool = False
    data: str = "fake"
    recipe: str = "cct7-cifar100"
    workers: int = 2
    isolate: bool = True

    def limits(self, seconds: float) -> Limits:
        """When a comparison stops that would take so many seconds by itself."""
        seconds = seconds if self.seconds is None else self.seconds
        if self.quick:
            return Limits(seconds / 10, most=min(self.rounds, 3), least=min(self.rounds, 2))
        return Limits(seconds, most=self.rounds, least=min(self.rounds, 3))


def words(text: str | None) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers above 0 between commas.

    Raises:
        InputError: anything else.
    """
    found = words(text)
    if not all(word.isdecimal() and int(word) > 0 for word in found):
        raise InputError(f"expected {option} to be whole numbers above 0, got {text!r}")
    return tuple(map(int, found))
