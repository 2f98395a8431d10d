"""Rules that update some layers per step and skip the others' backward work."""

from optimizers.layer_dropping.drop_muon import DropMuon

__all__ = ["DropMuon"]
