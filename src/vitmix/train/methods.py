"""Methods by name: which pixel mix, labels and token stages a name stands for, with which settings.

A method is a :class:`MethodSpec`: three plain entries, ``mix``, ``labels`` and ``tokens``, the same
as in a YAML file. Names are turned into specs without looking at a model; :func:`build_mixing`
makes the stages for one.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.train.config import suggest

if TYPE_CHECKING:
    from torch import Generator, nn

    import vitmix
    from vitmix.train.config import TrainConfig

__all__ = [
    "METHODS",
    "MethodSpec",
    "Part",
    "build_mixing",
    "in_words",
    "parse_method",
    "unused_options",
]


@dataclass(frozen=True)
class Part:
    """One stage: its name here and the arguments that are given explicitly."""

    name: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class MethodSpec:
    """A method, stage by stage. Several pixel mixes take turns."""

    mix: tuple[Part, ...] = ()
    labels: Part = Part("area")
    tokens: tuple[Part, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether the labels come from a teacher."""
        return self.labels.name == "teacher"


_MIXUP, _CUTMIX = Part("mixup"), Part("cutmix")
_TOKENMIX, _ALIGNED_BOX = Part("tokenmix"), Part("cutmix", {"align": True})
_HORIZONTAL, _VERTICAL = Part("horizontal"), Part("vertical")

METHODS: dict[str, MethodSpec] = {
    "none": MethodSpec(),
    "mixup": MethodSpec((_MIXUP,)),
    "cutmix": MethodSpec((_CUTMIX,)),
    "mixup+cutmix": MethodSpec((_MIXUP, _CUTMIX)),
    "tokenmix": MethodSpec((_TOKENMIX,), Part("teacher")),
    "tokenmix-area": MethodSpec((_TOKENMIX,)),
    "transmix": MethodSpec((_CUTMIX,), Part("attention")),
    "tl-align": MethodSpec((_ALIGNED_BOX,), Part("aligned")),
    "manifold-mixup": MethodSpec(tokens=(Part("manifold"),)),
    "tokenmixup-h": MethodSpec(tokens=(_HORIZONTAL,)),
    "tokenmixup-v": MethodSpec(tokens=(_VERTICAL,)),
    "tokenmixup": MethodSpec(tokens=(_HORIZONTAL, _VERTICAL)),
}

# Names of parts and the public classes of vitmix that they stand for.
MIXES = {"mixup": "Mixup", "cutmix": "CutMix", "tokenmix": "TokenMix"}
LABELS = {
    "area": "AreaLabels", "teacher": "TeacherLabels", "attention": "AttentionLabels",
    "aligned": "TokenAlignedLabels",
}  # fmt: skip
TOKENS = {
    "horizontal": "HorizontalTokenMixup", "vertical": "VerticalTokenMixup",
    "manifold": "ManifoldMixup",
}  # fmt: skip


def parse_method(method: str) -> MethodSpec:
    """The spec of a name, of names joined by ``+``, or of a YAML file.

    Raises:
        InputError: an unknown name (with the nearest), stages that exclude each other, or a file
            that does not describe a method.

    >>> [part.name for part in parse_method("cutmix+tokenmixup-h").tokens]
    ['horizontal']
    """
    if method.endswith((".yaml", ".yml")):
        return _read_method(Path(method))
    if method in METHODS:
        return METHODS[method]
    mix: list[Part] = []
    labels: dict[str, str] = {}
    tokens: dict[str, Part] = {}
    for name in method.split("+"):
        if name not in METHODS:
            raise InputError(
                f"expected --method to be one of {', '.join(METHODS)}, several joined by +, or a "
                f"YAML file, got {method!r}{suggest(name, METHODS)}"
            )
        spec = METHODS[name]
        mix += [part for part in spec.mix if part not in mix]
        if spec.labels.name != "area":
            labels[spec.labels.name] = name
        tokens |= {part.name: part for part in spec.tokens}
    if len(labels) > 1:
        raise InputError(
            f"expected one way to make labels, got {' and '.join(labels.values())} in --method "
            f"{method}; leave one out, or choose `labels` in a YAML file"
        )
    return MethodSpec(tuple(mix), Part(next(iter(labels), "area")), tuple(tokens.values()))


