"""The command line: ``vitmix train | evaluate | compare | preview | report | bench | ...``.

Only the standard library is imported here; each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from vitmix.errors import InputError, UnsupportedModelError, VitmixError

if TYPE_CHECKING:
    from pathlib import Path

    from vitmix.options import Parser
    from vitmix.train.config import TrainConfig

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """A sub-command: what it does, an example, its options and its work."""

    summary: str
    example: str
    configure: Callable[[Parser], None]
    run: Callable[[Any], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        0, or 2 for bad input, 1 for anything else that went wrong, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except SystemExit as done:  # --help and --version
        return done.code if isinstance(done.code, int) else 0 if done.code is None else 2
    except BrokenPipeError:  # the reader of our output has gone, as in `vitmix ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        return _fail("; ".join(filter(None, ("interrupted", str(stop)))), 130, debug)
    except (InputError, UnsupportedModelError) as error:
        return _fail(f"error: {error}", 2, debug)
    except VitmixError as error:
        return _fail(f"error: {error}", 1, debug)
    except Exception as error:  # a user sees one line, a developer asks for more
        text = f"error: {type(error).__name__}: {error}; --debug shows where"
        return _fail(text, 1, debug)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("vitmix:", " ".join(message.split()), file=sys.stderr)
    return status


def _dispatch(arguments: list[str]) -> int:
    from vitmix.train.config import suggest

    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        from vitmix._version import __version__

        print(f"vitmix {__version__}")
        return 0
    if name not in COMMANDS:
        raise InputError(
            f"expected a command ({', '.join(COMMANDS)}), got {name!r}"
            f"{suggest(name, COMMANDS)}; vitmix --help lists them"
        )
    from vitmix.options import Parser

    command = COMMANDS[name]
    parser = Parser(f"vitmix {name}", command.summary, command.example)
    command.configure(parser)
    command.run(parser.parse(arguments[1:]))
    return 0


def _overview() -> str:
    lines = [
        "usage: vitmix COMMAND [options]",
        "",
        "Train vision transformers with TokenMixup, TokenMix, TL-Align and their combinations.",
        "",
        "commands:",
        *(f"  {name:10} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "vitmix COMMAND --help shows a command's options and an example.",
        "--debug shows the traceback of an error, --version the version.",
    ]
    return "\n".join(lines)


def _configure_train(parser: Parser) -> None:
    from vitmix.train.config import TrainConfig
    from vitmix.train.recipes import settings_under

    parser.add_config(TrainConfig, base=settings_under)
    parser.add("--resume", str | None, None, "go on with the stopped run in this folder", "Run")


def _settings(options: dict[str, Any]) -> TrainConfig:
    """The settings of a run; ``fake`` data takes the shape of the recipe's."""
    from vitmix.train.config import TrainConfig
    from vitmix.train.recipes import get_recipe

    if options.get("init") is not None:
        from vitmix.train.transfer import with_model

        options = with_model(options)
    config = TrainConfig.from_dict(options)
    if config.recipe is not None and config.data == "fake":
        config.data = get_recipe(config.recipe).fake_data()
    config.validate()
    return config


def _train(options: Any) -> None:
    from pathlib import Path

    from vitmix.train.methods import method_of
    from vitmix.train.resume import finished_results, resumed_settings

    place = options.pop("resume")
    resume = None if place is None else Path(place).expanduser()
    config = _settings(options if resume is None else resumed_settings(resume, options))
    method_of(config)  # what can be refused at once is refused before the slow imports
    if resume is not None:
        results = finished_results(resume)
        if results is not None:
            print(f"nothing is left to do, the run has finished\n{_last_lines(resume, results)}")
            return
    from vitmix.plots.run_figures import save_run_figures
    from vitmix.train.run import train_run

    run = train_run(config, resume=resume, finish=save_run_figures)
    if run.first:
        print(_last_lines(run.folder, run.results))


def _last_lines(folder: Path, results: dict[str, Any]) -> str:
    return (
        f"top-1 {results['top1']:.2f}%  top-5 {results['top5']:.2f}%  "
        f"loss {results['loss']:.4f}  ({results['seconds']:.0f} s)\n"
        f"results {folder / 'results.json'}"
    )


