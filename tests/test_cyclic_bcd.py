"""CyclicBCD: its oracle, what it reduces to, its theorems, its claims and its refusals."""

from __future__ import annotations

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from optimizers import Muon, Objective, OracleError
from optimizers.layer_dropping import CyclicBCD, DropMuon, cyclic_bcd
from optimizers.layer_dropping.draws import draw_small_batch, random_states, replaying
from optimizers.oracle import Needs
from optimizers.testing.checks import pytest_params, run_check
from optimizers.testing.checks.subject import Subject
from optimizers.testing.problems import Lasso
from tests.oracles import cyclic_bcd as reference

D = torch.float64


class Blocks(nn.Module):
    """Predicts ``A @ x`` with the vector x cut into blocks of parameters of given shapes."""

    def __init__(self, blocks, start=None, dtype=D):
        super().__init__()
        self.blocks = [[nn.Parameter(torch.zeros(s, dtype=dtype)) for s in b] for b in blocks]
        for i, p in enumerate(itertools.chain(*self.blocks)):
            self.register_parameter(f"x{i}", p)
        if start is not None:
            place(self.parameters(), start)

    def forward(self, A: Tensor) -> Tensor:
        return A @ torch.cat([p.reshape(-1) for p in self.parameters()]).to(A.dtype)

    def groups(self, **options):
        """The blocks as parameter groups; a list among the options holds one value for each."""
        return [
            {
                "params": block,
                **{k: v[i] if isinstance(v, list) else v for k, v in options.items()},
            }
            for i, block in enumerate(self.blocks)
        ]


def place(params, values):
    at = 0
    with torch.no_grad():
        for p in params:
            p.copy_(torch.as_tensor(values[at : at + p.numel()]).reshape(p.shape))
            at += p.numel()


def flat(tensors) -> np.ndarray:
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]).numpy().copy()


def half_mse(outputs, targets):
    return (outputs - targets).square().mean() / 2


def pseudo_huber(outputs, targets):
    return (1 + (outputs - targets).square()).sqrt().mean()


def least_squares(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal(n)


def bound(model, A, y, loss=half_mse) -> Objective:
    return Objective(model, loss).on(torch.as_tensor(A), torch.as_tensor(y))


def smoothness(A, sizes) -> list[float]:
    """Return the constants L_j of |Ax - y|^2/(2n), block by block."""
    ends = np.cumsum([0, *sizes])
    return [float(np.linalg.norm(A[:, a:b], 2) ** 2 / len(A)) for a, b in itertools.pairwise(ends)]


def mlp(seed=0, sizes=(5, 6, 4, 2), dtype=D) -> nn.Sequential:
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=D) / 2)
    return model


def mlp_batch(n=12, seed=1, dtype=D):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=D)
    return x.to(dtype), torch.randn(n, 2, generator=generator, dtype=D).to(dtype)


# ------------------------------------------------------------------ the oracle

BLOCK = st.lists(
    st.sampled_from([(1,), (3,), (2, 2), (1, 3), (2, 1, 2), ()]), min_size=1, max_size=2
)


def flat_prox(shapes, prox):
    """Return the reference's prox for a block that is the concatenation of its parameters."""

    def apply(z, eta):
        ends = np.cumsum([0, *(math.prod(s) for s in shapes)])
        parts = [z[a:b].reshape(s or 1) for (a, b), s in zip(itertools.pairwise(ends), shapes)]  # noqa: B905
        return np.concatenate([prox(part, eta).reshape(-1) for part in parts])

    return apply


@given(
    blocks=st.lists(BLOCK, min_size=1, max_size=4),
    n=st.integers(1, 9),
    small_batch=st.sampled_from([None, 1, 2]),
    refresh_prob=st.sampled_from([None, 0.05, 0.5, 1.0]),
    coin=st.sampled_from(["block", "cycle"]),
    prox=st.sampled_from([None, "l1", "group", "box"]),
    strength=st.sampled_from([0.01, 0.2]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    schedule=st.booleans(),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 10_000),
)  # fmt: skip
@example(
    blocks=[[(2, 2)], [(3,), (1, 3)]],
    n=9,
    small_batch=None,
    refresh_prob=None,
    coin="block",
    prox="l1",
    strength=0.2,
    weight_decay=0.1,
    maximize=False,
    schedule=True,
    foreach=None,
    seed=1,
)
def test_matches_the_oracle(
    blocks, n, small_batch, refresh_prob, coin, prox, strength, schedule, maximize, seed, **options
):
    small_batch = small_batch and min(small_batch, n)
    sizes = [sum(math.prod(s) for s in shapes) for shapes in blocks]
    A, y = least_squares(n, sum(sizes), seed)
    ends = np.cumsum([0, *sizes])
    start = np.random.default_rng(seed + 1).standard_normal(sum(sizes))
    rates = [0.4 / (1 + i) / np.linalg.norm(A, 2) ** 2 * n for i in range(len(blocks))]
    theirs = {
        None: None,
        "l1": reference.prox_l1(strength),
        "group": reference.prox_group(strength),
        "box": reference.prox_box(-0.3, 0.4),
    }[prox]
    expected = reference.CyclicBCD(
        [start[a:b] for a, b in itertools.pairwise(ends)],
        lr=rates,
        prox=None if theirs is None else [flat_prox(shapes, theirs) for shapes in blocks],
        weight_decay=options["weight_decay"],
    )

    def block_grad(j, x, rows):
        rows = np.arange(n) if rows is None else rows
        r = A[rows] @ np.concatenate(x) - y[rows]
        slope = A[rows].T @ (r / np.sqrt(1 + r * r)) / len(rows)
        return (-slope if maximize else slope)[ends[j] : ends[j + 1]]

    model = Blocks(blocks, start)
    objective = bound(model, A, y, pseudo_huber)
    optimizer = CyclicBCD(
        model.groups(lr=rates),
        small_batch=small_batch,
        refresh_prob=refresh_prob,
        coin=coin,
        prox=prox,
        strength=strength,
        lower=-0.3,
        upper=0.4,
        maximize=maximize,
        seed=seed,
        **options,
    )
    small = math.isqrt(n) if small_batch is None else small_batch
    p_big = small / (n + small) if refresh_prob is None else refresh_prob
    for cycle in range(50):
        keys = [[seed, cycle, j] if coin == "block" else [seed, cycle] for j in range(len(blocks))]
        # The first cycle is large whatever the coin says.
        draws = [draw_small_batch(key, n, small, p_big) if cycle else None for key in keys]
        before = np.concatenate(expected.x)
        expected.cycle(
            block_grad,
            [rows is None for rows in draws],
            [None if rows is None else rows.numpy() for rows in draws],
        )
        optimizer.step(objective)
        if schedule:
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = expected.lr[i] = rates[i] * (1 - cycle / 60)
        theirs_now = np.concatenate(expected.x)
        # Rounding in another order of summation, carried on by fifty cycles.
        error = np.abs(flat(model.parameters()) - theirs_now).max()
        assert error < 1e-10 * max(1.0, np.abs(theirs_now).max()), (cycle, error)
    if refresh_prob != 1:
        states = [optimizer.state[p] for p in model.parameters()]
        size = max(1.0, np.abs(before).max())
        assert np.abs(flat(s["older"] for s in states) - before).max() < 1e-10 * size
        estimates = flat(s["estimate"] for s in states) * (-1 if maximize else 1)
        estimates += options["weight_decay"] * before
        assert np.abs(estimates - np.concatenate(expected.g)).max() < 1e-10 * size


