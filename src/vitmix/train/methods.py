"""Methods by name: which pixel mix, labels and token stages a name stands for, with which settings.

A method is a :class:`MethodSpec`: three plain entries, ``mix``, ``labels`` and ``tokens``, the same
as in a YAML file. Nothing here looks at a model; :mod:`vitmix.train.stages` makes the stages for
one.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import zlib
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.train.config import suggest

if TYPE_CHECKING:
    from vitmix.train.config import TrainConfig

__all__ = [
    "METHODS",
    "MethodSpec",
    "Part",
    "in_words",
    "method_name",
    "method_of",
    "own_class",
    "parse_method",
    "unused_options",
]


@dataclass(frozen=True)
class Part:
    """One stage: its name here, the arguments that are given explicitly, and whose class it is.

    Attributes:
        name: of a stage of vitmix, which says what settings there are.
        args: for its class.
        own: ``"file.py:Class"`` or ``"module:Class"`` that takes its place, or None.
    """

    name: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    own: str | None = None

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name if self.own is None else f"{self.name}:{self.own.rpartition(':')[2]}"


@dataclass(frozen=True)
class MethodSpec:
    """A method, stage by stage. Several pixel mixes take turns, as ``turns`` says (``OneOf``)."""

    mix: tuple[Part, ...] = ()
    labels: Part = Part("area")
    tokens: tuple[Part, ...] = ()
    turns: dict[str, Any] = dataclasses.field(default_factory=dict)

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


def method_of(config: TrainConfig) -> MethodSpec:
    """The method that the settings describe.

    ``method`` comes first, then the stages given on their own (``mix``, ``labels``, ``tokens``),
    then ``mixup``, ``cutmix`` and what goes with them, which have the meaning of timm's options.

    Raises:
        InputError: see :func:`parse_method`, or options that do not fit the pixel mixes.
    """
    spec = parse_method(config.method)
    changes: dict[str, Any] = {}
    if config.mix is not None:
        changes["mix"], changes["turns"] = _read_mix(config.mix, "--mix")
    if config.labels is not None:
        changes["labels"] = _read_labels(config.labels, "--labels")
    if config.tokens is not None:
        changes["tokens"] = tuple(_parts(config.tokens, "--tokens", TOKENS))
    return _with_options(dataclasses.replace(spec, **changes), config)


def method_name(config: TrainConfig) -> str:
    """What to call the method of these settings: its name, or the names of its stages.

    >>> from vitmix.train.config import TrainConfig
    >>> method_name(TrainConfig(mixup=0.8, tokens="horizontal"))
    'mixup+horizontal'
    """
    own = (config.mix, config.labels, config.tokens, config.mixup, config.cutmix)
    if all(option is None for option in own):
        return Path(config.method).stem
    spec = method_of(config)
    labels = () if spec.labels == Part("area") else (spec.labels,)
    return "+".join(part.title for part in (*spec.mix, *labels, *spec.tokens)) or "none"


def _with_options(spec: MethodSpec, config: TrainConfig) -> MethodSpec:
    """A method with the pixel mixes that timm's options ask for."""
    mix = list(spec.mix)
    for name, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)):
        if alpha is None:
            continue
        known = [part for part in mix if part.name == name]
        if alpha == 0:
            mix = [part for part in mix if part.name != name]
        elif known:
            args = {"alpha": alpha}
            mix = [dataclasses.replace(p, args=p.args | args) if p.name == name else p for p in mix]
        else:
            mix.insert(0 if name == "mixup" else len(mix), Part(name, {"alpha": alpha}))
    drawn: dict[str, Any] = {}
    if config.mixup_prob is not None:
        drawn["prob"] = config.mixup_prob
    if config.mixup_mode is not None:
        drawn["draw"] = {"elem": "element"}.get(config.mixup_mode, config.mixup_mode)
    if config.mixup_switch_prob is not None:
        if len(mix) != 2:
            raise InputError(
                f"expected two pixel mixes for --mixup-switch-prob to choose from, got {len(mix)}"
            )
        drawn["weights"] = [1 - config.mixup_switch_prob, config.mixup_switch_prob]
    if len(mix) == 1 and not spec.turns:
        return dataclasses.replace(
            spec, mix=(dataclasses.replace(mix[0], args=mix[0].args | drawn),)
        )
    return dataclasses.replace(spec, mix=tuple(mix), turns=spec.turns | drawn)


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
    mix, turns = _read_mix(content.get("mix"), f"`mix` in {path}")
    return MethodSpec(
        mix,
        _read_labels(content.get("labels"), f"`labels` in {path}"),
        tuple(_parts(content.get("tokens"), f"`tokens` in {path}", TOKENS)),
        turns,
    )


