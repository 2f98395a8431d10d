"""AMSGrad: oracle, reductions, regret bound, counter-examples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import AMSGrad
from tests.oracles.amsgrad import AMSGrad as Reference

STEPS = 50


def gradient_stream(shape, seed, steps=STEPS):
    rng = np.random.default_rng(seed)
    # Magnitudes over four decades, so that the maximum matters.
    return [rng.standard_normal(shape) * 10 ** rng.uniform(-2, 2) for _ in range(steps)]


def run(x0, grads, **options):
    p = nn.Parameter(torch.tensor(x0, dtype=torch.float64))
    optimizer = AMSGrad([p], **options)
    points = []
    for g in grads:
        p.grad = torch.as_tensor(g, dtype=torch.float64).reshape(p.shape)
        optimizer.step()
        points.append(p.detach().numpy().copy())
    return points


def relative(ours, theirs):
    scale = max(1.0, np.abs(theirs).max())
    return np.abs(ours - theirs).max() / scale


options_drawn = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1, 1.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.0, 0.0)]),
        "eps": st.sampled_from([0.0, 1e-8, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "decoupled_weight_decay": st.booleans(),
        "lr_decay": st.sampled_from(["none", "sqrt"]),
        "maximize": st.booleans(),
        "form": st.sampled_from(
            [
                {},
                {"bias_correction": "torch"},
                {"beta1_decay": 0.9},
                {"beta1_decay": "1/t"},
                {"beta2_schedule": "1-1/t"},
            ]
        ),
    }
)


@pytest.mark.filterwarnings("ignore:betas")  # the oracle does not care whether theory applies
@pytest.mark.parametrize("foreach", [None, True, False])
@given(
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 2)]),
    options=options_drawn,
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shape, options, seed):
    options = dict(options)
    options.update(options.pop("form"))
    x0 = np.random.default_rng(seed + 1).standard_normal(shape)
    grads = gradient_stream(shape, seed)
    reference = Reference(x0, **options)
    for ours, g in zip(run(x0, grads, foreach=foreach, **options), grads, strict=True):
        # Fifty steps of some ten roundings each.
        assert relative(ours, reference.step(g)) < 1e-11


@pytest.mark.parametrize("foreach", [None, True, False])
def test_parameters_with_different_counts_have_their_own_schedules(foreach):
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AMSGrad([a, b], lr=0.1, lr_decay="sqrt", beta1_decay=0.9, foreach=foreach)
    references = [Reference(np.ones(3), lr=0.1, lr_decay="sqrt", beta1_decay=0.9) for _ in "ab"]
    for k, (g, h) in enumerate(zip(gradient_stream(3, 1), gradient_stream(3, 2), strict=True)):
        a.grad = torch.tensor(g)
        b.grad = torch.tensor(h) if k % 3 == 2 else None
        optimizer.step()
        references[0].step(g)
        if b.grad is not None:
            references[1].step(h)
    for p, reference in zip((a, b), references, strict=True):
        assert relative(p.detach().numpy(), reference.x) < 1e-11


def test_the_default_path_runs_torchs_fused_kernel(monkeypatch):
    calls = []
    kernel = torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    run(np.ones(3), gradient_stream(3, 0, 2))
    assert len(calls) == 2
    run(np.ones(3), gradient_stream(3, 0, 2), eps=0.0)  # the kernel has no rule for 0/0
    assert len(calls) == 2


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_torch_form_equals_torch(decay, decoupled, foreach):
    x0, grads = np.linspace(-1, 1, 6), gradient_stream(6, 3)
    p = nn.Parameter(torch.tensor(x0))
    cls = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = cls([p], lr=0.05, amsgrad=True, **({"weight_decay": 0.0} | decay))
    ours = run(
        x0,
        grads,
        lr=0.05,
        bias_correction="torch",
        decoupled_weight_decay=decoupled,
        foreach=foreach,
        **decay,
    )
    for point, g in zip(ours, grads, strict=True):
        p.grad = torch.tensor(g)
        theirs.step()
        assert relative(point, p.detach().numpy()) < 1e-13


@pytest.mark.parametrize("foreach", [True, False])
def test_adamnc_without_momentum_is_adagrad(foreach):
    x0, grads = np.linspace(-1, 1, 6), gradient_stream(6, 4)
    p = nn.Parameter(torch.tensor(x0))
    theirs = torch.optim.Adagrad([p], lr=0.05, eps=0)
    ours = run(
        x0,
        grads,
        lr=0.05,
        betas=(0.0, 0.999),
        eps=0.0,
        lr_decay="sqrt",
        beta2_schedule="1-1/t",
        foreach=foreach,
    )
    for point, g in zip(ours, grads, strict=True):
        p.grad = torch.tensor(g)
        theirs.step()
        assert relative(point, p.detach().numpy()) < 1e-12


def test_with_growing_gradients_it_is_adam_without_bias_correction():
    grads = [np.array([1.0, -2.0]) * 1.1**k for k in range(30)]
    x, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for point, g in zip(run(x, grads, lr=0.1), grads, strict=True):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - 0.1 * m / (np.sqrt(v) + 1e-8)
        assert relative(point, x) < 1e-12


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.filterwarnings("ignore:betas")
def test_without_averages_the_step_is_scaled_by_the_largest_gradient(foreach):
    grads = [np.array([g]) for g in (1.0, -3.0, 2.0, 0.5, 6.0)]
    points = run(np.zeros(1), grads, lr=1.0, betas=(0.0, 0.0), eps=0.0, foreach=foreach)
    expected = np.cumsum([-1.0, 1.0, -2 / 3, -0.5 / 3, -1.0])
    assert np.allclose(np.ravel(points), expected, rtol=0, atol=1e-14)


def test_the_rate_never_grows_while_torchs_form_does():
    """The published difference: 1.000, 1.414, 1.731, 1.999, 2.234 against a constant rate."""
    grads = [np.array([g]) for g in (1.0, 1e-3, 1e-3, 1e-3, 1e-3)]

    def rates(**options):
        points = [np.zeros(1), *run(np.zeros(1), grads, lr=1.0, betas=(0, 0.999), **options)]
        moves = -np.diff(np.ravel(points))
        return moves / moves[0] / (np.ravel(grads) / grads[0])

    torchs = rates(eps=0.0, bias_correction="torch")
    assert np.allclose(torchs, [1.000, 1.414, 1.731, 1.999, 2.234], atol=5e-4)
    assert np.all(np.diff(rates(eps=0.0)) <= 1e-12)


# ------------------------------------------------------------------ theorems


def play(slopes, x0, clip=True, **options):
    """Play online linear losses on [-1, 1]; return points before each step and the optimizer."""
    p = nn.Parameter(torch.tensor([x0], dtype=torch.float64))
    optimizer = AMSGrad([p], foreach=False, **options)
    if clip:
        optimizer.register_step_post_hook(lambda *_: p.data.clamp_(-1, 1))
    points = []
    for slope in slopes:
        points.append(p.item())
        p.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.step()
    return np.array(points), p.item(), optimizer.state[p]


@given(
    seed=st.integers(0, 1000),
    lr=st.sampled_from([0.05, 0.3, 2.0]),
    beta2=st.sampled_from([0.5, 0.99]),
    lr_decay=st.sampled_from(["none", "sqrt"]),
)
def test_regret_bound(seed, lr, beta2, lr_decay):
    """For beta1 = 0 and linear losses: R <= D^2 sqrt(v)/(2 a_T) + sum a_t g_t^2/sqrt(v_t)/2."""
    slopes = np.random.default_rng(seed).standard_normal(200) * 3
    points, _, _ = play(slopes, 0.3, lr=lr, betas=(0.0, beta2), eps=0.0, lr_decay=lr_decay)
    regret = np.sum(slopes * points) - (-abs(np.sum(slopes)))  # the best fixed point is -sign
    v = vhat = bound = 0.0
    for t, g in enumerate(slopes, 1):
        alpha = lr / math.sqrt(t) if lr_decay == "sqrt" else lr
        v = beta2 * v + (1 - beta2) * g * g
        vhat = max(vhat, v)
        bound += alpha * g * g / math.sqrt(vhat) / 2
    bound += 2**2 * math.sqrt(vhat) / (2 * alpha)
    assert regret <= bound * (1 + 1e-9)


@pytest.mark.parametrize("C", [3.0, 10.0])
def test_converges_where_adam_does_not(C):
    """Reddi's period-3 losses: Adam returns to the worst point, AMSGrad finds the best."""
    T, beta2 = 9_000, 1 / (1 + C * C)
    lr = 0.9 * math.sqrt(1 - beta2)
    slopes = np.where(np.arange(1, T + 1) % 3 == 1, C, -1.0)
    points, _, _ = play(slopes, 1.0, lr=lr, betas=(0.0, beta2), eps=0.0, lr_decay="sqrt")
    regret = np.sum(slopes * (points + 1)) / T  # the best point is -1
    assert regret <= 0.04  # 0.02 at three times the horizon; the rate is 1/sqrt(T)
    assert points[-1] < -0.9
    # Adam on the same losses: the same rule without the maximum.
    x, v, adams = 1.0, 0.0, []
    for t, g in enumerate(slopes, 1):
        adams.append(x)
        v = beta2 * v + (1 - beta2) * g * g
        x = float(np.clip(x - lr / math.sqrt(t) * g / math.sqrt(v), -1, 1))
    assert np.sum(slopes * (np.array(adams) + 1)) / T >= 0.99 * (2 * C - 4) / 3
    assert x == 1.0


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("foreach", [None, True, False])
def test_zero_over_zero_is_a_zero_step(foreach):
    (point,) = run(np.ones(2), [np.array([0.0, 1.0])], lr=0.1, eps=0.0, foreach=foreach)
    assert point[0] == 1.0
    assert point[1] < 1.0


def test_reset_max_forgets_an_exploding_gradient():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AMSGrad([p], lr=0.1, betas=(0.9, 0.9))
    for g in (1e6, *[1.0] * 300):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    frozen = p.item()
    optimizer.step()
    assert abs(p.item() - frozen) < 1e-6
    optimizer.reset_max()
    before = p.item()
    optimizer.step()
    assert abs(p.item() - before) == pytest.approx(0.1, rel=0.01)


def test_warns_where_the_theory_is_void():
    with pytest.warns(UserWarning, match=r"beta1 < sqrt\(beta2\)"):
        AMSGrad([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (1.0, 0.9)},
        {"eps": -1e-8},
        {"weight_decay": float("nan")},
        {"bias_correction": "adam"},
        {"lr_decay": "linear"},
        {"beta1_decay": 0.0},
        {"beta2_schedule": "1-1/t", "bias_correction": "torch"},
        {"beta1_decay": 0.9, "bias_correction": "torch"},
    ],
)
def test_refusals(options):
    with pytest.raises(ValueError, match="|".join(options)):
        AMSGrad([nn.Parameter(torch.zeros(1))], **options)
