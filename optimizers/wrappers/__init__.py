"""Optimizers around other optimizers."""

from optimizers.wrappers.roles import Weight, classify
from optimizers.wrappers.routed import Routed, Rule, muon_with_adamw

__all__ = ["Routed", "Rule", "Weight", "classify", "muon_with_adamw"]