def _read_mix(value: Any, where: str) -> tuple[tuple[Part, ...], dict[str, Any]]:
    """Pixel mixes, and how they take turns: a part, a list, or the arguments of ``OneOf``."""
    turns: dict[str, Any] = {}
    if isinstance(value, dict) and value.get("name") == "one-of":
        (whole,) = _parts(value, where, {"one-of": "OneOf"})
        turns = dict(whole.args)
        value = turns.pop("mixers", None)
        if not value:
            raise InputError(f"expected `mixers` for one-of in {where}, got {value!r}")
    parts = _parts(value, where, MIXES)
    for part in parts if len(parts) > 1 else ():
        for option in {"draw", "pairing"} & set(part.args):
            raise InputError(
                f"expected {option!r} for all pixel mixes together in {where}, got one for "
                f"{part.name}; write {{name: one-of, {option}: ..., mixers: [...]}}"
            )
    return tuple(parts), turns


def _read_labels(value: Any, where: str) -> Part:
    parts = _parts(value, where, LABELS)
    if len(parts) > 1:
        raise InputError(f"expected one way to make labels in {where}, got {len(parts)}")
    return parts[0] if parts else Part("area")


def _parts(value: Any, where: str, known: dict[str, str]) -> list[Part]:
    """Entries: a name, ``{name: ..., argument: ...}``, or a list of such."""
    import vitmix

    parts = []
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        entry = {"name": entry} if isinstance(entry, str) else entry
        name = entry.get("name") if isinstance(entry, dict) else None
        if name == "none":
            continue
        if not isinstance(name, str) or name not in known:
            raise InputError(
                f"expected {where} to name one of {', '.join(known)}, "
                f"got {name!r}{suggest(str(name), known)}"
            )
        entry = dict(entry)
        del entry["name"]
        args, own = entry.pop("args", None) or {}, entry.pop("class", None)
        if not isinstance(args, dict):
            raise InputError(f"expected `args` of {name} in {where} by name, got {args!r}")
        args = args | entry
        found = getattr(vitmix, known[name]) if own is None else own_class(own, known[name], where)
        accepted = set(inspect.signature(found).parameters) - {"teacher", "maps"}
        for option in args:
            if option not in accepted:
                raise InputError(
                    f"expected arguments {', '.join(sorted(accepted))} for {name} in {where}, "
                    f"got {option!r}{suggest(str(option), accepted)}"
                )
        parts.append(Part(name, args, own))
    return parts


def own_class(path: str, instead: str, where: str) -> type:
    """A class of one's own, in place of one of vitmix.

    Args:
        path: ``"file.py:Class"`` or ``"module:Class"``.
        instead: name of the class of vitmix; both must be the same kind of stage.
        where: what names it, for messages.

    Raises:
        InputError: no such class, or no stage of this kind.
    """
    import vitmix

    place, _, name = str(path).rpartition(":")
    try:
        module = vars(_own_file(Path(place)) if place.endswith(".py") else import_module(place))
    except (ImportError, OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"expected `class` in {where} as file.py:Class or module:Class, got {path!r}: {error}"
        ) from error
    found = module.get(name)
    kinds = (vitmix.PixelMix, vitmix.LabelRule, vitmix.TokenStage)
    kind = next(kind for kind in kinds if issubclass(getattr(vitmix, instead), kind))
    if not (isinstance(found, type) and issubclass(found, kind)):
        classes = [key for key, value in module.items() if isinstance(value, type)]
        raise InputError(
            f"expected a subclass of vitmix.{kind.__name__} named {name!r} in {place} for {where}, "
            f"got {'no class of this name' if found is None else found!r}{suggest(name, classes)}"
        )
    return found


def _own_file(path: Path) -> ModuleType:
    """A file as a module, read once."""
    path = path.expanduser().resolve(strict=True)
    name = f"vitmix_own_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def unused_options(spec: MethodSpec) -> list[str]:
    """Settings that a method has no use for."""
    names = {part.name for part in spec.tokens}
    used = {
        "alpha": bool(spec.mix) or "manifold" in names,
        "teacher_maps": spec.needs_teacher,
        "mixup_prob": bool(spec.mix),
        "mixup_mode": bool(spec.mix),
        "tau": "horizontal" in names,
        "rho": "horizontal" in names,
        "kappa": "vertical" in names,
        "block": bool(names),
        "vertical_block": "vertical" in names,
        "teacher": spec.needs_teacher,
    }
    return [option for option, known in used.items() if not known]
