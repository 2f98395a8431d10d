"""The one list of everything in the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimizers.first_order import AMSGrad
from optimizers.forward_only import PolyStep
from optimizers.layer_dropping import CyclicBCD, DropMuon
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
from optimizers.second_order import (
    EGN,
    MFAC,
    OASIS,
    SOAP,
    AdaHessian,
    FAdam,
    InducedMetric,
    KLShampoo,
    Shampoo,
    SPlus,
)
from optimizers.spec import Spec
from optimizers.wrappers import DropLayers, Hyperball, InducedMetricOn, Routed, muon_with_adamw


def _routed(cls: Any, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """A rule for matrices, with AdamW for everything else."""
    return muon_with_adamw(model, rule=cls, **options)


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
        AMSGrad,
        family="first_order",
        reference="Reddi, Kale, Kumar: On the Convergence of Adam and Beyond, ICLR 2018",
        example={"lr": 1e-2},
        state_floats="3",
        evidence={
            "oracle": "tests/test_amsgrad.py::test_matches_the_oracle",
            "reduction": "tests/test_amsgrad.py: AdaGrad, Adam, torch's amsgrad",
            "rate": "tests/test_amsgrad.py::test_regret_bound",
            "claim": "converges on Reddi's counter-examples, where Adam does not",
        },
    ),
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
    Spec(
        DropMuon,
        family="layer_dropping",
        reference="Gruntkowska et al.: Drop-Muon, Update Less, Converge Faster, 2025",
        example={"lr": 2e-2},
        state_floats="1",
        evidence={
            "oracle": "tests/test_drop_muon.py::test_matches_the_oracle",
            "reduction": "tests/test_drop_muon.py: Muon when nothing is dropped",
            "rate": "tests/test_drop_muon.py::test_expected_decrease",
            "claim": "tests/test_drop_muon.py: dropped layers run no backward; a gain in "
            "time to a loss is not established",
        },
        exceptions={
            "one_group_equals_many": "a group is a layer",
            "parameter_order_is_irrelevant": "the order of the layers is the method",
            "late_parameter_starts_afresh": "which layers a step updates depends on how "
            "many steps were taken before",
        },
    ),
    Spec(
        CyclicBCD,
        family="layer_dropping",
        reference="Cai, Song, Wright, Diakonikolas: Cyclic Block Coordinate Descent With "
        "Variance Reduction for Composite Nonconvex Optimization, ICML 2023",
        example={"lr": 0.1},
        state_floats="2, 0 with refresh_prob=1",
        evidence={
            "oracle": "tests/test_cyclic_bcd.py::test_matches_the_oracle",
            "reduction": "tests/test_cyclic_bcd.py: SGD, PAGE, proximal gradient, "
            "Gauss-Seidel, and P-CCD when small batches hold all samples",
            "rate": "tests/test_cyclic_bcd.py: descent and stationarity of P-CCD in every "
            "cycle, ::test_linear_rate (derived)",
            "claim": "tests/test_cyclic_bcd.py"
            "::test_gets_below_the_noise_floor_of_sgd_and_sccd; on a network no gain at "
            "equal work, and divergence at rates that SGD bears (tested)",
        },
        exceptions={
            "one_group_equals_many": "a group is a block",
            "parameter_order_is_irrelevant": "the order of the blocks is the method",
        },
    ),
    Spec(
        EGN,
        family="second_order",
        reference="Korbit et al.: Exact Gauss-Newton Optimization for Training Deep Neural "
        "Networks, 2024",
        example={"lr": 0.5, "damping": 0.1},
        state_floats="0, 1 with momentum",
        evidence={
            "oracle": "tests/test_egn.py::test_matches_the_oracle",
            "reduction": "tests/test_egn.py: SGD, normalised LMS, least squares, the paper's form",
            "rate": "tests/test_egn.py::test_descent_inequality_on_logistic_regression (derived)",
            "claim": "tests/test_egn.py"
            "::test_beats_tuned_first_order_rules_on_digits_in_fifty_steps",
        },
    ),
    Spec(
        MFAC,
        family="second_order",
        reference="Frantar, Kurtic, Alistarh: M-FAC, Efficient Matrix-Free Approximations of "
        "Second-Order Information, NeurIPS 2021",
        example={"lr": 1e-2, "ngrads": 8, "damp": 0.1},
        state_floats="ngrads, 1 more with momentum",
        evidence={
            "oracle": "tests/test_mfac.py::test_matches_the_oracle",
            "reduction": "tests/test_mfac.py: normalised gradient, SGD, Sherman-Morrison, the "
            "dense inverse up to condition 1e12",
            "rate": "tests/test_mfac.py::test_descends_by_the_inequality_on_a_quadratic (derived)",
            "claim": "tests/test_mfac.py::test_ends_below_tuned_sgd_on_digits",
        },
        exceptions={
            "late_parameter_starts_afresh": "all parameters share one window of gradients",
            "nan_gradient_stays_local": "it would stay in the window for ngrads steps: refused, "
            "and nothing changes",
        },
    ),
    Spec(
        SOAP,
        family="second_order",
        reference="Vyas et al.: SOAP, Improving and Stabilizing Shampoo using Adam, 2024",
        example={"lr": 1e-2},
        state_floats="2, and 2 (A^2 + B^2) a matrix",
        evidence={
            "oracle": "tests/test_soap.py::test_matches_the_oracle",
            "reduction": "tests/test_soap.py: AdamW in the identity basis",
            "rate": "tests/test_soap.py::test_it_whitens, "
            "::test_rotated_gradients_rotate_the_step; no theorem is published",
        },
    ),
    Spec(
        Shampoo,
        family="second_order",
        reference="Gupta, Koren, Singer: Shampoo, Preconditioned Stochastic Tensor Optimization, "
        "ICML 2018; Shi et al.: Distributed Shampoo, 2023",
        example={"lr": 1e-2},
        state_floats="1, and 2 (A^2 + B^2) a matrix; 1 more for grafting",
        evidence={
            "oracle": "tests/test_shampoo.py::test_matches_the_oracle",
            "reduction": "tests/test_shampoo.py: full-matrix AdaGrad, the polar factor, the "
            "grafted rule before the start",
            "rate": "tests/test_shampoo.py::test_regret_bound",
        },
    ),
    Spec(
        KLShampoo,
        family="second_order",
        reference="Lin et al.: Understanding and Improving Shampoo and SOAP via Kullback-Leibler "
        "Minimization, ICLR 2026",
        example={"lr": 1e-2},
        state_floats="1, and 2 (A^2 + B^2) a matrix",
        evidence={
            "oracle": "tests/test_kl_shampoo.py::test_matches_the_oracle",
            "reduction": "tests/test_kl_shampoo.py: a second moment for each entry of a vector, "
            "the identity under isotropic noise",
            "rate": "tests/test_kl_shampoo.py::test_it_whitens; no theorem is published",
        },
    ),
    Spec(
        SPlus,
        family="second_order",
        reference="Frans, Levine, Abbeel: A Stable Whitening Optimizer for Efficient Neural "
        "Network Training, 2025",
        example={"lr": 0.1},
        state_floats="2, and 2 (A^2 + B^2) a matrix",
        evidence={
            "oracle": "tests/test_splus.py::test_matches_the_oracle",
            "reduction": "tests/test_splus.py: the sign of the momentum in the identity basis",
            "rate": "tests/test_splus.py::test_it_whitens; no theorem is published",
        },
    ),
    Spec(
        OASIS,
        family="second_order",
        reference="Jahani et al.: Doubly Adaptive Scaled Algorithm for Machine Learning Using "
        "Second-Order Information, ICLR 2022",
        example={"lr": 0.1, "adaptive": False, "alpha": 0.1},
        state_floats="3 adaptive, 1 or 2 with a rate",
        evidence={
            "oracle": "tests/test_hutchinson.py::test_adaptive_oasis_matches_the_oracle",
            "reduction": "tests/test_hutchinson.py: adaptive gradient descent, SGD with and "
            "without momentum",
            "rate": "tests/test_hutchinson.py::test_the_theorem_of_the_adaptive_rate, "
            "::test_the_linear_rate_of_the_fixed_form (derived)",
            "claim": "tests/test_hutchinson.py"
            "::test_on_digits_no_rate_is_given_and_the_gap_is_a_quarter_of_gradient_descents",
        },
        exceptions={
            "parameter_order_is_irrelevant": "a probe is drawn parameter by parameter, in their "
            "order",
        },
    ),
    Spec(
        AdaHessian,
        family="second_order",
        reference="Yao et al.: AdaHessian, An Adaptive Second Order Optimizer for Machine "
        "Learning, AAAI 2021",
        example={"lr": 0.1},
        state_floats="2",
        evidence={
            "oracle": "tests/test_hutchinson.py::test_adahessian_matches_the_oracle",
            "reduction": "tests/test_hutchinson.py"
            "::test_adahessian_without_curvature_is_averaged_sgd",
            "rate": "tests/test_hutchinson.py"
            "::test_on_separable_functions_the_seed_does_not_matter; no theorem is tested",
        },
        exceptions={
            "parameter_order_is_irrelevant": "a probe is drawn parameter by parameter, in their "
            "order",
        },
    ),
    Spec(
        FAdam,
        family="second_order",
        reference="Hwang: FAdam, Adam is a natural gradient optimizer using diagonal empirical "
        "Fisher information, 2024",
        example={"lr": 1e-2},
        state_floats="2",
        evidence={
            "oracle": "tests/test_fadam.py::test_matches_the_oracle",
            "reduction": "tests/test_fadam.py: Adam without momentum, sign descent",
            "rate": "tests/test_fadam.py::test_steps_are_bounded (derived); no theorem is "
            "published",
            "claim": "tests/test_fadam.py::test_on_digits_it_ends_near_adam_without_a_lead_and_"
            "small_rates_are_slower",
        },
    ),
    Spec(
        InducedMetric,
        family="second_order",
        reference="Harvey: The Optimiser Hidden in Plain Sight, Training with the Loss Landscape's "
        "Induced Metric, 2025",
        example={"lr": 0.1, "xi": 1e-3},
        state_floats="1, 2 for rms",
        evidence={
            "oracle": "tests/test_induced_metric.py::test_matches_the_oracle",
            "reduction": "tests/test_induced_metric.py: SGD and AdamW without the metric",
            "rate": "tests/test_induced_metric.py: length of a step, descent on a quadratic "
            "(derived); no theorem is published",
            "claim": "tests/test_induced_metric.py::test_the_published_numbers_of_steps",
        },
    ),
    Spec(
        PolyStep,
        family="forward_only",
        reference="An T. Le: Training Non-Differentiable Networks via Optimal Transport, 2026",
        example={"epsilon": 0.3},
        state_floats="0, 1 with momentum",
        evidence={
            "oracle": "tests/test_polystep.py::test_matches_the_oracle",
            "reduction": "tests/test_polystep.py: closed form on linear losses, gradient "
            "step for small radii",
            "rate": "tests/test_polystep.py: fixed point of the orthoplex (derived)",
            "claim": "tests/test_polystep.py: trains a staircase network without a "
            "gradient; the lead over evolution strategies is not tested",
        },
        exceptions={
            "parameter_order_is_irrelevant": "the vector of all parameters is cut into "
            "particles in the order given",
        },
    ),
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
