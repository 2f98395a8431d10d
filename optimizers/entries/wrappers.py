"""Wrappers of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimizers.first_order import AMSGrad
from optimizers.spec import Spec
from optimizers.wrappers import DropLayers, Hyperball, InducedMetricOn, Routed, muon_with_adamw


def _routed_muon(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    return muon_with_adamw(model, **options)


def _hyperball(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """AdamH: matrices of the model on their spheres, vectors by Adam."""
    return Hyperball(torch.optim.Adam(model.named_parameters(), **options))


def _induced_metric_on(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """Adam's direction, shortened by the metric."""
    return InducedMetricOn(torch.optim.Adam(model.named_parameters(), **options), xi=1e-5)


def _drop_layers(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    return DropLayers(AMSGrad(model.named_parameters(), **options), model.named_parameters())


ENTRIES: tuple[Spec, ...] = (
    Spec(
        Hyperball,
        family="orthogonalized",
        kind="wrapper",
        reference="Wen et al.: Fantastic Pretraining Optimizers and Where to Find Them II, "
        "Hyperball Optimization, 2026",
        example={"lr": 1e-2},
        state_floats="the inner rule's and one a parameter",
        evidence={
            "oracle": "tests/test_hyperball.py::test_matches_the_oracle",
            "reduction": "tests/test_hyperball.py: MuonH and AdamH",
            "rate": "tests/test_hyperball.py::test_around_muon_it_is_muonh: the angle of a step is "
            "at most arcsin(lr) (derived)",
            "claim": "tests/test_muon_family.py::test_a_hyperball_needs_a_good_radius",
        },
        builder=_hyperball,
    ),
    Spec(
        InducedMetricOn,
        family="second_order",
        kind="wrapper",
        reference="Harvey: The Optimiser Hidden in Plain Sight, Training with the Loss Landscape's "
        "Induced Metric, 2025",
        example={"lr": 1e-2},
        state_floats="the inner rule's",
        evidence={
            "oracle": "tests/test_induced_metric_on.py::test_matches_the_oracle",
            "reduction": "tests/test_induced_metric_on.py: InducedMetric base and rms, the inner "
            "rule without the metric",
            "rate": "tests/test_induced_metric_on.py::test_length_of_a_step (derived)",
        },
        builder=_induced_metric_on,
    ),
    Spec(
        DropLayers,
        family="layer_dropping",
        kind="wrapper",
        reference="the sampling of Gruntkowska et al.: Drop-Muon, 2025",
        example={"lr": 1e-2},
        state_floats="the inner rule's",
        evidence={
            "reduction": "tests/test_drop_layers.py: DropMuon, and the inner rule without dropping",
            "claim": "tests/test_drop_layers.py::test_saved_backward_work_follows_the_cost_model",
        },
        builder=_drop_layers,
    ),
    Spec(
        Routed,
        family="orthogonalized",
        kind="wrapper",
        reference="the division of labour of Jordan et al.: Muon, 2024",
        example={"lr": 2e-2, "adamw_lr": 1e-2},
        state_floats="1 (Muon) or 2 (AdamW)",
        evidence={"reduction": "tests/test_routed.py: its inner rules apart, bit by bit"},
        builder=_routed_muon,
    ),
)
