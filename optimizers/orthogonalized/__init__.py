"""Orthogonalized rules: the step of a matrix is (close to) its momentum's polar factor."""

from optimizers.orthogonalized.adamuon import AdaMuon
from optimizers.orthogonalized.dion2 import Dion2
from optimizers.orthogonalized.lanton import LANTON
from optimizers.orthogonalized.muon import Muon
from optimizers.orthogonalized.noise import (
    NoiseAdaptive,
    NoiseAdaptiveAdaMuon,
    NoiseAdaptiveDion2,
    NoiseAdaptiveMuon,
    NoiseAdaptiveNorMuon,
)
from optimizers.orthogonalized.normuon import NorMuon
from optimizers.orthogonalized.qk_clip import qk_clip_
from optimizers.orthogonalized.scion import Scion
from optimizers.orthogonalized.trust_region import NonEuclideanTrustRegion

__all__ = [
    "LANTON",
    "AdaMuon",
    "Dion2",
    "Muon",
    "NoiseAdaptive",
    "NoiseAdaptiveAdaMuon",
    "NoiseAdaptiveDion2",
    "NoiseAdaptiveMuon",
    "NoiseAdaptiveNorMuon",
    "NonEuclideanTrustRegion",
    "NorMuon",
    "Scion",
    "qk_clip_",
]
