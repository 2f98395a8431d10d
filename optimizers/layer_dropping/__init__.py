"""Rules that work on some layers at a time and skip the others' backward work."""

from optimizers.layer_dropping.cyclic_bcd import CyclicBCD
from optimizers.layer_dropping.drop_muon import DropMuon

__all__ = ["CyclicBCD", "DropMuon"]
