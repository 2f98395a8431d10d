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
from optimizers.layer_dropping import DropMuon
from optimizers.objective import Counts, Objective, OracleError
from optimizers.orthogonalized import Muon
from optimizers.registry import Spec, get_optimizer, get_spec, list_optimizers
from optimizers.second_order import EGN
from optimizers.wrappers import Routed, Rule, classify, muon_with_adamw

__version__ = "0.1.0"

__all__ = [
    "EGN",
    "AMSGrad",
    "Counts",
    "DropMuon",
    "Muon",
    "Needs",
    "Objective",
    "Optimizer",
    "OracleError",
    "PolyStep",
    "Routed",
    "Rule",
    "Scope",
    "Spec",
    "classify",
    "get_optimizer",
    "get_spec",
    "list_optimizers",
    "muon_with_adamw",
]
