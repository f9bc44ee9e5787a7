"""Several methods over several seeds, trained the same way and tabulated."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.evaluate.report import write_report
from vitmix.evaluate.table import as_markdown, as_text, header, summarise, table_rows
from vitmix.plots.curves import learning_curves, read_metrics
from vitmix.plots.style import LIGHT, themed
from vitmix.train.checkpoint import make_model
from vitmix.train.data import load_data
from vitmix.train.folder import MARKER, claim_folder, replacing, write_json, write_text
from vitmix.train.methods import method_name, method_of, unused_options
from vitmix.train.parallel import Processes
from vitmix.train.provenance import commit, versions
from vitmix.train.recipes import settings_under
from vitmix.train.run import Interrupted, check_config, default_name, train_run
from vitmix.train.transfer import load_start, read_start
from vitmix.train.trial import try_method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitmix.train.config import TrainConfig

__all__ = ["Comparison", "compare", "parse_seeds"]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison."""

    folder: Path
    report: Path
    summaries: list[dict[str, Any]]


def parse_seeds(text: str, first: int) -> list[int]:
    """``"3"``: three seeds from ``first`` on; ``"0,4,7"``: these seeds.

    >>> parse_seeds("2", 5), parse_seeds("1,4", 0)
    ([5, 6], [1, 4])
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] > 0:
        return list(range(first, first + numbers[0]))
    if len(numbers) < 2 or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise InputError(
            f"expected --seeds to be a number of seeds, or different seeds between commas, "
            f"got {text!r}"
        )
    return numbers


def compare(
    config: TrainConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    resume: Path | None = None,
    title: str = "",
    command: str = "",
) -> Comparison:
    """Train every method with every seed; write table, plots and report.

    Teachers of ``tokenmix`` with ``teacher="auto"`` are the runs of ``none`` with the same seed,
    where there are such.

    Args:
        config: the settings that the runs share.
        methods: the methods.
        seeds: the seeds.
        resume: folder of a comparison to go on with; finished runs in it are not trained again.
        title: heading of the report.
        command: what the report says it was made by.

    Raises:
        InputError: settings that do not fit; nothing was written.
    """
    if not methods or len({Path(method).stem for method in methods}) < len(methods):
        raise InputError(
            f"expected --methods to be different methods between commas, got {','.join(methods)!r}"
        )
    check_config(config)
    if Processes.of(config).count > 1:
        raise InputError(
            "expected one process for a comparison, got several; compare with --devices 1, or "
            "train each method with vitmix train"
        )
    data = load_data(config)
    settled = {method: _settings_of(config, method) for method in methods}
    titles = _titles(settled)
    for chosen in settled.values():
        try_method(chosen, data)
    if config.init is not None and resume is None:
        model = make_model(config, len(data.classes), data.img_size)
        load_start(model, read_start(config.init), data.classes)
    default = default_name("compare", data.name, config.model)
    listed = ",".join(map(str, seeds))
    settings: dict[str, Any] = {
        "methods": ",".join(methods),
        "seeds": listed if len(seeds) > 1 else "1",
        **replace(config, seed=seeds[0]).to_dict(),
    }
    folder = resume or claim_folder(config.out, config.name, default, config.overwrite, settings)
    print(f"data    {data.name}: {len(data.train)} training, {len(data.test)} test images")
    print(f"model   {config.model}, {config.epochs} epochs, seeds {listed}")
    print(f"folder  {folder}", flush=True)
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    plain: dict[int, Path] = {}
    # The plain runs first: they are the teachers.
    order = [(seed, method) for seed in seeds for method in sorted(methods, key="none".__ne__)]
    for number, (seed, method) in enumerate(order, 1):
        name = f"{Path(method).stem}-seed{seed}"
        begun = folder / name
        try:
            run = train_run(
                replace(settled[method], seed=seed, out=str(folder), name=name, overwrite=False),
                data=data,
                teacher_run=plain.get(seed),
                resume=begun if (begun / MARKER).is_file() else None,
                label=f"[{number}/{len(order)}] {Path(method).stem} seed {seed}  ",
                verbose=False,
            )
        except Interrupted:
            raise Interrupted(f"go on with vitmix compare --resume {folder}") from None
        results[method].append(run.results)
        if method == "none":
            plain[seed] = run.folder
        write_json(folder / "compare.json", _document(config, seeds, titles, results))
    summaries = [summarise(titles[method], results[method]) for method in methods]
    rows = table_rows(summaries)
    write_text(folder / "compare.md", as_markdown(header(summaries), rows))
    metrics = {
        titles[method]: [read_metrics(folder / f"{Path(method).stem}-seed{seed}") for seed in seeds]
        for method in methods
    }
    with themed(LIGHT):
        figure = learning_curves(metrics)
        with replacing(folder / "compare.png") as temporary:
            figure.savefig(temporary, dpi=160)
    report = write_report(
        [folder / f"{Path(method).stem}-seed{seed}" for method in methods for seed in seeds],
        folder / "report.html",
        title=title,
        command=command or _command(config, methods, seeds),
    )
    print(f"\n{as_text(header(summaries), rows)}\n", flush=True)
    return Comparison(folder, report, summaries)


def _settings_of(config: TrainConfig, method: str) -> TrainConfig:
    """The settings for one of several methods: without options that only others use."""
    spec = method_of(replace(config, method=method))
    return replace(config.without(unused_options(spec)), method=method)


def _titles(settled: dict[str, TrainConfig]) -> dict[str, str]:
    """What to call the rows: what a method became follows where all rows got a stage.

    Raises:
        InputError: two rows are the same method.
    """
    first: dict[str, str] = {}
    titles = {}
    for method, config in settled.items():
        stem, whole = Path(method).stem, method_name(config)
        same = first.setdefault(repr(method_of(config)), stem)
        if same != stem:
            raise InputError(
                f"expected --methods to be different methods, got {same} and {stem}, which are "
                f"both {whole} with the options given; leave one out"
            )
        titles[method] = stem if whole == stem else f"{stem} ({whole})"
    return titles


def _document(
    config: TrainConfig,
    seeds: Sequence[int],
    titles: dict[str, str],
    results: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """What ``compare.json`` holds; complete after every run."""
    return {
        "methods": [summarise(titles[method], runs) for method, runs in results.items() if runs],
        "seeds": list(seeds),
        "config": config.to_dict(),
        "commit": commit(),
        "versions": versions(),
        "runs": [run for runs in results.values() for run in runs],
    }


# Settings that the methods, the seeds and a new folder stand for.
NOT_REPEATED = {"method", "mix", "labels", "tokens", "seed", "out", "name", "overwrite"}


def _command(config: TrainConfig, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """The same comparison, for people who read the report."""
    recipe = {} if config.recipe is None else {"recipe": config.recipe}
    beneath = settings_under(recipe, whole_method=True)
    words = ["vitmix", "compare", "--methods", ",".join(methods)]
    if len(seeds) > 1:
        words += ["--seeds", ",".join(map(str, seeds))]
    elif seeds[0]:
        words += ["--seed", str(seeds[0])]
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in NOT_REPEATED or value == beneath.get(entry.name, entry.default):
            continue
        words.append("--" + entry.name.replace("_", "-"))
        if entry.metadata["count"] is not None:
            words += map(str, value)
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(json.dumps(value))
    return shlex.join(words)
