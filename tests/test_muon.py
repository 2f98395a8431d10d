"""Muon: oracle, torch's Muon bit by bit, equivariances, the descent inequality."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import Muon
from optimizers.linalg import MUON_COEFFICIENTS, newton_schulz, polar_svd
from tests.oracles import polar as reference_polar
from tests.oracles.muon import Muon as Reference

STEPS = 50
D = torch.float64


def matrices(shape, seed, count):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def train(optimizer, params, gradient_lists):
    for grads in gradient_lists:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.as_tensor(g, dtype=p.dtype)
        optimizer.step()


def relative(a, b):
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


# A convergent table keeps the comparison well conditioned over fifty steps; Muon's own quintic
# amplifies a small singular value's rounding by up to 484.9 in each step.
SIMPLE = (2.0, -1.5, 0.5)

options_drawn = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.05]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "momentum": st.sampled_from([0.0, 0.5, 0.95]),
        "nesterov": st.booleans(),
        "ns_coefficients": st.sampled_from([MUON_COEFFICIENTS, SIMPLE]),
        "ns_steps": st.sampled_from([1, 5, 8]),
        "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
        "maximize": st.booleans(),
    }
)


@pytest.mark.parametrize("foreach", [None, False])
@given(
    shapes=st.lists(
        st.sampled_from([(3, 5), (5, 3), (4, 4), (1, 6), (2, 3, 4), (4, 3, 2, 2), (3, 2, 1, 2, 2)]),
        min_size=1,
        max_size=4,
    ),
    options=options_drawn,
    exact=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, exact, seed):
    starts = [matrices(s, seed + i, 1)[0] for i, s in enumerate(shapes)]
    streams = [matrices(s, seed + 100 + i, STEPS) for i, s in enumerate(shapes)]
    params = [nn.Parameter(torch.tensor(w)) for w in starts]
    optimizer = Muon(
        params, ns_dtype=D, polar="svd" if exact else "newton_schulz", foreach=foreach, **options
    )
    train(optimizer, params, zip(*streams, strict=True))
    for p, w, stream in zip(params, starts, streams, strict=True):
        reference = Reference(w, exact=exact, **options)
        for g in stream:
            expected = reference.step(g)
        # Fifty steps; one step's rounding is amplified at most by the quintic's slope.
        assert relative(p.detach().numpy(), expected) < 1e-10


@pytest.mark.parametrize("transposed", [False, True])
def test_golden_run(transposed):
    """Published: three steps on a 2x3 matrix and on its transpose, with the norm plus eps."""
    W = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=D)
    N = torch.tensor([[1.0, 0, -1], [0, 1, 1]], dtype=D)
    golden = [[0.981557599302, 1.989396559340, 2.978665335204],
              [3.962489939923, 4.944832787408, 5.933069099497]]  # fmt: skip
    if transposed:
        W, N = W.T, N.T
        golden = [[0.978775871195, 3.959438300998], [1.989679837255, 4.939162923511],
                  [2.977920521392, 5.926099524279]]  # fmt: skip
    p = nn.Parameter(W.clone())
    optimizer = Muon([p], 0.02, 0.1, 0.95, polar="newton_schulz", ns_dtype=D, eps_mode="add")
    for k in range(3):
        p.grad = (p * p / 10 + k * N).detach()
        optimizer.step()
    # Twelve digits are published, of which one entry's last two are in doubt.
    assert np.allclose(p.detach().numpy(), golden, rtol=0, atol=3e-12)


@pytest.mark.parametrize(
    ("nesterov", "adjust"), [*itertools.product([True, False], [None, "match_rms_adamw"])]
)
def test_equals_torch_bit_by_bit(nesterov, adjust):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in ((20, 30), (30, 20), (16, 16))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": adjust}
    left, right = (
        Muon(ours, polar="newton_schulz", foreach=False, **options),
        torch.optim.Muon(theirs, **options),
    )
    for k in range(10):
        grads = [g.astype(np.float32) for g in (matrices(p.shape, k, 1)[0] for p in ours)]
        train(left, ours, [grads])
        train(right, theirs, [grads])
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_bfloat16_parameters_keep_their_momentum():
    """torch 2.13 normalises the momentum buffer itself when nothing is cast; this must not."""
    p = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = Muon([p], nesterov=False, momentum=0.0)
    p.grad = torch.full((8, 8), 2.0, dtype=torch.bfloat16)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((8, 8), 2.0))


@given(seed=st.integers(0, 1000), power=st.integers(-10, 10))
def test_scaling_all_gradients_changes_nothing(seed, power):
    results = []
    for scale in (1.0, 2.0**power):
        p = nn.Parameter(torch.tensor(matrices((4, 6), seed, 1)[0]))
        stream = [[scale * g] for g in matrices((4, 6), seed + 1, 5)]
        train(Muon([p], lr=0.1, ns_dtype=D, weight_decay=0.0), [p], stream)
        results.append(p.detach())
    # A power of two changes no mantissa.
    assert torch.equal(*results)


@given(seed=st.integers(0, 1000))
def test_orthogonal_changes_of_basis_commute_with_the_rule(seed):
    rng = np.random.default_rng(seed)
    P, Q = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (4, 6))
    W, stream = matrices((4, 6), seed, 1)[0], matrices((4, 6), seed + 1, 5)
    plain, turned = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(P @ W @ Q))
    train(Muon([plain], lr=0.1, polar="svd"), [plain], [[g] for g in stream])
    train(Muon([turned], lr=0.1, polar="svd"), [turned], [[P @ g @ Q] for g in stream])
    expected = P @ plain.detach().numpy() @ Q
    assert relative(turned.detach().numpy(), expected) < 1e-10


def test_transposing_commutes_with_the_symmetric_scaling():
    W, stream = matrices((4, 6), 0, 1)[0], matrices((4, 6), 1, 5)
    plain, turned = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(W.T.copy()))
    options = {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "ns_dtype": D}
    train(Muon([plain], **options), [plain], [[g] for g in stream])
    train(Muon([turned], **options), [turned], [[g.T] for g in stream])
    assert relative(turned.detach().numpy().T, plain.detach().numpy()) < 1e-12


def test_a_row_is_normalized_momentum_sgd():
    w, stream = matrices((1, 5), 0, 1)[0], matrices((1, 5), 1, 10)
    p = nn.Parameter(torch.tensor(w))
    train(
        Muon([p], lr=0.1, weight_decay=0, polar="svd", nesterov=False), [p], [[g] for g in stream]
    )
    m = np.zeros((1, 5))
    for g in stream:
        m += 0.05 * (g - m)
        w = w - 0.1 * m / np.linalg.norm(m)
    assert relative(p.detach().numpy(), w) < 1e-12


def test_without_momentum_a_diagonal_moves_by_signs():
    p = nn.Parameter(torch.zeros(3, 3, dtype=D))
    g = np.diag([2.0, -0.5, 7.0])
    train(Muon([p], lr=0.1, weight_decay=0, momentum=0.0, polar="svd"), [p], [[g]])
    assert np.allclose(p.detach().numpy(), -0.1 * np.sign(g), atol=1e-15)


def test_splits_are_matrices_of_their_own():
    whole = nn.Parameter(torch.tensor(matrices((6, 4), 0, 1)[0]))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    streams = matrices((6, 4), 1, 5)
    train(Muon([whole], lr=0.1, splits=3, ns_dtype=D), [whole], [[g] for g in streams])
    train(Muon(parts, lr=0.1, ns_dtype=D), parts, [np.split(g, 3) for g in streams])
    assert relative(whole.detach().numpy(), np.concatenate([p.detach() for p in parts])) < 1e-13
    unsplit = nn.Parameter(torch.tensor(matrices((6, 4), 0, 1)[0]))
    train(Muon([unsplit], lr=0.1, ns_dtype=D), [unsplit], [[g] for g in streams])
    assert relative(whole.detach().numpy(), unsplit.detach().numpy()) > 1e-3


def test_descent_inequality():
    """f(W+) <= f(W) - lr ||grad||_nuc + L lr^2 / 2, and the best gradient obeys the rate."""
    torch.manual_seed(0)
    A = torch.randn(40, 20, dtype=D) * torch.logspace(0, -1, 20, dtype=D)
    B = torch.randn(40, 30, dtype=D)
    L, K = float(A.norm() ** 2), 200
    best = torch.linalg.lstsq(A, B).solution
    W = nn.Parameter(torch.zeros(20, 30, dtype=D))

    def f(X):
        return 0.5 * float((A @ X - B).norm() ** 2)

    gap = f(W.detach()) - f(best)
    lr = math.sqrt(2 * gap / (L * K))
    optimizer = Muon([W], lr=lr, momentum=0.0, weight_decay=0.0, adjust_lr_fn="none", polar="svd")
    norms = []
    for _ in range(K):
        W.grad = (A.T @ (A @ W - B)).detach()
        nuclear = float(torch.linalg.svdvals(W.grad).sum())
        norms.append(nuclear)
        before = f(W.detach())
        optimizer.step()
        # A decrease of order lr * nuclear is asserted with the rounding of f's own size.
        assert f(W.detach()) <= before - lr * nuclear + L * lr**2 / 2 + 1e-12 * before
    assert min(norms) <= math.sqrt(2 * L * gap / K)


# ------------------------------------------------------------------ the polar factor


@given(
    shape=st.sampled_from([(4, 4), (3, 7), (7, 3), (1, 5), (2, 3, 4), (2, 2, 5, 3)]),
    seed=st.integers(0, 1000),
    clamp=st.booleans(),
)
def test_newton_schulz_equals_its_oracle(shape, seed, clamp):
    G = matrices(shape, seed, 1)[0]
    ours = newton_schulz(torch.tensor(G), eps_mode="clamp" if clamp else "add", dtype=None).numpy()
    for index in np.ndindex(shape[:-2]):
        expected = reference_polar.newton_schulz(
            G[index], coefficients=MUON_COEFFICIENTS, steps=5, eps=1e-7, clamp=clamp
        )
        assert np.abs(ours[index] - expected).max() < 1e-12


@given(shape=st.sampled_from([(4, 4), (3, 7), (7, 3), (2, 3, 4)]), seed=st.integers(0, 1000))
def test_polar_svd_is_the_polar_factor(shape, seed):
    G = torch.tensor(matrices(shape, seed, 1)[0])
    O = polar_svd(G)
    S = torch.linalg.svdvals(O)
    assert (S - 1).abs().max() < 1e-13
    # <G, O> is the nuclear norm only for the polar factor.
    inner, nuclear = (G * O).sum((-2, -1)), torch.linalg.svdvals(G).sum(-1)
    torch.testing.assert_close(inner, nuclear, rtol=1e-12, atol=0)


def test_polar_svd_drops_what_is_not_there():
    G = torch.outer(torch.tensor([1.0, 2, 2]), torch.tensor([0.6, 0.8])).double()
    O = polar_svd(G)
    torch.testing.assert_close(O, G / G.norm(), rtol=0, atol=1e-7)
    assert not polar_svd(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_edges_of_newton_schulz(dtype):
    assert not newton_schulz(torch.zeros(3, 4), dtype=dtype).any()
    assert newton_schulz(torch.zeros(0, 4), dtype=dtype).shape == (0, 4)
    S = torch.linalg.svdvals(newton_schulz(torch.randn(32, 48), dtype=dtype).float())
    # The published interval for singular values above one percent of the norm.
    assert S.max() < 1.21
    with pytest.raises(ValueError, match="two dimensions"):
        newton_schulz(torch.zeros(3))


def test_float16_is_normalised_before_the_cast():
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    one = newton_schulz(G, dtype=torch.float16)
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(
            newton_schulz(scale * G, dtype=torch.float16), one, rtol=0, atol=0.02
        )
    assert not newton_schulz(torch.zeros(2, 2), dtype=torch.float16, eps=1e-8).any()


@pytest.mark.parametrize("polar", ["newton_schulz", "svd"])
def test_a_nan_gradient_stays_in_its_matrix(polar):
    params = [nn.Parameter(torch.tensor(matrices((4, 4), k, 1)[0])) for k in range(3)]
    for k, p in enumerate(params):
        p.grad = torch.tensor(matrices((4, 4), 9 + k, 1)[0])
    params[1].grad[0, 0] = torch.nan
    Muon(params, polar=polar).step()
    finite = [bool(p.isfinite().all()) for p in params]
    assert finite == [True, False, True]


def test_a_one_dimensional_kernel_is_flattened_when_told():
    start, streams = matrices((4, 3, 5), 0, 1)[0], matrices((4, 3, 5), 1, 5)
    kernel = nn.Parameter(torch.tensor(start))
    flat = nn.Parameter(torch.tensor(start.reshape(4, 15)))
    train(Muon([kernel], lr=0.1, flatten=True, ns_dtype=D), [kernel], [[g] for g in streams])
    train(Muon([flat], lr=0.1, ns_dtype=D), [flat], [[g.reshape(4, 15)] for g in streams])
    assert np.allclose(kernel.detach().numpy().reshape(4, 15), flat.detach().numpy(), atol=1e-14)


def test_a_table_of_triples_is_used_row_by_row():
    table = [[4.0848, -6.8946, 2.9270], [3.9505, -6.3029, 2.6377], [3.7418, -5.5913, 2.3037],
             [2.8769, -3.1427, 1.2046], [2.8366, -3.0525, 1.2012]]  # fmt: skip
    X = newton_schulz(torch.ones(1, 1, dtype=D), coefficients=table, dtype=None)
    assert X.item() == pytest.approx(0.978345560294, abs=1e-11)  # published
    p = nn.Parameter(torch.eye(3, dtype=D))
    p.grad = torch.eye(3, dtype=D)
    Muon([p], ns_coefficients=table).step()


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5,), "vectors"), ((), "vectors"), ((1, 1), "1x1"), ((6, 4), "splits must divide")],
)
def test_what_holds_no_matrix_is_refused(shape, message):
    with pytest.raises(ValueError, match=message) as caught:
        Muon([nn.Parameter(torch.zeros(shape))], splits=4 if shape == (6, 4) else 1)
    remedy = "Set splits" if shape == (6, 4) else "muon_with_adamw"
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"ns_steps": 0},
        {"ns_steps": 100},
        {"ns_coefficients": (1.0, 2.0)},
        {"momentum": 1.0},
        {"adjust_lr_fn": "spectral_norm"},
        {"ns_dtype": "int8"},
        {"eps": 0.0},
    ],
)
def test_refusals(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)
