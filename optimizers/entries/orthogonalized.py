"""Orthogonalized rules of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from optimizers.orthogonalized import (
    LANTON,
    AdaMuon,
    Dion2,
    Muon,
    NoiseAdaptiveNorMuon,
    NonEuclideanTrustRegion,
    NorMuon,
    Scion,
)
from optimizers.spec import Spec
from optimizers.wrappers import muon_with_adamw


def _routed(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """A rule for matrices, with AdamW for everything else."""
    return muon_with_adamw(model, rule=cls, **options)


ENTRIES: tuple[Spec, ...] = (
    Spec(
        Muon,
        family="orthogonalized",
        reference="Jordan et al.: Muon, an optimizer for hidden layers, 2024",
        example={"lr": 2e-2},
        state_floats="1",
        evidence={
            "oracle": "tests/test_muon.py::test_matches_the_oracle",
            "reduction": "tests/test_muon.py: torch.optim.Muon bit by bit",
            "rate": "tests/test_muon.py::test_descent_inequality",
        },
        builder=_routed,
    ),
    Spec(
        NorMuon,
        family="orthogonalized",
        reference="Li et al.: NorMuon, Making Muon more efficient and scalable, 2025",
        example={"lr": 2e-2},
        state_floats="1 and one a row",
        evidence={
            "oracle": "tests/test_normuon.py::test_matches_the_oracle",
            "reduction": "tests/test_normuon.py::test_wide_matrices_of_full_rank_move_like_muons",
            "rate": "tests/test_normuon.py"
            "::test_rows_get_one_size_and_the_step_keeps_its_norm; no theorem is published",
            "claim": "tests/test_muon_family.py::test_on_digits_they_end_at_half_of_adamws_loss",
        },
        builder=_routed,
    ),
    Spec(
        AdaMuon,
        family="orthogonalized",
        reference="Si, Zhang, Shen: AdaMuon, Adaptive Muon Optimizer, 2025",
        example={"lr": 2e-2},
        state_floats="2",
        evidence={
            "oracle": "tests/test_adamuon.py::test_matches_the_oracle",
            "reduction": "tests/test_adamuon.py"
            "::test_entries_of_equal_size_move_like_muons_of_fixed_rms",
            "rate": "tests/test_adamuon.py"
            "::test_every_step_has_the_same_rms_whatever_the_gradients; no theorem is published",
            "claim": "tests/test_muon_family.py::test_on_digits_they_end_at_half_of_adamws_loss",
        },
        builder=_routed,
    ),
    Spec(
        Dion2,
        family="orthogonalized",
        reference="Ahn, Amsel, Langford: Dion2, A Simple Method to Shrink Matrix in Muon, 2025",
        example={"lr": 2e-2},
        state_floats="1",
        evidence={
            "oracle": "tests/test_dion2.py::test_matches_the_oracle",
            "reduction": "tests/test_dion2.py::test_with_all_lines_it_is_muon_in_sum_form",
            "rate": "tests/test_dion2.py::test_the_largest_lines_move_and_all_decay; no theorem "
            "is published",
            "claim": "tests/test_muon_family.py::test_on_digits_they_end_at_half_of_adamws_loss",
        },
        builder=_routed,
    ),
    Spec(
        NonEuclideanTrustRegion,
        family="orthogonalized",
        reference="Kovalev: Understanding Gradient Orthogonalization for Deep Learning via "
        "Non-Euclidean Trust-Region Optimization, 2025",
        example={"lr": 2e-2},
        state_floats="1, 2 extrapolated",
        evidence={
            "oracle": "tests/test_trust_region.py::test_matches_the_oracle",
            "reduction": "tests/test_trust_region.py: Muon, normalised SGD, signSGD with momentum",
            "rate": "tests/test_trust_region.py::test_stochastic_rate_in_the_spectral_norm",
            "claim": "tests/test_trust_region.py"
            "::test_averaging_beats_none_under_skewed_noise; under symmetric noise it does not",
        },
    ),
    Spec(
        Scion,
        family="orthogonalized",
        reference="Pethick et al.: Training Deep Learning Models with Norm-Constrained LMOs, "
        "ICML 2025",
        example={"lr": 2e-2},
        state_floats="1",
        evidence={
            "oracle": "tests/test_trust_region.py::test_scion_matches_its_oracle",
            "reduction": "tests/test_trust_region.py"
            "::test_scion_constrained_is_the_trust_region_with_decay",
            "rate": "tests/test_trust_region.py::test_scion_constrained_stays_in_its_ball",
        },
    ),
    Spec(
        LANTON,
        family="orthogonalized",
        reference="Hao et al.: Noise-Adaptive Layerwise Learning Rates, 2025",
        example={"lr": 2e-2},
        state_floats="2, 1 with independent gradients",
        evidence={
            "oracle": "tests/test_lanton.py::test_matches_the_oracle",
            "reduction": "tests/test_lanton.py: Scion and the trust region without adaptation",
            "rate": "tests/test_lanton.py::test_the_noise_is_estimated_within_its_standard_error",
            "claim": "tests/test_lanton.py: beats the fixed rate where noisy layers travel less, "
            "and gains nothing where all travel as far",
        },
        exceptions={
            "one_group_equals_many": "a rate is relative to the quietest layer of its group",
            "late_parameter_starts_afresh": "a layer's rate depends on the noise of the others in "
            "its group",
        },
    ),
    Spec(
        NoiseAdaptiveNorMuon,
        family="orthogonalized",
        reference="the rates of Hao et al.: Noise-Adaptive Layerwise Learning Rates, 2025, on "
        "NorMuon; likewise on Muon, AdaMuon, Dion2 and any rule for matrices (NoiseAdaptive)",
        example={"lr": 2e-2},
        state_floats="2 and one a row",
        evidence={
            "oracle": "tests/test_noise_adaptive.py"
            "::test_each_step_is_the_rules_times_the_share_of_the_rate",
            "reduction": "tests/test_noise_adaptive.py: the rule bit by bit without adaptation, "
            "LANTON on Scion",
            "rate": "tests/test_lanton.py::test_the_noise_is_estimated_within_its_standard_error",
            "claim": "tests/test_noise_adaptive.py"
            "::test_it_beats_the_fixed_rate_where_noisy_layers_travel_less",
        },
        exceptions={
            "one_group_equals_many": "a rate is relative to the quietest layer of its group",
            "late_parameter_starts_afresh": "a layer's rate depends on the noise of the others in "
            "its group",
        },
        builder=_routed,
    ),
)
