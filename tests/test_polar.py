"""Polar back-ends against the SVD, on shapes x ranks x conditioning x dtypes, with their bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers.linalg import (
    MUON_COEFFICIENTS,
    TABLES,
    image,
    optimal_quintic,
    polar,
    polar_eigh,
    polar_many,
    polar_svd,
    quintic_coefficients,
    worst_error,
)
from optimizers.linalg.backends import _FAST, _FAST_SHORT
from optimizers.linalg.coefficients import (
    completed,
    divided,
    evaluate,
    odd_coefficients,
    optimal_row,
    rows_of,
)
from optimizers.linalg.polar import CORRECTION
from optimizers.linalg.speed import NEVER, half_from
from optimizers.linalg.stacks import iterate
from optimizers.linalg.symmetric import (
    halved,
    outer,
    polynomial,
    product,
    scaled_polynomial,
    whole,
    worth_halving,
)
from tests.oracles import polar as reference

D = torch.float64
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 2.0**-8}


def spectrum(rows, columns, values, seed):
    """Return a float64 matrix with these singular values, and its polar factor."""
    rng = np.random.default_rng(seed)
    n, m = min(rows, columns), max(rows, columns)
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    V = np.linalg.qr(rng.standard_normal((m, n)))[0]
    values = np.asarray(values, dtype=np.float64)
    G, O = (U * values) @ V.T, (U * (values > 0)) @ V.T
    if rows > columns:
        G, O = G.T, O.T
    return torch.tensor(np.ascontiguousarray(G)), torch.tensor(np.ascontiguousarray(O))


def logarithmic(rows, columns, decades, seed):
    return spectrum(rows, columns, np.logspace(0, -decades, min(rows, columns)), seed)


def distance(X, O):
    """Relative Frobenius distance."""
    return float((X.double() - O).norm() / O.norm())


SHAPES = [(8, 8), (16, 24), (24, 16), (12, 60), (60, 12), (1, 7), (33, 34)]


# ------------------------------------------------------------------ coefficients


@pytest.mark.parametrize("interval", [(1e-3, 1.0), (0.1, 1.0), (0.5, 1.5)])
def test_optimal_quintics_equioscillate(interval):
    lower, upper = interval
    a, b, c = optimal_quintic(lower, upper)
    root = math.sqrt(9 * b * b - 20 * a * c)
    q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    errors = [1 - evaluate((a, b, c), x) for x in (lower, q, r, upper)]
    assert np.allclose(errors, errors[0] * np.array([1, -1, 1, -1]), rtol=0, atol=1e-14)


@given(lower=st.floats(1e-3, 0.9), upper=st.floats(0.1, 3), terms=st.sampled_from([1, 2, 3, 5]))
def test_optimal_rows_equioscillate(lower, upper, terms):
    row = optimal_row(lower * upper, upper, terms)
    x = np.geomspace(lower * upper, upper, 100_001)
    error = 1 - sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    worst = np.abs(error).max()
    # Chebyshev: no odd polynomial of so many terms is better if terms + 1 signs alternate. The
    # points of the grid miss the peaks by less than a thousandth, or by rounding.
    peaks = error[np.abs(error) >= 0.999 * worst - 1e-12]
    if worst > 1e-9:
        assert 1 + np.count_nonzero(np.diff(np.sign(peaks))) >= terms + 1


@pytest.mark.parametrize("terms", [3, 5])
def test_optimal_rows_of_a_point_are_the_limit(terms):
    row = optimal_row(0.7, 0.7, terms)
    p = np.polynomial.Polynomial(np.stack([np.zeros(terms), row], 1).ravel())
    assert p(0.7) == pytest.approx(1, abs=1e-12)
    for k in range(1, terms):
        assert abs(p.deriv(k)(0.7)) < 1e-8


@given(
    terms=st.lists(st.sampled_from([3, 5]), min_size=1, max_size=4),
    lower=st.floats(1e-4, 0.5),
    cushion=st.sampled_from([0.0, 0.003, 0.02]),
)
def test_compositions_of_rows_are_centred_and_as_good_as_their_interval_says(terms, lower, cushion):
    rows = odd_coefficients(terms, lower, cushion)
    assert [len(row) for row in rows] == terms
    low, high = image(rows, lower)
    x = np.geomspace(lower, 1, 20_001)
    for row in rows:
        x = sum(c * x ** (2 * k + 1) for k, c in enumerate(row))
    assert low - 1e-9 <= x.min()
    assert x.max() <= high + 1e-9
    assert low + high == pytest.approx(2, abs=1e-9)
    # Five terms do not do worse than three in any place.
    longer = odd_coefficients([5] * len(terms), lower, cushion=0.0)
    shorter = odd_coefficients(terms, lower, cushion=0.0)
    assert worst_error(longer, lower) <= worst_error(shorter, lower) + 1e-12


def test_completing_the_square_is_the_same_polynomial():
    row = (14.0, -126.0, 392.0, -473.0, 194.0)
    a, delta, gamma, alpha, e = completed(row)
    r = np.linspace(0, 1, 101)
    U = r**2 + alpha * r
    powers = sum(c * r**k for k, c in enumerate(row))
    np.testing.assert_allclose(a + delta * r + gamma * U + e * U**2, powers, rtol=0, atol=1e-12)


def test_the_generator_reproduces_the_published_tables():
    rows = quintic_coefficients(1e-3, 8)
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ]
    # Twelve digits: the published rows were computed with another exchange.
    np.testing.assert_allclose(rows[:5], published, rtol=1e-11)
    np.testing.assert_allclose(rows[7], (1.875, -1.25, 0.375), rtol=1e-8)
    inside = quintic_coefficients(1e-3, 5, cushion=0.02, safety=1.02)
    np.testing.assert_allclose(inside[0], (8.156554524902461, -22.48329292557795,
                                           15.878769915207462), rtol=1e-11)  # fmt: skip
    np.testing.assert_allclose(inside[4], (2.3465413258596377, -1.7097828382687081,
                                           0.42323551169305323), rtol=1e-11)  # fmt: skip


@given(
    lower=st.floats(1e-4, 0.5),
    steps=st.integers(1, 8),
    cushion=st.sampled_from([0.0, 0.02, 0.1]),
    safety=st.sampled_from([1.0, 1.02]),
)
def test_the_generator_equals_its_oracle(lower, steps, cushion, safety):
    ours = x = np.geomspace(lower, 1, 2001)
    for row in quintic_coefficients(lower, steps, cushion, safety):
        ours = reference.quintic(row, ours)
    for row in reference.quintic_coefficients(lower, steps, cushion, safety):
        x = reference.quintic(row, x)
    # Values, not coefficients: once the interval has closed, many rows do the same.
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-9)


def test_composition_errors_are_the_published_ones():
    published = [0.991530, 0.964572, 0.859771, 0.545893, 0.113448, 9.1647e-4, 4.8110e-10]
    previous = 1.0
    for steps, expected in enumerate(published, start=1):
        error = worst_error(quintic_coefficients(1e-3, steps, cushion=0.0), 1e-3)
        assert error == pytest.approx(expected, rel=1e-5)
        fixed = worst_error([(15 / 8, -10 / 8, 3 / 8)] * steps, 1e-3)
        assert error <= fixed
        assert error < previous
        previous = error


@pytest.mark.parametrize(
    ("rows", "lower", "interval"),
    [
        (TABLES["muon"], 1e-3, (0.4705, 1.2024)),
        (TABLES["muon"], 1e-2, (0.6818, 1.1344)),
        (TABLES["you"], 1e-2, (0.9778, 1.0318)),
    ],
)
def test_intervals_are_the_published_ones(rows, lower, interval):
    low, high = image(rows, lower)
    grid = np.geomspace(lower, 1, 20001)
    for row in rows:
        grid = reference.quintic(row, grid)
    # The card's largest value above 0.01 is a fine grid's; ours is the exact interval of each row.
    assert low <= grid.min() + 1e-12
    assert high >= grid.max() - 1e-12
    assert low == pytest.approx(interval[0], abs=2e-4)
    if lower == 1e-3:
        assert high == pytest.approx(interval[1], abs=2e-4)


def test_coefficients_refuse():
    with pytest.raises(ValueError, match="lower must lie in"):
        quintic_coefficients(0.0)
    with pytest.raises(ValueError, match="steps"):
        quintic_coefficients(1e-3, 0)
    with pytest.raises(ValueError, match="interval"):
        optimal_quintic(-1.0, 1.0)
    with pytest.raises(ValueError, match="triples"):
        rows_of([1.0, 2.0], 3)
    with pytest.raises(ValueError, match="terms must be 3 or 5"):
        odd_coefficients([3, 4], 1e-3)


# ------------------------------------------------------------------ forms that must agree


@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    steps=st.integers(1, 8),
    tight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_batched_and_gram_forms_equal_the_polynomial_of_the_singular_values(
    shapes, steps, tight, seed
):
    rows = divided(quintic_coefficients(1e-3, steps), 1.01)
    matrices, expected = [], []
    for k, (r, c) in enumerate(shapes):
        values = np.logspace(0, -2, min(r, c))
        G, O = spectrum(r, c, values, seed + k)
        if tight:
            scale = 1.01 * (values**8).sum() ** 0.125
        else:
            scale = 1.01 * np.sqrt((values**2).sum())
        x = values / scale
        for row in rows:
            x = reference.quintic(row, x)
        # p(G) = U p(S) V^T with the polar factor's U and V.
        n = min(r, c)
        U = np.linalg.qr(np.random.default_rng(seed + k).standard_normal((n, n)))[0]
        P = (U * x) @ U.T
        O = O.numpy()
        expected.append(P @ O if r <= c else O @ P)
        matrices.append(3.7 * G)
    for gram in (None, True, False):
        for i, X in iterate(matrices, rows, dtype=D, tight=tight, safety=1.01, gram=gram):
            # Rounding, amplified by the slopes of the rows: at most 500, squared in the Gram form.
            assert np.abs(X.numpy() - expected[i]).max() < 1e-9


@given(n=st.integers(1, 6), count=st.integers(1, 3), seed=st.integers(0, 1000))
def test_halved_products_are_products(n, count, seed):
    rng = np.random.default_rng(seed)
    X = torch.tensor(rng.standard_normal((count, 2 * n, 2 * n)))
    R = X @ X.mT
    R = (R + R.mT) / 2
    P = 0.3 * R @ R + 0.2 * R  # commutes with R
    scale = float((R.norm() * P.norm()).clamp(min=1))
    torch.testing.assert_close(whole(halved(R)), R, rtol=0, atol=0)
    for form in (halved, lambda R: (R,)):
        AB = whole(product(form(R), form(P), "test")).clone()
        torch.testing.assert_close(AB, R @ P, rtol=0, atol=1e-14 * scale)


@given(
    n=st.integers(1, 6),
    count=st.integers(1, 3),
    row=st.lists(st.floats(-3, 3), min_size=3, max_size=5).filter(
        lambda row: len(row) != 4 and abs(row[-1]) > 0.1
    ),
    seed=st.integers(0, 1000),
)
def test_polynomials_of_symmetric_matrices_are_those_of_their_eigenvalues(n, count, row, seed):
    rng = np.random.default_rng(seed)
    V = np.linalg.qr(rng.standard_normal((count, 2 * n, 2 * n)))[0]
    values = rng.uniform(0, 1, (count, 1, 2 * n))
    R = torch.tensor((V * values) @ V.transpose(0, 2, 1))
    expected = (V * sum(c * values**k for k, c in enumerate(row))) @ V.transpose(0, 2, 1)
    # Of the scaled matrix: R / bound^2, the polynomial divided by the bound.
    bound = 1.01 * (values**4).sum((1, 2), keepdims=True) ** 0.125
    powers = [c * values**k / bound ** (2 * k + 1) for k, c in enumerate(row)]
    scaled = (V * sum(powers)) @ V.transpose(0, 2, 1)
    size = max(np.abs(p).max() for p in powers) * max(1, abs(row[-2] / row[-1])) ** 2
    for form in (halved, lambda R: (R,)):
        P = whole(polynomial(form(R), tuple(row), "test")).numpy()
        # Completing the square multiplies rounding by (d / 2e)^2 at most.
        assert np.abs(P - expected).max() <= 1e-11
        if len(row) == 3 or row[-1] > 0:
            P = whole(scaled_polynomial(form(R), tuple(row), 1.01, "test")).numpy()
            assert np.abs(P - scaled).max() <= 1e-13 * size


@pytest.mark.parametrize("side", [257, 384])
@pytest.mark.parametrize("tall", [False, True])
def test_the_outer_product_by_blocks_is_the_outer_product(tall, side):
    torch.manual_seed(0)
    X = torch.randn(2, 600, side, dtype=D) if tall else torch.randn(2, side, 600, dtype=D)
    expected = X.mT @ X if tall else X @ X.mT
    R = outer(X, tall, "test")
    assert len(R) == (2 if worth_halving(X, side) else 1)
    torch.testing.assert_close(whole(R), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["auto", "gram", "polar_express", "refined", "newton_schulz"])
def test_many_matrices_equal_each_by_itself(method):
    torch.manual_seed(0)
    shapes = [(6, 30), (30, 6), (6, 6), (3, 6, 30), (6, 40), (6, 6), (1, 5), (5, 1)]
    matrices = [torch.randn(s, dtype=D) for s in shapes]
    seen = {i: X.clone() for i, X in polar_many(matrices, method=method, dtype=D)}
    assert sorted(seen) == list(range(len(shapes)))
    for i, G in enumerate(matrices):
        alone = polar(G, method=method, dtype=D)
        assert alone.shape == G.shape
        torch.testing.assert_close(seen[i], alone, rtol=0, atol=1e-11)


def test_what_polar_returns_is_not_overwritten():
    torch.manual_seed(0)
    first = polar(torch.randn(8, 30))
    copy = first.clone()
    polar(torch.randn(8, 30))
    assert torch.equal(first, copy)


# ------------------------------------------------------------------ the bound of each back-end


@given(
    shape=st.sampled_from([(8, 8), (16, 24), (12, 60), (60, 12), (33, 34)]),
    decades=st.integers(0, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_exact_factors_keep_their_bound(shape, decades, seed, dtype):
    G, O = logarithmic(*shape, decades, seed)
    n, kappa = min(shape), 10.0**decades
    # Casting G perturbs it by eps: the polar factor moves by at most 2 eps ||G|| / (s_i + s_j).
    cast = 2 * EPS[dtype] * math.sqrt(n) * kappa
    svd = polar_svd(G.to(dtype))
    if kappa < 1e5 or dtype is D:  # below, float32 cannot tell a direction from nothing
        assert distance(svd, O) <= 10 * cast + 1e-13
    exact = polar_eigh(G.to(dtype))
    gram = 10 * n * EPS[D] * kappa**2
    if gram < 0.1:
        assert distance(exact, O) <= gram + 10 * cast + 1e-13


@given(
    method=st.sampled_from(["polar_express", "gram", "auto"]),
    steps=st.integers(4, 8),
    shape=st.sampled_from([(8, 8), (16, 24), (12, 60), (60, 12)]),
    decades=st.integers(0, 6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_iterations_stay_in_the_interval_of_their_polynomial(
    method, steps, shape, decades, seed, dtype
):
    values = np.logspace(0, -decades, min(shape))
    G, O = spectrum(*shape, values, seed)
    rows = divided(quintic_coefficients(1e-3, steps), 1.01 if method == "polar_express" else 1.03)
    tight = method == "auto"
    scale = 1.01 * ((values**8).sum() ** 0.125 if tight else np.sqrt((values**2).sum()))
    low, high = image(rows, values[-1] / scale, values[0] / scale)
    X = polar(G.to(dtype), method=method, steps=steps, dtype=dtype)
    S = torch.linalg.svdvals(X.double())
    # One step's rounding is amplified by the slope of what follows: at most 1e3 (1 / lower).
    slack = 1e3 * 30 * EPS[dtype]
    assert S.max() <= high + slack
    assert S.min() >= low - slack
    if decades <= 2 and dtype is D:
        # The singular vectors are kept, so the distance is that of the singular values.
        assert distance(X, O) <= max(abs(1 - low), abs(1 - high)) + slack


@given(
    shape=st.sampled_from([(32, 32), (32, 128), (200, 48), (48, 96)]),
    decades=st.floats(0, 6),
    rank=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 1000),
    method=st.sampled_from(["auto", "gram", "polar_express", "refined"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_half_precision_overshoots_by_rounding_only(shape, decades, rank, seed, method, dtype):
    n = min(shape)
    values = np.logspace(0, -decades, n) * (np.arange(n) < rank * n)
    G, O = spectrum(*shape, values, seed)
    X = polar(G, method=method, dtype=dtype).double()
    S = torch.linalg.svdvals(X)
    # The polynomial ends at most at 1.21 (auto), 1.12 (the others), 1.01 (refined); rounding in
    # the Gram form adds what was measured over 10^4 draws, 0.2, and must never feed on itself.
    assert S.max() < {"auto": 1.45, "refined": 1.2}.get(method, 1.4)
    assert bool(X.isfinite().all())
    if decades <= 1 and rank == 1.0:
        bound = {"auto": 0.21, "refined": 0.02}.get(method, 0.13)
        assert distance(X, O) <= bound + 20 * EPS[torch.bfloat16]


@pytest.mark.parametrize("decades", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", [(256, 256), (64, 256), (300, 50)])
def test_the_default_is_at_least_as_exact_as_five_quintic_steps(shape, decades):
    G, O = logarithmic(*shape, decades, 0)
    torchs = distance(polar(G.float(), method="newton_schulz"), O)
    assert distance(polar(G.float()), O) <= torchs
    # In bfloat16 small directions are rounding, which is orthogonalized too: equal to a percent.
    assert distance(polar(G.float(), dtype=torch.bfloat16), O) <= 1.01 * torchs


@pytest.mark.parametrize("rows", [_FAST, _FAST_SHORT])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (384, 768), (768, 384)])
def test_the_gram_form_is_as_exact_in_half_precision_as_the_plain_form(shape, rows):
    """Wide or tall, halved or not: every product has its factors in the order that X meets."""
    G, O = logarithmic(*shape, 1, 0)
    distances = []
    for gram in (True, False):
        ((_, X),) = iterate(
            [G.float()], rows, dtype=torch.bfloat16, tight=True, safety=1.01, gram=gram
        )
        distances.append(distance(X, O))
    # Measured: 1 to 8 % more. In the wrong order it is 10 % (three products halved), 100 % or 8x.
    assert distances[0] <= 1.09 * distances[1]


def test_the_default_on_gaussian_matrices():
    torch.manual_seed(0)
    for shape in [(128, 128), (64, 256), (256, 256)]:
        G = torch.randn(shape)
        O = polar_svd(G.double())
        torchs = distance(polar(G, method="newton_schulz"), O)
        assert distance(polar(G), O) <= torchs


def test_published_distances_on_gaussian_matrices():
    """Relative distances to the SVD of a Gaussian 128 x 128, as the methods' card gives them."""
    torch.manual_seed(0)
    G = torch.randn(128, 128, dtype=D)
    O = polar_svd(G)
    for options, expected in [
        ({"method": "newton_schulz", "dtype": D}, 0.205),
        ({"method": "newton_schulz", "coefficients": TABLES["you"], "dtype": D}, 0.071),
        ({"method": "polar_express", "dtype": D}, 0.094),
        ({"method": "polar_express", "steps": 8, "dtype": torch.bfloat16}, 0.020),
    ]:
        # Another draw of the matrix: a smallest singular value more or less shows in two digits.
        assert distance(polar(G, **options), O) == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("decades", [1, 2])