@pytest.mark.parametrize("form", ["loss", "backward", "objective"])
@pytest.mark.parametrize("coin", ["block", "cycle"])
def test_a_closure_gives_the_deterministic_rule(form, coin):
    A, y = least_squares(9, 6)
    model, start = Blocks([[(2,)], [(2, 1)], [(2,)]], np.ones(6)), np.ones(6)
    expected = reference.CyclicBCD(np.split(start, 3), lr=0.3, prox=reference.prox_l1(0.1))
    optimizer = CyclicBCD(model.groups(), lr=0.3, prox="l1", strength=0.1, coin=coin)
    objective = bound(model, A, y)
    if form == "objective":
        optimizer = CyclicBCD(
            model.groups(), lr=0.3, prox="l1", strength=0.1, coin=coin, refresh_prob=1
        )

    def loss():
        return half_mse(model(torch.tensor(A)), torch.tensor(y))

    def backward():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    closure = {"loss": loss, "backward": backward, "objective": objective}[form]
    for _ in range(50):
        before = np.concatenate(expected.x)
        value = optimizer.step(closure)
        expected.cycle(lambda j, x, _: (A.T @ (A @ np.concatenate(x) - y) / 9)[2 * j : 2 * j + 2])
        # A few hundred roundings.
        np.testing.assert_allclose(
            flat(model.parameters()), np.concatenate(expected.x), rtol=0, atol=1e-13
        )
        assert float(value) == pytest.approx(np.sum((A @ before - y) ** 2) / 18, rel=1e-12)
        assert not value.requires_grad
    if form != "backward":
        assert all(p.grad is None for p in model.parameters())
    if form == "objective":
        assert all(set(optimizer.state[p]) == {"step"} for p in model.parameters())


def test_a_closure_refreshes_the_estimate():
    A, y = least_squares(9, 6)
    model = Blocks([[(3,)], [(3,)]])
    optimizer = CyclicBCD(model.groups(), lr=0.2, refresh_prob=None)
    for _ in range(8):
        optimizer.step(bound(model, A, y))
    x, estimate = flat(model.parameters()), optimizer.state[model.x0]["estimate"]
    gradient = (A.T @ (A @ x - y) / 9)[:3]
    assert np.abs(estimate.numpy() - gradient).max() > 1e-3
    optimizer.step(lambda: half_mse(model(torch.tensor(A)), torch.tensor(y)))
    np.testing.assert_allclose(estimate.numpy(), gradient, rtol=0, atol=1e-14)


# ------------------------------------------------------------------ what it reduces to


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [False, True])
def test_one_block_and_large_batches_are_sgd(weight_decay, maximize):
    left, right = mlp(), mlp()
    options = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
    ours = CyclicBCD([{"params": left.parameters()}], refresh_prob=1.0, **options)
    theirs = torch.optim.SGD(right.parameters(), **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 40) for o in (ours, theirs)]
    for k in range(8 if maximize else 30):  # ascent magnifies rounding
        batch = mlp_batch(seed=k)
        mine = ours.step(Objective(left, functional.mse_loss).on(*batch))
        other = theirs.step(Objective(right, functional.mse_loss).on(*batch))
        for schedule in schedules:
            schedule.step()
        # SGD fuses the product with the sum.
        assert float(mine) == pytest.approx(float(other), rel=1e-12)
        np.testing.assert_allclose(
            flat(left.parameters()), flat(right.parameters()), rtol=1e-12, atol=1e-13
        )


def test_one_block_is_page():
    """m = 1: g = grad f_B with probability p, else g + grad f_B'(x) - grad f_B'(x_prev)."""
    A, y = least_squares(30, 5, seed=2)
    model = Blocks([[(2,), (3,)]])
    optimizer = CyclicBCD(model.groups(), lr=0.2, small_batch=4, refresh_prob=0.2, seed=11)
    x, previous, g = np.zeros(5), np.zeros(5), np.zeros(5)
    for k in range(60):
        rows = draw_small_batch([11, k, 0], 30, 4, 0.2)
        if k == 0 or rows is None:
            g = A.T @ (A @ x - y) / 30
        else:
            a = A[rows.numpy()]
            g = g + a.T @ (a @ (x - previous)) / 4
        previous, x = x, x - 0.2 * g
        optimizer.step(bound(model, A, y))
        np.testing.assert_allclose(flat(model.parameters()), x, rtol=0, atol=1e-12)


def test_one_block_is_proximal_gradient_descent():
    A, y = least_squares(30, 8, seed=3)
    problem = Lasso(torch.tensor(A), torch.tensor(y), lam=5.0)
    model = problem.module()
    optimizer = CyclicBCD(model.parameters(), lr=1 / problem.L, prox="l1", strength=5.0)
    x = problem.x0
    for _ in range(50):
        x = problem.prox(x - problem.smooth_grad(x) / problem.L, 1 / problem.L)
        optimizer.step(lambda: problem.smooth(model.x))
        torch.testing.assert_close(model.x.detach(), x, rtol=0, atol=1e-13)
    assert int((x == 0).sum()) > 0


@pytest.mark.parametrize("coin", ["block", "cycle"])
@pytest.mark.parametrize("refresh_prob", [1e-9, 0.06, 0.5])
def test_small_batches_of_all_samples_are_the_deterministic_rule(coin, refresh_prob):
    """The card's strongest test: with a wrong older point the difference is about 0.01."""
    A, y = least_squares(64, 12)
    blocks = [[(4,)], [(2, 2)], [(3,), (1,)]]
    lr = 0.3 / np.linalg.norm(A, 2) ** 2 * 64
    left, right = Blocks(blocks), Blocks(blocks)
    vr = CyclicBCD(
        left.groups(), lr=lr, small_batch=64, refresh_prob=refresh_prob, coin=coin, seed=5
    )
    plain = CyclicBCD(right.groups(), lr=lr, refresh_prob=1)
    for _ in range(30):
        vr.step(bound(left, A, y))
        plain.step(bound(right, A, y))
        # The estimate collects two roundings per cycle.
        assert np.abs(flat(left.parameters()) - flat(right.parameters())).max() <= 1e-12


