"""Hypergradients: the oracle, the reductions, the bound of the series, and what they tune."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from optimizers import OracleError
from optimizers.forward_only import PolyStep
from optimizers.second_order import IFTHypergradient, SophiaH, hypergradient
from tests.functions import Once
from tests.oracles import hypergradient as oracle

D = torch.float64


class Ridge:
    """The card's problem in torch, beside the oracle's."""

    def __init__(self, seed=0, features=12, decays=None):
        rng = np.random.default_rng(seed)
        w = rng.normal(size=features)
        self.phi0 = -2 + 0.1 * rng.normal(size=features) if decays is None else np.array(decays)
        X, X_val = rng.normal(size=(60, features)), rng.normal(size=(40, features))
        y, y_val = (Z @ w + 0.5 * rng.normal(size=len(Z)) for Z in (X, X_val))
        self.oracle = oracle.Ridge(X, y, X_val, y_val)
        self.X, self.y, self.X_val, self.y_val = map(torch.tensor, (X, y, X_val, y_val))
        self.w = torch.tensor(self.oracle.optimum(self.phi0), requires_grad=True)
        self.phi = torch.tensor(self.phi0, requires_grad=True)

    def training(self, w=None, phi=None):
        w, phi = self.w if w is None else w, self.phi if phi is None else phi
        return ((self.X @ w - self.y) ** 2).mean() / 2 + (phi.exp() * w**2).sum() / 2

    def validation(self, w=None):
        w = self.w if w is None else w
        return ((self.X_val @ w - self.y_val) ** 2).mean() / 2

    def found(self, **options):
        (h,) = hypergradient(self.training(), self.validation(), [self.w], [self.phi], **options)
        return h

    def dense(self):
        w, phi = self.w.detach().numpy(), self.phi0
        return (
            self.oracle.hessian(phi),
            self.oracle.mixed(w, phi),
            self.oracle.validation_gradient(w),
        )

    def exact(self):
        """Differentiate through the solution itself."""
        phi = self.phi.detach().requires_grad_()
        A = self.X.T @ self.X / len(self.y) + torch.diag(phi.exp())
        w = torch.linalg.solve(A, self.X.T @ self.y / len(self.y))
        (h,) = torch.autograd.grad(self.validation(w), phi)
        return h


def relative(a, b):
    return float((a - torch.as_tensor(b)).norm() / torch.as_tensor(b).norm())


@given(
    seed=st.integers(0, 99),
    terms=st.integers(0, 30),
    rate=st.floats(0.05, 1.0),
    damping=st.sampled_from([0.0, 0.3]),
    at_the_optimum=st.booleans(),
)
def test_matches_the_oracle(seed, terms, rate, damping, at_the_optimum):
    problem = Ridge(seed)
    if not at_the_optimum:
        with torch.no_grad():
            problem.w += 0.3
    H, M, v = problem.dense()
    alpha = rate / (np.linalg.eigvalsh(H)[-1] + damping)
    options = {"terms": terms, "damping": damping}
    for method in ("neumann", "cg"):
        found = problem.found(hvp_lr=alpha, method=method, **options)
        expected = oracle.hypergradient(H, M, v, alpha=alpha, method=method, **options)
        # Thirty products of a well conditioned matrix; conjugate gradients lose some more digits.
        size = np.linalg.norm(np.linalg.norm(M, 2) * np.linalg.norm(v)) / np.linalg.eigvalsh(H)[0]
        assert float((found - torch.tensor(expected)).norm()) <= 1e-12 * size


def test_no_terms_are_t1_t2():
    problem = Ridge()
    _, M, v = problem.dense()
    found = problem.found(terms=0, hvp_lr=0.3)
    torch.testing.assert_close(found, torch.tensor(-0.3 * M.T @ v), rtol=1e-13, atol=0)


@pytest.mark.parametrize("terms", [0, 1, 3, 10])
def test_terms_are_back_propagation_through_descent_from_the_optimum(terms):
    problem = Ridge(1)
    alpha = 1 / np.linalg.eigvalsh(problem.dense()[0])[-1]
    w = problem.w.detach().requires_grad_()
    for _ in range(terms + 1):
        (slope,) = torch.autograd.grad(problem.training(w), w, create_graph=True)
        w = w - alpha * slope
    (unrolled,) = torch.autograd.grad(problem.validation(w), problem.phi)
    found = problem.found(terms=terms, hvp_lr=alpha)
    torch.testing.assert_close(found, unrolled, rtol=1e-12, atol=1e-15)


def test_the_error_of_the_series_obeys_its_bound_and_vanishes():
    problem = Ridge(2)
    H, M, v = problem.dense()
    mu, L = np.linalg.eigvalsh(H)[[0, -1]]
    exact = problem.exact()
    for terms in (0, 1, 3, 5, 10, 20, 60):
        found = problem.found(terms=terms, hvp_lr=1 / L)
        bound = np.linalg.norm(M, 2) * (1 - mu / L) ** (terms + 1) * np.linalg.norm(v) / mu
        error = float((found - exact).norm())
        assert error <= bound + 1e-14
        assert error >= bound / 1e3 or terms == 60  # no bound that anything would keep
    assert relative(problem.found(terms=300, hvp_lr=1 / L), exact) < 1e-12


def test_conjugate_gradients_are_exact_after_as_many_steps_as_weights():
    problem = Ridge(3)
    assert relative(problem.found(method="cg", terms=12), problem.exact()) < 1e-11
    assert relative(problem.found(method="cg", terms=500), problem.exact()) < 1e-11


@pytest.mark.parametrize(("dtype", "condition"), [(D, 1e12), (torch.float32, 1e6)])
def test_ill_conditioned_hessians(dtype, condition):
    """A diagonal Hessian: as many steps as distinct eigenvalues, where the series needs 1e12."""
    values = torch.logspace(0, -math.log10(condition), 5, dtype=dtype)
    w = torch.ones(5, dtype=dtype, requires_grad=True)
    phi = torch.ones(5, dtype=dtype, requires_grad=True)
    found = hypergradient(
        (values * w**2).sum() / 2 - (phi * w).sum(),
        (w * torch.arange(1, 6)).sum(),
        [w],
        [phi],
        method="cg",
        terms=40,
    )[0]
    residual = values * found - torch.arange(1, 6, dtype=dtype)
    # The residual, and not the error, is what conjugate gradients bound: by eps |H| |x|.
    assert float(residual.norm()) <= 10 * torch.finfo(dtype).eps * float(found.norm())
    singular = (torch.tensor([1.0, 0.0], dtype=dtype) * w[:2] ** 2).sum() / 2 - (phi * w).sum()
    with pytest.raises(OracleError, match="positive definite"):
        hypergradient(singular, w[1] ** 2, [w], [phi], method="cg", terms=5)
    damped = hypergradient(singular, w[:2].sum(), [w], [phi], method="cg", terms=5, damping=0.5)[0]
    torch.testing.assert_close(damped[:2], torch.tensor([1 / 1.5, 2.0], dtype=dtype))


def test_the_direct_part_and_parameters_without_a_part():
    w = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    bystander = torch.ones(3, dtype=D, requires_grad=True)
    phi = torch.tensor(2.0, dtype=D, requires_grad=True)
    only_validation = torch.tensor(5.0, dtype=D, requires_grad=True)
    training = ((w - phi) ** 2).sum() / 2
    validation = (w**2).sum() * only_validation + phi**3
    h, direct = hypergradient(
        training, validation, [w, bystander], [phi, only_validation], hvp_lr=1.0
    )
    # dw/dphi = 1; the derivative of validation: 2 w 5 . 1 + 3 phi^2.
    assert float(h) == pytest.approx(2 * 5 * 3 + 12)
    assert float(direct) == pytest.approx(5.0)
    assert w.grad is None
    assert phi.grad is None


def test_a_weight_that_enters_linearly_has_no_curvature():
    w, b, phi = (torch.tensor(x, dtype=D, requires_grad=True) for x in (1.0, 2.0, 3.0))
    training = (w - phi) ** 2 / 2 + 4 * b
    (h,) = hypergradient(training, w**2 + b**2, [w, b], [phi], hvp_lr=1.0)
    assert float(h) == 2.0  # through w alone


def test_networks_agree_with_the_dense_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params = list(model.parameters())
    weights = torch.zeros(8, dtype=D, requires_grad=True)
    x, t = torch.randn(8, 3, dtype=D), torch.randn(8, 2, dtype=D)
    shapes = [p.shape for p in params]

    def call(flat, inputs):
        parts = flat.split([s.numel() for s in shapes])
        named = dict(zip(dict(model.named_parameters()), parts, strict=True))
        named = {k: v.view(s) for (k, v), s in zip(named.items(), shapes, strict=True)}
        return torch.func.functional_call(model, named, (inputs,))

    def training(flat, phi):
        errors = ((call(flat, x) - t) ** 2).mean(1)
        return (phi.exp() * errors).mean() + 0.1 * (flat**2).sum()

    def validation(flat):
        return ((call(flat, 2 * x) - t) ** 2).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    H = torch.func.hessian(training)(flat, weights.detach())
    M = torch.func.jacrev(torch.func.grad(training), 1)(flat, weights.detach())
    v = torch.func.grad(validation)(flat)
    H, M, v = H.numpy(), M.numpy(), v.numpy()
    expected = oracle.hypergradient(H, M, v, terms=7, alpha=0.2, damping=0.1)
    joined = torch.cat([p.reshape(-1) for p in params])
    found = hypergradient(
        training(joined, weights),
        validation(joined),
        params,
        [weights],
        terms=7,
        hvp_lr=0.2,
        damping=0.1,
    )[0]
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------ refusals


def test_what_is_refused():
    problem = Ridge()

    def call(training=None, validation=None, params=None, hyperparams=None, **options):
        return hypergradient(
            problem.training() if training is None else training,
            problem.validation() if validation is None else validation,
            [problem.w] if params is None else params,
            [problem.phi] if hyperparams is None else hyperparams,
            **{"hvp_lr": 0.1, **options},
        )

    for options, message in [
        ({"terms": -1}, "terms"),
        ({"hvp_lr": 0.0}, "hvp_lr"),
        ({"hvp_lr": None}, "rate of the inner gradient descent"),
        ({"damping": -1.0}, "damping"),
        ({"method": "exact"}, "method"),
        ({"params": []}, "one tensor or more"),
        ({"params": [torch.zeros(3)]}, "require gradients"),
        ({"hyperparams": [problem.w]}, "given as both"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(TypeError, match="iterable"):
        call(params=problem.w)
    rate = torch.tensor(0.1, dtype=D, requires_grad=True)
    for options, message in [
        ({"training": problem.training().detach()}, "one number with its graph"),
        ({"validation": problem.X_val @ problem.w}, "one number with its graph"),
        ({"hyperparams": [problem.phi, rate]}, "hyperparameter 1 .* takes part in neither"),
        ({"hvp_lr": 5.0, "terms": 50}, "diverges"),
        ({"training": problem.training() * math.inf}, "diverges|not finite"),
        ({"validation": problem.validation() * math.nan}, "diverges|not finite"),
    ]:
        with pytest.raises(OracleError, match=message):
            call(**options)
    with pytest.raises(OracleError, match="hypergradient is not finite"):
        call(validation=problem.validation() + math.inf * problem.phi.sum())
    spent = problem.training()
    spent.backward()
    with pytest.raises(OracleError, match="lost its graph"):
        call(training=spent)


def test_a_term_apart_from_the_weights_has_no_implicit_gradient():
    """A constant in the training loss does not move its minimum."""
    problem = Ridge()
    offset = torch.zeros((), dtype=D, requires_grad=True)
    with pytest.raises(OracleError, match="apart from the weights"):
        hypergradient(
            problem.training() + offset, problem.validation(), [problem.w], [offset], hvp_lr=0.1
        )


def test_a_refused_outer_step_changes_nothing():
    problem = Ridge()
    outer = torch.optim.SGD([problem.phi], lr=0.1)
    tuner = IFTHypergradient([problem.w], outer, hvp_lr=5.0, terms=50)
    before = problem.phi.detach().clone()
    with pytest.raises(OracleError, match="diverges"):
        tuner.step(problem.training, problem.validation)
    assert torch.equal(problem.phi, before)
    assert problem.phi.grad is None
    with pytest.raises(ValueError, match="one of outer's"):
        IFTHypergradient([problem.phi], outer, hvp_lr=0.1)
    with pytest.raises(TypeError, match="optimizer"):
        IFTHypergradient([problem.w], "sgd", hvp_lr=0.1)


@pytest.mark.parametrize("method", ["neumann", "cg"])
def test_a_training_loss_that_is_differentiable_once_is_refused(method):
    def found(square, inner, outer):
        w = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
        phi = torch.tensor([0.5, 0.1], dtype=D, requires_grad=True)
        training = inner(square, w, phi) + (phi.exp() * w**2).sum()
        how = {"hvp_lr": 0.1, "terms": 9, "method": method}
        return hypergradient(training, outer(w).sum(), [w], [phi], **how)[0]

    last = lambda square, w, phi: square(w - 2 * phi).sum()  # noqa: E731
    inside = lambda square, w, phi: (w * square(w - 2 * phi)).sum()  # noqa: E731
    for inner in (last, inside):
        with pytest.raises(OracleError, match=r"training loss.*once_differentiable"):
            found(Once.apply, inner, torch.square)
    # Of the validation loss the first derivative alone is taken.
    left, right = (found(torch.square, last, f) for f in (Once.apply, torch.square))
    assert torch.equal(left, right)


def test_an_outer_rule_that_evaluates_objectives_is_refused_at_once():
    problem = Ridge()
    for outer in (
        SophiaH([problem.phi]),
        PolyStep([problem.phi]),
        torch.optim.LBFGS([problem.phi]),
    ):
        with pytest.raises(ValueError, match=f"got {type(outer).__name__}, which evaluates"):
            IFTHypergradient([problem.w], outer, hvp_lr=0.1)


# ------------------------------------------------------------------ what they tune


def test_an_outer_step_hands_over_the_hypergradient():
    problem = Ridge()
    outer = torch.optim.SGD([problem.phi], lr=0.5)
    tuner = IFTHypergradient([problem.w], outer, hvp_lr=0.1, terms=4)
    expected = problem.found(hvp_lr=0.1, terms=4)
    before, weights = problem.phi.detach().clone(), problem.w.detach().clone()
    loss = tuner.step(problem.training, problem.validation)
    torch.testing.assert_close(problem.phi.detach(), before - 0.5 * expected, rtol=0, atol=0)
    assert torch.equal(problem.w, weights)
    assert not loss.requires_grad
    assert torch.equal(loss, problem.validation().detach())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_decays_of_single_weights_are_tuned(seed):
    """The card's outer loop: 0.282 falls to 0.108 there, on other random numbers."""
    problem = Ridge(seed)
    outer = torch.optim.RMSprop([problem.phi], lr=0.05)
    tuner = IFTHypergradient([problem.w], outer, terms=20, hvp_lr=0.1)
    start = float(problem.validation().detach())
    for _ in range(300):
        H = problem.oracle.hessian(problem.phi.detach().numpy())  # grows with the decays
        alpha = tuner.options["hvp_lr"] = 1 / float(np.linalg.eigvalsh(H)[-1])
        for _ in range(5):
            (slope,) = torch.autograd.grad(problem.training(), problem.w)
            with torch.no_grad():
                problem.w -= alpha * slope
        tuner.step(problem.training, problem.validation)
    optimum = problem.oracle.optimum(problem.phi.detach().numpy())
    assert problem.oracle.validation(optimum) < 0.6 * start  # the card's figure