WORDS = {
    "mixup": "Two images are blended.",
    "cutmix": "One box comes from the partner.",
    "tokenmix": "Scattered blocks of tokens come from the partner.",
    "area": "The label follows the area.",
    "teacher": "The label follows what a teacher sees of each image.",
    "attention": "The label follows the model's attention.",
    "aligned": "The label is carried, token by token, through every attention layer.",
    "horizontal": "Tokens of easy images are replaced by more salient ones of a partner; the label "
    "follows the saliency.",
    "vertical": "A block also attends to the most salient tokens of the blocks before it.",
    "manifold": "Hidden tokens of two images are blended.",
}


def in_words(spec: MethodSpec) -> str:
    """What a method does, for people who read a report.

    >>> in_words(METHODS["cutmix"])
    'One box comes from the partner. The label follows the area.'
    """
    labels = (spec.labels,) if spec.mix else ()
    return " ".join(WORDS[part.name] for part in (*spec.mix, *labels, *spec.tokens))


def _read_method(path: Path) -> MethodSpec:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"expected --method to be a readable file, got {path}: {error.strerror}"
        ) from error
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise InputError(f"expected YAML in the method file {path}: {line}") from error
    if not isinstance(content, dict) or set(content) - {"mix", "labels", "tokens"}:
        keys = content if isinstance(content, dict) else [content]
        wrong = next((str(k) for k in keys if k not in ("mix", "labels", "tokens")), "nothing")
        raise InputError(
            f"expected only the keys mix, labels and tokens in {path}, "
            f"got {wrong!r}{suggest(wrong, ('mix', 'labels', 'tokens'))}"
        )
    labels = _parts(content.get("labels"), "labels", LABELS, path)
    if len(labels) > 1:
        raise InputError(f"expected one way to make labels in {path}, got {len(labels)}")
    return MethodSpec(
        tuple(_parts(content.get("mix"), "mix", MIXES, path)),
        labels[0] if labels else Part("area"),
        tuple(_parts(content.get("tokens"), "tokens", TOKENS, path)),
    )


def _parts(value: Any, key: str, known: dict[str, str], path: Path) -> list[Part]:
    """Entries of one key: a name, ``{name: ..., argument: ...}``, or a list of such."""
    import vitmix

    parts = []
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        entry = {"name": entry} if isinstance(entry, str) else entry
        name = entry.get("name") if isinstance(entry, dict) else None
        if name == "none":
            continue
        if name not in known:
            raise InputError(
                f"expected `{key}` in {path} to name one of {', '.join(known)}, "
                f"got {name!r}{suggest(str(name), known)}"
            )
        args = dict(entry.get("args") or {})
        args |= {option: given for option, given in entry.items() if option not in ("name", "args")}
        accepted = set(inspect.signature(getattr(vitmix, known[name])).parameters) - {"teacher"}
        for option in args:
            if option not in accepted:
                raise InputError(
                    f"expected arguments {', '.join(sorted(accepted))} for {name} in {path}, "
                    f"got {option!r}{suggest(str(option), accepted)}"
                )
        parts.append(Part(name, args))
    return parts


@dataclass(frozen=True)
class ModelFacts:
    """What the default settings of the token stages depend on."""

    depth: int
    tokens: int
    class_token: bool

    @classmethod
    def of(cls, model: nn.Module, img_size: int) -> ModelFacts:
        """Read them off a model."""
        import vitmix

        backbone = vitmix.describe(model)
        height, width = backbone.grid((img_size, img_size))
        return cls(backbone.depth, height * width, backbone.class_token)


def token_defaults(part: str, both: bool, facts: ModelFacts) -> dict[str, Any]:
    """Published settings of a token stage, scaled to a model.

    CCT-7 (7 blocks, 256 tokens): horizontal at block 2, or 3 together with vertical at block 2;
    tau 2.0, rho 0.005; kappa 80 alone, 3 together. Models with a class token (12 blocks, 196
    tokens): both at block 3, together at 3 and 4; tau 1.0, rho 0.01, kappa 3. Saliency sums to 1,
    so rho goes with 1 / tokens.
    """
    depth, last = facts.depth, facts.depth - 1

    def at(share: float) -> int:
        return min(last, max(1, round(share * depth)))

    if part == "manifold":
        return {"block": tuple(range(min(3, depth)))}
    if part == "vertical":
        if facts.class_token:
            return {"block": at(4 / 12 if both else 3 / 12), "kappa": min(3, facts.tokens)}
        kappa = 3 if both else round(80 / 256 * facts.tokens)
        return {"block": at(2 / 7), "kappa": min(max(1, kappa), facts.tokens)}
    if facts.class_token:
        return {
            "block": at(3 / 12), "tau": 1.0, "rho": 0.01 * 196 / facts.tokens,
            "stop_gradient": True, "scorenet_weight": 1.0,
        }  # fmt: skip
    return {
        "block": at(3 / 7 if both else 2 / 7), "tau": 2.0, "rho": 0.005 * 256 / facts.tokens,
        "stop_gradient": False, "scorenet_weight": 0.001,
    }  # fmt: skip