def test_the_same_on_a_network_with_every_option():
    left, right = mlp(), mlp()
    options = {"lr": 0.1, "weight_decay": 0.1, "prox": "group", "strength": 0.01}
    vr = CyclicBCD(left.named_parameters(), small_batch=12, refresh_prob=0.1, **options)
    plain = CyclicBCD(right.named_parameters(), refresh_prob=1, **options)
    assert len(vr.param_groups) == 3
    for _ in range(40):
        vr.step(Objective(left, functional.mse_loss).on(*mlp_batch()))
        plain.step(Objective(right, functional.mse_loss).on(*mlp_batch()))
        assert np.abs(flat(left.parameters()) - flat(right.parameters())).max() <= 1e-12


def test_single_coordinates_with_their_own_rates_are_gauss_seidel():
    A, y = least_squares(20, 6, seed=1)
    H, c = A.T @ A / 20, A.T @ y / 20
    model = Blocks([[(1,)], [()], [(1,)], [(1, 1)], [(1,)], [()]])
    optimizer = CyclicBCD(model.groups(lr=(1 / np.diag(H)).tolist()))
    x = np.zeros(6)
    for _ in range(40):
        for j in range(6):
            x[j] = (c[j] - H[j] @ x + H[j, j] * x[j]) / H[j, j]
        optimizer.step(lambda: half_mse(model(torch.tensor(A)), torch.tensor(y)))
        np.testing.assert_allclose(flat(model.parameters()), x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(x, np.linalg.solve(H, c), atol=1e-8)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("prox", [None, "l1", "group", "box"])
def test_a_zero_rate_leaves_the_parameters(lr, prox):
    model = Blocks([[(2,)], [(2, 2)]], -np.ones(6))  # outside the box
    optimizer = CyclicBCD(model.groups(), lr=lr, prox=prox, strength=1.0, weight_decay=0.1)
    A, y = least_squares(9, 6)
    for _ in range(10):
        optimizer.step(bound(model, A, y))
    assert flat(model.parameters()).tolist() == [-1.0] * 6
    g = A.T @ (A @ -np.ones(6) - y) / 9
    # Points that do not move differ by nothing, so the estimate stays the exact gradient.
    np.testing.assert_allclose(
        flat(optimizer.state[p]["estimate"] for p in model.parameters()), g, atol=1e-13
    )


def test_a_tensor_rate_is_the_same_rate():
    results = []
    for lr in (0.1, torch.tensor(0.1, dtype=D)):
        model = mlp()
        optimizer = CyclicBCD(model.named_parameters(), lr=lr, prox="box", lower=-0.4, upper=0.6)
        for _ in range(10):
            optimizer.step(Objective(model, functional.mse_loss).on(*mlp_batch()))
        results.append(flat(model.parameters()))
    np.testing.assert_array_equal(*results)
    assert results[0].min() == -0.4
    assert results[0].max() == 0.6


# ------------------------------------------------------------------ theorems


def hat_matrix(rows: list[np.ndarray]) -> np.ndarray:
    """Return the sum of the Q_j, each with the rows and columns of earlier blocks set to zero.

    ``rows[j]`` is a root of Q_j: Q_j = rows[j].T @ rows[j].
    """
    total, at = 0.0, 0
    for root, size in rows:
        Q = root.T @ root
        Q[:at], Q[:, :at] = 0, 0
        total, at = total + Q, at + size
    return total


def run_inequalities(model, optimizer, closure, f, grad, L, hat, r, subgradient, least, cycles):
    """Run and assert both inequalities in every cycle; return the objective after each.

    ``subgradient(v, x)`` asserts that v lies in the subdifferential of r at x.
    """
    L_hat2, L_max, L_min = np.linalg.norm(hat, 2), max(L), min(L)
    sizes = [sum(p.numel() for p in block) for block in model.blocks]
    ends = np.cumsum([0, *sizes])
    x = flat(model.parameters())
    values, smallest = [f(x) + r(x)], math.inf
    rounding = 1e-14 * max(1.0, values[0])  # of the values of F that are compared
    for k in range(1, cycles + 1):
        optimizer.step(closure)
        new = flat(model.parameters())
        move = new - x
        # The subgradient that the optimality conditions of the block steps give.
        s = np.zeros_like(x)
        for j, (a, b) in enumerate(itertools.pairwise(ends)):
            middle = np.concatenate([new[:a], x[a:]])
            s[a:b] = (grad(new) - grad(middle))[a:b] - L[j] * move[a:b]
        subgradient(s - grad(new), new)
        squares = [float(move[a:b] @ move[a:b]) for a, b in itertools.pairwise(ends)]
        values.append(f(new) + r(new))
        decrease = sum(l / 2 * q for l, q in zip(L, squares, strict=True))
        assert values[-1] <= values[-2] - decrease + rounding
        assert s @ s <= 2 * (L_hat2 + L_max**2) * sum(squares) * (1 + 1e-9) + 1e-28
        smallest = min(smallest, float(s @ s))
        bound = 4 * (L_hat2 + L_max**2) * (values[0] - least) / (L_min * k)
        assert smallest <= bound
        x = new
    return values


def test_inequalities_on_the_lasso():
    """The card's problem: F(x_k) <= F(x_{k-1}) - sum_j L_j/2 |x_k^j - x_{k-1}^j|^2 and
    min_i dist^2(0, dF(x_i)) <= 4 (L_hat^2 + L_max^2) (F(x_0) - F*) / (L_min K), every cycle.
    """
    rng = np.random.default_rng(0)
    A = rng.standard_normal((60, 24)) * np.logspace(0, -1, 24)
    y, lam, sizes = rng.standard_normal(60), 0.02, [6] * 4
    L = smoothness(A, sizes)
    H = A.T @ A / 60
    hat = hat_matrix([(H[i : i + 6], 6) for i in range(0, 24, 6)])
    assert np.allclose(L, (0.878, 0.351, 0.112, 0.035), atol=5e-4)  # published on the card
    assert np.linalg.norm(hat, 2) ** 0.5 == pytest.approx(0.887, abs=5e-4)
    scale = math.sqrt(60)
    problem = Lasso(torch.tensor(A / scale), torch.tensor(y / scale), lam=lam)
    model = Blocks([[(6,)]] * 4)
    optimizer = CyclicBCD(model.groups(lr=[1 / l for l in L]), prox="l1", strength=lam)

    def subgradient(v, x):
        assert np.abs(v).max() <= lam + 1e-12
        np.testing.assert_allclose(v[x != 0], lam * np.sign(x[x != 0]), atol=1e-12)

    values = run_inequalities(
        model,
        optimizer,
        lambda: half_mse(model(torch.tensor(A)), torch.tensor(y)),
        lambda x: np.sum((A @ x - y) ** 2) / 120,
        lambda x: A.T @ (A @ x - y) / 60,
        L,
        hat,
        lambda x: lam * np.abs(x).sum(),
        subgradient,
        problem.fstar - problem.certified_gap,
        cycles=200,
    )
    assert abs(values[-1] - problem.fstar) <= 1e-15


@pytest.mark.parametrize("prox", [None, "group", "box"])
def test_inequalities_on_a_nonconvex_problem(prox):
    """The same for f = mean of log(1 + r_i^2)/2, whose second derivative in r lies in [-1/8, 1].

    Hence L_j = |A_j|^2/n, and |grad^j f(x) - grad^j f(y)|^2 <= L_j |A(x-y)|^2/n, so Q_j is
    L_j A^T A/n.
    """
    A, y = least_squares(20, 9, seed=7)
    y *= 6
    sizes = [4, 3, 2]
    L = smoothness(A, sizes)
    hat = hat_matrix([(math.sqrt(l / 20) * A, s) for l, s in zip(L, sizes, strict=True)])
    blocks = [[(2, 2)], [(3,)], [(2, 1)]]
    model = Blocks(blocks, np.random.default_rng(1).uniform(-0.5, 0.5, 9))
    optimizer = CyclicBCD(
        model.groups(lr=[1 / l for l in L]), prox=prox, strength=0.05, lower=-0.6, upper=0.6
    )

    def rows(x):
        return [*x[:4].reshape(2, 2), *x[4:, None]]

    def r(x):
        return 0.05 * sum(np.linalg.norm(row) for row in rows(x)) if prox == "group" else 0.0

    def subgradient(v, x):
        if prox is None:
            np.testing.assert_allclose(v, 0, atol=1e-13)
        elif prox == "box":  # the normal cone
            inside, low = (x > -0.6) & (x < 0.6), x <= -0.6
            np.testing.assert_allclose(v[inside], 0, atol=1e-13)
            assert (v[low] <= 1e-13).all()
            assert (v[x >= 0.6] >= -1e-13).all()
        else:
            for s, row in zip(rows(v), rows(x), strict=True):
                norm = np.linalg.norm(row)
                assert np.linalg.norm(s) <= 0.05 + 1e-12
                if norm > 0:
                    np.testing.assert_allclose(s, 0.05 * row / norm, atol=1e-12)

    def f(x):
        return np.log1p((A @ x - y) ** 2).mean() / 2

    def grad(x):
        residual = A @ x - y
        return A.T @ (residual / (1 + residual**2)) / 20

    values = run_inequalities(
        model,
        optimizer,
        lambda: torch.log1p((model(torch.tensor(A)) - torch.tensor(y)).square()).mean() / 2,
        f,
        grad,
        L,
        hat,
        r,
        subgradient,
        least=0.0,  # F is nonnegative
        cycles=300,
    )
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
    "kind", ["strongly convex lasso", "least squares without strong convexity"]
)
def test_linear_rate(kind):
    r"""P-CCD with steps 1/L_j contracts the gap by C/(1+C), C = 2 (L_hat^2 + L_max^2)/(mu L_min).

    Derivation, from the two inequalities. Let D^2 = sum_j |x_k^j - x_{k-1}^j|^2 and
    gap_k = F(x_k) - F*. The first gives L_min D^2 / 2 <= gap_{k-1} - gap_k. The second, for one
    cycle, is dist^2(0, dF(x_k)) <= |s|^2 <= 2 (L_hat^2 + L_max^2) D^2: the subgradient's block j,
    grad^j f(x_k) - grad^j f(x_{k,j}) - L_j (x_k^j - x_{k-1}^j), has a first part whose squares sum
    to at most L_hat^2 D^2, because x_k and x_{k,j} agree in the blocks before j, and a second part
    of at most L_max^2 D^2. Together dist^2 <= 4 (L_hat^2 + L_max^2)/L_min (gap_{k-1} - gap_k).
    If F is mu-strongly convex, or satisfies the PL inequality dist^2(0, dF(x)) >= 2 mu gap(x)
    (which strong convexity implies: minimise F(x) + <s, u - x> + mu/2 |u - x|^2 over u), then
    gap_k <= C (gap_{k-1} - gap_k), that is gap_k <= C/(1+C) gap_{k-1}, in every cycle.
    """
    convex = kind.startswith("strongly")
    n, d, sizes = (200, 8, [3, 3, 2]) if convex else (5, 9, [3, 3, 3])
    A, y = least_squares(n, d, seed=5)
    L, H = smoothness(A, sizes), A.T @ A / n
    ends = np.cumsum([0, *sizes])
    hat = hat_matrix([(H[a:b], b - a) for a, b in itertools.pairwise(ends)])
    eigenvalues = np.linalg.eigvalsh(H)
    # Least squares is PL with the smallest eigenvalue that is not zero.
    mu = float(eigenvalues[eigenvalues > 1e-12][0])
    lam = 0.05 if convex else 0.0
    best = 0.0
    if convex:
        scale = math.sqrt(n)
        best = Lasso(torch.tensor(A / scale), torch.tensor(y / scale), lam=lam).fstar
    C = 2 * (np.linalg.norm(hat, 2) + max(L) ** 2) / (mu * min(L))
    model = Blocks([[(s,)] for s in sizes], np.ones(d))
    optimizer = CyclicBCD(model.groups(lr=[1 / l for l in L]), prox="l1", strength=lam)

    def gap():
        x = flat(model.parameters())
        return np.sum((A @ x - y) ** 2) / (2 * n) + lam * np.abs(x).sum() - best

    before = gap()
    for _ in range(200):
        optimizer.step(lambda: half_mse(model(torch.tensor(A)), torch.tensor(y)))
        after = gap()
        assert after <= C / (1 + C) * before + 1e-15  # the rounding of F*
        before = after
    assert before < 1e-13


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_mean_over_all_small_batches_is_the_gradient_plus_the_old_error(block, monkeypatch):
    """E g^j = grad^j f(x_{k,j}) + (g_prev - grad^j f(x_{k-1,j})), over all batches of size one."""
    A, y = least_squares(8, 6, seed=4)
    model = Blocks([[(2,)]] * 3)
    optimizer = CyclicBCD(model.groups(), lr=0.2, small_batch=1, refresh_prob=0.1, seed=2)
    points = [flat(model.parameters())]
    for _ in range(4):
        optimizer.step(bound(model, A, y))
        points.append(flat(model.parameters()))
    previous = flat([optimizer.state[model.blocks[block][0]]["estimate"]])
    outcomes = []
    for i in range(8):
        # The other blocks take large batches, so that x_{k,j} is one point.
        monkeypatch.setattr(
            cyclic_bcd,
            "draw_small_batch",
            lambda key, *_, i=i: torch.tensor([i]) if key[-1] == block else None,
        )
        twin, other = copy.deepcopy((model, optimizer))
        other.step(bound(twin, A, y))
        p = other.param_groups[block]["params"][0]
        outcomes.append(flat([other.state[p]["estimate"]]))
        new = flat(twin.parameters())
    assert np.ptp(outcomes, axis=0).min() > 0.01  # the outcomes do differ
    j = slice(2 * block, 2 * block + 2)

    def grad(x):
        return (A.T @ (A @ x - y) / 8)[j]

    here = np.concatenate([new[: j.start], points[-1][j.start :]])
    old = np.concatenate([points[-1][: j.start], points[-2][j.start :]])
    expected = grad(here) + previous - grad(old)
    np.testing.assert_allclose(np.mean(outcomes, axis=0), expected, rtol=0, atol=1e-12)


