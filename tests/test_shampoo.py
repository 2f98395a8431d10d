"""Shampoo: oracle, reductions, symmetries, blocks, grafting, the regret bound."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers.linalg import polar_svd
from optimizers.linalg.kronecker import multiply
from optimizers.second_order import Shampoo
from tests import kronecker_family as shared
from tests.family import D, matrices, parameter, relative, train
from tests.oracles import kronecker as oracles

NAMES = {"max_precond_dim": "max_preconditioner_dim"}
GRAFTS = [None, "sgd", "adam", "adagrad", "rmsprop"]


@pytest.mark.parametrize("foreach", [None, False])
@given(
    shapes=st.lists(st.sampled_from(shared.SHAPES), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-2, 0.1]),
            "betas": st.sampled_from([(0.9, 1.0), (0.0, 0.9), (0.5, 0.999)]),
            # A smaller eps divides the rounding of null spaces by its root; see below.
            "eps": st.sampled_from([1e-6, 1e-2]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "max_precond_dim": st.sampled_from([1024, 4, 3, 2, 1]),
            "precondition_frequency": st.sampled_from([1, 2, 10]),
            "bias_correction": st.booleans(),
            "exponent": st.sampled_from([None, None, -0.5]),
            "grafting_beta2": st.sampled_from([0.9, 0.999]),
            "grafting_eps": st.sampled_from([1e-8, 1e-2]),
        }
    ),
    start=st.sampled_from([None, 1, 5, 20]),
    grafting=st.sampled_from(GRAFTS),
    tensor=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, start, grafting, tensor, seed):
    starts, grads = shared.streams(shapes, seed, steps=50)
    params = [parameter(w) for w in starts]
    how = {"start_preconditioning_step": start, "grafting": grafting, "tensor": tensor}
    optimizer = Shampoo(params, **options, **how, foreach=foreach)
    (group,) = optimizer.param_groups
    train(optimizer, params, zip(*grads, strict=True))
    for p, w, stream in zip(params, starts, grads, strict=True):
        rows = zip(*(shared.members(g, group) for g in stream), strict=True)
        pairs = zip(shared.members(p.detach(), group), shared.members(w, group), rows, strict=True)
        for found, point, row in pairs:
            oracle = oracles.Shampoo(
                **{NAMES.get(k, k): v for k, v in options.items()},
                start_preconditioning_step=-1 if start is None else start,
                grafting=grafting or "none",
            )
            for g in row:
                point = oracle.step(point, g)
            # Fifty steps of rounding; in a null space it is divided by eps ** 0.5 = 1e-3.
            assert relative(found, point) < 1e-11


def test_matches_the_oracle_with_the_default_options():
    start, grads = matrices((5, 3), 0, 1)[0], matrices((5, 3), 1, 50)
    p, oracle, W = parameter(start), oracles.Shampoo(), start
    train(Shampoo([p]), [p], [[g] for g in grads])
    for g in grads:
        W = oracle.step(W, g)
    # At the first step the rounding of the null space is divided by 1e-12 ** 0.25.
    assert relative(p.detach(), W) < 1e-12


# ------------------------------------------------------------------ reductions


def test_a_vector_gets_full_matrix_adagrad():
    start, grads = matrices((6,), 0, 1)[0], matrices((6,), 1, 40)
    p, w, H = parameter(start), start, np.zeros((6, 6))
    train(Shampoo([p], 0.1, (0.0, 1.0), eps=1e-4), [p], [[g] for g in grads])
    for g in grads:
        H = H + np.outer(g, g)
        values, Q = np.linalg.eigh(H)
        w = w - 0.1 * Q @ ((Q.T @ g) / np.sqrt(np.maximum(values, 0) + 1e-4))
    # The rounding of the null space over the root of eps, 1e-2.
    assert relative(p.detach(), w) < 1e-12
    # A matrix of one row has two factors, and so other powers.
    row = parameter(start[None])
    train(Shampoo([row], 0.1, (0.0, 1.0), eps=1e-4), [row], [[g[None]] for g in grads])
    assert relative(row.detach()[0], w) > 1e-2


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (2, 4, 4)])
def test_without_memory_it_moves_along_the_polar_factor(shape):
    start, grads = matrices(shape, 0, 1)[0], matrices(shape, 1, 10)
    p, w = parameter(start), torch.tensor(start)
    train(Shampoo([p], 0.1, (0.0, 1e-300), eps=1e-16), [p], [[g] for g in grads])
    for g in grads:
        w = w - 0.1 * polar_svd(torch.tensor(g))
    # Rounding, and eps, over the squares of singular values of 0.03 and more; in the null space
    # of a wide matrix the rounding over eps ** 0.25.
    assert relative(p.detach(), w) < 1e-11


def test_scalars_get_adagrad():
    start, grads = matrices((), 0, 1)[0], matrices((), 1, 40)
    p, q = parameter(start), parameter(start)
    train(Shampoo([p], 0.1, (0.0, 1.0), eps=1e-30), [p], [[g] for g in grads])
    train(torch.optim.Adagrad([q], 0.1, eps=0.0), [q], [[g] for g in grads])
    assert relative(p.detach(), q.detach()) < 1e-14


@pytest.mark.parametrize(("grafting", "name"), [("adam", "Adam"), ("adagrad", "Adagrad")])
def test_before_the_start_it_is_the_grafted_rule(grafting, name):
    start, grads = matrices((4, 3), 0, 1)[0], matrices((4, 3), 1, 12)
    p, q = parameter(start), parameter(start)
    betas = (0.9 if grafting == "adam" else 0.0, 0.9)
    ours = Shampoo(
        [p], 0.01, betas, grafting=grafting, grafting_beta2=0.99, grafting_eps=1e-6,
        start_preconditioning_step=10, precondition_frequency=2,
    )  # fmt: skip
    options = {"betas": (0.9, 0.99)} if grafting == "adam" else {}
    theirs = getattr(torch.optim, name)([q], 0.01, eps=1e-6, **options)
    mine = train(ours, [p], [[g] for g in grads])
    other = train(theirs, [q], [[g] for g in grads])
    for t, ((a,), (b,)) in enumerate(zip(mine, other, strict=True), 1):
        assert (relative(a, b) < 1e-14) == (t < 10), t


def test_before_the_start_without_grafting_it_is_momentum():
    start, grads = matrices((4, 3), 0, 1)[0], matrices((4, 3), 1, 9)
    p, w, m = parameter(start), start, 0.0
    optimizer = Shampoo([p], 0.1, (0.8, 0.9), precondition_frequency=10)
    train(optimizer, [p], [[g] for g in grads])
    for t, g in enumerate(grads, 1):
        m = 0.8 * m + 0.2 * g
        w = w - 0.1 * m / (1 - 0.8**t)
    assert relative(p.detach(), w) < 1e-14


def test_rounding_of_a_null_space_is_not_magnified():
    """With the default eps the root of the rounding of float32 would be as large as the step."""
    start, grads = matrices((12,), 0, 1)[0], matrices((12,), 1, 6)
    moves = []
    for dtype in (D, torch.float32):
        p = torch.nn.Parameter(torch.tensor(start).to(dtype))
        train(Shampoo([p]), [p], [[g] for g in grads])
        moves.append(p.detach().to(D) - torch.tensor(start))
    # 2^-23 over its own root.
    assert float((moves[0] - moves[1]).norm() / moves[0].norm()) < 2e-3


# ------------------------------------------------------------------ blocks and grafting


def test_blocks_are_parameters_of_their_own():
    start, grads = matrices((7, 5), 0, 1)[0], matrices((7, 5), 1, 15)
    cuts = [
        (r, c) for r in (slice(0, 3), slice(3, 6), slice(6, 7)) for c in (slice(0, 3), slice(3, 5))
    ]
    options = {"eps": 1e-8, "grafting": "adam", "betas": (0.9, 0.99)}
    whole, parts = parameter(start), [parameter(start[c]) for c in cuts]
    optimizer = Shampoo([whole], max_precond_dim=3, **options)
    train(optimizer, [whole], [[g] for g in grads])
    train(Shampoo(parts, **options), parts, [[g[c] for c in cuts] for g in grads])
    for cut, part in zip(cuts, parts, strict=True):
        assert relative(whole.detach()[cut], part.detach()) < 1e-12
    shapes = {k: tuple(v.shape) for k, v in optimizer.state[whole].items() if k[:4] == "root"}
    assert shapes == {
        "root_0": (2, 3, 3), "root_1": (2, 3, 3),  # two blocks of 3x3
        "root_0_1": (2, 3, 3), "root_1_1": (2, 2, 2),  # two of 3x2
        "root_0_2": (1, 1), "root_1_2": (3, 3),  # one of 1x3
        "root_0_3": (1, 1), "root_1_3": (2, 2),  # one of 1x2
    }  # fmt: skip


@pytest.mark.parametrize("grafting", GRAFTS[1:])
def test_the_step_has_the_grafted_length_and_shampoos_direction(grafting):
    start, grads = matrices((4, 3), 0, 1)[0], matrices((4, 3), 1, 6)
    plain, grafted, graft = parameter(start), parameter(start), parameter(start)
    base = {"lr": 0.1, "betas": (0.9, 0.95)}
    last = []
    for p, options in (
        (plain, {}),
        (grafted, {"grafting": grafting}),
        (graft, {"grafting": grafting, "start_preconditioning_step": 100}),
    ):
        path = train(Shampoo([p], **base, **options), [p], [[g] for g in grads])
        last.append((path[-1][0] - path[-2][0]).numpy())
    size = np.linalg.norm
    np.testing.assert_allclose(last[1] / size(last[1]), last[0] / size(last[0]), rtol=1e-9)
    assert size(last[1]) == pytest.approx(size(last[2]), rel=1e-12)
    assert abs(size(last[0]) / size(last[2]) - 1) > 1e-3


def test_a_zero_direction_stays_zero():
    p = parameter(np.ones((3, 2)))
    optimizer = Shampoo([p], grafting="adam", weight_decay=0.5, lr=0.1)
    train(optimizer, [p], [[np.zeros((3, 2))]] * 3)
    np.testing.assert_allclose(p.detach(), 0.95**3, rtol=1e-15)


# ------------------------------------------------------------------ symmetries


@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
@pytest.mark.parametrize("grafting", [None, "sgd"])
def test_rotated_gradients_rotate_the_step(shape, grafting):
    start, grads = matrices(shape, 0, 1)[0], matrices(shape, 1, 40)
    U, V = shared.rotation(shape[0], 1).numpy(), shared.rotation(shape[1], 2).numpy()
    p, q = parameter(start), parameter(U @ start @ V.T)
    options = {"precondition_frequency": 3, "betas": (0.9, 0.99), "grafting": grafting}
    train(Shampoo([p], 0.05, **options), [p], [[g] for g in grads])
    train(Shampoo([q], 0.05, **options), [q], [[U @ g @ V.T] for g in grads])
    assert relative(q.detach(), U @ p.detach().numpy() @ V.T) < 1e-11


# ------------------------------------------------------------------ theorems


def tensor_adagrad_bound(diameter, rank, lr, traces):
    r"""Theorem 7 of Gupta et al. with any rate; its own is :math:`D / \sqrt{2r}`."""
    return (diameter**2 / (2 * lr) + lr * rank) * traces


@pytest.mark.parametrize(("samples", "lr"), [(1, 0.3), (1, 3.0), (3, 0.3)])
def test_regret_bound(samples, lr):
    """Losses sum_i |a_i^T W b_i - c_i|: convex, with gradients of rank at most ``samples``."""
    rng, eps, T = np.random.default_rng(samples), 1e-4, 1500
    target = rng.standard_normal((5, 4))
    p = parameter(np.zeros((5, 4)))
    optimizer = Shampoo([p], lr, (0.0, 1.0), eps=eps)
    L, R = eps * np.eye(5), eps * np.eye(4)
    regret = diameter = 0.0
    for _ in range(T):
        a, b = rng.standard_normal((samples, 5)), rng.standard_normal((samples, 4))
        c = np.einsum("si,ij,sj->s", a, target, b) + rng.standard_normal(samples)
        W = p.detach().numpy()
        errors = np.einsum("si,ij,sj->s", a, W, b) - c
        regret += np.abs(errors).sum() - np.abs(np.einsum("si,ij,sj->s", a, target, b) - c).sum()
        diameter = max(diameter, np.linalg.norm(W - target))
        G = np.einsum("s,si,sj->ij", np.sign(errors), a, b)
        L, R = L + G @ G.T, R + G.T @ G
        train(optimizer, [p], [[G]])
    traces = np.prod([np.sum(np.linalg.eigvalsh(F) ** 0.25) for F in (L, R)])
    assert 0 < regret <= tensor_adagrad_bound(diameter, samples, lr, traces)


@pytest.mark.parametrize("seed", [0, 4])
def test_average_regret_falls_as_the_root_of_time(seed):
    """On a sharp function; the card: within a factor of 2 between T = 500 and T = 2000."""
    rng = np.random.default_rng(seed)
    target, p = rng.standard_normal((5, 4)), parameter(np.zeros((5, 4)))
    a, b = rng.standard_normal((6, 5)), rng.standard_normal((6, 4))
    optimizer = Shampoo([p], 1.0, (0.0, 1.0), eps=1e-6)
    regret, total, found = 0.0, np.zeros((5, 4)), {}

    def errors(W):
        return np.einsum("si,ij,sj->s", a, W - target, b)

    for t in range(1, 2001):
        W = p.detach().numpy()
        regret += np.abs(errors(W)).sum()
        total += W
        train(optimizer, [p], [[np.einsum("s,si,sj->ij", np.sign(errors(W)), a, b)]])
        if t in (500, 2000):
            found[t] = regret / t, np.abs(errors(total / t)).sum()
    assert found[500][0] / found[2000][0] == pytest.approx(2, abs=0.4)
    assert 1 <= found[500][1] / found[2000][1] <= 4
    assert all(gap <= average for average, gap in found.values())  # Jensen


@pytest.mark.parametrize(("exponent", "low", "high"), [(None, 60, 150), (-0.5, 1, 1.6)])
def test_powers_of_a_half_whiten_and_of_a_quarter_take_the_root(exponent, low, high):
    """The card: 98 and 1.28 with 8000 draws and 20000 to judge."""
    draw = shared.whitening_problem(3)
    state = shared.accumulated(
        lambda p: Shampoo(p, betas=(0.0, 0.998), exponent=exponent, precondition_frequency=3000),
        draw,
        3000,
    )
    ratio, _ = shared.whitened(multiply(draw(20_000), shared.many(state, "root", 20_000)))
    assert low < ratio < high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, 0.0)}, r"betas\[1\]"),
        ({"betas": (0.9, 1.1)}, "betas"),
        ({"exponent": 0.5}, "exponent"),
        ({"grafting": "lion"}, "grafting"),
        ({"start_preconditioning_step": 0}, "start_preconditioning_step"),
        ({"eps": 0.0}, "eps"),
        ({"flatten": True, "tensor": True}, "exclude each other"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Shampoo([parameter(np.ones((2, 2)))], **options)


def test_float64_matrices_of_the_state():
    p = parameter(np.ones((3, 2)))
    state = Shampoo([p], grafting="rmsprop").state[p]
    assert {v.dtype for k, v in state.items() if k[:3] in ("fac", "roo", "exp")} == {D}