def test_convergent_iterations_reach_the_polar_factor(decades):
    G, O = logarithmic(64, 96, decades, 0)
    assert distance(polar(G, method="polar_express", steps=8), O) < 1e-12
    simple = polar(G, method="newton_schulz", coefficients=TABLES["simple"], steps=12, dtype=D)
    assert distance(simple, O) < 1e-12


@pytest.mark.parametrize("error", [0.5, 0.2, 0.1, 1e-2, 1e-3, 1e-5, 1e-8])
def test_auto_keeps_the_error_that_was_asked_for(error):
    # Values above 1e-3 of the Frobenius norm, which is no smaller than the scaling.
    values = np.geomspace(1, 8e-3, 40)
    G, _ = spectrum(40, 90, values, 0)
    S = torch.linalg.svdvals(polar(G.float(), error=error).double())
    assert (S - 1).abs().max() <= error * 1.1 + 2e-6 * (error < 1e-3)


def test_refined_corrects_orthogonality():
    for shape in [(48, 200), (64, 64), (200, 48)]:
        G, _ = logarithmic(*shape, 1, 0)
        rough = polar(G, method="auto", steps=5, dtype=torch.bfloat16)
        e = float((torch.linalg.svdvals(rough.double()) - 1).abs().max())
        assert e > 0.05
        fine = torch.linalg.svdvals(polar(G, method="refined", dtype=torch.bfloat16).double())
        # What one correcting step makes of an error e, and the rounding of float32.
        bound = worst_error([CORRECTION], 1 - e, 1 + e) + 1e-5
        assert float((fine - 1).abs().max()) <= bound < 0.06


