"""Optimizers around other optimizers."""

from optimizers.wrappers.drop_layers import DropLayers
from optimizers.wrappers.hyperball import Hyperball
from optimizers.wrappers.induced_metric import InducedMetricOn
from optimizers.wrappers.muon_with_adamw import muon_with_adamw
from optimizers.wrappers.roles import Weight, classify
from optimizers.wrappers.routed import Routed, Rule

__all__ = [
    "DropLayers",
    "Hyperball",
    "InducedMetricOn",
    "Routed",
    "Rule",
    "Weight",
    "classify",
    "muon_with_adamw",
]
