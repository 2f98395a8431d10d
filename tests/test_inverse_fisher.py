"""The static inverse Fisher matrix and pruning against the dense formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import optimizers.second_order.inverse_fisher as module
from optimizers.second_order import MFAC, InverseFisher
from tests.family import D, parameter, relative
from tests.oracles import mfac as reference
from tests.windows import direction


def rows(m, d, seed=0, dtype=D):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


@given(
    m=st.integers(1, 12),
    d=st.integers(1, 30),
    block=st.sampled_from([None, 1, 3, 8, 100]),
    damp=st.sampled_from([1e-3, 0.1, 10.0]),
    share=st.floats(0, 1),
    chunk=st.sampled_from([1, 200, 2**24]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(m, d, block, damp, share, chunk, seed):
    G, w, x = rows(m, d, seed), rows(1, d, seed + 1)[0], rows(3, d, seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        ours = InverseFisher(G, damp, block)
    dense = reference.InverseFisher(G.numpy(), damp, block)
    # Condition numbers up to |g|^2 / damp = 5e4, and results of size 1 / damp.
    tolerance = {"rtol": 1e-9, "atol": 1e-11 / damp}
    for one in x:
        np.testing.assert_allclose(ours.mul(one), dense.mul(one.numpy()), **tolerance)
    np.testing.assert_allclose(ours.mul(x), dense.mul(x.numpy().T).T, **tolerance)
    np.testing.assert_allclose(ours.diag(), dense.diag(), **tolerance)
    k = round(share * d)
    got, (expected, removed) = ours.prune(w, k), dense.prune(w.numpy(), k)
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)
    assert (got.numpy() == 0).tolist() == removed.tolist()


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e12])
@pytest.mark.parametrize("block", [None, 7])
def test_is_right_to_rounding_times_condition(condition, block):
    m, d = 6, 20
    U, V = torch.linalg.qr(rows(m, m)).Q, torch.linalg.qr(rows(d, m, 1)).Q
    G = (U * torch.logspace(0, -np.log10(condition) / 2, m, dtype=D) * m**0.5) @ V.T
    damp, x = 1 / condition, rows(1, d, 2)[0]
    ours, dense = InverseFisher(G, damp, block), reference.InverseFisher(G.numpy(), damp, block)
    bound = 4 * 2.0**-52 * condition * condition  # of a matrix of norm `condition`
    assert (ours.mul(x) - torch.tensor(dense.mul(x.numpy()))).norm() <= bound * x.norm()
    assert (ours.diag() - torch.tensor(dense.diag())).abs().max() <= bound


def test_the_diagonal_stays_above_the_smallest_eigenvalue():
    """Where 1/damp hides it: a diagonal of rounding alone would choose what is pruned."""
    g = rows(1, 4)
    diagonal = InverseFisher(g * 1e6, 1e-3).diag()
    assert (diagonal >= 1 / (1e-3 + 1e12 * (g * g).sum())).all()
    alone = InverseFisher(torch.tensor([[1e8]], dtype=D), 1e-1)
    assert alone.diag()[0] == pytest.approx(1e-16, rel=1e-6, abs=0)


def test_equals_the_dynamic_form_and_repeated_rank_one_updates():
    G, damp = rows(8, 30), 1e-3
    p = parameter(np.zeros(30))
    optimizer = MFAC([p], 1.0, ngrads=8, damp=damp)
    for g in G:
        s = direction(optimizer, p, g)
    # Two vectors of size |g| / damp = 5e3 are subtracted.
    torch.testing.assert_close(InverseFisher(G, damp).mul(G[-1]), s, rtol=0, atol=5e-12)
    v: list[torch.Tensor] = []
    n: list[float] = []
    x = rows(1, 30, 5)[0]
    for g in G:  # the recursion of the paper
        new = g / damp - sum(((a @ g) / b * a for a, b in zip(v, n, strict=True)), 0 * g)
        v, n = [*v, new], [*n, len(G) + g @ new]
    by_recursion = x / damp - sum((a @ x) / b * a for a, b in zip(v, n, strict=True))
    torch.testing.assert_close(InverseFisher(G, damp).mul(x), by_recursion, rtol=1e-11, atol=1e-11)


def test_accepts_lists_and_other_precisions():
    G, w = rows(5, 12), rows(1, 12, 1)[0]
    whole = InverseFisher(G, 0.1)
    listed = InverseFisher([g.reshape(3, 4) for g in G], 0.1)
    assert torch.equal(whole.mul(w), listed.mul(w))
    single = InverseFisher(G.float(), 0.1)
    assert single.mul(w.float()).dtype == torch.float32
    assert relative(single.mul(w.float()), whole.mul(w)) < 1e-5
    pruned = whole.prune(w.reshape(3, 4).bfloat16(), 5)
    assert pruned.dtype == torch.bfloat16
    assert pruned.shape == (3, 4)
    assert int((pruned == 0).sum()) == 5


def test_pruning_nothing_and_everything_and_again():
    G, w = rows(5, 12), rows(1, 12, 1)[0]
    inverse = InverseFisher(G, 0.1)
    kept = w.clone()
    assert torch.equal(inverse.prune(w, 0), w)
    assert not inverse.prune(w, 12).any()
    once = inverse.prune(w, 4)
    assert torch.equal(inverse.prune(once, 4), once)  # zeros are pruned first, and stay
    assert set(torch.nonzero(once == 0).flatten().tolist()) <= set(
        torch.nonzero(inverse.prune(once, 7) == 0).flatten().tolist()
    )
    assert torch.equal(w, kept)


def test_one_weight_is_removed_at_the_least_cost_in_the_quadratic_model():
    """The Optimal Brain Surgeon's own theorem, by trying all."""
    G, w = rows(4, 6), rows(1, 6, 1)[0]
    F = torch.tensor(reference.fisher(G.numpy(), 0.1))
    costs = []
    for q in range(6):
        others = [i for i in range(6) if i != q]
        # Minimise (1/2) d'Fd under d_q = -w_q.
        rest = torch.linalg.solve(F[others][:, others], F[others, q] * w[q])
        delta = torch.zeros(6, dtype=D)
        delta[others], delta[q] = rest, -w[q]
        costs.append((float(delta @ F @ delta) / 2, delta))
    best = min(range(6), key=lambda q: costs[q][0])
    pruned = InverseFisher(G, 0.1).prune(w, 1)
    assert pruned[best] == 0
    torch.testing.assert_close(pruned, w + costs[best][1], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InverseFisher(rows(2, 3), 0.0), r"damp must lie in \(0, inf\); got 0.0"),
        (lambda: InverseFisher(rows(2, 3), 0.1, 0), "block_size must .* got 0"),
        (lambda: InverseFisher(rows(2, 3)[0], 0.1), r"shape \(m, d\).* got torch.float64 \(3,\)"),
        (lambda: InverseFisher([], 0.1), r"grads must be real, of shape \(m, d\)"),
        (lambda: InverseFisher(torch.ones(2, 3, dtype=torch.int64), 0.1), "grads must be real"),
        (lambda: InverseFisher(rows(2, 3) / 0, 0.1), "grads must be finite"),
        (lambda: InverseFisher(torch.ones(2, 3, dtype=D), 1e-18), "lost in the rounding"),
        (lambda: InverseFisher(rows(2, 3), 0.1).mul(torch.ones(4)), r"\(3,\) or \(k, 3\)"),
        (lambda: InverseFisher(rows(2, 3), 0.1).prune(torch.ones(3), 4), "k must .* got 4"),
        (lambda: InverseFisher(rows(2, 3), 0.1).prune(torch.ones(4), 1), "must hold 3 real"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
