"""Train vision transformers with token-level mixing: TokenMixup, TokenMix and TL-Align.

Three stages combine freely around an unmodified model: pixels (which parts of which image make the
input?), tokens (what happens to hidden tokens at a block?) and labels (how much of each source does
the target get?). :class:`MixingModel` puts them together; :mod:`vitmix.functional` has the papers'
equations as functions of tensors.
"""

from vitmix import functional, models
from vitmix._version import __version__
from vitmix.backbones import Backbone, Block, describe
from vitmix.errors import InputError, UnsupportedModelError, VitmixError
from vitmix.labels import (
    AreaLabels,
    AttentionLabels,
    LabelRule,
    TeacherLabels,
    TokenAlignedLabels,
)
from vitmix.maps import TeacherMaps, store_maps
from vitmix.mixing import MixingModel
from vitmix.pixels import CutMix, Mixup, OneOf, PixelMix, PixelPlan, TokenMix
from vitmix.step import MixOutput, MixTrace
from vitmix.teacher import ActivationMaps
from vitmix.tokens import (
    HorizontalTokenMixup,
    ManifoldMixup,
    TokenStage,
    VerticalTokenMixup,
)

__all__ = [
    "ActivationMaps",
    "AreaLabels",
    "AttentionLabels",
    "Backbone",
    "Block",
    "CutMix",
    "HorizontalTokenMixup",
    "InputError",
    "LabelRule",
    "ManifoldMixup",
    "MixOutput",
    "MixTrace",
    "MixingModel",
    "Mixup",
    "OneOf",
    "PixelMix",
    "PixelPlan",
    "TeacherLabels",
    "TeacherMaps",
    "TokenAlignedLabels",
    "TokenMix",
    "TokenStage",
    "UnsupportedModelError",
    "VerticalTokenMixup",
    "VitmixError",
    "__version__",
    "describe",
    "functional",
    "models",
    "store_maps",
]
