"""Run variants of the same work in turns, and tell how long they take and how much memory."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

__all__ = ["Comparison", "Limits", "Measured", "Memory", "Ratio", "Row", "compare", "peak_memory"]

# A turn repeats what is faster than this, seconds: clocks and threads are not sharper.
_SHORTEST_TURN = 0.05

Work = Callable[[], Any]


@dataclass(frozen=True)
class Comparison:
    """Variants of one work.

    Attributes:
        group: what kind of work, as ``vitmix bench`` names it.
        title: tells it from the others of its group.
        base: the variant whose time and memory the others' are divided by.
        makers: makes each variant: a function that does the work once. What a maker allocates is
            memory of its variant; what all share is made before.
        settings: for the record.
        images: images in one part, for images a second; 0 if the work has none.
        parts: equal parts that one call of a variant has, if more than one: times are of one part.
        figures: further numbers of each variant, from what its first call returned.
        rates: further numbers of each variant, from the median seconds of all.
    """

    group: str
    title: str
    base: str
    makers: Mapping[str, Callable[[], Work]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    figures: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, float]]] | None = None
    rates: Callable[[Mapping[str, float]], Mapping[str, Mapping[str, float]]] | None = None

    @property
    def key(self) -> str:
        """Names the comparison among all."""
        return f"{self.group}: {self.title}"


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        seconds: time for the rounds.
        most: rounds at most.
        least: rounds at least, whatever the time.
    """

    seconds: float
    most: int = 25
    least: int = 3


class Job(NamedTuple):
    """A comparison to be made and run, in this process or another.

    Attributes:
        make: makes the comparison, with all that it needs.
        args: what it is given.
        seconds: time for the rounds.
    """

    make: Callable[..., Comparison]
    args: tuple[Any, ...]
    seconds: float


class Memory(NamedTuple):
    """Bytes.

    Attributes:
        peak: the most that was allocated at once.
        kept: what was still there at the end: results, and what the work holds on to.
    """

    peak: int
    kept: int

    @property
    def working(self) -> int:
        """What is needed beyond results, and beyond what was there before."""
        return self.peak - self.kept


class Ratio(NamedTuple):
    """Median of a ratio round by round, and its quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        clock: seconds of one call in each round.
        processor: processor time of all threads, seconds of one call in each round.
        memory: of making it and of its first call.
        figures: further numbers.
    """

    clock: list[float]
    processor: list[float]
    memory: Memory
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def milliseconds(self) -> float:
        """Median on the clock."""
        return 1e3 * statistics.median(self.clock)


