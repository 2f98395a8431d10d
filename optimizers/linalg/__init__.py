"""Pure tensor-to-tensor mathematics: no optimizer, no state."""

from optimizers.linalg.backends import METHODS, polar, polar_many
from optimizers.linalg.coefficients import (
    MUON_COEFFICIENTS,
    TABLES,
    image,
    odd_coefficients,
    optimal_quintic,
    quintic_coefficients,
    worst_error,
)
from optimizers.linalg.polar import (
    dual_norm_spectral,
    newton_schulz,
    polar_eigh,
    polar_svd,
)

__all__ = [
    "METHODS",
    "MUON_COEFFICIENTS",
    "TABLES",
    "dual_norm_spectral",
    "image",
    "newton_schulz",
    "odd_coefficients",
    "optimal_quintic",
    "polar",
    "polar_eigh",
    "polar_many",
    "polar_svd",
    "quintic_coefficients",
    "worst_error",
]
