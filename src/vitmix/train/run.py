"""One training run, from settings to ``results.json``."""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitmix.errors import InputError
from vitmix.processes import alone
from vitmix.train.callbacks import ConsoleProgress, MixedImages, Predictions, WeightAverage
from vitmix.train.checkpoint import (
    LAST,
    load_trained,
    make_facts,
    make_model,
    newest_checkpoint,
    read_checkpoint,
)
from vitmix.train.data import ImageData, load_data
from vitmix.train.folder import MARKER, claim_folder, held, read_settings, write_json
from vitmix.train.loading import check_crops, make_augment, make_loader
from vitmix.train.loggers import check_loggers, close_loggers, make_loggers
from vitmix.train.methods import method_name, method_of
from vitmix.train.module import MixingTask, NonFiniteLossError
from vitmix.train.optimiser import check_optimiser, parameter_groups
from vitmix.train.parallel import (
    Processes,
    make_plugins,
    make_strategy,
    require_whole_blocks,
    shared_folder,
    tell_folder,
)
from vitmix.train.policies import make_policy
from vitmix.train.provenance import commit, device_name, pick_device, versions
from vitmix.train.resume import check_origin, finished_results
from vitmix.train.saving import (
    Checkpoints,
    RandomStates,
    WholeFiles,
    restored_signals,
)
from vitmix.train.stages import build_mixing, stages_in_words
from vitmix.train.teachers import named_teacher
from vitmix.train.transfer import freeze_backbone, load_start, normalised, read_start
from vitmix.train.trial import try_step
from vitmix.weights import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import lightning.pytorch as pl
    from torch import nn

    from vitmix.train.config import TrainConfig

