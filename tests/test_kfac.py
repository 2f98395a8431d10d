"""KFAC against its oracle, its reductions, its theorems and its refusals."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Objective
from optimizers.second_order import EGN, KFAC
from optimizers.second_order.kfac_layers import COLUMN, ROW
from tests.kfac_cases import (
    ENTROPY,
    PLAIN,
    flat,
    half_mse,
    images,
    mlp,
    normal,
    randomize,
    statuses,
    zoo,
)
from tests.oracles import kfac as reference

torch.set_num_threads(1)

# --- the oracle ----------------------------------------------------------------------------------


class Momentum:
    """SGD with momentum on given directions, in NumPy."""

    def __init__(self, weights, lr, momentum, weight_decay):
        self.w = [w.copy() for w in weights]
        self.m = [np.zeros_like(w) for w in weights]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay

    def step(self, directions):
        for w, m, v in zip(self.w, self.m, directions, strict=True):
            m *= self.momentum
            m += v + self.weight_decay * w
            w -= self.lr * m


def backward_mlp(weights, x, y):
    """Return (rows of a, rows of g, gradient) of each tanh layer for half_mse, by hand."""
    inputs, b = [], len(x)
    for k, w in enumerate(weights):
        inputs.append(reference.linear_rows(x, bias=True) if w.shape[1] > x.shape[1] else x)
        x = inputs[-1] @ w.T
        if k + 1 < len(weights):
            x = np.tanh(x)
    found, g = [], (x - y) / b
    for k in range(len(weights) - 1, -1, -1):
        a, w = inputs[k], weights[k]
        found.append((a, g, g.T @ a))
        if k:
            n = weights[k - 1].shape[0]  # without the column of the bias
            g = (g @ w)[:, :n] * (1 - a[:, :n] ** 2)
    return found[::-1]


OPTIONS = {
    "lr": st.sampled_from([0.1, 0.02]),
    "damping": st.sampled_from([1e-3, 1e-2, 0.3]),
    "factor_decay": st.sampled_from([0.95, 0.5, 0.99]),
    "kl_clip": st.sampled_from([1e-3, 1e-2, None]),
    "factor_update_steps": st.integers(1, 3),
    "inverse_update_steps": st.integers(1, 4),
}


def meet(layers, theirs, k) -> None:
    """Demand equal weights, and let both go on from the same ones.

    Without that an unstable run would magnify rounding from step to step; factors, eigenvectors
    and momentum are carried along.
    """
    for module, w in zip(layers, theirs.w, strict=True):
        # Rounding of both, magnified by 1 / damping.
        assert np.abs(flat(module) - w).max() <= 1e-11 * max(1.0, np.abs(w).max()), k
        with torch.no_grad():
            n = module.weight[0].numel()
            module.weight.copy_(torch.from_numpy(w[:, :n]).reshape(module.weight.shape))
            if module.bias is not None:
                module.bias.copy_(torch.from_numpy(w[:, n]))


def build_reference(options):
    """Return the oracle. Without a clip steps are lr / damping: weights would grow until tanh,
    saturated, has a slope of nothing but rounding.
    """
    if options["kl_clip"] is None:
        options["lr"] *= options["damping"]
    options = dict(options)
    options["inv_update_steps"] = options.pop("inverse_update_steps")
    return reference.KFAC(**options)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    batch=st.integers(1, 8),
    bias=st.booleans(),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    options=st.fixed_dictionaries(OPTIONS),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(sizes, batch, bias, momentum, weight_decay, options, seed) -> None:
    model = mlp(*sizes, bias=bias, seed=seed)
    layers = [m for m in model if isinstance(m, nn.Linear)]
    oracle = build_reference(options)
    theirs = Momentum([flat(m) for m in layers], options["lr"], momentum, weight_decay)
    optimizer = KFAC(model.parameters(), momentum=momentum, weight_decay=weight_decay, **options)
    objective = Objective(model, half_mse)
    for k in range(30):
        x, y = normal(batch, sizes[0], seed=500 + k), normal(batch, sizes[-1], seed=700 + k)
        optimizer.step(objective.on(x, y))
        theirs.step(oracle.step(backward_mlp(theirs.w, x.numpy(), y.numpy())))
        meet(layers, theirs, k)
    assert all(statuses(optimizer)[:: 1 + bias])


@settings(max_examples=12)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    bias=st.booleans(),
    options=st.fixed_dictionaries(OPTIONS),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle_on_convolutions(kernel, stride, padding, bias, options, seed) -> None:
    geometry = {"stride": stride, "padding": padding}
    model = nn.Sequential(
        nn.Conv2d(2, 3, kernel, bias=bias, **geometry), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)
    ).double()
    model(normal(1, 2, 5, 4))
    model = randomize(model, seed)
    first, last = model[0], model[3]
    oracle = build_reference(options)
    theirs = Momentum([flat(first), flat(last)], options["lr"], 0.9, 0.0)
    optimizer = KFAC(model.parameters(), **options)
    objective = Objective(model, half_mse)
    for k in range(30):
        x, y = normal(4, 2, 5, 4, seed=500 + k), normal(4, 2, seed=700 + k)
        w, v = (torch.from_numpy(value) for value in theirs.w)
        n = first.weight[0].numel()
        h = functional.conv2d(
            x, w[:, :n].reshape(first.weight.shape), w[:, n] if bias else None, **geometry
        )
        a = torch.tanh(h)
        f = a.flatten(1) @ v[:, :-1].mT + v[:, -1]
        g = (f - y) / 4
        slope = (g @ v[:, :-1]).reshape(h.shape) * (1 - a**2)
        rows = reference.conv_rows(x.numpy(), kernel, stride, padding, bias=bias)
        out = reference.conv_output_rows(slope.numpy())
        positions = h.shape[2] * h.shape[3]
        inner = reference.linear_rows(a.flatten(1).numpy())
        theirs.step(
            oracle.step(
                [
                    (rows, out, out.T @ rows * positions**2),
                    (inner, g.numpy(), g.numpy().T @ inner),
                ]
            )
        )
        optimizer.step(objective.on(x, y))
        meet((first, last), theirs, k)


def test_one_step_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    bound = Objective(model, nn.MSELoss()).on(
        torch.full((1, 1), 2.0, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    )
    # f = 2, slope 4, gradient 8, A = 0.95 + 0.05 * 4, G = 0.95 + 0.05 * 16.
    v = 8 / (1.15 * 1.75 + 0.001)
    KFAC(model.parameters(), kl_clip=None).step(bound)
    assert model.weight.item() == pytest.approx(1 - 0.1 * v, rel=1e-14)
    nn.init.ones_(model.weight)
    KFAC(model.parameters()).step(bound)  # lr^2 <V, gradient> = 0.32 is above 0.001
    nu = math.sqrt(0.001 / (0.01 * 8 * v))
    assert model.weight.item() == pytest.approx(1 - 0.1 * nu * v, rel=1e-14)


# --- reductions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_frozen_identity_factors_are_torchs_sgd(damping: float) -> None:
    """A = G = I: V is the gradient over 1 + damping."""
    mine, theirs = zoo(), zoo()
    optimizer = KFAC(
        mine.parameters(),
        lr=0.05 * (1 + damping),
        weight_decay=0.01 / (1 + damping),
        damping=damping,
        factor_decay=1.0,
        kl_clip=None,
    )
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    left, right = Objective(mine, ENTROPY), Objective(theirs, ENTROPY)
    for k in range(30):
        optimizer.step(left.on(*images(k)))
        sgd.step(right.on(*images(k)))
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            # A few roundings a step.
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
    assert statuses(optimizer) == [2, 0] * 7


@pytest.mark.parametrize("loss_fn", [half_mse, nn.MSELoss()], ids=["half", "torch"])
def test_linear_regression_is_solved_in_one_step(loss_fn) -> None:
    """G is a multiple of the identity: the step is Gauss-Newton's over b^2."""
    b, model = 20, mlp(4, 3)
    x, y = normal(b, 4, seed=1), normal(b, 3, seed=2)
    declared = "half_mse" if loss_fn is half_mse else None
    optimizer = KFAC(
        model.parameters(), lr=1 / b**2, damping=0.0, fisher="exact", loss=declared, **PLAIN
    )
    optimizer.step(Objective(model, loss_fn).on(x, y))
    scale = 1.0 if declared else 2 / 3
    G = optimizer.state[model[0].weight][ROW]
    torch.testing.assert_close(G, scale / b**2 * torch.eye(3).double(), rtol=1e-12, atol=1e-15)
    ones = torch.cat([x, torch.ones(b, 1).double()], 1)
    expected = torch.linalg.lstsq(ones, y).solution.mT
    # A's condition number is below 10.
    np.testing.assert_allclose(flat(model[0]), expected.numpy(), rtol=1e-12, atol=1e-13)