def _configure_evaluate(parser: Parser) -> None:
    parser.add("run", str, None, "run folder (its last.ckpt) or a checkpoint file")
    parser.add("--data", str | None, None, "data set to test on (default: that of the training)")
    parser.add("--test-split", str | None, None, "split to test on (default: as in training)")
    parser.add("--model", str | None, None, "refuse a checkpoint that is not of this model")
    parser.add("--batch-size", int | None, None, "images at a time")
    parser.add("--precision", str | None, None, "fp32, bf16 or fp16 (default: as trained)")
    parser.add("--device", str, "auto", "where to run: auto, cpu, cuda or mps")
    parser.add("--json", bool, False, "print JSON instead of a line")
    parser.add(
        "--measures", str | None, None,
        "further measures between commas, or all: calibration, occlusion, corruptions, fgsm, "
        "localisation; written to evaluation.json and evaluation.png",
    )  # fmt: skip
    parser.add(
        "--limit", int | None, None, "take the measures on so many test images, spread evenly"
    )
    parser.add("--out", str | None, None, "folder for their files (default: that of the run)")


def _evaluate(options: Any) -> None:
    from vitmix.evaluate.checkpoint import evaluate_checkpoint

    print(evaluate_checkpoint(**options))


def _configure_export(parser: Parser) -> None:
    parser.add("run", str, None, "run folder (its last.ckpt) or a checkpoint file")
    parser.add("path", str, None, "file to write, *.safetensors")
    parser.add(
        "--part", Literal["all", "backbone", "features"], "all",
        "all; backbone without the classifier, for timm.create_model(..., num_classes=0); or "
        "features, for timm.create_model(..., features_only=True)",
    )  # fmt: skip


def _export(options: Any) -> None:
    from vitmix.train.export import export_run

    trained = export_run(**options)
    part = "" if options["part"] == "all" else f" ({options['part']})"
    print(
        f"{options['path']}: {trained.config.model}{part}, {len(trained.classes)} classes, "
        f"{trained.img_size} pixels, mean {_figures(trained.mean)}, std {_figures(trained.std)}"
    )


