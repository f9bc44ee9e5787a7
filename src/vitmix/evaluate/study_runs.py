"""``vitmix study`` and ``vitmix ablate``: train the runs of a study that are missing.

One after another, or several side by side in processes of their own: on a GPU that a small model
does not fill, or on the cores of a processor.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch

from vitmix.errors import InputError, VitmixError
from vitmix.evaluate.checkpoint import evaluate_checkpoint
from vitmix.evaluate.measured import chosen_measures
from vitmix.evaluate.study_results import (
    READING,
    Runs,
    check_images,
    find_run,
    find_runs_of,
    measures_in,
    taken_on,
)
from vitmix.evaluate.study_tables import write_tables
from vitmix.plots.study import save_study_figures
from vitmix.train.checkpoint import LAST
from vitmix.train.data import load_data, pretrained_statistics
from vitmix.train.folder import MARKER
from vitmix.train.methods import method_of
from vitmix.train.parallel import Processes
from vitmix.train.resume import finished_results
from vitmix.train.run import Interrupted, check_config, train_run
from vitmix.train.trial import try_method

if TYPE_CHECKING:
    from vitmix.evaluate.study import Cell, Study
    from vitmix.train.config import TrainConfig
    from vitmix.train.data import ImageData

__all__ = ["measure_runs", "run_study"]


def run_study(
    study: Study, seeds: Sequence[int], out: Path, store: Path | None = None, jobs: int = 1
) -> Runs:
    """Train the runs that are missing; write ``study.json`` and ``study.md``.

    Both are written anew after every run. Teachers of ``tokenmix`` with ``teacher: auto`` are the
    runs of a cell ``none`` with the same seed and settings, where there is one with its checkpoint.
    A run that fails, with a broken loss say, does not keep the others from being trained.

    Args:
        study: the study.
        seeds: of every cell, seed by seed, so that a study that is stopped has whole tables.
        out: folder of the run folders.
        store: folder of stored runs, which count as finished; new ones are added.
        jobs: how many runs to train side by side.

    Returns:
        The results by cell and seed.

    Raises:
        InputError: data, settings or folders that do not fit, several processes a run, or runs on
            other images than the others.
        VitmixError: some of the runs failed, or a process that trained was killed.
        Interrupted: Ctrl-C; what was begun goes on with the next call.
    """
    for cell in study.cells:
        if Processes.of(cell.config).count > 1:
            raise InputError(
                f"expected one process a run in a study, got several in cell {cell.name!r}; leave "
                "--devices and --nodes out (--jobs trains runs side by side), or train each row "
                "with vitmix train"
            )
    for option, folder in (("--results", store), ("--out", out)):
        if folder is not None:
            _make_folder(option, folder)
    results = find_runs_of(study, seeds, out, store)
    check_images(results)
    missing = _missing(study, seeds, out, results)
    count = len(seeds) * len(study.cells)
    print(f"study   {study.name}: {count} runs, {len(missing)} to train, in {out}", flush=True)
    _try_rows({task.cell.name: task.cell for task in missing}.values())

    def finished(task: _Task) -> None:
        run = find_run(task.cell, task.seed, out, store)
        assert run is not None
        results[task.cell.name][task.seed] = run
        check_images(results)
        write_tables(study, results, len(seeds), out)

    failed: dict[str, Exception] = {}

    def fails(task: _Task, error: Exception) -> None:
        failed[f"{task.cell.name} seed {task.seed}"] = error
        print(f"{task.label}failed: {error}", flush=True)

    try:
        if jobs > 1:
            _side_by_side(missing, jobs, finished, fails)
        else:
            for task in missing:
                try:
                    _train(task)
                except InputError:
                    raise
                except Exception as error:
                    fails(task, error)
                else:
                    finished(task)
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on") from None
    finally:
        _in_memory.clear()
    write_tables(study, results, len(seeds), out)
    if failed:
        name, first = next(iter(failed.items()))
        raise VitmixError(
            f"{len(failed)} of {len(missing)} runs failed ({', '.join(failed)}), the others are in "
            f"{out / 'study.md'}; {name}: {first}"
        ) from first
    return results


def _make_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"expected {option} to be a folder to write in, cannot make {folder}: {error.strerror}"
        ) from error


def _try_rows(cells: Iterable[Cell]) -> None:
    """Refuse a row that does not fit its model or data before the first one is trained."""
    for cell in cells:
        try:
            check_config(cell.config)
            try_method(cell.config, _data(cell.config))
        except VitmixError as error:
            raise InputError(f"cell {cell.name!r} cannot be trained: {error}") from error


@dataclass(frozen=True)
class _Task:
    """A run to train.

    Attributes:
        out: folder of the run folders.
        teacher: folder of the run that is to be its teacher, where that is one of the study's.
        label: stands before each line of its progress.
    """

    cell: Cell
    seed: int
    out: Path
    teacher: Path | None
    label: str = ""

    @property
    def folder(self) -> Path:
        return self.out / self.cell.folder(self.seed)


def _missing(study: Study, seeds: Sequence[int], out: Path, results: Runs) -> list[_Task]:
    """What is to be trained: seed by seed, the plain runs first, as they are teachers."""
    cells = sorted(study.cells, key=lambda cell: cell.name != "none")
    tasks = []
    for seed in seeds:
        plain = out / cells[0].folder(seed) if cells[0].name == "none" else None
        for cell in cells:
            if seed not in results[cell.name]:
                taught = cell.name != "none" and method_of(cell.config).needs_teacher
                alike = cell.config.without_method() == cells[0].config
                tasks.append(_Task(cell, seed, out, plain if taught and alike else None))
    return [
        replace(task, label=f"[{number}/{len(tasks)}] {task.cell.name} seed {task.seed}  ")
        for number, task in enumerate(tasks, 1)
    ]


def _train(task: _Task) -> None:
    """Train a run, or go on with it."""
    config, folder, teacher = task.cell.config, task.folder, task.teacher
    train_run(
        replace(config, seed=task.seed, out=str(task.out), name=folder.name, overwrite=False),
        data=_data(config),
        teacher_run=teacher if teacher is not None and _trained(teacher) else None,
        resume=folder if (folder / MARKER).is_file() else None,
        label=task.label,
        verbose=False,
    )


def _trained(folder: Path) -> bool:
    """Whether a finished run has its weights here."""
    return (folder / LAST).is_file() and finished_results(folder) is not None


_in_memory: dict[tuple[str, ...], ImageData] = {}  # the data of the run before


def _data(config: TrainConfig) -> ImageData:
    """The data set, read once for runs that read it in the same way."""
    names = ("data", *READING, "mean", "std", "teacher_maps")
    key = (*(repr(getattr(config, name)) for name in names), repr(pretrained_statistics(config)))
    if key not in _in_memory:
        _in_memory.clear()
        _in_memory[key] = load_data(config)
    return _in_memory[key]


# --- several at a time


def _side_by_side(
    tasks: Sequence[_Task],
    jobs: int,
    finished: Callable[[_Task], None],
    fails: Callable[[_Task, Exception], None],
) -> None:
    """Train in processes; a run whose teacher is yet to be trained waits for it."""
    waiting = list(tasks)
    running: dict[Future[None], _Task] = {}
    # SIGTERM is what schedulers send; SIGINT is ignored from the start where a shell runs this in
    # the background, and a run that trains alone stops at it, too.
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(stop, signal.default_int_handler) for stop in stops]
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_process, (jobs,)) as pool:
        try:
            while waiting or running:
                unfinished = {task.folder for task in (*waiting, *running.values())}
                ready = [task for task in waiting if task.teacher not in unfinished]
                for task in ready[: jobs - len(running)]:
                    waiting.remove(task)
                    with _without_interrupts():  # a process may start here
                        running[pool.submit(_train_in_process, task)] = task
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    task = running.pop(future)
                    try:
                        future.result()
                    except (InputError, BrokenProcessPool):
                        raise
                    except Exception as error:
                        fails(task, error)
                    else:
                        finished(task)
        except (KeyboardInterrupt, InputError):  # the others keep a checkpoint and end
            for process in active_children():
                os.kill(process.pid or 0, signal.SIGINT)
            raise
        except BrokenProcessPool:
            raise VitmixError(
                "a process that trained was killed, for want of memory perhaps; the same command "
                "goes on, with fewer --jobs if need be"
            ) from None
        finally:
            for stop, handler in zip(stops, before, strict=True):
                signal.signal(stop, handler)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back, also from processes that start, until they say what to do with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_process(jobs: int) -> None:
    """Share the processor's cores, leave signals to the parent, print no bars, end with it."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    sys.stderr = _PlainStream(sys.stderr.buffer, line_buffering=True)
    Thread(target=_end_with_parent, daemon=True).start()