def build_mixing(
    model: nn.Module,
    config: TrainConfig,
    *,
    num_classes: int,
    img_size: int,
    teacher: nn.Module | None = None,
    generator: Generator | None = None,
) -> vitmix.MixingModel:
    """The model with the stages of ``config.method`` around it.

    Raises:
        InputError: settings that do not fit the model or the method.
    """
    import vitmix

    spec = parse_method(config.method)
    mixers = []
    for part in spec.mix:
        args = dict(part.args)
        if config.alpha is not None:
            args["alpha"] = config.alpha
        mixers.append(_make(MIXES[part.name], args))
    mix = None if not mixers else mixers[0] if len(mixers) == 1 else vitmix.OneOf(mixers)
    args = dict(spec.labels.args)
    if spec.needs_teacher:
        args["teacher"] = teacher
    labels = _make(LABELS[spec.labels.name], args)
    tokens = [
        _make(TOKENS[part.name], args)
        for part, args in _token_settings(spec, config, model, img_size)
    ]
    _refuse_unused(spec, config)
    return vitmix.MixingModel(
        model,
        mix=mix,
        labels=labels,
        tokens=tokens,
        num_classes=num_classes,
        label_smoothing=config.smoothing,
        generator=generator,
    )


def _token_settings(
    spec: MethodSpec, config: TrainConfig, model: nn.Module, img_size: int
) -> list[tuple[Part, dict[str, Any]]]:
    """Arguments of each token stage: defaults, then the method file, then the command line."""
    if not spec.tokens:
        return []
    facts = ModelFacts.of(model, img_size)
    names = {part.name for part in spec.tokens}
    both = {"horizontal", "vertical"} <= names
    chosen = []
    for part in spec.tokens:
        block = config.block
        if part.name == "vertical" and (len(names) > 1 or config.vertical_block is not None):
            block = config.vertical_block
        options: dict[str, dict[str, Any]] = {
            "horizontal": {"block": block, "tau": config.tau, "rho": config.rho},
            "vertical": {"block": block, "kappa": config.kappa},
            "manifold": {"block": block, "alpha": config.alpha},
        }
        given = {key: value for key, value in options[part.name].items() if value is not None}
        chosen.append((part, token_defaults(part.name, both, facts) | part.args | given))
    return chosen


def _make(class_name: str, args: dict[str, Any]) -> Any:
    import vitmix

    for name in ("tau", "rho"):
        with suppress(KeyError, TypeError, ValueError):  # YAML takes `inf` and `1e-3` for text
            args[name] = float(args[name])
    if isinstance(args.get("block"), list):
        args["block"] = tuple(args["block"])
    return getattr(vitmix, class_name)(**args)


def unused_options(spec: MethodSpec) -> list[str]:
    """Settings that a method has no use for."""
    names = {part.name for part in spec.tokens}
    used = {
        "alpha": bool(spec.mix) or "manifold" in names,
        "tau": "horizontal" in names,
        "rho": "horizontal" in names,
        "kappa": "vertical" in names,
        "block": bool(names),
        "vertical_block": "vertical" in names,
    }
    return [option for option, known in used.items() if not known]


def _refuse_unused(spec: MethodSpec, config: TrainConfig) -> None:
    """An option that the method has no use for is a mistake, not something to pass over."""
    given = [option for option in unused_options(spec) if getattr(config, option) is not None]
    if config.teacher != "auto" and not spec.needs_teacher:
        given.append("teacher")
    if given:
        raise InputError(
            f"expected a method that uses --{given[0].replace('_', '-')}, got --method "
            f"{config.method}; leave the option out or choose another method"
        )