def test_single_samples_and_one_layer_are_exact_gauss_newton() -> None:
    """With one row the Kronecker product is no approximation."""
    mine, theirs = mlp(4, 3), mlp(4, 3)
    kfac = KFAC(mine.parameters(), lr=0.5, damping=0.1, fisher="exact", **PLAIN)
    egn = EGN(theirs.parameters(), lr=0.5, damping=0.1)
    left, right = Objective(mine, ENTROPY), Objective(theirs, ENTROPY)
    for k in range(30):
        x, y = normal(1, 4, seed=k), torch.tensor([k % 3])
        kfac.step(left.on(x, y))
        egn.step(right.on(x, y))
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            # Rounding of two solves over the damping, carried through thirty steps.
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_every_layer_of_a_deep_linear_network_makes_the_same_step_in_function_space() -> None:
    """Bernacchia, Lengyel, Hennequin 2018: B_i V_i C_i = b^2 E S^-1 for square layers."""
    b, n, depth = 12, 3, 4
    torch.manual_seed(3)
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(depth))).double()
    x, y = normal(b, n, seed=1), normal(b, n, seed=2)
    W = [m.weight.detach().clone() for m in model]
    optimizer = KFAC(
        model.parameters(), lr=1.0, damping=0.0, fisher="exact", loss="half_mse", **PLAIN
    )
    with torch.no_grad():
        E = (model(x) - y).mT @ x / b
    wanted = b**2 * E @ torch.linalg.inv(x.mT @ x / b)
    optimizer.step(Objective(model, half_mse).on(x, y))
    product = functools.partial(functools.reduce, lambda total, w: w @ total)
    for k in range(depth):
        V = W[k] - model[k].weight.detach()
        before, after = (
            product(W[:k], torch.eye(n).double()),
            product(W[k + 1 :], torch.eye(n).double()),
        )
        # Condition numbers of products of default initialisations, squared.
        torch.testing.assert_close(after @ V @ before, wanted, rtol=1e-6, atol=1e-6)


