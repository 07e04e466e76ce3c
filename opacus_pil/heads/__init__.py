"""Heads on frozen features: the models that contraction is proved for, and what they train on."""

from .bounded_features import BoundedFeatures as BoundedFeatures
from .frozen_features import FrozenFeatures as FrozenFeatures
from .one_vs_rest import OneVsRest as OneVsRest
from .one_vs_rest import OneVsRestLoss as OneVsRestLoss
from .public_caps import caps_from_public_model as caps_from_public_model

__all__ = [
    "BoundedFeatures",
    "FrozenFeatures",
    "OneVsRest",
    "OneVsRestLoss",
    "caps_from_public_model",
]
