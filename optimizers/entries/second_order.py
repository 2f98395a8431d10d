"""Second-order rules of the zoo."""

from __future__ import annotations

from optimizers.second_order import (
    EGN,
    KFAC,
    MFAC,
    OASIS,
    SOAP,
    AdaHessian,
    FAdam,
    GradientRegularizedNewton,
    InducedMetric,
    KLShampoo,
    PSGDKron,
    SaddleFreeNewton,
    Shampoo,
    SophiaG,
    SophiaH,
    SPlus,
)
from optimizers.spec import Spec

_PROBES = "a probe is drawn parameter by parameter, in their order"
_SOPHIA = (
    "Liu, Li, Hall, Liang, Ma: Sophia, A Scalable Stochastic Second-order Optimizer for Language "
    "Model Pre-training, ICLR 2024"
)

ENTRIES: tuple[Spec, ...] = (
    Spec(
        EGN,
        family="second_order",
        reference="Korbit et al.: Exact Gauss-Newton Optimization for Training Deep Neural "
        "Networks, 2024",
        example={"lr": 0.5, "damping": 0.1},
        state_floats="0, 1 with momentum",
        evidence={
            "oracle": "tests/test_egn.py::test_matches_the_oracle, "
            "tests/test_egn_losses.py::test_every_loss_gives_the_dense_step",
            "reduction": "tests/test_egn.py: SGD, normalised LMS, least squares, the paper's form",
            "rate": "tests/test_egn.py::test_descent_inequality_on_logistic_regression (derived)",
            "claim": "tests/test_egn.py"
            "::test_beats_tuned_first_order_rules_on_digits_in_fifty_steps",
        },
    ),
    Spec(
        SaddleFreeNewton,
        family="second_order",
        reference="Dauphin et al.: Identifying and attacking the saddle point problem in "
        "high-dimensional non-convex optimization, NeurIPS 2014",
        example={},
        state_floats="0",
        evidence={
            "oracle": "tests/test_saddle_free.py::test_matches_the_oracle",
            "reduction": "tests/test_saddle_free.py: Newton, reversed Newton, gradient descent; "
            "the whole Krylov space is the exact form",
            "rate": "tests/test_saddle_free.py"
            "::test_it_converges_quadratically_near_a_regular_minimum (derived)",
            "claim": "tests/test_saddle_free.py"
            "::test_it_leaves_the_saddle_of_a_deep_linear_network",
        },
    ),
    Spec(
        GradientRegularizedNewton,
        family="second_order",
        reference="Semenov, Jaggi, Doikov: Gradient-Normalized Smoothness for Optimization with "
        "Approximate Hessians, 2025",
        example={},
        state_floats="0",
        evidence={
            "oracle": "tests/test_gradient_regularized.py::test_matches_the_oracle",
            "reduction": "tests/test_gradient_regularized.py: Newton on quadratics, normalised "
            "descent, Levenberg-Marquardt, lambda = sqrt(M |g|), Sherman-Morrison",
            "rate": "tests/test_gradient_regularized_rates.py"
            "::test_the_global_rate_of_quasi_self_concordant_functions (derived)",
            "claim": "tests/test_gradient_regularized.py::test_log_sum_exp_of_the_card",
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
        PSGDKron,
        family="second_order",
        reference="Li: Preconditioned Stochastic Gradient Descent, 2018; Pooladzandi, Li: "
        "Curvature-Informed SGD via General Purpose Lie-Group Preconditioners, 2024",
        example={"lr": 1e-2},
        state_floats="1, and A^2 + B^2 a matrix",
        evidence={
            "oracle": "tests/test_psgd_kron.py::test_matches_the_oracle",
            "reduction": "tests/test_psgd_kron.py: momentum with a clip at frozen factors, a "
            "diagonal factor for vectors",
            "rate": "tests/test_psgd_kron.py::test_it_converges_to_the_inverse_root, "
            "::test_the_diagonals_stay_positive (derived), ::test_it_whitens; no theorem is "
            "published",
        },
        exceptions={
            "parameter_order_is_irrelevant": "the noise of a refresh is drawn by the parameter's "
            "place",
        },
    ),
    Spec(
        KFAC,
        family="second_order",
        reference="Martens, Grosse: Optimizing Neural Networks with Kronecker-factored Approximate "
        "Curvature, ICML 2015; in the form of Pauloski et al., SC 2020",
        example={"lr": 0.1},
        state_floats="1, A^2 + B^2 a matrix (twice with inverse_update_steps > 1), 4 a vector "
        "element",
        evidence={
            "oracle": "tests/test_kfac.py::test_matches_the_oracle, "
            "::test_matches_the_oracle_on_convolutions",
            "reduction": "tests/test_kfac.py: torch's SGD, least squares in one step, EGN on "
            "single samples; tests/test_kfac_models.py: the dense Kronecker systems",
            "rate": "tests/test_kfac.py: invariance (Martens, Grosse 2015, theorem 1), "
            "::test_every_layer_of_a_deep_linear_network_makes_the_same_step_in_function_space, "
            "::test_the_clip_bounds_the_step_in_the_damped_fisher_metric (derived)",
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
            "parameter_order_is_irrelevant": _PROBES,
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
            "parameter_order_is_irrelevant": _PROBES,
        },
    ),
    Spec(
        SophiaG,
        family="second_order",
        reference=_SOPHIA,
        example={"lr": 1e-2},
        state_floats="2",
        evidence={
            "oracle": "tests/test_sophia.py::test_sophia_g_matches_the_oracle",
            "reduction": "tests/test_sophia.py: sign descent with momentum, a diagonal Newton step",
            "rate": "tests/test_sophia.py"
            "::test_the_expected_estimate_is_the_gauss_newton_diagonal, "
            "::test_no_entry_moves_by_more_than_the_rate",
        },
    ),
    Spec(
        SophiaH,
        family="second_order",
        reference=_SOPHIA,
        example={"lr": 1e-2},
        state_floats="2",
        evidence={
            "oracle": "tests/test_sophia.py::test_sophia_h_matches_the_oracle",
            "reduction": "tests/test_sophia.py: sign descent with momentum, a diagonal Newton step",
            "rate": "tests/test_sophia.py"
            "::test_with_the_hessian_the_gap_falls_at_a_rate_without_the_condition, "
            "::test_each_distance_shrinks_as_derived_whatever_the_probes (derived)",
        },
        exceptions={
            "parameter_order_is_irrelevant": _PROBES,
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
)
