"""Rules that use curvature: Gauss-Newton matrices of the batch, Fisher matrices, metrics."""

from optimizers.second_order.adahessian import AdaHessian
from optimizers.second_order.egn import EGN
from optimizers.second_order.fadam import FAdam
from optimizers.second_order.induced_metric import InducedMetric
from optimizers.second_order.oasis import OASIS

__all__ = ["EGN", "OASIS", "AdaHessian", "FAdam", "InducedMetric"]
