"""EGN where the Gauss-Newton matrix is the Hessian: ridge in one step, and Newton's method."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn
from torch.nn import functional

from optimizers import EGN, Objective

D = torch.float64


def zeros(inputs, outputs=1):
    model = nn.Linear(inputs, outputs, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


@pytest.mark.parametrize("samples", [8, 60])  # fewer rows than parameters, and more
@pytest.mark.parametrize("damping", [1e-8, 1e-3, 1.0])
def test_one_step_is_the_ridge_solution(samples, damping):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((samples, 20)), rng.standard_normal(samples)
    model = zeros(20)
    rule = EGN(model.parameters(), lr=1.0, damping=damping, loss="half_mse")

    def half_mse(f, target):
        return (f - target).square().sum(1).mean() / 2

    rule.step(Objective(model, half_mse).on(torch.tensor(X), torch.tensor(y)[:, None]))
    # NumPy solves the smaller system, too: both solutions have a few roundings of its condition.
    small = X @ X.T if samples < 20 else X.T @ X
    system = small / samples + damping * np.eye(len(small))
    if samples < 20:
        expected = X.T @ np.linalg.solve(system, y) / samples
    else:
        expected = np.linalg.solve(system, X.T @ y / samples)
    found = model.weight.detach().numpy()[0]
    bound = 50 * np.finfo(float).eps * np.linalg.cond(system)
    assert bound < 1e-11
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("classes", [1, 3])
def test_with_little_damping_it_is_newtons_method(classes):
    """Logistic and softmax regression with a penalty, which the samples carry."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((200, 5))
    truth = rng.standard_normal((5, classes))
    if classes == 1:
        y = (X @ truth + rng.logistic(size=(200, 1)) > 0).astype(float)
        loss, targets = functional.binary_cross_entropy_with_logits, torch.tensor(y)
    else:
        y = (X @ truth + rng.gumbel(size=(200, classes))).argmax(1)
        loss, targets = functional.cross_entropy, torch.tensor(y)
    inputs = torch.tensor(X)

    def value(w):
        return loss(inputs @ w.view(5, classes), targets)

    def f(w):
        return float(value(torch.tensor(w)))

    def gradient(w):
        return torch.func.grad(value)(torch.tensor(w)).numpy()

    def hessian(w):
        return torch.func.hessian(value)(torch.tensor(w)).numpy()

    model = zeros(5, classes)
    damping = 1e-9
    rule = EGN(model.parameters(), lr=1.0, damping=damping)
    objective = Objective(model, loss).on(inputs, targets)
    w = np.zeros(5 * classes)
    for _ in range(8):
        w = w - np.linalg.solve(hessian(w) + damping * np.eye(len(w)), gradient(w))
        rule.step(objective)
        found = model.weight.detach().numpy().T.reshape(-1)
        # Softmax's Hessian is singular along equal shifts: the damping alone stands there, and
        # multiplies a gradient of rounding by 1e9; compared is what the loss sees.
        shift = (lambda v: v) if classes == 1 else centred
        assert np.abs(shift(found) - shift(w)).max() < 1e-9
    best = scipy.optimize.minimize(
        f, np.zeros(5 * classes), jac=gradient, hess=hessian, method="trust-exact",
        options={"gtol": 1e-12},
    )  # fmt: skip
    assert f(found) <= best.fun + 1e-14
    assert np.abs(gradient(found)).max() < 1e-13
    assert np.abs(shift(found) - shift(best.x)).max() < 1e-7


def centred(w):
    """Take the mean over the classes out, which changes no probability."""
    w = w.reshape(5, -1)
    return w - w.mean(1, keepdims=True)
