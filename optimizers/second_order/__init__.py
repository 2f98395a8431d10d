"""Rules that use curvature: Gauss-Newton matrices of the batch, Fisher matrices, metrics."""

from optimizers.second_order.adahessian import AdaHessian
from optimizers.second_order.egn import EGN
from optimizers.second_order.fadam import FAdam
from optimizers.second_order.gradient_regularized import GradientRegularizedNewton
from optimizers.second_order.implicit import IFTHypergradient, hypergradient
from optimizers.second_order.induced_metric import InducedMetric
from optimizers.second_order.inverse_fisher import InverseFisher
from optimizers.second_order.kfac import KFAC
from optimizers.second_order.kl_shampoo import KLShampoo
from optimizers.second_order.mfac import MFAC
from optimizers.second_order.oasis import OASIS
from optimizers.second_order.psgd_kron import PSGDKron
from optimizers.second_order.saddle_free import SaddleFreeNewton
from optimizers.second_order.shampoo import Shampoo
from optimizers.second_order.soap import SOAP
from optimizers.second_order.sophia import SophiaG, SophiaH
from optimizers.second_order.splus import SPlus

__all__ = [
    "EGN",
    "KFAC",
    "MFAC",
    "OASIS",
    "SOAP",
    "AdaHessian",
    "FAdam",
    "GradientRegularizedNewton",
    "IFTHypergradient",
    "InducedMetric",
    "InverseFisher",
    "KLShampoo",
    "PSGDKron",
    "SPlus",
    "SaddleFreeNewton",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "hypergradient",
]