def draws_of(optimizer, objective, monkeypatch):
    """Return the keys and batches that a step draws."""
    seen = []

    def spy(key, *rest):
        seen.append((key, draw_small_batch(key, *rest)))
        return seen[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(cyclic_bcd, "draw_small_batch", spy)
        optimizer.step(objective)
    return seen


def test_every_block_draws_for_itself_or_once_for_all(monkeypatch):
    A, y = least_squares(8, 6)
    for coin in ("block", "cycle"):
        model = Blocks([[(2,)]] * 3)
        optimizer = CyclicBCD(model.groups(), coin=coin, seed=7)
        for cycle in range(3):
            seen = draws_of(optimizer, bound(model, A, y), monkeypatch)
            own = [[j] if coin == "block" else [] for j in range(3)]
            assert [key for key, _ in seen] == [[7, cycle, *j] for j in own]


def test_draws_are_functions_of_their_key_and_fair():
    n, size, count = 10, 3, 4000
    draws = [draw_small_batch([3, k, 1], n, size, 0.25) for k in range(count)]
    small = [d for d in draws if d is not None]
    # Counts within five standard deviations (p = 6e-7 for fair draws; seeded).
    assert abs(len(small) - 0.75 * count) < 5 * math.sqrt(count * 0.75 * 0.25)
    hits = np.bincount(torch.cat(small).numpy(), minlength=n)
    assert (np.abs(hits - 0.3 * len(small)) < 5 * math.sqrt(len(small) * 0.3 * 0.7)).all()
    assert all(len(d.unique()) == size and d.equal(d.sort().values) for d in small)
    assert len({tuple(d.tolist()) for d in small}) == math.comb(n, size)
    assert torch.equal(small[0], next(d for d in draws if d is not None))
    again = [draw_small_batch([3, k, 1], n, size, 0.25) for k in range(50)]
    assert all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(draws[:50], again, strict=True)
    )
    assert all(draw_small_batch([0, k], n, n, 1.0) is None for k in range(50))


