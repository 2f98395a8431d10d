"""AdaHessian and OASIS: oracles, published runs, reductions, the rates of OASIS, digits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from optimizers.second_order import OASIS, AdaHessian
from optimizers.second_order.hutchinson import draw_probes
from tests.oracles import hutchinson as oracles

D = torch.float64
SHAPES = [(2, 3), (4,), (2, 2, 3), (2, 1, 2, 2), ()]


class Quartic:
    """1/2 w'Aw + b'w + sum w^4 / 12 of all parameters together; A and b may change."""

    def __init__(self, shapes, seed):
        self.rng = np.random.default_rng(seed)
        self.shapes, self.d = shapes, sum(int(np.prod(s)) for s in shapes)
        self.params = [nn.Parameter(torch.tensor(self.rng.standard_normal(s))) for s in shapes]
        self.draw()

    def draw(self):
        M = self.rng.standard_normal((self.d, self.d))
        self.A, self.b = M @ M.T / self.d, self.rng.standard_normal(self.d)

    def closure(self):
        w = torch.cat([p.flatten() for p in self.params])
        A, b = torch.tensor(self.A), torch.tensor(self.b)
        return w @ A @ w / 2 + b @ w + (w**4).sum() / 12

    def split(self, flat):
        sizes = [int(np.prod(s)) for s in self.shapes]
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        return [part.reshape(s) for part, s in zip(parts, self.shapes, strict=True)]

    def gradient(self, arrays):
        w = np.concatenate([np.ravel(a) for a in arrays])
        return self.split(self.A @ w + self.b + w**3 / 3)

    def estimate(self, arrays, seed, time, samples):
        """The mean of z * Hz, with the rule's own z."""
        w = np.concatenate([np.ravel(a) for a in arrays])
        found = np.zeros(self.d)
        for probe in draw_probes(self.params, seed, time, samples):
            z = np.concatenate([p.numpy().ravel() for p in probe])
            assert set(z) <= {-1.0, 1.0}
            found += z * (self.A @ z + w**2 * z) / samples
        return self.split(found)

    def values(self):
        return [p.detach().numpy().copy() for p in self.params]


problems = st.builds(
    Quartic,
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    st.integers(0, 1000),
)


def close(params, expected, tolerance):
    for p, w in zip(params, expected, strict=True):
        gap = np.abs(p.detach().numpy() - w).max(initial=0.0)
        assert gap <= tolerance * max(1.0, np.abs(w).max(initial=0.0))


# ------------------------------------------------------------------ oracles


@given(
    problem=problems,
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.01, 0.1]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
            "eps": st.sampled_from([1e-4, 1e-1]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "hessian_power": st.sampled_from([1.0, 0.5, 0.0]),
        }
    ),
    samples=st.sampled_from([1, 3]),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 10**6),
)
def test_adahessian_matches_the_oracle(problem, options, samples, foreach, seed):
    how = {"hessian_samples": samples, "seed": seed, "foreach": foreach}
    optimizer = AdaHessian(problem.params, **how, **options)
    references = [oracles.AdaHessian(w, **options) for w in problem.values()]
    values = problem.values()
    for t in range(30):
        v = problem.estimate(values, seed, t, samples)
        g = problem.gradient(values)
        optimizer.step(problem.closure)
        values = [r.step(x, y) for r, x, y in zip(references, g, v, strict=True)]
        problem.draw()
    # Thirty steps of a few roundings, of matrices of norm about 4.
    close(problem.params, values, 1e-11)


@given(
    problem=problems,
    beta2=st.sampled_from([0.5, 0.99, 1.0]),
    alpha=st.sampled_from([1e-3, 0.5]),
    same_batch=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_adaptive_oasis_matches_the_oracle(problem, beta2, alpha, same_batch, seed):
    optimizer = OASIS(
        problem.params, betas=(0.0, beta2), alpha=alpha, init_lr=1e-2, same_batch=same_batch,
        warmup_samples=5, seed=seed,
    )  # fmt: skip
    values = problem.values()
    start = problem.estimate(values, seed, 0, 5)
    reference = oracles.OASISAdaptive(values, start, init_lr=1e-2, beta2=beta2, alpha=alpha)
    before = None
    for t in range(30):
        g = problem.gradient(values)
        other = None if before is None else problem.gradient(before)
        v = problem.estimate(values, seed, t, 1)
        optimizer.step(problem.closure)
        before, values = values, reference.step(g, other, v)
        assert optimizer.param_groups[0]["last_lr"] == pytest.approx(reference.eta, rel=1e-9)
        if same_batch:
            problem.draw()
    # The rate is a ratio of differences, which keep some ten digits.
    close(problem.params, values, 1e-9)


@given(
    problem=problems,
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.02]),
            "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 1.0)]),
            "alpha": st.sampled_from([1e-2, 1.0]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
        }
    ),
    every=st.sampled_from([1, 3]),
    warm=st.sampled_from([0, 4]),
    average=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_fixed_oasis_matches_the_oracle(problem, options, every, warm, average, seed):
    optimizer = OASIS(
        problem.params, hessian_every=every, warmup_samples=warm, average_kernels=average,
        seed=seed, adaptive=False, **options,
    )  # fmt: skip
    values = problem.values()
    start = problem.estimate(values, seed, 0, warm) if warm else [0.0] * len(values)
    if average:
        start = [oracles.spatial_mean(s) if np.ndim(s) > 2 else s for s in start]
    references = [
        oracles.OASISFixed(w, s, conv_average=average, **options)
        for w, s in zip(values, start, strict=True)
    ]
    for t in range(30):
        refresh = t % every == 0 and not (warm and t == 0)
        v = problem.estimate(values, seed, t, 1) if refresh else [None] * len(values)
        g = problem.gradient(values)
        optimizer.step(problem.closure)
        values = [r.step(x, y) for r, x, y in zip(references, g, v, strict=True)]
    close(problem.params, values, 1e-10)


