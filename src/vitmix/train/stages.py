"""The stages of a method around a model, with the published settings where none are given."""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitmix.errors import InputError
from vitmix.functional.targets import least_cross_entropy
from vitmix.train.methods import (
    LABELS,
    MIXES,
    TOKENS,
    MethodSpec,
    Part,
    method_name,
    method_of,
    own_class,
    unused_options,
)

if TYPE_CHECKING:
    from torch import Generator, nn

    import vitmix
    from vitmix.maps import TeacherMaps
    from vitmix.train.config import TrainConfig

__all__ = ["build_mixing", "stages_in_words"]


@dataclass(frozen=True)
class ModelFacts:
    """What the default settings of the token stages depend on."""

    depth: int
    tokens: int
    class_token: bool
    num_classes: int
    smoothing: float

    @classmethod
    def of(cls, model: nn.Module, img_size: int, num_classes: int, smoothing: float) -> ModelFacts:
        """Read them off a model."""
        import vitmix

        backbone = vitmix.describe(model)
        height, width = backbone.grid((img_size, img_size))
        return cls(backbone.depth, height * width, backbone.class_token, num_classes, smoothing)


def token_defaults(part: str, both: bool, facts: ModelFacts) -> dict[str, Any]:
    """Published settings of a token stage, scaled to a model and to the number of classes.

    CCT-7 (7 blocks, 256 tokens): horizontal at block 2, or 3 together with vertical at block 2;
    rho 0.005; kappa 80 alone, 3 together; tau 1.0 for 10 classes, 2.0 for 100, the logarithm to
    base 10. Models with a class token (12 blocks, 196 tokens): both at block 3, together at 3 and
    4; rho 0.01, kappa 3; tau 1.0 for 1,000 classes, a third of the logarithm. Saliency sums to 1,
    so rho goes with 1 / tokens. The latter were published without label smoothing, so that tau
    counts from the least loss that smoothing leaves: of 1,000 classes none would be below 1.0.
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
    tau = math.log10(facts.num_classes)
    if facts.class_token:
        tau = tau / 3 + least_cross_entropy(facts.num_classes, facts.smoothing)
        return {
            "block": at(3 / 12), "tau": round(tau, 4), "rho": 0.01 * 196 / facts.tokens,
            "stop_gradient": True, "scorenet_weight": 1.0,
        }  # fmt: skip
    return {
        "block": at(3 / 7 if both else 2 / 7), "tau": round(tau, 4),
        "rho": 0.005 * 256 / facts.tokens, "stop_gradient": False, "scorenet_weight": 0.001,
    }  # fmt: skip


def build_mixing(
    model: nn.Module,
    config: TrainConfig,
    *,
    num_classes: int,
    img_size: int,
    teacher: nn.Module | None = None,
    maps: TeacherMaps | None = None,
    generator: Generator | None = None,
) -> vitmix.MixingModel:
    """The model with the stages that the settings describe around it.

    Raises:
        InputError: settings that do not fit the model or the method.
    """
    import vitmix

    spec = method_of(config)
    mixers = []
    for part in spec.mix:
        args = dict(part.args)
        if config.alpha is not None:
            args["alpha"] = config.alpha
        mixers.append(_make(MIXES[part.name], args, part.own))
    mix = None if not mixers else mixers[0]
    if len(mixers) > 1 or (mixers and spec.turns):
        mix = _make("OneOf", {"mixers": mixers} | spec.turns)
    args = dict(spec.labels.args)
    if spec.needs_teacher:
        args |= {"teacher": teacher} if config.teacher_maps is None else {"maps": maps}
    labels = _make(LABELS[spec.labels.name], args, spec.labels.own)
    tokens = [
        _make(TOKENS[part.name], args, part.own)
        for part, args in _token_settings(spec, config, model, img_size, num_classes)
    ]
    _refuse_unused(spec, config)
    if config.linear_probe and tokens:
        raise InputError(
            f"expected a method without token stages for --linear-probe, got --method "
            f"{method_name(config)}: they change tokens inside of what does not learn; pixel "
            "mixing with any labels works"
        )
    return vitmix.MixingModel(
        model,
        mix=mix,
        labels=labels,
        tokens=tokens,
        num_classes=num_classes,
        label_smoothing=config.smoothing,
        generator=generator,
    )


def stages_in_words(mixing: vitmix.MixingModel) -> list[str]:
    """The token stages with all their settings, defaults included, in words."""
    found = []
    for stage in mixing.tokens:
        names = [name for name in inspect.signature(type(stage)).parameters if hasattr(stage, name)]
        settings = ", ".join(f"{name}={getattr(stage, name)!r}" for name in names)
        found.append(f"{type(stage).__name__}({settings})")
    return found


def _token_settings(
    spec: MethodSpec, config: TrainConfig, model: nn.Module, img_size: int, num_classes: int
) -> list[tuple[Part, dict[str, Any]]]:
    """Arguments of each token stage: defaults, then the method file, then the command line."""
    if not spec.tokens:
        return []
    facts = ModelFacts.of(model, img_size, num_classes, config.smoothing)
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


def _make(class_name: str, args: dict[str, Any], own: str | None = None) -> Any:
    import vitmix

    made = getattr(vitmix, class_name) if own is None else own_class(own, class_name, own)

    for name in ("tau", "rho"):
        with suppress(KeyError, TypeError, ValueError):  # YAML takes `inf` and `1e-3` for text
            args[name] = float(args[name])
    if isinstance(args.get("block"), list):
        args["block"] = tuple(args["block"])
    try:
        return made(**args)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected arguments that fit {made.__name__}, got {args}: {error}"
        ) from error


def _refuse_unused(spec: MethodSpec, config: TrainConfig) -> None:
    """An option that the method has no use for is a mistake, not something to pass over."""
    plain = config.without_method()
    given = [name for name in unused_options(spec) if getattr(config, name) != getattr(plain, name)]
    if given:
        raise InputError(
            f"expected a method that uses --{given[0].replace('_', '-')}, got --method "
            f"{method_name(config)}; leave the option out or choose another method"
        )
