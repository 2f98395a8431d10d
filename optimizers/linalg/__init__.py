"""Pure tensor-to-tensor mathematics: no optimizer, no state."""

from optimizers.linalg.polar import (
    MUON_COEFFICIENTS,
    dual_norm_spectral,
    newton_schulz,
    polar_svd,
)

__all__ = ["MUON_COEFFICIENTS", "dual_norm_spectral", "newton_schulz", "polar_svd"]
