"""Optimizers around other optimizers."""

from optimizers.wrappers.muon_with_adamw import muon_with_adamw
from optimizers.wrappers.roles import Weight, classify
from optimizers.wrappers.routed import Routed, Rule

__all__ = ["Routed", "Rule", "Weight", "classify", "muon_with_adamw"]