@dataclass(frozen=True)
class Measured:
    """What a comparison gave."""

    group: str
    title: str
    base: str
    settings: dict[str, Any]
    images: int
    rows: dict[str, Row]

    @property
    def key(self) -> str:
        """Names the comparison among all."""
        return f"{self.group}: {self.title}"

    def ratio(self, variant: str, base: str | None = None, kind: str = "clock") -> Ratio:
        """Time of a variant over that of another.

        Args:
            variant: the one.
            base: the other; by default the comparison's own.
            kind: ``"clock"`` or ``"processor"``.
        """
        mine = getattr(self.rows[variant], kind)
        others = getattr(self.rows[base or self.base], kind)
        return _ratio([a / b if b else float("nan") for a, b in zip(mine, others, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every round, and the ratios."""
        return {
            "group": self.group,
            "title": self.title,
            "base": self.base,
            "settings": self.settings,
            "images": self.images,
            "variants": {
                name: {
                    "clock_seconds": row.clock,
                    "processor_seconds": row.processor,
                    "clock_ratio": self.ratio(name)._asdict(),
                    "processor_ratio": self.ratio(name, kind="processor")._asdict(),
                    "peak_bytes": row.memory.peak,
                    "kept_bytes": row.memory.kept,
                    "figures": row.figures,
                }
                for name, row in self.rows.items()
            },
        }


def compare(comparison: Comparison, device: str, limits: Limits) -> Measured:
    """Let all variants take turns in one process, so that a drifting machine is fair to them.

    The order turns every round. The first call of each, which is not timed, is the one whose memory
    is measured.

    Args:
        comparison: what to run.
        device: where it runs, for waiting and for memory.
        limits: when to stop.
    """
    with tqdm(total=limits.most, desc=comparison.key, disable=None, leave=False) as bar:
        begun: dict[str, _Begun] = {}
        for name, make in comparison.makers.items():
            bar.set_postfix_str(name)
            begun[name] = _begin(make, device)
        results = {name: each.results.pop() for name, each in begun.items()}
        figures = {} if comparison.figures is None else comparison.figures(results)
        results.clear()
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in begun}
        start, rounds = time.perf_counter(), 0
        while rounds < limits.most and (
            rounds < limits.least or time.perf_counter() - start < limits.seconds
        ):
            for name in list(begun)[:: 1 if rounds % 2 == 0 else -1]:
                bar.set_postfix_str(name)
                turn = _turn(begun[name].work, begun[name].repeats, device)
                parts = comparison.parts.get(name, 1)
                turns[name].append((turn[0] / parts, turn[1] / parts))
            rounds += 1
            bar.update()
    rates: Mapping[str, Mapping[str, float]] = {}
    if comparison.rates is not None:
        seconds = {name: [clock for clock, _ in found] for name, found in turns.items()}
        rates = comparison.rates({name: statistics.median(each) for name, each in seconds.items()})
    rows = {
        name: Row(
            clock=[clock for clock, _ in found],
            processor=[processor for _, processor in found],
            memory=begun[name].memory,
            figures={**figures.get(name, {}), **rates.get(name, {})},
        )
        for name, found in turns.items()
    }
    return Measured(
        comparison.group,
        comparison.title,
        comparison.base,
        dict(comparison.settings),
        comparison.images,
        rows,
    )


class _Begun(NamedTuple):
    """A variant that has been called once.

    Attributes:
        work: what is timed.
        memory: of making it and of its first call.
        repeats: calls in a turn.
        results: what the first call returned.
    """

    work: Work
    memory: Memory
    repeats: int
    results: list[Any]


def _begin(make: Callable[[], Work], device: str) -> _Begun:
    works: list[Work] = []
    starts: list[float] = []

    def run() -> Any:
        works.append(make())
        starts.append(time.perf_counter())
        return works[0]()

    memory, result = peak_memory(run, device)
    repeats = 1
    if time.perf_counter() - starts[0] < 1.0:  # else a turn is long enough, and another too dear
        repeats = max(1, int(_SHORTEST_TURN / max(_turn(works[0], 1, device)[0], 1e-6)))
    return _Begun(works[0], memory, repeats, [result])


def peak_memory(work: Work, device: str) -> tuple[Memory, Any]:
    """Run a work once and follow what it allocates, beyond what is there already.

    On the CPU that is what PyTorch's allocator hands out, as its profiler records it, temporaries
    inside of kernels included; what other libraries allocate for themselves (SciPy's copy of a cost
    matrix, oneDNN's scratch space) is not. On a GPU it is what PyTorch's allocator has handed out.

    Returns:
        The memory, and what the work returned.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Memory(peak - before, kept - before), result
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes are for people who profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = work()
    events: Any = recorded.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return Memory(peak, total), result


def _turn(work: Work, repeats: int, device: str) -> tuple[float, float]:
    """Seconds of one call: on the clock, and of the processor."""
    if device != "cuda":
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            work()
        if device == "mps":
            torch.mps.synchronize()
        processor = time.process_time() - processor
        return (time.perf_counter() - clock) / repeats, processor / repeats
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    processor = time.process_time()
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    processor = time.process_time() - processor
    seconds: float = begin.elapsed_time(end) / 1e3
    return seconds / repeats, processor / repeats


def _ratio(values: Sequence[float]) -> Ratio:
    if len(values) < 2:
        return Ratio(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(middle, low, high)
