"""PyTorch optimizers whose every rule is proven.

>>> import torch, optimizers
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = optimizers.AMSGrad(model.parameters(), lr=1e-3)
>>> model(torch.ones(1, 4)).sum().backward()
>>> optimizer.step()
"""

from optimizers.base import Needs, Optimizer, Scope
from optimizers.first_order import AMSGrad
from optimizers.forward_only import PolyStep
from optimizers.layer_dropping import CyclicBCD, DropMuon
from optimizers.objective import Counts, Objective, OracleError
from optimizers.orthogonalized import (
    LANTON,
    AdaMuon,
    Dion2,
    Muon,
    NoiseAdaptiveNorMuon,
    NonEuclideanTrustRegion,
    NorMuon,
    Scion,
    qk_clip_,
)
from optimizers.registry import Spec, get_optimizer, get_spec, list_optimizers
from optimizers.second_order import (
    EGN,
    KFAC,
    MFAC,
    OASIS,
    SOAP,
    AdaHessian,
    FAdam,
    GradientRegularizedNewton,
    IFTHypergradient,
    InducedMetric,
    InverseFisher,
    KLShampoo,
    PSGDKron,
    SaddleFreeNewton,
    Shampoo,
    SophiaG,
    SophiaH,
    SPlus,
    hypergradient,
)
from optimizers.wrappers import (
    DropLayers,
    Hyperball,
    InducedMetricOn,
    Routed,
    Rule,
    classify,
    muon_with_adamw,
)

__version__ = "0.1.0"

__all__ = [
    "EGN",
    "KFAC",
    "LANTON",
    "MFAC",
    "OASIS",
    "SOAP",
    "AMSGrad",
    "AdaHessian",
    "AdaMuon",
    "Counts",
    "CyclicBCD",
    "Dion2",
    "DropLayers",
    "DropMuon",
    "FAdam",
    "GradientRegularizedNewton",
    "Hyperball",
    "IFTHypergradient",
    "InducedMetric",
    "InducedMetricOn",
    "InverseFisher",
    "KLShampoo",
    "Muon",
    "Needs",
    "NoiseAdaptiveNorMuon",
    "NonEuclideanTrustRegion",
    "NorMuon",
    "Objective",
    "Optimizer",
    "OracleError",
    "PSGDKron",
    "PolyStep",
    "Routed",
    "Rule",
    "SPlus",
    "SaddleFreeNewton",
    "Scion",
    "Scope",
    "Shampoo",
    "SophiaG",
    "SophiaH",
    "Spec",
    "classify",
    "get_optimizer",
    "get_spec",
    "hypergradient",
    "list_optimizers",
    "muon_with_adamw",
    "qk_clip_",
]