class _PlainStream(TextIOWrapper):
    def isatty(self) -> bool:
        return False


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_in_process(task: _Task) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _train(task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- measures


def measure_runs(
    study: Study, results: Runs, out: Path, store: Path | None, names: str, limit: int | None
) -> Runs:
    """Take the measures that runs lack; write the tables again, and their figures.

    Args:
        study: the study.
        results: of :func:`run_study`.
        out: folder of the run folders.
        store: folder of stored runs.
        names: of measures, as for ``vitmix evaluate``.
        limit: take them on so many test images; measures that were taken on another number are
            taken again.

    Returns:
        The results with their measures.

    Raises:
        InputError: a run that is stored without them, and has no checkpoint here.
    """
    wanted = []
    for cell in study.cells:
        for seed, known in results[cell.name].items():
            taken, count = known["measures"], known["test_images"]
            missing = [
                name
                for name in chosen_measures(names)
                if name not in taken or taken_on(taken[name]) != min(count, limit or count)
            ]
            if missing:
                wanted.append((cell, seed, missing))
    for cell, seed, _ in wanted:
        folder = out / cell.folder(seed)
        run = finished_results(folder) if _trained(folder) else None
        if run is None or run["started"] != results[cell.name][seed]["started"]:
            raise InputError(
                f"expected the run {folder} for --measures, its figures are stored but its "
                "checkpoint is not there; leave it out with --cells and --seeds, or train it "
                "without --results"
            )
    for cell, seed, missing in wanted:
        folder, config = out / cell.folder(seed), cell.config
        print(f"measure {folder.name}: {', '.join(missing)}", flush=True)
        evaluate_checkpoint(
            str(folder), data=config.data, device=config.device, measures=",".join(missing),
            limit=limit, keep=measures_in(folder),
        )  # fmt: skip
        run = find_run(cell, seed, out, store)
        assert run is not None
        results[cell.name][seed] = run
    write_tables(study, results, max(map(len, results.values())), out)
    measured = {cell: [run["measures"] for run in runs.values()] for cell, runs in results.items()}
    save_study_figures(measured, out, "study")
    return results
