"""Rules that use curvature: Gauss-Newton matrices of the batch, Fisher matrices, metrics."""

from optimizers.second_order.egn import EGN
from optimizers.second_order.fadam import FAdam
from optimizers.second_order.induced_metric import InducedMetric

__all__ = ["EGN", "FAdam", "InducedMetric"]