def test_the_loss_returned_is_that_of_the_first_blocks_batch():
    A, y = least_squares(30, 6)
    model = Blocks([[(3,)], [(3,)]])
    optimizer = CyclicBCD(model.groups(), small_batch=2, refresh_prob=0.3)
    kinds = set()
    for k in range(20):
        rows = draw_small_batch([0, k, 0], 30, 2, 0.3) if k else None
        kinds.add(rows is None)
        rows = slice(None) if rows is None else rows
        expected = half_mse(model(torch.tensor(A)[rows]), torch.tensor(y)[rows]).detach()
        assert float(optimizer.step(bound(model, A, y))) == pytest.approx(
            float(expected), rel=1e-12
        )
    assert kinds == {True, False}


# ------------------------------------------------------------------ claims


def noise_floor(make, lr, seed, small, cycles=600):
    """Return the mean gap of the last 120 cycles on the card's least squares problem."""
    rng = np.random.default_rng(0)
    A, y = (torch.tensor(rng.standard_normal(s)) for s in ((64, 12), 64))
    best = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    least = float(half_mse(A @ best, y))
    model, draws = Blocks([[(4,)]] * 3), np.random.default_rng([seed, 9])
    optimizer, gaps = make(model, lr, seed), []
    objective = Objective(model, half_mse)
    for k in range(cycles):
        rows = torch.tensor(draws.choice(64, 8, replace=False)) if small else slice(None)
        optimizer.step(objective.on(A[rows], y[rows]))
        if k >= cycles - 120:
            with torch.no_grad():
                gaps.append(float(half_mse(model(A), y)) - least)
    return np.mean(gaps)


@pytest.mark.parametrize("lr", [0.1, 0.4])
def test_gets_below_the_noise_floor_of_sgd_and_sccd(lr):
    """Constant rates, b = n = 64, b' = 8, p = 8/72; SGD and SCCD (no small batches) with 8."""

    def vr(coin):
        return lambda model, lr, seed: CyclicBCD(
            model.groups(), lr=lr, small_batch=8, coin=coin, seed=seed
        )

    def sccd(model, lr, seed):
        return CyclicBCD(model.groups(), lr=lr, refresh_prob=1)

    def sgd(model, lr, seed):
        return torch.optim.SGD(model.parameters(), lr=lr)

    assert noise_floor(sgd, lr, 0, small=True) >= 1e-3
    assert noise_floor(sccd, lr, 0, small=True) >= 1e-3
    for seed, coin in enumerate(("block", "cycle")):
        assert noise_floor(vr(coin), lr, seed, small=False) <= 1e-10


def digits_loss(kind, lr, seed, epochs=12):
    """Train 64-64-32-10 on digits; an epoch is as many block gradients as samples and blocks."""
    from optimizers.testing.tasks import get_task

    split = get_task("digits-mlp").load()
    X, Y, n = split.inputs, split.targets, len(split.inputs)
    model = mlp(seed, (64, 64, 32, 10), torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # about as torch does it
            p.mul_(2 / math.sqrt(3 * p.shape[-1]))
    objective, rng = Objective(model, functional.cross_entropy), np.random.default_rng([seed, 7])
    size = {"sgd": 64, "sccd": 64, "sccd at equal work": 45, "vr": 256}[kind]
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    else:
        small = {"small_batch": 16, "seed": seed} if kind == "vr" else {"refresh_prob": 1.0}
        optimizer = CyclicBCD(model.named_parameters(), lr=lr, **small)
    used = 0.0
    while used < epochs * n:
        rows, before = torch.tensor(rng.choice(n, size, replace=False)), objective.counts.gradient
        try:
            optimizer.step(objective.on(X[rows], Y[rows]))
        except OracleError:
            return math.nan
        pairs = objective.counts.gradient - before - 3
        used += ((3 - pairs) * 256 + pairs * 32) / 3 if kind == "vr" else size
    return float(objective.on(X, Y).loss())


def test_on_digits_it_beats_sccd_as_published_but_not_at_equal_work():
    """The card's comparison at lr 0.06, and why it says little.

    SCCD with batches of 64 takes fewer steps than VR-CCD, whose blocks cost
    p 256 + (1 - p) 2 16 = 45.2 samples each; with batches of 45 SCCD does as well or better.
    """
    mean = {
        kind: np.mean([digits_loss(kind, 0.06, seed) for seed in range(2)])
        for kind in ("sccd", "sccd at equal work", "vr")
    }
    assert mean["vr"] < mean["sccd"]
    assert mean["vr"] > 0.95 * mean["sccd at equal work"]


def test_on_digits_it_diverges_at_a_rate_that_sgd_bears():
    sgd, vr = digits_loss("sgd", 0.4, 0), digits_loss("vr", 0.4, 0)
    assert sgd < 0.2
    assert not vr < 1.0  # NaN, or no better than guessing


# ------------------------------------------------------------------ the backward work


class Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counter):
        ctx.counter = counter
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.counter.backwards += 1
        return g, None


