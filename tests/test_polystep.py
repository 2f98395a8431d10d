"""PolyStep: against its oracle, its closed forms, and the promises of a forward-only rule."""

from __future__ import annotations

import copy
import io
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizers import Objective, OracleError
from optimizers.forward_only import PolyStep
from optimizers.forward_only.polytopes import (
    POLYTOPES,
    check_schedule,
    distance_at,
    jitter,
    rotations,
    template,
    value_at,
)
from optimizers.forward_only.subspace import coordinate_count, projection
from tests.oracles import polystep as oracle

torch.set_num_threads(1)
SHAPES = [(), (1,), (5,), (2, 3), (3, 2), (2, 1, 2), (1, 4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def flat(params) -> np.ndarray:
    return torch.cat([p.detach().double().reshape(-1) for p in params]).numpy().copy()


def at(value) -> object:
    """Return the oracle's form of a schedule: a callable is a distance."""
    return value if isinstance(value, float) else lambda t: value_at(value, t)


class Net(nn.Module):
    """Two smooth layers, 55 parameters in float64."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 2)
        self.norm: nn.Module = nn.Identity()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.5 * normal(*p.shape, seed=seed + i))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(torch.tanh(self.first(x))))


def batch(k: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return normal(8, 5, seed=100 + k).to(dtype), normal(8, 2, seed=200 + k).to(dtype)


def bound(model: nn.Module, k: int = 0, dtype: torch.dtype = torch.float64) -> Objective:
    return Objective(model, nn.functional.mse_loss).on(*batch(k, dtype))


def closure(model: nn.Module, k: int = 0, dtype: torch.dtype = torch.float64):
    x, y = batch(k, dtype)
    return lambda: nn.functional.mse_loss(model(x), y)


# --- the pieces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLYTOPES)
@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
def test_templates(name: str, d: int) -> None:
    U = template(name, d)
    V = {"orthoplex": 2 * d, "simplex": d + 1, "cube": 2**d}[name]
    assert U.shape == (V, d)
    # Sums of at most 256 unit vectors in float64.
    np.testing.assert_allclose(np.linalg.norm(U, axis=1), 1, rtol=0, atol=1e-14)
    np.testing.assert_allclose(U.sum(axis=0), 0, atol=1e-13)
    np.testing.assert_allclose(U.T @ U, V / d * np.eye(d), rtol=0, atol=1e-13)
    np.testing.assert_allclose(U, oracle.template(name, d), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="polytope must be one of"):
        template("octagon", d)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 8])
def test_rotations_are_special_orthogonal_and_functions_of_seed_and_draw(d: int) -> None:
    R = rotations(200, d, 3, 5)
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.eye(d)[None] + 0 * R, atol=1e-13)
    np.testing.assert_allclose(np.linalg.det(R), 1, rtol=1e-12)
    np.testing.assert_array_equal(R, rotations(200, d, 3, 5))
    if d > 1:
        for other in (rotations(200, d, 3, 6), rotations(200, d, 4, 5)):
            assert np.abs(R - other).max() > 0.1
        assert np.abs(R[0] - R[1]).max() > 1e-3  # independent particles


@pytest.mark.parametrize("d", [2, 3, 5])
def test_rotations_are_uniform(d: int) -> None:
    # Traces of Haar matrices of SO(d): mean 0 for d >= 2, mean square 1 for d >= 3 and 2 for
    # d = 2. Entries: mean 0, variance 1/d, and E R_ij^2 R_kl^2 is equal for all i, j, so every
    # row and column is alike. Bounds at 5 standard errors: a false alarm in 1e-6, and the seed is
    # fixed.
    N = 20000
    R = rotations(N, d, 0, 0)
    trace = np.trace(R, axis1=1, axis2=2)
    limit = 5 / math.sqrt(N)
    assert abs(trace.mean()) < limit * trace.std()
    assert abs((trace**2).mean() - (2 if d == 2 else 1)) < limit * (trace**2).std()
    for power, expected in ((1, 0), (2, 1 / d), (3, 0), (4, 3 / (d * (d + 2)))):
        moment = R**power
        gap = np.abs(moment.mean(axis=0) - expected)
        assert (gap < limit * moment.std(axis=0)).all(), f"moment {power}"
    if d == 3:  # R and its transpose, and R times a fixed rotation, are distributed alike
        angle = np.arccos(np.clip((trace - 1) / 2, -1, 1))  # density (1 - cos)/pi on [0, pi]
        cdf = (angle - np.sin(angle)) / math.pi
        assert abs(cdf.mean() - 0.5) < limit * math.sqrt(1 / 12)
        assert abs((cdf**2).mean() - 1 / 3) < limit * math.sqrt(4 / 45)


def test_schedules() -> None:
    cosine = ("cosine", 5.0, 1.0, 10)
    for t in (0, 1, 5, 10, 99):
        assert value_at(cosine, t) == pytest.approx(oracle.cosine(5.0, 1.0, 10, t), rel=1e-15)
    assert [value_at(("linear", 5.0, 2.0, 0.5), t) for t in range(4)] == [5, 3, 1, 0.5]
    assert value_at(("constant", 3), 7) == value_at(3, 7) == 3.0
    # A number is a multiple of epsilon, a schedule a distance.
    assert distance_at(3.0, 0.5, 0) == 1.5
    assert distance_at(("constant", 3.0), 0.5, 0) == 3.0
    for bad in (
        *(0.0, -1.0, math.nan, math.inf, True, "cosine", (), None, lambda t: 1.0),
        *(("cosine", 1.0, 0.0, 5), ("cosine", 1.0, 1.0, 0), ("cosine", 1.0, 1.0)),
        *(("linear", 1.0, 0.1, 2.0), ("linear", 1.0, -0.1, 0.5), ("linear", 1.0, 0.1, 0.0)),
        *(("constant", -1.0), ("constant", "1"), ("steps", 1.0)),
    ):
        with pytest.raises(ValueError, match="epsilon must"):
            check_schedule("epsilon", bad)
    values = np.array([jitter(0.2, 0, k) for k in range(4000)])
    assert values.min() >= 0.8
    assert values.max() <= 1.2
    # 5 standard errors of a uniform variable of standard deviation 0.4/sqrt(12).
    assert abs(values.mean() - 1) < 5 * 0.4 / math.sqrt(12 * 4000)
    assert jitter(0.0, 0, 3) == 1.0


def test_projections_are_orthonormal_and_functions_of_their_arguments() -> None:
    assert [coordinate_count(s, 2) for s in [(), (7,), (9, 6), (3, 4), (8, 2, 4), (0, 3)]] == [
        *(1, 7, 30, 12, 32, 0)
    ]
    assert coordinate_count((9, 6), None) == 54
    M = projection((9, 6), 2, 0, 1)
    assert M.shape == (54, 30)
    np.testing.assert_allclose(M.T @ M, np.eye(30), atol=1e-14)
    np.testing.assert_array_equal(M, projection((9, 6), 2, 0, 1))
    assert np.abs(M - projection((9, 6), 2, 0, 2)).max() > 0.01
    assert np.abs(M - projection((9, 6), 2, 1, 1)).max() > 0.01


# --- the rule -----------------------------------------------------------------------------------

# lr_eff times the curvature stays below 2: beyond it the rule is chaotic and rounding grows.
radii = st.one_of(
    st.floats(0.3, 1.0),
    st.tuples(st.just("constant"), st.floats(0.1, 0.4)),
    st.tuples(st.just("cosine"), st.floats(0.2, 0.4), st.floats(0.1, 0.3), st.just(20)),
    st.tuples(st.just("linear"), st.floats(0.2, 0.4), st.just(0.01), st.just(0.1)),
)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2),
    polytope=st.sampled_from(POLYTOPES),
    dim=st.integers(1, 3),
    rank=st.sampled_from([None, 1, 2]),
    num_probe=st.integers(1, 3),
    momentum=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([None, "mean"]),
    epsilon=st.one_of(st.floats(0.2, 1.0), st.just(("cosine", 1.0, 0.3, 30))),
    step_radius=radii,
    probe_radius=radii,
    chunk=st.sampled_from([None, 1, 7]),
    wall=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_the_oracle(
    shapes, polytope, dim, rank, num_probe, momentum, scale, epsilon, **rest
) -> None:
    seed, chunk, wall = rest["seed"], rest["chunk"], rest["wall"]
    params = [nn.Parameter(normal(*s, seed=seed + i)) for i, s in enumerate(shapes)]
    theta = flat(params)
    n = len(theta)
    centre, slope = normal(n, seed=seed + 10).numpy(), normal(n, seed=seed + 11).numpy()

    def loss(x: np.ndarray) -> float:
        if wall and x[0] > theta[0] + 0.2:
            return math.inf
        return float(1 + np.mean((x - centre) ** 2) + 0.1 * np.sin(slope @ x))

    options = {
        **{"epsilon": epsilon, "num_probe": num_probe, "scale_cost": scale},
        **{"step_radius": rest["step_radius"], "probe_radius": rest["probe_radius"]},
    }
    optimizer = PolyStep(
        params,
        **{**options, "polytope": polytope, "particle_dim": dim, "momentum": momentum},
        **{"rank": rank, "seed": seed, "chunk": chunk},
    )
    basis = None
    if rank is not None:
        basis, end = [], 0
        for i, shape in enumerate(shapes):
            start, end = end, end + math.prod(shape)
            whole = len(shape) < 2
            M = np.eye(end - start) if whole else projection(shape, rank, seed, i)
            basis.append((slice(start, end), M))
    reference = oracle.PolyStep(
        theta,
        **{
            k: at(v) if k in ("epsilon", "step_radius", "probe_radius") else v
            for k, v in options.items()
        },
        **{"polytope": polytope, "particle_dim": dim, "momentum": momentum, "basis": basis},
    )
    views = [p.detach().numpy().reshape(-1) for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(50):
            mean = optimizer.step(lambda: loss(np.concatenate(views)))
            expected = reference.step(loss, rotations(reference.P, dim, seed, t))
            # Rounding of a rule that contracts; measured: 3e-15 over 50 steps.
            np.testing.assert_allclose(flat(params), expected, rtol=1e-11, atol=1e-11)
            assert float(mean) == pytest.approx(reference.mean_cost, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("d", "K"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_linear_loss_has_a_closed_form(d: int, K: int) -> None:
    p, g = nn.Parameter(normal(3 * d)), normal(3 * d, seed=1)
    start = flat([p])
    optimizer = PolyStep(
        [p], epsilon=0.5, step_radius=0.8, probe_radius=3.0, particle_dim=d, num_probe=K, seed=7
    )
    mean = optimizer.step(lambda: g @ p)
    R = rotations(3, d, 7, 0)
    move = flat([p]) - start
    for i in range(3):
        here = slice(i * d, i * d + d)
        slope = g[here].numpy()
        a = 0.5 * 1.5 * (R[i].T @ slope) / 0.5
        expected = -0.4 * R[i] @ (np.sinh(a) / np.cosh(a).sum())
        # Losses of order 10 carry 1e-15, divided by epsilon.
        np.testing.assert_allclose(move[here], expected, rtol=0, atol=1e-13)
        if d == 1:  # the coordinate-wise two-point method
            expected = -0.4 * np.tanh(0.5 * 1.5 * slope / 0.5)
            np.testing.assert_allclose(move[here], expected, rtol=0, atol=1e-13)
    assert float(mean) == pytest.approx(g.numpy() @ start, abs=1e-13)  # vertices average to x


@pytest.mark.parametrize(("name", "order"), [("orthoplex", 2), ("cube", 2), ("simplex", 1)])
def test_small_radii_make_a_gradient_step(name: str, order: int) -> None:
    start, target = normal(6, seed=2), normal(6, seed=3)
    gradient = (2 * (start - target) + 0.6 * torch.cos(2 * start)).numpy()
    errors = []
    for h in (0.04, 0.02, 0.01):
        p = nn.Parameter(start.clone())
        radius = ("constant", h)
        options = {"step_radius": radius, "probe_radius": radius, "particle_dim": 3}
        PolyStep([p], epsilon=0.7, polytope=name, **options).step(
            lambda p=p: ((p - target) ** 2 + 0.3 * torch.sin(2 * p)).sum()
        )
        rate = h * 0.5 * h / (3 * 0.7)
        errors.append(np.linalg.norm((flat([p]) - start.numpy()) / rate + gradient))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.15)  # the next term is one power of h away


@pytest.mark.parametrize("seed", range(3))
def test_the_orthoplex_has_the_minimum_as_fixed_point_and_the_simplex_stalls(seed: int) -> None:
    H = torch.logspace(0, 1, 16, dtype=torch.float64)
    values = {}
    for name in ("orthoplex", "simplex"):
        p = nn.Parameter(normal(16, seed=seed))

        def loss(p=p) -> Tensor:
            return 0.5 * (H * p) @ p

        half = ("constant", 0.5)
        optimizer = PolyStep(
            [p], epsilon=0.5, step_radius=half, probe_radius=half, polytope=name, seed=seed
        )
        values[name] = [loss().item()]
        for _ in range(400):
            optimizer.step(loss)
            values[name].append(loss().item())
    f0 = values["orthoplex"][0]
    assert values["orthoplex"][100] <= 1e-10 * f0
    assert values["orthoplex"][400] <= 1e-25 * f0
    assert values["simplex"][400] > 1e-4


@pytest.mark.parametrize("polytope", POLYTOPES)
@pytest.mark.parametrize("rank", [None, 1])
def test_a_constant_loss_moves_nothing_and_says_so_once(polytope: str, rank: int | None) -> None:
    # From zero, where no move is too small to be seen.
    params = [nn.Parameter(torch.zeros(5, 3).double()), nn.Parameter(torch.zeros(3).double())]
    before = flat(params)
    optimizer = PolyStep(params, polytope=polytope, particle_dim=3, rank=rank, momentum=0.5)
    with pytest.warns(UserWarning, match="raise probe_radius above") as caught:
        assert float(optimizer.step(lambda: 0.7)) == pytest.approx(0.7)
    assert caught[0].filename == __file__
    for _ in range(2):  # in silence
        optimizer.step(lambda: 0.7)
    np.testing.assert_array_equal(flat(params), before)


def test_warnings_point_to_the_caller_below_a_scheduler() -> None:
    p = nn.Parameter(normal(4))
    optimizer = PolyStep([p])
    torch.optim.lr_scheduler.StepLR(optimizer, 5)  # wraps step
    with pytest.warns(UserWarning, match="raise probe_radius") as caught:
        optimizer.step(lambda: 0.0)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="raise epsilon, or lower probe_radius"):
        optimizer.step(lambda: 1e6 * p.sum())
    optimizer.step(lambda: 1e6 * p.sum())  # once is enough
    with pytest.warns(UserWarning, match="lower epsilon, or raise probe_radius"):
        optimizer.step(lambda: 1e-6 * p.sum())


def test_a_hot_softmax_does_not_move_and_a_cold_one_jumps_to_the_best_vertex() -> None:
    start = normal(6, seed=5)
    moves = {}
    for epsilon in (1e12, 1e-9):
        p = nn.Parameter(start.clone())
        options = {"step_radius": ("constant", 0.3), "probe_radius": ("constant", 0.2)}
        with pytest.warns(UserWarning, match="epsilon"):
            PolyStep([p], epsilon=epsilon, seed=2, **options).step(lambda p=p: (p**4).sum())
        moves[epsilon] = (p.detach() - start).numpy()
    assert np.abs(moves[1e12]).max() < 1e-11
    R, U, x = rotations(3, 2, 2, 0), template("orthoplex", 2), start.numpy()
    for i in range(3):
        here = slice(2 * i, 2 * i + 2)
        best = min(U @ R[i].T, key=lambda u: np.sum((x[here] + 0.1 * u) ** 4))
        np.testing.assert_allclose(moves[1e-9][here], 0.3 * best, rtol=0, atol=1e-15)


def test_jitter_scales_the_probe_radius() -> None:
    ends = []
    for jittered in (False, True):
        p = nn.Parameter(normal(6, seed=6))
        reach = 0.4 if jittered else 0.4 * jitter(0.3, 5, 0)
        optimizer = PolyStep(
            [p], probe_radius=("constant", reach), probe_jitter=0.3 * jittered, seed=5, epsilon=0.5
        )
        optimizer.step(lambda p=p: (p**4).sum())
        ends.append(flat([p]))
    np.testing.assert_array_equal(*ends)
    assert abs(jitter(0.3, 5, 0) - 1) > 0.01


def test_costs_shifted_or_scaled() -> None:
    start = normal(6, seed=6)

    def run(factor: float = 1.0, shift: float = 0.0, **options) -> np.ndarray:
        p = nn.Parameter(start.clone())
        optimizer = PolyStep([p], epsilon=0.5, **options)
        for _ in range(5):
            optimizer.step(lambda: factor * (p**4).sum() + shift)
        return flat([p])

    np.testing.assert_allclose(run(shift=7.0), run(), rtol=0, atol=1e-13)
    scaled = run(scale_cost="mean")
    np.testing.assert_allclose(run(1000.0, scale_cost="mean"), scaled, rtol=0, atol=1e-13)
    assert np.abs(run(1000.0, 1.0, scale_cost="mean") - scaled).max() > 1e-6
    np.testing.assert_array_equal(run(-1.0, maximize=True), run())
    np.testing.assert_allclose(run(-1.0, maximize=True, scale_cost="mean"), scaled, atol=1e-14)


def test_lr_multiplies_the_displacement_and_groups_have_their_own() -> None:
    def run(*lrs: float, momentum: float = 0.0) -> list[np.ndarray]:
        model = Net()
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), lrs, strict=True)]
        optimizer = PolyStep(groups, momentum=momentum)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(bound(model))
        return [(p.detach() - b).numpy() for p, b in zip(model.parameters(), before, strict=True)]

    ones = run(1.0, 1.0, 1.0, 1.0)
    for lr, one, move in zip((0.0, 0.5, 2.0, 1.0), ones, run(0.0, 0.5, 2.0, 1.0), strict=True):
        np.testing.assert_allclose(move, lr * one, rtol=0, atol=1e-15)
        assert np.abs(one).max() > 1e-4
    assert not any(move.any() for move in run(0.0, 0.0, 0.0, 0.0, momentum=0.5))


def test_momentum_that_a_scheduler_raises_from_zero() -> None:
    model = Net()
    optimizer = PolyStep(model.parameters())
    optimizer.step(bound(model))
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step(bound(model))
    assert all("velocity" in s for s in optimizer.state.values())
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step(bound(model))
    assert all(set(s) == {"step"} for s in optimizer.state.values())


# --- the objective ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("K", [1, 2])
def test_objective_equals_closure_and_evaluations_are_counted(rank: int | None, K: int) -> None:
    left, right = Net(), Net()
    options = {"rank": rank, "num_probe": K, "epsilon": 0.3}
    one, two = PolyStep(left.parameters(), **options), PolyStep(right.parameters(), **options)
    objective, calls = bound(left), 0
    plain = closure(right)

    def counting() -> Tensor:
        nonlocal calls
        calls += 1
        return plain()

    n = sum(coordinate_count(p.shape, rank) for p in left.parameters())
    d = 2 if rank is None else 8
    for _ in range(4):
        a, b = one.step(objective), two.step(counting)
        assert float(a) == pytest.approx(float(b), rel=1e-12)
    np.testing.assert_allclose(flat(left.parameters()), flat(right.parameters()), atol=1e-12)
    assert objective.counts.loss == calls == 4 * -(-n // d) * 2 * d * K
    assert objective.counts.gradient == 0
    assert all(p.grad is None for p in [*left.parameters(), *right.parameters()])


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_chunk_changes_rounding_alone(chunk: int) -> None:
    ends = []
    for size in (None, chunk):
        model = Net()
        optimizer = PolyStep(model.parameters(), chunk=size, rank=1, num_probe=2)
        for _ in range(3):
            optimizer.step(bound(model))
        ends.append(flat(model.parameters()))
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-13)


def test_a_chunk_bounds_the_candidates_and_holds_only_what_changes() -> None:
    model = Net()
    optimizer = PolyStep(model.parameters(), chunk=6)
    objective, seen = bound(model), []
    original = objective.population

    def spy(params, candidates, **options):
        seen.append((len(params), {len(c) for c in candidates}))
        return original(params, candidates, **options)

    objective.population = spy  # type: ignore[method-assign]
    optimizer.step(objective)
    assert max(max(sizes) for _, sizes in seen) == 6
    # 25 particles of 2 on 30 + 6 + 12 + 2 parameters: three boundaries are crossed at most.
    assert sum(count for count, _ in seen) <= len(seen) + 3


class _Stop(Exception):
    pass


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_are_restored_bitwise_also_after_an_exception(rank, dtype) -> None:
    model = Net(dtype)
    optimizer = PolyStep(model.parameters(), rank=rank, momentum=0.5, epsilon=0.5)
    for k in range(2):
        optimizer.step(closure(model, k, dtype))
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    calls, plain = 0, closure(model, 2, dtype)

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 31:
            pairs = zip(model.parameters(), before, strict=True)
            assert any(not torch.equal(p, b) for p, b in pairs)
            raise _Stop
        return plain()

    with pytest.raises(_Stop):
        optimizer.step(failing)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            assert torch.equal(value, state["state"][index][key])
    assert optimizer.param_groups[0]["time"] == 2

    optimizer.param_groups[0]["lr"] = 0.0  # a whole step that goes nowhere
    optimizer.step(plain)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_no_gradient_and_no_global_generator_is_touched() -> None:
    model = Net()
    marks = [normal(*p.shape, seed=9) for p in model.parameters()]
    for p, mark in zip(model.parameters(), marks, strict=True):
        p.grad = mark.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    optimizer = PolyStep(model.parameters(), rank=1, probe_jitter=0.05)
    optimizer.step(bound(model))
    optimizer.step(closure(model))
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    assert all(torch.equal(p.grad, m) for p, m in zip(model.parameters(), marks, strict=True))


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("make", [bound, closure])
def test_works_under_inference_mode(make, rank) -> None:
    ends = []
    for mode in (torch.inference_mode, torch.enable_grad):
        model = Net()
        optimizer = PolyStep(model.parameters(), momentum=0.5, rank=rank)
        with mode():
            optimizer.step(make(model))
        optimizer.step(make(model))  # what inference mode left behind must serve outside too
        ends.append(flat(model.parameters()))
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = Net(dtype)
    start = closure(model, 0, dtype)().item()
    optimizer = PolyStep(model.parameters(), rank=1, momentum=0.5, epsilon=0.5)
    for _ in range(12):
        optimizer.step(bound(model, 0, dtype))
    assert closure(model, 0, dtype)().item() < 0.5 * start
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters())
    assert all(s["velocity"].dtype == torch.float32 for s in optimizer.state.values())


def test_mixed_dtypes_and_frozen_and_empty_parameters() -> None:
    a, b = nn.Parameter(normal(3)), nn.Parameter(normal(2, 2, seed=1).float())
    frozen = nn.Parameter(normal(4, seed=2), requires_grad=False)
    empty = nn.Parameter(torch.zeros(0, 3))
    before, calls = frozen.detach().clone(), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return (a**2).sum() + (b.double() ** 2).sum() + frozen.sum() ** 2

    start = loss().item()
    for rank in (None, 1):
        optimizer, calls = PolyStep([frozen, a, empty, b], rank=rank, particle_dim=2), 0
        optimizer.step(loss)
        assert calls == 16  # 7 coordinates, 4 particles, 4 vertices
        for _ in range(9):
            optimizer.step(loss)
    assert torch.equal(frozen, before)
    assert loss().item() < start
    for p in (a, b):
        p.requires_grad_(False)
    calls, held = 0, flat([a, b])
    optimizer.step(loss)
    assert calls == 1  # nothing to probe: the loss alone
    np.testing.assert_array_equal(held, flat([a, b]))


def test_batch_norm_and_dropout_in_training_mode_are_refused() -> None:
    for norm in (nn.BatchNorm1d(6), nn.Dropout(0.5)):
        model = Net()
        model.norm = norm.double()
        # Only the last layer moves: its candidates do not reach the statistics.
        optimizer = PolyStep(model.second.parameters())
        held = copy.deepcopy(model.state_dict())
        with pytest.raises(OracleError, match=r"model\.eval\(\)"):
            optimizer.step(bound(model))
        assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
        assert optimizer.param_groups[0]["time"] == 0
        model.eval()
        optimizer.step(bound(model))
        assert optimizer.param_groups[0]["time"] == 1


def test_no_finite_loss_raises_and_changes_nothing() -> None:
    p = nn.Parameter(normal(4))
    optimizer = PolyStep([p], momentum=0.5)
    optimizer.step(lambda: (p**2).sum())
    before, state = flat([p]), copy.deepcopy(optimizer.state_dict())
    for bad in (math.nan, math.inf):
        with pytest.raises(OracleError, match="none of 8 candidates has one"):
            optimizer.step(lambda bad=bad: bad)
    np.testing.assert_array_equal(before, flat([p]))
    now = optimizer.state_dict()
    assert torch.equal(now["state"][0]["velocity"], state["state"][0]["velocity"])
    assert now["param_groups"] == state["param_groups"]


def test_a_step_that_overflows_is_not_taken() -> None:
    p = nn.Parameter(torch.full((2,), 65000.0, dtype=torch.float16))  # at most 65504
    radii = {"step_radius": ("constant", 1e4), "probe_radius": ("constant", 100.0)}
    optimizer = PolyStep([p], epsilon=1.0, maximize=True, momentum=0.5, **radii)
    with pytest.warns(UserWarning, match="non-finite and is not taken; lower lr"):
        optimizer.step(lambda: p.float().mean() / 10)
    assert torch.equal(p, torch.full_like(p, 65000.0))
    assert not optimizer.state[p]["velocity"].any()


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 3])
def test_resumes_bit_exactly(rank, dtype, k) -> None:
    def make(model: nn.Module, **options) -> PolyStep:
        return PolyStep(model.parameters(), momentum=0.5, rank=rank, **options)

    model = Net(dtype)
    schedule = {"epsilon": ("cosine", 0.5, 0.1, 6), "step_radius": ("linear", 0.3, 0.02, 0.1)}
    optimizer = make(model, **schedule, seed=4, probe_jitter=0.1)
    for i in range(k):
        optimizer.step(bound(model, i, dtype))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin, copied = Net(dtype, seed=50), copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    other = make(twin)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    third = make(copied)
    third.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(k, k + 4):
        losses = [
            o.step(bound(m, i, dtype))
            for o, m in ((optimizer, model), (other, twin), (third, copied))
        ]
        assert losses[0] == losses[1] == losses[2]
    for p, q, r in zip(model.parameters(), twin.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_loading_another_seed_replaces_the_subspace() -> None:
    model, twin = Net(), Net()
    optimizer, other = (
        PolyStep(model.parameters(), rank=1),
        PolyStep(twin.parameters(), rank=1, seed=5),
    )
    optimizer.step(bound(model))  # fills the cache with bases of seed 0
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(other.state_dict())
    for o, m in ((optimizer, model), (other, twin)):
        o.step(bound(m))
    np.testing.assert_array_equal(flat(model.parameters()), flat(twin.parameters()))


def test_weights_written_between_steps_are_honoured() -> None:
    model, twin = Net(), Net(seed=50)
    optimizer = PolyStep(model.parameters(), rank=1)
    other = PolyStep(twin.parameters(), rank=1)
    optimizer.step(bound(model))
    other.step(bound(twin))
    twin.load_state_dict(model.state_dict())
    optimizer.step(bound(model))
    other.step(bound(twin))
    np.testing.assert_array_equal(flat(model.parameters()), flat(twin.parameters()))


def test_steps_stay_in_each_parameters_own_subspace() -> None:
    params = [nn.Parameter(normal(6, 5, seed=i)) for i in range(2)]  # alike, yet not one basis
    starts = [flat([p]) for p in params]
    optimizer = PolyStep(params, rank=1, momentum=0.5, epsilon=0.5)
    for _ in range(20):
        optimizer.step(lambda: sum(((p - 1) ** 2).sum() for p in params))
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        M = projection((6, 5), 1, 0, i)
        move = flat([p]) - start
        assert np.linalg.norm(move) > 0.5
        np.testing.assert_allclose(M @ (M.T @ move), move, atol=1e-13)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("lr", -1.0), ("epsilon", 0.0), ("step_radius", -1.0), ("probe_radius", math.nan)),
        *(("probe_radius", ("cosine", 1.0)), ("polytope", "ball"), ("particle_dim", 0)),
        *(("rank", 0), ("rank", 1.5), ("num_probe", 0), ("momentum", 1.0), ("probe_jitter", 1.0)),
        *(("scale_cost", "max"), ("seed", -1), ("chunk", 0), ("maximize", 1)),
    ],
)
def test_options_outside_their_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        PolyStep([nn.Parameter(torch.zeros(2))], **{option: value})


def test_cubes_of_many_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="particle_dim must be at most 12 for the cube"):
        PolyStep([nn.Parameter(torch.zeros(2))], polytope="cube", particle_dim=13)


def test_groups_must_agree() -> None:
    a, b = nn.Parameter(normal(2)), nn.Parameter(normal(2))
    message = "epsilon must agree in all parameter groups"
    with pytest.raises(ValueError, match=message):
        PolyStep([{"params": [a]}, {"params": [b], "epsilon": 0.5}])
    optimizer = PolyStep([{"params": [a], "lr": 0.5}, {"params": [b], "momentum": 0.5}])
    with pytest.raises(ValueError, match="seed must agree"):
        optimizer.add_param_group({"params": [nn.Parameter(normal(2))], "seed": 3})
    assert len(optimizer.param_groups) == 2
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["time"] = 7
    state["param_groups"][1]["epsilon"] = 0.5
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["time"] == 0  # a refused state changes nothing
    assert optimizer.param_groups[1]["epsilon"] == 0.1
    optimizer.param_groups[1]["epsilon"] = 0.5
    before = flat([a, b])
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: (a**2).sum())
    np.testing.assert_array_equal(before, flat([a, b]))


def test_what_is_no_objective_is_refused() -> None:
    p = nn.Parameter(normal(2))
    optimizer = PolyStep([p])
    with pytest.raises(OracleError, match="evaluates the objective itself"):
        optimizer.step()
    with pytest.raises(OracleError, match="one number"):
        optimizer.step(lambda: torch.zeros(3))
    with pytest.raises(OracleError, match="return the loss"):
        optimizer.step(lambda: None)


# --- the claim ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trains_a_staircase_network_that_has_no_gradient(seed: int) -> None:
    pytest.importorskip("sklearn")
    from optimizers.testing.tasks import get_task

    task = get_task("staircase")
    data = task.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.make_model()
    loss = task.loss_fn(model(data[0]), data[1])
    loss.backward()
    assert not next(model.parameters()).grad.any()  # exactly zero: backpropagation cannot train it
    model.zero_grad()
    objective = Objective(model, task.loss_fn)
    optimizer = PolyStep(
        model.parameters(),
        epsilon=1.0,
        step_radius=("cosine", 20.0, 2.0, 150),
        rank=2,
        momentum=0.9,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(150):
        index = torch.randint(len(data[0]), (128,), generator=generator)
        optimizer.step(objective.on(data[0][index], data[1][index]))
    assert objective.counts.loss == 96_000
    with torch.no_grad():
        accuracy = (model(data[2]).argmax(1) == data[3]).double().mean()
    assert accuracy > 0.85  # three seeds: 0.91 to 0.93