def test_the_published_run_of_oasis():
    """F = sum W^3 / 30 has a diagonal Hessian: every probe gives it."""
    W = nn.Parameter(torch.arange(1.0, 7.0, dtype=D).view(2, 3))
    optimizer = OASIS([W], betas=(0.0, 0.9), alpha=0.3, init_lr=0.01, warmup_samples=1, seed=5)
    rates = []
    for _ in range(4):
        optimizer.step(lambda: (W**3).sum() / 30)
        rates.append(optimizer.param_groups[0]["last_lr"])
    golden = [0.01, 0.5012131719416782, 0.5595659431509024, 0.7019726639618491]
    np.testing.assert_allclose(rates, golden, rtol=1e-13)
    end = [[0.586683919050, 0.915006570143, 1.372509855214],
           [1.830013140285, 2.287516425357, 2.745019710428]]  # fmt: skip
    np.testing.assert_allclose(W.detach().numpy(), end, rtol=0, atol=6e-13)


# ------------------------------------------------------------------ reductions


def ones(optimizer):
    for state in optimizer.state.values():
        state["hessian_diag"].fill_(1.0)
    return optimizer


def test_with_a_frozen_unit_diagonal_it_is_adaptive_gradient_descent():
    problem = Quartic([(2, 3), (4,)], 0)
    optimizer = ones(OASIS(problem.params, betas=(0.0, 1.0), alpha=0.5, warmup_samples=0))
    w = np.concatenate([a.ravel() for a in problem.values()])
    f = lambda w: problem.A @ w + problem.b + w**3 / 3  # noqa: E731
    rate, theta = 1e-3, math.inf
    before, w_next = w, w - rate * f(w)
    optimizer.step(problem.closure)
    for _ in range(50):
        optimizer.step(problem.closure)
        ratio = np.linalg.norm(w_next - before) / (2 * np.linalg.norm(f(w_next) - f(before)))
        new = min(math.sqrt(1 + theta) * rate, ratio)
        rate, theta = new, new / rate
        before, w_next = w_next, w_next - rate * f(w_next)
    ours = np.concatenate([a.ravel() for a in problem.values()])
    np.testing.assert_allclose(ours, w_next, rtol=0, atol=1e-10)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_with_a_frozen_unit_diagonal_and_a_rate_it_is_sgd(beta1):
    left, right = Quartic([(2, 3), (4,)], 0), Quartic([(2, 3), (4,)], 0)
    options = {"betas": (beta1, 1.0), "alpha": 0.5, "warmup_samples": 0}
    optimizer = ones(OASIS(left.params, lr=0.01, adaptive=False, **options))
    sgd, m = torch.optim.SGD(right.params, lr=0.01), [0.0, 0.0]
    for t in range(1, 31):
        optimizer.step(left.closure)
        sgd.zero_grad()
        right.closure().backward()
        for k, p in enumerate(right.params):
            m[k] = beta1 * m[k] + (1 - beta1) * p.grad
            p.grad = m[k] / (1 - beta1**t)
        sgd.step()
    close(left.params, right.values(), 1e-13)


def test_adahessian_without_curvature_is_averaged_sgd():
    left, right = Quartic([(2, 3), (4,)], 0), Quartic([(2, 3), (4,)], 0)
    optimizer = AdaHessian(left.params, lr=0.01, hessian_power=0.0, eps=0.25)
    m = [0.0, 0.0]
    for t in range(1, 21):
        optimizer.step(left.closure)
        grads = right.gradient(right.values())
        for k, p in enumerate(right.params):
            m[k] = 0.9 * m[k] + 0.1 * grads[k]
            with torch.no_grad():
                p.sub_(torch.tensor(0.01 * m[k] / (1 - 0.9**t) / 1.25))
    close(left.params, right.values(), 1e-13)


@pytest.mark.parametrize("rule", [AdaHessian, OASIS])
def test_on_separable_functions_the_seed_does_not_matter(rule):
    ends = []
    for seed in (0, 1):
        w = nn.Parameter(torch.linspace(1, 2, 5, dtype=D))
        optimizer = rule([w], seed=seed)
        for _ in range(10):
            optimizer.step(lambda w=w: (w**4).sum() / 12)
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-13, atol=0)


