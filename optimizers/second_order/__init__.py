"""Rules that use curvature: Gauss-Newton matrices of the batch."""

from optimizers.second_order.egn import EGN

__all__ = ["EGN"]