def _figures(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


METHODS = "none,cutmix,tokenmix,tl-align,tokenmixup"


def _configure_compare(parser: Parser) -> None:
    from vitmix.train.config import TrainConfig
    from vitmix.train.recipes import settings_under

    parser.add("--methods", str | None, None, f"methods, between commas [{METHODS}]")
    parser.add(
        "--seeds", str | None, None, "number of seeds from --seed on, or seeds between commas [1]"
    )
    parser.add_config(
        TrainConfig,
        leave_out=("method", "mix", "labels", "tokens"),
        base=partial(settings_under, whole_method=True),
    )
    parser.add("--resume", str | None, None, "go on with the stopped comparison here", "Run")


def _compare(options: Any) -> None:
    from pathlib import Path

    from vitmix.train.resume import resumed_settings

    place = options.pop("resume")
    resume = None if place is None else Path(place).expanduser()
    for name in ("methods", "seeds"):
        if options[name] is None:
            del options[name]
    if resume is not None:
        options = resumed_settings(resume, options, comparison=True)
        report = resume / "report.html"
        if report.is_file():
            print(f"nothing is left to do, the comparison has finished\nreport  {report}")
            return
    from vitmix.evaluate.compare import compare, parse_seeds

    methods = [name.strip() for name in options.get("methods", METHODS).split(",") if name.strip()]
    config = _settings(options)
    seeds = parse_seeds(options.get("seeds", "1"), config.seed)
    comparison = compare(config, methods, seeds, resume=resume)
    print(f"report  {comparison.report}")


METHOD_OPTIONS = ("method", "mix", "labels", "tokens")


def _configure_study(parser: Parser) -> None:
    parser.add(
        "study", str, None,
        "digits, cifar10-few, cifar100-gpu, localisation, parts, combinations, sensitivity, or a "
        "YAML file",
    )  # fmt: skip
    _configure_cells(parser)


def _configure_ablate(parser: Parser) -> None:
    parser.add("table", str, "parts", "parts, combinations or sensitivity")
    _configure_cells(parser)


def _configure_cells(parser: Parser) -> None:
    from vitmix.train.config import TrainConfig
    from vitmix.train.recipes import REPLACED

    parser.add("--cells", str | None, None, "only these cells, between commas")
    parser.add(
        "--seeds", str | None, None, "number of seeds from --seed on, or seeds (the study's own)"
    )
    parser.add(
        "--results", str | None, None,
        "folder of stored results: a run that is in it counts as finished, new ones are added",
    )  # fmt: skip
    parser.add("--jobs", int, 1, "runs to train side by side, in processes of their own")
    parser.add("--measures", str | None, None, "of every run, as by vitmix evaluate; or all")
    parser.add(
        "--limit", int | None, None, "take the measures on so many test images, spread evenly"
    )
    parser.add_config(
        TrainConfig,
        leave_out=(*METHOD_OPTIONS, *REPLACED["mix"], "name", "overwrite"),
    )


def _study(options: Any) -> None:
    from pathlib import Path

    from vitmix.evaluate.compare import parse_seeds
    from vitmix.evaluate.measured import check_measures, chosen_measures
    from vitmix.evaluate.study import read_study
    from vitmix.evaluate.study_runs import measure_runs, run_study
    from vitmix.evaluate.study_tables import show

    name, cells, seeds, stored, jobs, measures, limit = (
        options.pop(key)
        for key in ("study", "cells", "seeds", "results", "jobs", "measures", "limit")
    )
    if jobs < 1:
        raise InputError(f"expected --jobs to be at least 1, got {jobs}")
    chosen = None if cells is None else [cell.strip() for cell in cells.split(",")]
    first, out = options.pop("seed", 0), options.pop("out", None)
    study = read_study(name, options, chosen)
    if measures is not None:
        check_measures(chosen_measures(measures), study.cells[0].config)
    elif limit is not None:
        raise InputError("expected --limit with --measures; add it, or leave --limit out")
    if limit is not None and limit < 1:
        raise InputError(f"expected --limit to be at least 1, got {limit}")
    wanted = parse_seeds(seeds or str(study.seeds), first)
    folder = Path(out or f"runs/{study.name}").expanduser()
    store = None if stored is None else Path(stored).expanduser()
    found = run_study(study, wanted, folder, store, jobs)
    if measures is not None:
        found = measure_runs(study, found, folder, store, measures, limit)
    print(f"\n{show(study, found, len(wanted))}\n")
    print(f"results {folder / 'study.md'}, {folder / 'study.json'}")


def _ablate(options: Any) -> None:
    tables = ("parts", "combinations", "sensitivity")
    table = options.pop("table")
    if table not in tables:
        from vitmix.train.config import suggest

        raise InputError(
            f"expected a table ({', '.join(tables)}), got {table!r}{suggest(table, tables)}"
        )
    _study({"study": table, **options})


def _configure_report(parser: Parser) -> None:
    parser.add("runs", list[str], None, "run folders, or folders of comparisons")
    parser.add("--out", str, "report.html", "file to write; an earlier one is replaced")


def _report(options: Any) -> None:
    from pathlib import Path

    from vitmix.evaluate.report import write_report

    folders = [Path(run).expanduser() for run in options["runs"]]
    path = write_report(folders, Path(options["out"]).expanduser())
    print(f"the report is {path.resolve()}, {path.stat().st_size / 1e6:.1f} MB")


def _configure_models(parser: Parser) -> None:
    parser.add("pattern", str, "*", "name, or a pattern such as 'vit_*'; all by default")


def _models(options: Any) -> None:
    from vitmix.survey import model_names, survey_model, table_row

    names = model_names(options["pattern"])
    if not names:
        raise InputError(
            f"expected the name of a model of vitmix or timm or a pattern that fits some, "
            f"got {options['pattern']!r}"
        )
    if len(names) == 1:
        print(survey_model(names[0]).details())
        return
    for name in names:
        print(table_row(survey_model(name)), flush=True)


def _configure_teach(parser: Parser) -> None:
    from vitmix.train.config import TEACH_OPTIONS, TrainConfig

    parser.add("--model", str | None, None, "teacher: a timm name, with its pretrained weights")
    parser.add(
        "--checkpoint",
        str | None,
        None,
        "teacher: a run folder or checkpoint; with --model, a file of that model's weights",
    )
    parser.add("--out", str, "maps", "folder of the maps; one that was begun goes on")
    parser.add_config(TrainConfig, only=TEACH_OPTIONS)


def _teach(options: Any) -> None:
    from vitmix.train.config import TrainConfig

    model, checkpoint, out = (options.pop(name) for name in ("model", "checkpoint", "out"))
    config = TrainConfig.from_dict(options)
    config.validate()
    if model is None and checkpoint is None:
        raise InputError("expected a teacher, --model NAME or --checkpoint FILE, got neither")
    from vitmix.train.teaching import teach

    maps = teach(config, out, model=model, checkpoint=checkpoint)
    rows, columns = maps.grid
    print(f"{len(maps)} maps of {rows}x{columns} in {maps.folder}")


def _configure_preview(parser: Parser) -> None:
    from vitmix.train.config import PREVIEW_OPTIONS, TrainConfig
    from vitmix.train.recipes import settings_under

    parser.add("--out", str, "preview.png", "picture to write: *.png, *.pdf or *.svg")
    parser.add(
        "--checkpoint", str | None, None, "run folder or checkpoint: its model, data and method"
    )
    parser.add("--samples", int, 3, "samples to show, of a batch of --batch-size")
    parser.add_config(
        TrainConfig, only=PREVIEW_OPTIONS, base=settings_under, instead={"batch_size": 16}
    )


def _preview(options: Any) -> None:
    from vitmix.evaluate.preview import make_preview

    out, checkpoint, samples = (options.pop(name) for name in ("out", "checkpoint", "samples"))
    shown = make_preview(options, checkpoint, samples)
    path = shown.save(out)
    if shown.note:
        print(shown.note)
    print(f"preview {path}")


def _configure_figure(parser: Parser) -> None:
    from vitmix.train.config import LOOK_OPTIONS, TrainConfig

    parser.add("kind", str, None, "saliency, mixing, fluctuation or difficulty")
    parser.add(
        "run", str, None,
        "run folder (its last.ckpt) or a checkpoint file; its settings hold where none are given",
    )  # fmt: skip
    parser.add("--out", str | None, None, "file to write: *.png, *.pdf or *.svg [KIND.png]")
    parser.add("--block", int | None, None, "saliency: the block (default: that of the method)")
    of_the_run = dict.fromkeys(("data", "data_root", "crop_pct", "interpolation", "seed"))
    parser.add_config(TrainConfig, only=LOOK_OPTIONS, instead={**of_the_run, "batch_size": 64})


def _figure(options: Any) -> None:
    from vitmix.evaluate.figures import make_figure

    kind, run, out, block = (options.pop(name) for name in ("kind", "run", "out", "block"))
    print(f"figure  {make_figure(kind, run, options, out, block)}")


def _configure_recipes(parser: Parser) -> None:
    parser.add("pattern", str | None, None, "show one recipe, or list those that have this in them")
    parser.add("--markdown", bool, False, "print the page of all recipes: docs/recipes.md")


def _recipes(options: Any) -> None:
    from vitmix.train.recipes import all_recipes, as_page, as_table, find_recipes

    pattern = options["pattern"]
    if options["markdown"]:
        print(as_page(), end="")
    elif pattern in all_recipes():
        print(all_recipes()[pattern].as_yaml(), end="")
    else:
        print(as_table(find_recipes(pattern)), end="")


def _configure_bench(parser: Parser) -> None:
    parser.add(
        "group",
        str,
        "targets",
        "targets, steps, saliency, horizontal, pixels, pipeline, or all (40 minutes on two cores)",
    )
    parser.add("--quick", bool, False, "few rounds, few and small comparisons (some minutes)")
    parser.add("--seconds", float | None, None, "time for each comparison [10 to 200]")
    parser.add("--rounds", int, 25, "rounds of a comparison at most")
    parser.add("--model", str | None, None, "models, between commas")
    parser.add("--batch-size", str | None, None, "batch sizes, between commas")
    parser.add("--tokens", str | None, None, "horizontal: numbers of tokens, between commas")
    parser.add("--variants", str | None, None, "variants, between commas; ratios are to the first")
    parser.add("--precision", Literal["fp32", "bf16"], "fp32", "arithmetic of steps")
    parser.add("--compile", bool, False, "steps: compile them")
    parser.add("--device", str, "auto", "where to run: auto, cpu, cuda or mps")
    parser.add("--threads", int | None, None, "threads of PyTorch on the CPU")
    parser.add("--data", str, "fake", "pipeline: data set, as --data of vitmix train")
    parser.add("--recipe", str, "cct7-cifar100", "pipeline: settings, see vitmix recipes")
    parser.add("--workers", int, 2, "pipeline: loading processes")
    parser.add("--isolate", bool, True, "a process of its own for each comparison (default: true)")
    parser.add("--json", str | None, None, "write every number to this file")
    parser.add("--write", str | None, None, "renew the tables of this page: docs/benchmarks.md")


def _bench(options: Any) -> None:
    from pathlib import Path

    import torch

    from vitmix.benchmarks.options import BenchOptions, numbers, words
    from vitmix.benchmarks.run import bench
    from vitmix.train.provenance import pick_device

    if options["rounds"] < 1:
        raise InputError(f"expected --rounds to be at least 1, got {options['rounds']}")
    chosen = BenchOptions(
        device=pick_device(options["device"]),
        precision=options["precision"],
        compile=options["compile"],
        models=words(options["model"]),
        batch_sizes=numbers("--batch-size", options["batch_size"]),
        tokens=numbers("--tokens", options["tokens"]),
        variants=words(options["variants"]),
        rounds=options["rounds"],
        seconds=options["seconds"],
        quick=options["quick"],
        data=options["data"],
        recipe=options["recipe"],
        workers=options["workers"],
        isolate=options["isolate"],
    )
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    files = {name: options[name] and Path(options[name]).expanduser() for name in ("json", "write")}
    bench(
        options["group"],
        chosen,
        say=partial(print, flush=True),
        json_path=files["json"],
        page=files["write"],
        command=" ".join(["vitmix", *sys.argv[1:]]),
    )


def _configure_demo(parser: Parser) -> None:
    parser.add("--out", str, "demo", "folder to write to; an earlier demo there is replaced")
    parser.add("--epochs", int | None, None, "passes over the data (default: the demo's own)")


def _demo(options: Any) -> None:
    from vitmix.evaluate.demo import demo

    report = demo(options["out"], epochs=options["epochs"])
    print(f"the report is {report.resolve()}")


COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a model with one method",
        "vitmix train --data digits --model cct_2_3x2_32 --method tokenmixup --epochs 20",
        _configure_train,
        _train,
    ),
    "evaluate": Command(
        "measure a trained model",
        "vitmix evaluate runs/digits-cct_2_3x2_32-tokenmixup-seed0",
        _configure_evaluate,
        _evaluate,
    ),
    "export": Command(
        "write a trained model's weights for other programs",
        "vitmix export runs/digits-cct_2_3x2_32-tokenmixup-seed0 weights.safetensors",
        _configure_export,
        _export,
    ),
    "recipes": Command(
        "list the published settings that train can start from, or show one",
        "vitmix recipes cct7-cifar100-tokenmixup",
        _configure_recipes,
        _recipes,
    ),
    "compare": Command(
        "train several methods over several seeds and tabulate them",
        "vitmix compare --data digits --methods none,cutmix,tl-align --seeds 3 --epochs 10",
        _configure_compare,
        _compare,
    ),
    "study": Command(
        "train what is missing in a table of settings over seeds",
        "vitmix study cifar10-few --data path/to/cifar10-5k --out runs/cifar10-few",
        _configure_study,
        _study,
    ),
    "ablate": Command(
        "take TokenMixup apart on your data: its parts, combinations, sensitivity",
        "vitmix ablate parts --data digits --model cct_2_3x2_32 --epochs 20 --seeds 3",
        _configure_ablate,
        _ablate,
    ),
    "preview": Command(
        "show what a method mixes, as a picture of some images, tokens and labels",
        "vitmix preview --data photos --model vit_small_patch16_224 --method tokenmixup",
        _configure_preview,
        _preview,
    ),
    "figure": Command(
        "draw a figure of the papers for a run: saliency, mixing, fluctuation or difficulty",
        "vitmix figure saliency runs/digits-cct_2_3x2_32-tokenmixup-seed0 --out saliency.png",
        _configure_figure,
        _figure,
    ),
    "report": Command(
        "write one HTML page about finished runs",
        "vitmix report runs/none-seed0 runs/tokenmixup-seed0 --out report.html",
        _configure_report,
        _report,
    ),
    "models": Command(
        "say which registered models are supported, and with which stages",
        "vitmix models 'swin*'",
        _configure_models,
        _models,
    ),
    "teach": Command(
        "store a teacher's activation maps of a data set, for tokenmix",
        "vitmix teach --data path/to/folder --checkpoint runs/plain --out maps",
        _configure_teach,
        _teach,
    ),
    "bench": Command(
        "measure what mixing costs here, side by side with other ways",
        "vitmix bench targets --quick",
        _configure_bench,
        _bench,
    ),
    "demo": Command(
        "compare five methods on handwritten digits and write one HTML page",
        "vitmix demo",
        _configure_demo,
        _demo,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
