"""Rules that use curvature: Gauss-Newton matrices of the batch, Fisher matrices, metrics."""

from optimizers.second_order.adahessian import AdaHessian
from optimizers.second_order.egn import EGN
from optimizers.second_order.fadam import FAdam
from optimizers.second_order.implicit import IFTHypergradient, hypergradient
from optimizers.second_order.induced_metric import InducedMetric
from optimizers.second_order.inverse_fisher import InverseFisher
from optimizers.second_order.kl_shampoo import KLShampoo
from optimizers.second_order.mfac import MFAC
from optimizers.second_order.oasis import OASIS
from optimizers.second_order.shampoo import Shampoo
from optimizers.second_order.soap import SOAP
from optimizers.second_order.splus import SPlus

__all__ = [
    "EGN",
    "MFAC",
    "OASIS",
    "SOAP",
    "AdaHessian",
    "FAdam",
    "IFTHypergradient",
    "InducedMetric",
    "InverseFisher",
    "KLShampoo",
    "SPlus",
    "Shampoo",
    "hypergradient",
]