class Watch(nn.Module):
    """Passes its input on; counts the backward passes and notes which inputs had a graph."""

    def __init__(self):
        super().__init__()
        self.backwards, self.graphs = 0, []

    def forward(self, x):
        self.graphs.append(x.requires_grad)
        return Tap.apply(x, self)


def watched():
    model = mlp()
    return nn.Sequential(model[0], Watch(), model[2], Watch(), model[4]), model


@pytest.mark.parametrize("form", ["loss", "backward", "objective"])
def test_the_backward_pass_stops_at_the_block(form):
    model, _ = watched()
    x, y = mlp_batch()
    optimizer = CyclicBCD(model.named_parameters(), refresh_prob=1)
    flags = [p.requires_grad for p in model.parameters()]

    def backward():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(
        {
            "loss": lambda: functional.mse_loss(model(x), y),
            "backward": backward,
            "objective": Objective(model, functional.mse_loss).on(x, y),
        }[form]
    )
    # Blocks 0, 1, 2 in turn: the prefix of a block has no graph, and no backward pass.
    assert model[1].graphs == [True, False, False]
    assert model[3].graphs == [True, True, False]
    assert (model[1].backwards, model[3].backwards) == (1, 2)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_evaluations_are_counted():
    model, _ = watched()
    objective = Objective(model, functional.mse_loss)
    optimizer = CyclicBCD(model.named_parameters(), small_batch=3, refresh_prob=1e-9)
    for k, expected in enumerate((3, 6, 6)):
        objective.counts.reset()
        optimizer.step(objective.on(*mlp_batch(seed=k)))
        assert objective.counts.as_dict() == {**dict.fromkeys(objective.counts.as_dict(), 0),
                                              "gradient": expected}  # fmt: skip
    assert model[1].backwards == 1 + 2 + 2
    assert not any(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------ random layers, statistics


class Noise(nn.Module):
    def __init__(self, fail_at=None):
        super().__init__()
        self.seen, self.fail_at = [], fail_at

    def forward(self, x):
        u = torch.rand(())
        self.seen.append(float(u))
        if len(self.seen) == self.fail_at:
            raise ZeroDivisionError
        return x * u


def test_both_points_see_the_same_random_numbers():
    noise = Noise()
    base = mlp()
    model = nn.Sequential(base[0], noise, base[2], base[4])
    optimizer = CyclicBCD(model.named_parameters(), small_batch=3, refresh_prob=1e-9)
    objective = Objective(model, functional.mse_loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer.step(objective.on(*mlp_batch()))
        optimizer.step(objective.on(*mlp_batch()))
        after = torch.get_rng_state()
        torch.manual_seed(0)
        stream = [float(torch.rand(())) for _ in range(6)]
        # The stream goes on as if each block had been evaluated once.
        assert torch.equal(after, torch.get_rng_state())
    assert noise.seen == [*stream[:3], *(u for u in stream[3:] for _ in range(2))]


def test_the_random_stream_survives_an_exception():
    with torch.random.fork_rng(devices=[]):
        states = random_states([])
        torch.rand(())
        after = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), replaying(states):
            torch.rand(7)
            raise ZeroDivisionError
        assert torch.equal(after, torch.get_rng_state())


def test_batch_statistics_are_warned_of_and_not_written_at_the_older_point():
    base = mlp()
    model = nn.Sequential(base[0], nn.BatchNorm1d(6, dtype=D), base[1], base[2], base[4])
    objective = Objective(model, functional.mse_loss)
    optimizer = CyclicBCD(model.named_parameters(), small_batch=3, refresh_prob=1e-9)
    blocks = len(optimizer.param_groups)
    with pytest.warns(UserWarning, match=r"eval\(\)"):
        optimizer.step(objective.on(*mlp_batch()))
    assert int(model[1].num_batches_tracked) == blocks
    optimizer.step(objective.on(*mlp_batch()))  # said once, and evaluated twice for each block
    assert objective.counts.gradient == 3 * blocks
    assert int(model[1].num_batches_tracked) == 2 * blocks
    model.eval()
    other = CyclicBCD(model.named_parameters(), small_batch=3)
    other.step(objective.on(*mlp_batch()))
    model.train()
    deterministic = CyclicBCD(model.named_parameters(), refresh_prob=1)
    deterministic.step(objective.on(*mlp_batch()))


# ------------------------------------------------------------------ groups, flags, odd parameters


def test_blocks_are_modules_or_groups():
    model = mlp()
    assert len(CyclicBCD(model.named_parameters()).param_groups) == 3
    assert len(CyclicBCD(model.parameters()).param_groups) == 3
    assert len(CyclicBCD([{"params": model.parameters()}]).param_groups) == 1


def test_what_is_frozen_stays_and_what_thaws_begins_with_a_large_batch():
    model = mlp()
    objective = Objective(model, functional.mse_loss).on(*mlp_batch())
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = CyclicBCD(model.named_parameters(), small_batch=12, refresh_prob=1e-9)
    frozen = flat(model[2].parameters())
    for _ in range(3):
        optimizer.step(objective)
    np.testing.assert_array_equal(flat(model[2].parameters()), frozen)
    model[2].bias.requires_grad_(True)
    objective.counts.reset()
    optimizer.step(objective)
    assert objective.counts.gradient == 2 + 1 + 2
    model[2].weight.requires_grad_(True)
    objective.counts.reset()
    optimizer.step(objective)
    assert objective.counts.gradient == 2 + 2 + 2  # one small evaluation, then the large one


def test_flags_may_change_from_cycle_to_cycle():
    """With all samples in every batch each estimate stays the gradient itself."""
    left, right, rng = mlp(), mlp(), np.random.default_rng(0)
    vr = CyclicBCD(left.named_parameters(), small_batch=12, refresh_prob=1e-9)
    plain = CyclicBCD(right.named_parameters(), refresh_prob=1)
    for _ in range(40):
        flags = rng.random(6) < 0.6
        for model in (left, right):
            for p, flag in zip(model.parameters(), flags, strict=True):
                p.requires_grad_(bool(flag))
        vr.step(Objective(left, functional.mse_loss).on(*mlp_batch()))
        plain.step(Objective(right, functional.mse_loss).on(*mlp_batch()))
        # The estimate collects two roundings per cycle.
        assert np.abs(flat(left.parameters()) - flat(right.parameters())).max() <= 1e-12


def test_with_everything_frozen_nothing_happens():
    model = mlp()
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer = CyclicBCD(model.named_parameters())
    before = flat(model.parameters())
    loss = optimizer.step(Objective(model, functional.mse_loss).on(*mlp_batch()))
    assert float(loss) > 0
    np.testing.assert_array_equal(flat(model.parameters()), before)


@pytest.mark.parametrize("form", ["loss", "backward", "objective"])
def test_what_the_loss_does_not_use_is_left_alone(form):
    model = mlp()
    unused, empty = nn.Parameter(torch.ones(3, dtype=D)), nn.Parameter(torch.zeros(0, 2, dtype=D))
    model.unused = unused
    groups = [
        {"params": [unused]},
        {"params": [empty]},
        {"params": [*model[0].parameters(), empty.clone().detach().requires_grad_()]},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = CyclicBCD(groups, weight_decay=0.5, prox="l1", strength=0.1, small_batch=None)
    x, y = mlp_batch()

    def backward():
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    closure = {
        "loss": lambda: functional.mse_loss(model(x), y),
        "backward": backward,
        "objective": Objective(model, functional.mse_loss).on(x, y),
    }[form]
    with torch.no_grad():
        start = functional.mse_loss(model(x), y)
    before = flat(model[0].parameters())
    first = optimizer.step(closure)
    assert float(first) == pytest.approx(float(start), rel=1e-14)
    for _ in range(3):
        optimizer.step(closure)
    assert unused.tolist() == [1, 1, 1]
    assert optimizer.state[unused]["step"] == 0
    assert np.abs(flat(model[0].parameters()) - before).min() > 0


def test_half_precision_is_computed_in_single_and_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp(dtype=dtype)
        x, y = mlp_batch(dtype=dtype)
        objective = Objective(model, functional.mse_loss).on(x, y)
        twin = copy.deepcopy(model)
        optimizer = CyclicBCD(model.named_parameters(), lr=0.5, weight_decay=0.7)
        optimizer.step(objective)
        for i in (0, 2, 4):  # by hand, one block after another
            params = list(twin[i].parameters())
            grads = torch.autograd.grad(functional.mse_loss(twin(x), y), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p.copy_(p.float() - 0.5 * (g.float() + 0.7 * p.float()))
        assert all(
            torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
        )
        states = [optimizer.state[p] for p in model.parameters()]
        assert all(s[k].dtype == torch.float32 for s in states for k in ("estimate", "older"))
        assert np.isfinite(flat(s["estimate"] for s in states)).all()


def test_half_precision_keeps_the_estimate_in_single():
    """In bfloat16 the correction, -253.4375, would be -253, and the estimate 3."""
    model = Blocks([[(1,)]], [256.0], dtype=torch.bfloat16)
    objective = Objective(model, lambda outputs, _: outputs.square().mean() / 2)
    bound = objective.on(torch.ones(2, 1), None)
    optimizer = CyclicBCD(model.parameters(), lr=0.99, small_batch=1, refresh_prob=1e-9)
    optimizer.step(bound)
    assert float(optimizer.state[model.x0]["estimate"]) == 256
    assert float(model.x0.detach()) == 2.5625
    optimizer.step(bound)
    assert float(optimizer.state[model.x0]["estimate"]) == 2.5625


# ------------------------------------------------------------------ failing safely, resuming


def same(left, right) -> bool:
    """Whether two state dicts are equal bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_an_exception_at_any_evaluation_changes_nothing():
    for fail_at in range(4, 10):  # the second cycle evaluates six times
        model, _ = watched()
        twin = copy.deepcopy(model)
        noise, calls = Objective(model, functional.mse_loss), [0]
        options = {"small_batch": 3, "refresh_prob": 1e-9, "prox": "l1", "strength": 0.01}
        optimizer = CyclicBCD(model.named_parameters(), **options)
        other = CyclicBCD(twin.named_parameters(), **options)

        def count(*_, calls=calls, fail_at=fail_at):
            calls[0] += 1
            if calls[0] == fail_at:
                raise ZeroDivisionError

        model[4].register_forward_pre_hook(count)
        optimizer.step(noise.on(*mlp_batch()))
        before, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ZeroDivisionError):
            optimizer.step(noise.on(*mlp_batch()))
        np.testing.assert_array_equal(flat(model.parameters()), before)
        assert all(p.requires_grad for p in model.parameters())
        assert torch.is_grad_enabled()
        assert same(optimizer.state_dict(), state)
        for _ in range(3):
            optimizer.step(noise.on(*mlp_batch()))
        for _ in range(4):
            other.step(Objective(twin, functional.mse_loss).on(*mlp_batch()))
        np.testing.assert_array_equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("coin", ["block", "cycle"])
def test_resumes_bit_by_bit(coin):
    model = mlp()
    options = {"coin": coin, "small_batch": 3, "refresh_prob": 0.2}
    optimizer = CyclicBCD(model.named_parameters(), seed=3, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def train(model, optimizer, schedule, steps):
        objective = Objective(model, functional.mse_loss)
        for k in steps:
            optimizer.step(objective.on(*mlp_batch(seed=k)))
            schedule.step()

    train(model, optimizer, schedule, range(7))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    twin = mlp(seed=9)
    other = CyclicBCD(twin.named_parameters(), lr=0.7, seed=8)  # what is stored wins
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(other, 20)
    for part, state in zip((twin, other, plan), stored, strict=True):
        part.load_state_dict(state)
    assert other.param_groups[0]["cycle"] == 7
    train(model, optimizer, schedule, range(7, 15))
    train(twin, other, plan, range(7, 15))
    np.testing.assert_array_equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"small_batch": 0}, r"small_batch must be .*got 0"),
        ({"refresh_prob": 0.0}, r"refresh_prob must be .*got 0\.0"),
        ({"refresh_prob": 1.5}, r"refresh_prob.*got 1\.5"),
        ({"coin": "epoch"}, r"coin must be one of .*'epoch'"),
        ({"prox": "l2"}, r"prox must be one of .*'l2'"),
        ({"prox": "l1"}, r"strength must be given with prox='l1'"),
        ({"prox": "group"}, r"strength must be given"),
        ({"strength": -1.0}, r"strength must be .*got -1\.0"),
        ({"lower": 2.0, "upper": 1.0}, r"lower must be at most upper; got 2\.0 and 1\.0"),
        ({"upper": math.nan}, r"upper.*nan"),
        ({"weight_decay": -0.1}, r"weight_decay"),
        ({"seed": -1}, r"seed"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CyclicBCD(mlp().named_parameters(), **options)


def test_wrong_blocks_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match="must hold parameters; got none in group 1"):
        CyclicBCD([{"params": model[0].parameters()}, {"params": []}])
    with pytest.raises(ValueError, match="more than one parameter group"):
        CyclicBCD([{"params": model[0].parameters()}, {"params": [model[0].bias]}])
    with pytest.raises(ValueError, match="appears twice"):
        CyclicBCD([{"params": [model[0].bias, model[0].bias]}])
    with pytest.raises(ValueError, match=r"coin must agree .*'block' in group 0 and 'cycle'"):
        CyclicBCD([{"params": model[0].parameters()}, {"params": model[2].weight, "coin": "cycle"}])
    optimizer = CyclicBCD(model[0].parameters())
    with pytest.raises(ValueError, match="must hold parameters"):
        optimizer.add_param_group({"params": []})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="did you mean 'refresh_prob'"):
        optimizer.add_param_group({"params": model[2].weight, "refresh_probs": 1.0})


def test_layers_that_another_optimizer_dropped_are_refused():
    model = mlp()
    other = DropMuon(model.named_parameters(), sampling=(0.01, 0.01, 0.98), seed=1)
    for _ in range(2):
        other.step(Objective(model, functional.mse_loss).on(*mlp_batch()))
    assert not model[0].weight.requires_grad
    with pytest.raises(ValueError, match=r"release\(\)"):
        CyclicBCD(model.named_parameters())
    other.release()
    CyclicBCD(model.named_parameters())


def test_misuse_is_refused_with_the_remedy():
    model = mlp()
    x, y = mlp_batch()
    before = flat(model.parameters())

    def loss():
        return functional.mse_loss(model(x), y)

    for options in ({"refresh_prob": 0.5}, {"small_batch": 2}):
        optimizer = CyclicBCD(model.named_parameters(), **options)
        with pytest.raises(OracleError, match=r"Objective.*objective\.on.*refresh_prob=1"):
            optimizer.step(loss)
    optimizer = CyclicBCD(model.named_parameters())
    with pytest.raises(OracleError, match=r"objective\.on|Objective"):
        optimizer.step()
    for value in (lambda: loss().detach(), lambda: loss().item(), lambda: None):
        with pytest.raises(OracleError, match="no gradient of any parameter"):
            optimizer.step(value)
    other = Objective(mlp(seed=1), functional.mse_loss).on(x, y)  # of another model
    with pytest.raises(OracleError, match="of the model that holds the parameters"):
        optimizer.step(other)
    objective = Objective(model, functional.mse_loss)
    with pytest.raises(ValueError, match=r"got 13 for 12 samples.*drop_last"):
        CyclicBCD(model.named_parameters(), small_batch=13).step(objective.on(x, y))
    with pytest.raises(ValueError, match="got 0 for 0 samples"):
        optimizer.step(objective.on(x[:0], y[:0]))
    with pytest.raises(OracleError, match=r"first dimensions \[11, 12\]"):
        optimizer.step(objective.on(x, y[:11]))
    np.testing.assert_array_equal(flat(model.parameters()), before)
    deterministic = CyclicBCD(model.named_parameters(), refresh_prob=1)
    deterministic.step(loss)
    for group in deterministic.param_groups:
        group["refresh_prob"] = 0.5
    with pytest.raises(ValueError, match="below 1 from the start"):
        deterministic.step(objective.on(x, y))
    deterministic.param_groups[0]["refresh_prob"] = 0.6
    with pytest.raises(ValueError, match="refresh_prob must agree"):
        deterministic.step(loss)


@pytest.mark.parametrize("prox", [None, "box"])
def test_what_is_not_finite_is_refused_and_changes_nothing(prox):
    model = mlp()
    optimizer = CyclicBCD(model.named_parameters(), prox=prox, upper=0.5)
    objective = Objective(model, functional.mse_loss)
    x, y = mlp_batch()
    optimizer.step(objective.on(x, y))
    before, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict())
    for bad in (math.inf, math.nan):
        with pytest.raises(OracleError, match="step of block 0 is not finite"):
            optimizer.step(objective.on(x, torch.full_like(y, bad)))
    np.testing.assert_array_equal(flat(model.parameters()), before)
    assert same(optimizer.state_dict(), state)


@pytest.mark.parametrize("foreach", [None, False])
def test_a_box_does_not_hide_an_infinite_gradient(foreach):
    model = Blocks([[(1,)]])
    objective = Objective(model, lambda outputs, targets: (outputs * targets).mean())
    optimizer = CyclicBCD(model.parameters(), prox="box", upper=1.0, foreach=foreach)
    with pytest.raises(OracleError, match="not finite"):
        optimizer.step(objective.on(torch.ones(1, 1), torch.tensor([-math.inf])))
    assert float(model.x0.detach()) == 0


def test_rounding_to_half_precision_may_overflow_and_is_refused():
    model = Blocks([[(1,)]], dtype=torch.float16)
    objective = Objective(model, lambda outputs, targets: (outputs * targets).mean())
    optimizer = CyclicBCD(model.parameters(), lr=100.0)
    with pytest.raises(OracleError, match="not finite"):
        optimizer.step(objective.on(torch.ones(1, 1), torch.tensor([1e3])))
    assert float(model.x0.detach()) == 0


def test_sparse_gradients_and_complex_parameters_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = CyclicBCD(table.parameters())
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(lambda: table(torch.tensor([1, 3])).square().sum())
    with pytest.raises(ValueError, match="complex"):
        CyclicBCD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def test_an_optimizer_elsewhere_may_take_the_model_over():
    """No flag stays switched, no gradient is left behind."""
    model = mlp()
    CyclicBCD(model.named_parameters()).step(Objective(model, functional.mse_loss).on(*mlp_batch()))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    Muon([model[0].weight, model[2].weight])


# ------------------------------------------------------------------ the contract, variance-reduced


@pytest.mark.parametrize("check", pytest_params(expensive=False))
def test_contract_with_small_batches(check):
    """The registry's run hands over closures, which is P-CCD; here an Objective, VR-CCD."""
    subject = Subject(CyclicBCD, {"lr": 0.1, "refresh_prob": 0.3}, needs=Needs.OUTPUTS)
    declared = {
        "one_group_equals_many": "a group is a block",
        "parameter_order_is_irrelevant": "the order of the blocks is the method",
    }
    result = run_check(check, subject, declared)
    assert result.status != "fail", result.why