def test_wrong_labels_of_digits_lose_their_weight():
    """The card: 500 digits of which 40 % are flipped, one weight each; it finds 0.85 and 0.05."""
    rng = np.random.default_rng(0)
    data = load_digits()
    order = rng.permutation(len(data.target))[:800]
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    flipped = torch.tensor(rng.random(500) < 0.4)
    labels = torch.where(flipped, (y[:500] + torch.tensor(rng.integers(1, 10, 500))) % 10, y[:500])
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    phi = torch.zeros(500, requires_grad=True)

    def training():
        losses = nn.functional.cross_entropy(model(x[:500]), labels, reduction="none")
        decay = sum((p**2).sum() for p in model.parameters())
        return (phi.sigmoid() * losses).mean() + 1e-3 * decay

    def validation():
        return nn.functional.cross_entropy(model(x[500:]), y[500:])

    inner = torch.optim.SGD(model.parameters(), lr=0.3)
    tuner = IFTHypergradient(
        model.parameters(), torch.optim.RMSprop([phi], lr=0.05), terms=20, hvp_lr=0.3
    )
    for _ in range(100):  # half of the card's
        for _ in range(5):
            inner.zero_grad()
            training().backward()
            inner.step()
        tuner.step(training, validation)
    weights = phi.detach().sigmoid()
    assert float(weights[~flipped].mean() - weights[flipped].mean()) > 0.5