__all__ = [
    "Interrupted",
    "RunResult",
    "check_config",
    "default_name",
    "train_run",
]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says where the checkpoint is."""


@dataclass(frozen=True)
class RunResult:
    """A finished run, as each of its processes sees it; the ``first`` one writes and prints."""

    folder: Path
    results: dict[str, Any]
    task: MixingTask
    data: ImageData
    first: bool = True


def train_run(
    config: TrainConfig,
    *,
    data: ImageData | None = None,
    teacher_run: Path | None = None,
    resume: Path | None = None,
    label: str = "",
    verbose: bool = True,
    finish: Callable[[RunResult], object] | None = None,
) -> RunResult:
    """Train a model as ``config`` says, and leave a folder with everything about it.

    A run that goes on ends with the weights that it would have had without a stop, bit for bit
    where PyTorch itself repeats its numbers, as on the CPU. One that has ended is read again.

    Args:
        config: the settings.
        data: the data set, where it has been read before.
        teacher_run: run folder of a plain model to be the teacher with ``teacher="auto"``.
        resume: folder of a run to go on with; ``config`` must be that of the run.
        label: put in front of each line of progress.
        verbose: print what is trained and where it is written.
        finish: is called with the result before ``results.json`` marks the run as finished.

    Raises:
        InputError: settings, data, model or checkpoint do not fit, and nothing was written; or
            another process trains in the folder.
        NonFiniteLossError: the loss became NaN; the message names the step and the checkpoint.
        Interrupted: Ctrl-C; the message names the checkpoint.
    """
    check_config(config)
    commit()  # as it is now, not when the run ends
    with ExitStack() as locks:
        return _train_run(
            config, data, teacher_run, resume, label, verbose, finish, Processes.of(config), locks
        )


def _train_run(
    config: TrainConfig,
    data: ImageData | None,
    teacher_run: Path | None,
    resume: Path | None,
    label: str,
    verbose: bool,
    finish: Callable[[RunResult], object] | None,
    processes: Processes,
    locks: ExitStack,
) -> RunResult:
    """See :func:`train_run`; ``locks`` keep the folder until they are closed."""
    verbose &= processes.first
    if resume is not None and processes.first:
        read_settings(resume)
        locks.enter_context(held(resume))
    spec = method_of(config)
    path, saved = (newest_checkpoint(resume) if resume is not None else None) or (None, None)
    # A checkpoint of the run knows what it began with, which may be gone.
    start = None if config.init is None or saved is not None else read_start(config.init)
    data = data or load_data(config)
    check_crops(data, config)
    if config.init is not None:
        origin = start.origin if start is not None else (saved or {})["vitmix"]
        data = normalised(data, config, origin)
    classes = len(data.classes)
    torch.manual_seed(config.seed)
    # The weights of a checkpoint replace pretrained ones.
    fetched = config if saved is None else replace(config, pretrained=False)
    model = make_model(fetched, classes, data.img_size)
    init = None if saved is None else saved["vitmix"].get("init")
    if start is not None:
        init = load_start(model, start, data.classes)
    online = spec.needs_teacher and config.teacher_maps is None
    teacher = _make_teacher(config, data) if online else None
    mixing = build_mixing(
        model, config, num_classes=classes, img_size=data.img_size, teacher=teacher, maps=data.maps
    )
    try_step(mixing, data)
    if config.linear_probe:
        freeze_backbone(model)
    require_whole_blocks(mixing, config)
    parameter_groups(mixing, config)  # refuses what the optimiser cannot do
    own_seed = processes.seed(config.seed)
    mixing.generator = torch.Generator().manual_seed(own_seed + 1)
    default = default_name(
        *((config.recipe,) if config.recipe else (data.name, config.model, method_name(config))),
        f"seed{config.seed}",
    )
    folder = resume
    if folder is None and processes.first:
        settings = config.to_dict()
        folder = claim_folder(config.out, config.name, default, config.overwrite, settings)
        locks.enter_context(held(folder))
    folder = folder or shared_folder(config)
    if processes.first and processes.count > 1 and config.name is None:
        tell_folder(folder)  # a teacher's run has a name, and leaves this as it is
    if verbose:
        _announce(config, data, mixing, folder, init)
        if resume is not None:
            steps = 0 if saved is None else saved["global_step"]
            print(f"resume  after step {steps}", flush=True)
    if teacher is not None and config.teacher == "auto":
        _fill_teacher(teacher, config, data, teacher_run, folder, label, processes)
    facts = make_facts(config, data, stages_in_words(mixing), teacher, init)
    if saved is not None:
        check_origin(saved["vitmix"], facts)
    loader = make_loader(data, config, train=True, processes=processes)
    generator = torch.Generator().manual_seed(own_seed + 2)
    task = MixingTask(
        mixing, config,
        augment=make_augment(data, config, generator, train=True),
        prepare=make_augment(data, config, generator, train=False),
        num_classes=classes, epoch_steps=len(loader), facts=facts,
    )  # fmt: skip
    if config.channels_last:
        task.to(memory_format=torch.channels_last)
    if config.compile:
        mixing.compile()
    results = finished_results(folder)
    if results is not None and saved is not None:
        task.on_load_checkpoint(saved)
        task.load_state_dict(saved["state_dict"])
        return RunResult(folder, results, task, data, processes.first)
    if path is not None and path.name != LAST:  # a damaged one gives way to the one before
        path = path.replace(folder / LAST) if processes.first else folder / LAST
    checkpoints = Checkpoints(
        folder, steps=config.checkpoint_steps, minutes=config.checkpoint_minutes
    )
    states = RandomStates(own_seed, mixing=mixing.generator, augment=generator)
    callbacks = [states, checkpoints, Predictions(folder / "predictions.npz", data.classes)]
    if processes.first:
        callbacks.insert(0, ConsoleProgress(label))
        if config.image_epochs:
            callbacks.insert(1, MixedImages(data, folder / "images", config.image_epochs))
    trainer = _make_trainer(config, folder, callbacks, processes, saved)
    if teacher is not None:
        teacher.to(trainer.strategy.root_device)  # labels hold it, no module does
    test = make_loader(data, config, train=False, processes=processes)
    try:
        _fit(trainer, task, loader, test, checkpoints, path)
    finally:  # the next run of this process may come behind one that failed
        close_loggers(trainer.loggers)
    if teacher is not None:
        teacher.cpu()  # as Lightning does with everything else
    results = _results(config, data, task, checkpoints)
    run = RunResult(folder, results, task, data, processes.first)
    if processes.first:
        if config.strategy == "fsdp":
            model = make_model(replace(config, pretrained=False), classes, data.img_size)
            task.mixing = build_mixing(
                model, config, num_classes=classes, img_size=data.img_size, teacher=teacher,
                maps=data.maps,
            )  # fmt: skip
            task.load_state_dict(read_checkpoint(folder / LAST)["state_dict"])
        with alone():
            if finish is not None:
                finish(run)
        write_json(folder / "results.json", run.results)
    return run


def _results(
    config: TrainConfig, data: ImageData, task: MixingTask, checkpoints: Checkpoints
) -> dict[str, Any]:
    """What ``results.json`` holds."""
    last = task.history[-1]
    images = min(task.steps * config.batch_size, len(data.train) * config.epochs)
    return {
        "top1": last["val/top1"],
        "top5": last["val/top5"],
        "loss": last["val/loss"],
        "best_top1": checkpoints.best_top1,
        "best_epoch": checkpoints.best_epoch,
        "epochs": int(last["epoch"]),
        "steps": task.steps,
        "method": method_name(config),
        "token_stages": task.facts["made_from"]["token stages"],
        "model": config.model,
        "data": config.data,
        "data_fingerprint": task.facts["made_from"]["data"],
        "parameters": sum(p.numel() for p in task.mixing.model.parameters()),
        "classes": len(data.classes),
        "train_images": len(data.train),
        "test_images": len(data.test),
        "skipped_images": data.skipped,
        "seed": config.seed,
        "precision": config.precision,
        "device": device_name(torch.device(pick_device(config.device))),
        "seconds": checkpoints.seconds,
        "images_per_second": images / checkpoints.seconds,
        "started": checkpoints.started,
        "init": task.facts["init"],
        "commit": commit(),
        "versions": versions(),
        "config": config.to_dict(),
    }


def check_config(config: TrainConfig) -> None:
    """Everything that can be refused before data is read."""
    config.validate()
    make_policy(config.aa, config.color_jitter)
    check_optimiser(config)
    check_loggers(config)
    device = pick_device(config.device)
    if config.precision == "fp16" and device == "cpu":
        raise InputError("expected a GPU for --precision fp16, got the CPU; use bf16 or fp32")
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def default_name(*parts: str) -> str:
    """A folder name of these words, without signs that file systems dislike."""
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))


def _announce(
    config: TrainConfig, data: ImageData, mixing: Any, folder: Path, init: dict[str, Any] | None
) -> None:
    side = data.img_size
    print(
        f"data    {data.name}: {len(data.train)} training and {len(data.test)} test images, "
        f"{len(data.classes)} classes, {side}x{side}"
    )
    if data.skipped:
        print(f"        {data.skipped} corrupt images skipped")
    millions = sum(p.numel() for p in mixing.model.parameters()) / 1e6
    print(f"model   {config.model}, {millions:.2f} M parameters, {config.precision}")
    if init is not None:
        print(f"init    {init['path']}: {init['taken']} tensors taken")
        for word in ("new", "resampled"):
            if init[word]:
                print(f"        {word}: {listed(init[word])}")
    if config.linear_probe:
        names = [name for name, value in mixing.model.named_parameters() if value.requires_grad]
        print(f"probe   only {listed(names)} learn")
    print(f"method  {method_name(config)}")
    for stage in mixing.tokens:
        print(f"        {type(stage).__name__}: {stage.extra_repr()}")
    print(f"folder  {folder}", flush=True)


def _make_teacher(config: TrainConfig, data: ImageData) -> nn.Module:
    """The teacher; with ``auto`` one without knowledge yet, see :func:`_fill_teacher`."""
    classes = len(data.classes)
    if config.teacher == "auto":
        return make_model(replace(config, pretrained=False), classes, data.img_size).eval()
    return named_teacher(
        config.teacher, data.classes, data.name, data.img_size, mean=data.mean, std=data.std
    )


def _fill_teacher(
    teacher: nn.Module,
    config: TrainConfig,
    data: ImageData,
    run: Path | None,
    folder: Path,
    label: str,
    processes: Processes,
) -> None:
    """Load the plain model of ``run`` into the teacher; train one first where there is none."""
    if run is None:
        plain = config.without_method(out=str(folder), name="teacher")
        run = folder / "teacher"
        resume = run if (run / MARKER).is_file() else None
        if resume is None or finished_results(run) is None:
            if processes.first:
                print(f"{label}training the teacher: {config.model} without mixing", flush=True)
            try:
                train_run(plain, data=data, resume=resume, label=f"{label}teacher ", verbose=False)
            except Interrupted:
                raise Interrupted(f"go on with --resume {folder}") from None
    teacher.load_state_dict(load_trained(run).model.state_dict())


def _make_trainer(
    config: TrainConfig,
    folder: Path,
    callbacks: list[pl.Callback],
    processes: Processes,
    saved: dict[str, Any] | None,
) -> pl.Trainer:
    import lightning.pytorch as pl

    precision: Any = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    if config.model_ema:
        callbacks = [WeightAverage(config.model_ema_decay), *callbacks]
    steps = 0 if saved is None else saved["global_step"]
    with _quiet():
        return pl.Trainer(
            accelerator={"cuda": "gpu"}.get(device := pick_device(config.device), device),
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=make_strategy(config),
            precision=precision[config.precision],
            max_epochs=config.epochs,
            check_val_every_n_epoch=config.eval_epochs,
            gradient_clip_val=config.clip_grad,
            callbacks=callbacks,
            logger=make_loggers(config, folder, steps) if processes.first else [],
            plugins=[WholeFiles(), *make_plugins()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )


def _fit(
    trainer: pl.Trainer,
    task: MixingTask,
    train: Any,
    test: Any,
    checkpoints: Checkpoints,
    path: Path | None,
) -> None:
    """Train; Ctrl-C and a broken loss become errors that say where the checkpoint is."""
    kept = f"the checkpoint is {checkpoints.last}"
    with _quiet(), restored_signals():
        try:
            trainer.fit(task, train, test, ckpt_path=path, weights_only=True)
        except NonFiniteLossError as error:
            where = kept if checkpoints.last.exists() else "no epoch was finished"
            raise NonFiniteLossError(f"{error}; {where}; try a smaller --lr") from None
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns Ctrl-C into SystemExit after the callbacks have run.
            if isinstance(error, SystemExit) and not trainer.interrupted:
                raise
            where = kept if checkpoints.last.exists() else "nothing was trained yet"
            raise Interrupted(f"{where}; go on with --resume {checkpoints.folder}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks about choices that are ours off the console."""
    logger = logging.getLogger("lightning.pytorch")
    fabric = logging.getLogger("lightning.fabric")
    levels = logger.level, fabric.level
    logger.setLevel(logging.ERROR)
    fabric.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        try:
            yield
        finally:
            logger.setLevel(levels[0])
            fabric.setLevel(levels[1])