# ------------------------------------------------------------------ equivariances


@given(
    shape=st.sampled_from([(6, 6), (5, 11), (11, 5)]),
    method=st.sampled_from(["auto", "gram", "polar_express", "eigh", "svd"]),
    seed=st.integers(0, 1000),
)
def test_equivariance(shape, method, seed):
    rng = np.random.default_rng(seed)
    G, _ = logarithmic(*shape, 1, seed)
    P = torch.tensor(np.linalg.qr(rng.standard_normal((shape[0],) * 2))[0])
    Q = torch.tensor(np.linalg.qr(rng.standard_normal((shape[1],) * 2))[0])
    X = polar(G, method=method)
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(polar(-G, method=method), -X, **close)
    torch.testing.assert_close(polar(G.T, method=method), X.T, **close)
    torch.testing.assert_close(polar(P @ G @ Q, method=method), P @ X @ Q, **close)
    for scale in (1e-30, 1e-3, 1e6, 1e30):
        torch.testing.assert_close(polar(scale * G, method=method), X, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-16, 1e16, 1e30, 1e37])
def test_scale_invariance_to_the_ends_of_the_range(dtype, scale):
    G, O = logarithmic(16, 40, 1, 0)
    one, other = polar(G.float(), dtype=dtype), polar((scale * G).float(), dtype=dtype)
    if dtype is torch.float32:
        # One more rounding of 6e-8, amplified by the slope of three rows, below 500.
        torch.testing.assert_close(other, one, rtol=0, atol=3e-5)
    else:
        # One of 4e-3: singular values may end elsewhere in the band that the rows map to.
        worst = worst_error(_FAST_SHORT, 0.05)
        assert worst < 0.16
        assert distance(one, O) < worst
        assert distance(other, O) < worst


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("method", ["auto", "gram", "polar_express", "refined", "eigh", "svd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_edges(method, dtype):
    assert not polar(torch.zeros(4, 9, dtype=dtype), method=method).any()
    assert polar(torch.zeros(0, 9, dtype=dtype), method=method).shape == (0, 9)
    assert polar(torch.zeros(2, 3, 4, 0, dtype=dtype), method=method).shape == (2, 3, 4, 0)
    one = polar(torch.tensor([[3.0]], dtype=dtype), method=method)
    assert abs(float(one) - 1) < 0.25
    orthogonal = polar(-torch.eye(5, dtype=dtype), method=method).double()
    assert (orthogonal + torch.eye(5, dtype=D)).abs().max() < 0.25
    with pytest.raises(ValueError, match="two dimensions"):
        polar(torch.zeros(3, dtype=dtype), method=method)


@pytest.mark.parametrize("method", ["auto", "gram", "polar_express", "refined", "eigh", "svd"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_matrix(method, bad):
    torch.manual_seed(0)
    G = torch.randn(3, 6, 20)
    G[1, 2, 3] = bad
    X = polar(G, method=method)
    assert not X[1].isfinite().any()
    # In such a batch all are scaled in two divisions; the rounding of one more, times the slope.
    torch.testing.assert_close(X[[0, 2]], polar(G[[0, 2]], method=method), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["auto", "gram", "eigh", "svd"])
def test_a_zero_matrix_in_a_batch_stays_zero(method):
    torch.manual_seed(0)
    G = torch.randn(3, 6, 20)
    G[1] = 0
    X = polar(G, method=method)
    assert not X[1].any()
    assert bool(X.isfinite().all())


def test_refusals():
    with pytest.raises(ValueError, match="method must be one of"):
        polar(torch.eye(2), method="qr")
    with pytest.raises(ValueError, match="error must lie in"):
        polar(torch.eye(2), error=0.0)
    with pytest.raises(TypeError, match="floating-point"):
        polar(torch.eye(2, dtype=torch.int64))


def test_results_do_not_require_or_record_gradients():
    G = torch.randn(4, 9)
    with torch.no_grad():
        assert not polar(G).requires_grad
    # The rooms that are used again must serve both modes.
    with torch.inference_mode():
        polar(torch.randn(64, 90))
    with torch.no_grad():
        polar(torch.randn(64, 90))


def test_the_device_is_measured_once():
    side = half_from(torch.device("cpu"))
    assert side in (64, 128, 256, 512, NEVER)
    assert half_from(torch.device("cpu")) == side


def test_given_coefficients_are_honoured():
    torch.manual_seed(0)
    G = torch.randn(6, 20, dtype=D)
    ours = polar(G, method="auto", coefficients=MUON_COEFFICIENTS, steps=5)
    theirs = polar(G, method="newton_schulz", dtype=D)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
