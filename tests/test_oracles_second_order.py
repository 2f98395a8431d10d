"""The defaults of the curvature oracles, as the sources print them."""

from __future__ import annotations

import ast
import inspect

import pytest

from tests.oracles import gradient_normalized as gns
from tests.oracles import hutchinson, hypergradient, kfac, kronecker, mfac, psgd, saddle_free
from tests.oracles.fadam import FAdam
from tests.oracles.induced_metric import InducedMetric

DEFAULTS = [  # as the cards' tables print them; what no card names is not listed
    (mfac.MFAC, "lr 1e-3 momentum 0 weight_decay 0 ngrads 1024 damp 1e-5"),
    (mfac.InverseFisher, "damp 1e-5"),
    (mfac.densities, "nrecomps 16"),
    (
        kronecker.Shampoo,
        "lr 1e-2 betas (0.9,1.0) eps 1e-12 weight_decay 0 max_preconditioner_dim 1024 "
        "precondition_frequency 1 start_preconditioning_step -1 bias_correction True",
    ),
    (
        kronecker.SOAP,
        "lr 3e-3 betas (.95,.95) shampoo_beta -1 eps 1e-8 weight_decay .01 max_precond_dim 10000 "
        "precondition_frequency 10 precondition_1d False normalize_grads False",
    ),
    (
        kronecker.SPlus,
        "lr .1 betas (.9,.999) ema_rate .999 inverse_every 100 eps 1e-30 weight_decay 1e-2 "
        "max_dim 10000 nonstandard_constant .001",
    ),
    (
        kronecker.KLShampoo,
        "lr 1e-4 betas (.9,.98) eps 1e-8 weight_decay .01 precondition_frequency 10",
    ),
    (hutchinson.OASISAdaptive, "init_lr 1e-3 beta2 .999 alpha 1e-3"),
    (
        hutchinson.OASISFixed,
        "lr .1 betas (.9,.999) alpha 1e-3 weight_decay 0 conv_average False D0 0",
    ),
    (hutchinson.AdaHessian, "lr .15 betas (.9,.999) eps 1e-4 weight_decay 0 hessian_power 1"),
    (hutchinson.SophiaG, "lr 1e-4 betas (.965,.99) rho .04 weight_decay .1"),
    (hutchinson.SophiaH, "betas (.96,.99) gamma .01 eps 1e-12"),
    (
        FAdam,
        "lr 1e-3 betas (.9,.999) eps 1e-8 eps2 1e-8 clip 1 weight_decay .1 p .5 maximize False",
    ),
    (InducedMetric, "lr .1 momentum .9 xi .1 beta .8 beta_rms .99 eps 1e-8 weight_decay 0"),
    (
        saddle_free.SaddleFreeNewton,
        "lr 1 inner_steps 1 dampings (1,.1,.01,1e-3,1e-4,1e-5,1e-6) accept_only_decrease True",
    ),
    (saddle_free.krylov_basis, "breakdown 1e-10"),
    (
        gns.GradNormNewton,
        "gamma0 1 gamma_min 1e-9 max_trials 40 grad_tol 0 eps 0 round_off 1e-15 adaptive True",
    ),
    (
        psgd.PSGDKron,
        "lr 3e-4 b1 .9 weight_decay 0 precond_lr .1 precond_init_scale 1 min_ndim_triangular 2 "
        "max_size_triangular 8192 momentum_into_precond_update True",
    ),
    (
        kfac.KFAC,
        "lr .1 damping .001 factor_decay .95 kl_clip .001 factor_update_steps 1 inv_update_steps 1",
    ),
    (hypergradient.hypergradient, "terms 3 damping 0 direct 0"),
]


@pytest.mark.parametrize(("rule", "printed"), DEFAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_defaults(rule, printed: str) -> None:
    parameters = inspect.signature(rule).parameters
    words = printed.split()
    for name, value in zip(words[::2], words[1::2], strict=True):
        assert parameters[name].default == ast.literal_eval(value), name