def test_a_repeated_batch_is_a_smaller_damping() -> None:
    """G carries 1 / b^2: k copies of the batch divide G by k^2, and so do damping and rate."""
    x, y, k = normal(6, 3, seed=1), torch.arange(6) % 2, 3
    once, thrice = mlp(3, 4, 2), mlp(3, 4, 2)
    left = KFAC(once.parameters(), lr=0.09, damping=0.09, **PLAIN)
    right = KFAC(thrice.parameters(), lr=0.09 / k**2, damping=0.09 / k**2, **PLAIN)
    for _ in range(20):
        left.step(Objective(once, ENTROPY).on(x, y))
        right.step(Objective(thrice, ENTROPY).on(x.repeat(k, 1), y.repeat(k)))
        for p, q in zip(once.parameters(), thrice.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


# --- theorems ------------------------------------------------------------------------------------


def map_of(n: int, seed: int) -> Tensor:
    """Return a matrix of condition 4 that is neither orthogonal nor symmetric."""
    left, right = (torch.linalg.qr(normal(n, n, seed=seed + k)).Q for k in (1000, 2000))
    return left * torch.linspace(0.5, 2, n, dtype=torch.float64) @ right


class Reparametrised(nn.Module):
    """A network whose layers see and give affinely transformed values, and are the same function.

    Layer i gets ``Omega a + c`` for a, and what it gives is multiplied by Phi.
    """

    def __init__(self, plain: nn.Sequential, seed: int) -> None:
        super().__init__()
        self.layers, self.maps = nn.ModuleList(), []
        for k, m in enumerate(m for m in plain if isinstance(m, nn.Linear)):
            o, n = m.weight.shape
            Omega, Phi = (map_of(size, seed + 3 * k + j) for j, size in enumerate((n, o)))
            c = normal(n, seed=seed + 3 * k + 2)
            layer = nn.Linear(n, o).double()
            with torch.no_grad():
                W = torch.linalg.solve(Phi, m.weight) @ torch.linalg.inv(Omega)
                layer.weight.copy_(W)
                layer.bias.copy_(torch.linalg.solve(Phi, m.bias) - W @ c)
            self.layers.append(layer)
            self.maps.append((Omega, Phi, c))

    def forward(self, x: Tensor) -> Tensor:
        for k, (layer, (Omega, Phi, c)) in enumerate(zip(self.layers, self.maps, strict=True)):
            x = layer(x @ Omega.mT + c) @ Phi.mT
            if k + 1 < len(self.layers):
                x = torch.tanh(x)
        return x


@settings(max_examples=10)
@given(
    seed=st.integers(0, 50),
    fisher=st.sampled_from(["empirical", "sampled", "exact"]),
    clip=st.booleans(),
    loss_fn=st.sampled_from([nn.MSELoss(), functional.binary_cross_entropy_with_logits]),
)
def test_is_invariant_to_affine_maps_of_what_layers_see_and_give(
    seed, fisher, clip, loss_fn
) -> None:
    """Martens and Grosse 2015, theorem 1: without damping, and without the identity of the start.

    More samples than units and a loss of full rank (cross-entropy's slopes sum to zero), so that
    no factor is singular.
    """
    plain = mlp(3, 4, 3, seed=seed)
    other = Reparametrised(plain, seed)
    options = {
        **PLAIN,
        "lr": 1e-5,
        "damping": 0.0,
        "fisher": fisher,
        "momentum": 0.5,
        "kl_clip": 1.0 if clip else None,
        "seed": seed,
    }
    left, right = KFAC(plain.parameters(), **options), KFAC(other.parameters(), **options)
    x, start = normal(20, 3, seed=seed), plain(normal(20, 3, seed=seed)).detach()
    for k in range(10):
        batch = normal(40, 3, seed=100 + k), normal(40, 3, seed=200 + k).sigmoid()
        left.step(Objective(plain, loss_fn).on(*batch))
        right.step(Objective(other, loss_fn).on(*batch))
        f, g = plain(x).detach(), other(x).detach()
        # Rounding (the median is 1e-13) times condition numbers of factors, of 1e8 at worst.
        assert float((f - g).abs().max()) <= 1e-6 * float(f.abs().max())
    assert float((f - start).abs().max()) > 1e-3


@settings(max_examples=20)
@given(
    lr=st.sampled_from([1e-3, 0.1, 3.0]),
    clip=st.sampled_from([1e-6, 1e-3, 1.0]),
    damping=st.sampled_from([1e-3, 0.1]),
    seed=st.integers(0, 99),
)
def test_the_clip_bounds_the_step_in_the_damped_fisher_metric(lr, clip, damping, seed) -> None:
    """With F = A x G: step^T (F + damping I) step <= clip, with equality where it clips."""
    model = mlp(3, 4, 2, seed=seed)
    layers = [model[0], model[2]]
    options = {"momentum": 0.0, "damping": damping, "factor_decay": 0.5}
    optimizer = KFAC(model.parameters(), lr=lr, kl_clip=clip, **options)
    free = copy.deepcopy(model)
    unclipped = KFAC(free.parameters(), lr=lr, kl_clip=None, **options)
    batch = normal(6, 3, seed=seed), torch.arange(6) % 2
    before = [flat(m) for m in layers]
    optimizer.step(Objective(model, ENTROPY).on(*batch))
    unclipped.step(Objective(free, ENTROPY).on(*batch))

    def length(modules) -> float:
        total = 0.0
        for m, reference_layer, start in zip(modules, layers, before, strict=True):
            state = optimizer.state[reference_layer.weight]
            A, G = state[COLUMN].numpy(), state[ROW].numpy()
            d = flat(m) - start
            total += float((d * (G @ d @ A + damping * d)).sum())
        return total

    found, full = length(layers), length([free[0], free[2]])
    # A few roundings of the differences of weights, of which the step may be a small part.
    assert found <= clip * (1 + 1e-8)
    assert found == pytest.approx(min(clip, full), rel=1e-7)
