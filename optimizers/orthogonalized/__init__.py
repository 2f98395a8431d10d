"""Orthogonalized rules: the step of a matrix is (close to) its momentum's polar factor."""

from optimizers.orthogonalized.muon import Muon

__all__ = ["Muon"]