def test_on_a_separable_quadratic_the_loss_falls_by_four():
    h, w = torch.logspace(-2, 2, 6, dtype=D), nn.Parameter(torch.ones(6, dtype=D))
    optimizer = OASIS([w], alpha=1e-3, warmup_samples=1)
    losses = [float(optimizer.step(lambda: 0.5 * (h * w**2).sum())) for _ in range(8)]
    # After the first step, at any init_lr, the rate is one half: w halves.
    np.testing.assert_allclose(np.array(losses[2:]) / losses[1:-1], 0.25, rtol=1e-9)


# ------------------------------------------------------------------ rates


def logistic(n=80, d=10, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * np.logspace(-1, 0.5, d)
    y = np.sign(rng.standard_normal(n))
    X, y = torch.tensor(X), torch.tensor(y)

    def f(w):
        return nn.functional.softplus(-y * (X @ w)).mean() + 0.005 * w @ w

    w = torch.zeros(d, dtype=D)
    for _ in range(50):  # Newton
        H = torch.func.hessian(f)(w)
        w = w - torch.linalg.solve(H, torch.func.grad(f)(w))
    assert float(torch.func.grad(f)(w).norm()) < 1e-14
    L = X.T @ X / (4 * n) + 0.01 * torch.eye(d, dtype=D)
    return f, w, L


def test_the_theorem_of_the_adaptive_rate():
    f, best, L = logistic()
    scaling = torch.func.hessian(f)(torch.zeros(10, dtype=D)).diagonal().clamp(min=1e-3)
    root = scaling.rsqrt()
    L_D = float(torch.linalg.eigvalsh(root[:, None] * L * root).max())
    w = nn.Parameter(torch.ones(10, dtype=D))
    optimizer = OASIS([w], betas=(0.0, 1.0), init_lr=1e-3, warmup_samples=0)
    optimizer.state[w]["hessian_diag"].copy_(scaling)
    points, rates, thetas = [w.detach().clone()], [], []
    for _ in range(41):
        optimizer.step(lambda: f(w))
        points.append(w.detach().clone())
        rates.append(optimizer.param_groups[0]["last_lr"])
        thetas.append(optimizer.param_groups[0]["theta"])
    norm = lambda x: float((scaling * x * x).sum())  # noqa: E731
    gap = [float(f(p) - f(best)) for p in points]
    first = rates[1] * thetas[1]
    C = norm(points[1] - best) + norm(points[1] - points[0]) / 2 + 2 * first * gap[0]
    for k in range(1, 41):
        S = first + sum(rates[1 : k + 1])
        assert min(gap[1 : k + 1]) <= C / (2 * S) + 1e-14
        assert rates[k] >= 1 / (2 * L_D) * (1 - 1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_linear_rate_of_the_fixed_form(seed):
    f, best, bound = logistic()
    L, mu, alpha = float(torch.linalg.eigvalsh(bound).max()), 0.01, 0.05
    w = nn.Parameter(torch.ones(10, dtype=D))
    optimizer = OASIS(
        [w],
        lr=alpha / L,
        betas=(0.0, 0.99),
        alpha=alpha,
        adaptive=False,
        warmup_samples=5,
        seed=seed,
    )
    gap = float(f(w.detach()) - f(best))
    for _ in range(300):
        optimizer.step(lambda: f(w))
        largest = float(optimizer.state[w]["hessian_diag"].abs().clamp(min=alpha).max())
        after = float(f(w.detach()) - f(best))
        assert after <= (1 - alpha * mu / (L * largest)) * gap + 1e-14
        gap = after


@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_on_digits_no_rate_is_given_and_the_gap_is_a_quarter_of_gradient_descents(beta2):
    digits = load_digits()
    X = np.c_[digits.data / 16, np.ones(len(digits.data))]
    X, y = torch.tensor(X), torch.tensor(np.where(digits.target >= 5, 1.0, -1.0))

    def f(w):
        return nn.functional.softplus(-y * (X @ w)).mean() + 0.5e-4 * w @ w

    L = float(torch.linalg.eigvalsh(X.T @ X / (4 * len(X))).max()) + 1e-4
    best = torch.zeros(65, dtype=D)
    for _ in range(60):
        best = best - torch.linalg.solve(torch.func.hessian(f)(best), torch.func.grad(f)(best))
    lowest = float(f(best))
    w = torch.zeros(65, dtype=D)
    for _ in range(300):
        w = w - torch.func.grad(f)(w) / L
    descent = float(f(w)) - lowest
    for seed in range(3):
        p = nn.Parameter(torch.zeros(65, dtype=D))
        optimizer = OASIS([p], betas=(0.0, beta2), seed=seed)
        for _ in range(300):
            optimizer.step(lambda p=p: f(p))
        assert float(f(p.detach())) - lowest < descent / 4
