"""The settings of a run: one dataclass, whose every field is a command-line option and a YAML key.

Nothing heavy is imported here, so that ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import difflib
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vitmix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "LOOK_OPTIONS", "PREVIEW_OPTIONS", "TEACH_OPTIONS", "Device", "Interpolation", "Precision",
    "Strategy", "TrainConfig", "suggest",
]  # fmt: skip

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Strategy = Literal["ddp", "fsdp"]
Interpolation = Literal["bicubic", "bilinear"]
Stages = dict[str, Any] | list[Any] | str  # a name, {name: ..., argument: ...}, or several of them


# Settings of a run that mean the same to `vitmix teach`.
TEACH_OPTIONS = (
    "data", "data_root", "download", "label_column", "skip_corrupt", "img_size", "mean", "std",
    "workers", "batch_size", "device", "threads",
)  # fmt: skip

# Settings that say which images of a run are looked at, and how.
LOOK_OPTIONS = (
    "data", "data_root", "download", "label_column", "skip_corrupt", "crop_pct", "interpolation",
    "mean", "std", "batch_size", "device", "threads", "seed",
)  # fmt: skip

# Those that a picture of what a method mixes depends on.
PREVIEW_OPTIONS = (
    *LOOK_OPTIONS, "recipe", "img_size", "model", "pretrained", "model_kwargs", "method", "mix",
    "labels", "tokens", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode",
    "alpha", "tau", "rho", "kappa", "block", "vertical_block", "teacher",
)  # fmt: skip


def option(group: str, default: T, text: str, count: int | None = None) -> T:
    """A dataclass field with the group and the help text that the command line shows.

    Args:
        group: heading in the help.
        default: value where none is given.
        text: what the help says.
        count: number of values that the option takes, for a list.
    """
    made: T = field(default=default, metadata={"group": group, "help": text, "count": count})
    return made


@dataclass
class TrainConfig:
    """Everything that a training run needs to know.

    The defaults follow the published CCT settings where these exist (AdamW 6e-4, weight decay
    0.06, batch 128, label smoothing 0.1).
    """

    recipe: str | None = option(
        "Recipe", None, "settings to start from, changed by a file and by options: vitmix recipes"
    )

    data: str = option(
        "Data",
        "digits",
        "digits (comes with scikit-learn), a folder of class folders, a folder of Parquet files in "
        "the Hugging Face image layout, a torchvision data set such as cifar10, hf:NAME for what "
        "the datasets library loads (hub name, NAME:CONFIGURATION, folder or file), or fake "
        "(random images; fake:10x32x640 for 10 classes, side 32 and 640 training images)",
    )
    data_root: str = option("Data", "data", "where torchvision's data sets are stored")
    download: bool = option("Data", False, "let torchvision fetch a data set that is not there yet")
    label_column: str | None = option(
        "Data", None, "label column of Parquet files or hf:... (default: the first ClassLabel)"
    )
    train_limit: int | None = option("Data", None, "use only the first N training rows")
    test_split: str | None = option(
        "Data", None, "split to test on, such as validation (default: test, or what there is)"
    )
    test_share: float = option(
        "Data", 0.2, "share of a data set that has no test images of its own to test on"
    )
    val_share: float | None = option(
        "Data", None, "hold out this share of the training images and test on it instead"
    )
    skip_corrupt: bool = option("Data", False, "skip and count images that cannot be decoded")
    img_size: int | None = option(
        "Data", None, "side in pixels that images are brought to (default: the size they have)"
    )
    crop_pct: float = option(
        "Data", 1.0, "side of the middle cut out of a test image, as a share of its shorter side"
    )
    interpolation: Interpolation = option("Data", "bicubic", "how test images are resized")
    mean: list[float] | None = option(
        "Data",
        None,
        "mean of each channel in [0, 1] (default: that of --init or pretrained weights, else the "
        "data's, or ImageNet's)",
        3,
    )
    std: list[float] | None = option(
        "Data", None, "standard deviation of each channel (default: likewise)", 3
    )
    workers: int = option(
        "Data",
        4,
        "processes that decode images too large to hold in memory, one a processor core at most",
    )

    crop_padding: int | None = option(
        "Augmentation", None, "padding of the random crop (default: 1/8 of the image side)"
    )
    scale: list[float] | None = option(
        "Augmentation",
        None,
        "least and largest share of the image in a random resized crop (default: 0.08 1.0 for "
        "images that are decoded when needed; a padded crop for those held in memory)",
        2,
    )
    ratio: list[float] | None = option(
        "Augmentation", None, "least and largest aspect ratio of that crop (default: 3/4 4/3)", 2
    )
    train_interpolation: Literal["bicubic", "bilinear", "random"] = option(
        "Augmentation", "bicubic", "how that crop is resized"
    )
    hflip: float | None = option(
        "Augmentation", None, "probability of a horizontal flip (default: 0.5, for digits 0)"
    )
    aa: str = option(
        "Augmentation", "none", "none, trivial, or RandAugment in timm's notation: rand-m9-mstd0.5"
    )
    color_jitter: float | None = option(
        "Augmentation", None, "strength of changes of brightness, contrast and saturation"
    )
    aug_repeats: int = option(
        "Augmentation",
        1,
        "times that an image is shown in a row, augmented anew; an epoch shows fewer",
    )
    reprob: float = option("Augmentation", 0.0, "probability of random erasing")

    model: str = option("Model", "cct_2_3x2_32", "a CCT of vitmix.models or any timm name")
    pretrained: bool = option("Model", False, "start from timm's pretrained weights")
    init: str | None = option(
        "Model",
        None,
        "start from these weights: a run folder, its .ckpt, or a file of weights (the model is "
        "theirs unless --model is given; for other classes the classifier is made anew)",
    )
    linear_probe: bool = option(
        "Model", False, "train the classifier alone; the rest stays as --init or --pretrained is"
    )
    drop_path: float | None = option("Model", None, "stochastic depth (default: the model's own)")
    model_kwargs: dict[str, Any] | None = option(
        "Model", None, "more arguments of the model, such as {depth: 6}"
    )

    method: str = option(
        "Method",
        "none",
        "none, mixup, cutmix, tokenmix, tokenmix-area, transmix, tl-align, manifold-mixup, "
        "tokenmixup (both kinds), tokenmixup-h, tokenmixup-v, several joined by +, or a YAML file "
        "with mix, labels, tokens",
    )
    mix: Stages | None = option(
        "Method",
        None,
        "pixel stage instead of the method's: none, mixup, cutmix, tokenmix, with arguments as in "
        "{name: tokenmix, mask: random}, or a list of which one is drawn for each batch",
    )
    labels: Stages | None = option(
        "Method", None, "label stage instead of the method's: area, attention, teacher, aligned"
    )
    tokens: Stages | None = option(
        "Method",
        None,
        "token stages instead of the method's: none, horizontal, vertical, manifold, with "
        "arguments as in [{name: horizontal, block: 2, rho: 0.005}, vertical]",
    )
    mixup: float | None = option(
        "Method", None, "Beta parameter of Mixup, added to the method; 0: off"
    )
    cutmix: float | None = option("Method", None, "Beta parameter of CutMix, likewise")
    mixup_prob: float | None = option(
        "Method", None, "probability that pixels are mixed at all (default: 1)"
    )
    mixup_switch_prob: float | None = option(
        "Method", None, "probability of the second of two pixel mixes (default: 0.5)"
    )
    mixup_mode: Literal["batch", "pair", "elem"] | None = option(
        "Method", None, "what shares one draw of the pixel mix (default: the batch)"
    )
    alpha: float | None = option("Method", None, "Beta parameter of every pixel mix")
    tau: float | str | None = option(
        "Method",
        None,
        "horizontal: samples with a ScoreNet loss below tau (nats) are mixed; auto:0.5 keeps the "
        "share of mixed samples at 50%%",
    )
    rho: float | str | None = option(
        "Method",
        None,
        "horizontal: least gain of saliency for a token; auto:0.3 keeps the share of replaced "
        "tokens in mixed samples at 30%%",
    )
    kappa: int | None = option(
        "Method", None, "vertical: tokens taken from each earlier block (default: as published)"
    )
    block: int | None = option(
        "Method",
        None,
        "block of the token stage, counted from 0 (default: as published, scaled to the depth)",
    )
    vertical_block: int | None = option(
        "Method", None, "block of the vertical stage, when there are two"
    )
    teacher: str = option(
        "Method",
        "auto",
        "teacher of tokenmix: auto (trains a plain model first), a checkpoint, or a timm name",
    )
    teacher_maps: str | None = option(
        "Method", None, "folder that vitmix teach made: its maps instead of a teacher"
    )

    epochs: int = option("Optimisation", 10, "passes over the training data")
    max_steps: int | None = option("Optimisation", None, "stop after so many steps (a dry run)")
    batch_size: int = option("Optimisation", 128, "images a step, of all processes together")
    opt: str = option("Optimisation", "adamw", "optimiser by timm's name: adamw, sgd, lamb, ...")
    opt_kwargs: dict[str, Any] | None = option(
        "Optimisation", None, "more arguments of the optimiser, such as {betas: [0.9, 0.95]}"
    )
    lr: float = option("Optimisation", 6e-4, "peak learning rate")
    lr_base_size: int | None = option(
        "Optimisation",
        None,
        "batch size that --lr is meant for; with another --batch-size it is scaled",
    )
    lr_base_scale: Literal["linear", "sqrt"] = option(
        "Optimisation", "linear", "how it is scaled with the batch size"
    )
    layer_decay: float | None = option(
        "Optimisation", None, "factor of the learning rate from a layer to the one before"
    )
    min_lr: float = option("Optimisation", 1e-5, "learning rate at the end of the cosine")
    weight_decay: float = option(
        "Optimisation", 0.06, "weight decay (none on biases, norms and timm's positions)"
    )
    warmup_epochs: float = option("Optimisation", 1.0, "epochs of linear warm-up")
    smoothing: float = option("Optimisation", 0.1, "label smoothing")
    bce_loss: bool = option("Optimisation", False, "binary cross-entropy with each class's share")
    clip_grad: float | None = option("Optimisation", 1.0, "largest norm of the gradient, or null")
    model_ema: bool = option(
        "Optimisation", False, "evaluate an exponential moving average of weights"
    )
    model_ema_decay: float = option("Optimisation", 0.999, "decay of that average, a step")

    precision: Precision = option("Run", "fp32", "arithmetic of the model")
    device: Device = option("Run", "auto", "where to run")
    devices: int = option("Run", 1, "processes on each node, one a GPU (on the CPU: any number)")
    nodes: int = option("Run", 1, "machines, on each of which torchrun or srun starts the program")
    strategy: Strategy = option(
        "Run", "ddp", "how several processes train: ddp (whole copies) or fsdp (shards)"
    )
    channels_last: bool = option("Run", False, "channels-last memory layout (faster convolutions)")
    compile: bool = option("Run", False, "compile the passes through the model (torch.compile)")
    threads: int | None = option("Run", None, "CPU threads (default: PyTorch's choice)")
    seed: int = option("Run", 0, "seed of weights, order, augmentation and mixing")
    log_interval: int | None = option(
        "Run", None, "steps between two logged values (default: about 1000 in a run)"
    )
    eval_epochs: int = option(
        "Run", 1, "epochs between two tests on the test images; the last epoch always has one"
    )
    image_epochs: int = option(
        "Run", 10, "epochs between two pictures of mixed samples in the logs; 0: none"
    )
    logger: str | None = option(
        "Run", None, "where to log besides metrics.csv and TensorBoard: wandb, mlflow, or both"
    )
    checkpoint_steps: int | None = option(
        "Run", None, "steps between two checkpoints within an epoch (each epoch's end has one)"
    )
    checkpoint_minutes: float | None = option(
        "Run", 10.0, "minutes between two checkpoints within an epoch, or null"
    )
    out: str = option("Run", "runs", "folder that run folders are made in")
    name: str | None = option("Run", None, "name of the run folder (default: a new, telling one)")
    overwrite: bool = option("Run", False, "replace an earlier run of the same name")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled to the batch size where that is asked for.

        >>> TrainConfig(lr=1e-3, batch_size=512, lr_base_size=128, lr_base_scale="sqrt").peak_lr
        0.002
        """
        ratio = self.batch_size / (self.lr_base_size or self.batch_size)
        return self.lr * (ratio if self.lr_base_scale == "linear" else math.sqrt(ratio))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Settings from plain values; keys of other versions are left out."""
        names = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})

    def without_method(self, method: str = "none", **changes: Any) -> TrainConfig:
        """The settings with another method, and none of the options that belong to one."""
        own = [entry.name for entry in fields(self) if entry.metadata["group"] == "Method"]
        return replace(self.without(own), **({"method": method} | changes))

    def without(self, names: Iterable[str]) -> TrainConfig:
        """The settings with the defaults of some."""
        own: dict[str, Any] = {
            entry.name: entry.default for entry in fields(self) if entry.name in set(names)
        }
        return replace(self, **own)

    def validate(self) -> None:
        """Refuse numbers that no run can work with.

        Raises:
            InputError: names the option, its range and what came.
        """
        at_least: dict[str, float] = {
            "train_limit": 2, "img_size": 4, "workers": 0, "crop_padding": 0, "kappa": 1,
            "block": 0, "vertical_block": 0, "epochs": 1, "batch_size": 1, "warmup_epochs": 0,
            "weight_decay": 0, "min_lr": 0, "threads": 1, "max_steps": 1, "aug_repeats": 1,
            "log_interval": 1, "lr_base_size": 1, "devices": 1, "nodes": 1, "seed": 0, "mixup": 0,
            "cutmix": 0, "checkpoint_steps": 1, "checkpoint_minutes": 0, "eval_epochs": 1,
            "image_epochs": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                bound = "finite" if value == math.inf else f"at least {least}"
                raise InputError(f"expected {_dashed(name)} to be {bound}, got {value}")
        if self.seed >= 2**32:
            raise InputError(f"expected --seed to be less than 2**32, got {self.seed}")
        for name in ("lr", "alpha", "clip_grad", "color_jitter"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"expected {_dashed(name)} to be greater than 0, got {value}")
        below_one = (
            "test_share", "val_share", "hflip", "reprob", "smoothing", "model_ema_decay",
            "drop_path", "mixup_prob", "mixup_switch_prob",
        )  # fmt: skip
        exclusive = ("test_share", "val_share", "smoothing", "model_ema_decay", "drop_path")
        for name in below_one:
            value = getattr(self, name)
            inclusive = name not in exclusive
            if value is not None and not (0 <= value <= 1 if inclusive else 0 <= value < 1):
                bound = "between 0 and 1" if inclusive else "at least 0 and less than 1"
                raise InputError(f"expected {_dashed(name)} to be {bound}, got {value}")
        for name in ("crop_pct", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"expected {_dashed(name)} to be above 0 and up to 1, got {value}")
        self._check_lists()
        for name in ("test_share", "val_share"):
            if getattr(self, name) == 0:
                raise InputError(f"expected {_dashed(name)} to be greater than 0, got 0")
        if self.teacher_maps is not None and self.teacher != "auto":
            raise InputError("expected either --teacher or --teacher-maps, got both")
        if self.init is not None and self.pretrained:
            raise InputError("expected either --init or --pretrained to start from, got both")
        if self.linear_probe and self.init is None and not self.pretrained:
            raise InputError(
                "expected weights to probe, --init or --pretrained, with --linear-probe; got "
                "neither"
            )
        if self.linear_probe and self.layer_decay is not None:
            raise InputError(
                "expected no --layer-decay with --linear-probe, which trains one layer; leave one "
                "of them out"
            )
        if self.val_share is not None and self.test_split is not None:
            raise InputError(
                "expected either --val-share or --test-split to say what to test on, got both"
            )
        for name in ("tau", "rho"):
            self._validate_threshold(name)
        if self.name is not None and Path(self.name).name != self.name:
            raise InputError(
                f"expected --name to be a plain folder name, got {self.name!r}; "
                "use --out for the folder that it is made in"
            )

    def _check_lists(self) -> None:
        """Refuse lists of another length, out of range, or out of order."""
        for entry in fields(self):
            values, count = getattr(self, entry.name), entry.metadata["count"]
            if values is None or count is None:
                continue
            rising = entry.name in ("scale", "ratio")
            top = math.inf if entry.name == "ratio" else 1.0
            inside = all(0 <= value <= top and (value or entry.name == "mean") for value in values)
            if len(values) != count or not inside or (rising and values[0] > values[1]):
                bound = "" if entry.name == "mean" else " above 0"
                bound += " up to 1" if top == 1 else ""
                raise InputError(
                    f"expected {_dashed(entry.name)} to be {count}{' rising' if rising else ''} "
                    f"numbers{bound}, got {' '.join(map(str, values))}"
                )
        if self.scale is not None and self.crop_padding is not None:
            raise InputError(
                "expected either --scale, a random resized crop, or --crop-padding, a padded one; "
                "got both"
            )

    def _validate_threshold(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            word, _, share = value.partition(":")
            with suppress(ValueError):
                if word == "auto" and 0 < float(share) < 1:
                    return
            raise InputError(
                f"expected {_dashed(name)} to be a number, or auto:SHARE with a share between 0 "
                f"and 1 such as auto:0.5, got {value!r}"
            )
        if name == "tau" and value is not None and not value > 0:
            raise InputError(f"expected --tau to be greater than 0 (inf mixes all), got {value}")


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the nearest known names, or an empty string.

    >>> suggest("cutmx", ["mixup", "cutmix"])
    "; did you mean 'cutmix'?"
    """
    name, known = name.lower(), list(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.65)
    likeness = [difflib.SequenceMatcher(None, word, name).ratio() for word in near]
    near = [word for word, like in zip(near, likeness, strict=True) if like > likeness[0] - 0.1]
    return f"; did you mean {' or '.join(repr(word) for word in near)}?" if near else ""
