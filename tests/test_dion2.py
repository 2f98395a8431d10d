"""Dion2: oracle, Muon as its limit, which lines move, and what the others keep."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers.orthogonalized import Dion2, Muon
from tests import family
from tests.family import D, matrices, parameter, relative, train
from tests.oracles import muon_family as oracles


@pytest.mark.parametrize("foreach", [None, False])
@given(
    shapes=st.lists(st.sampled_from(family.SHAPES), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.05]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "momentum": st.sampled_from([0.0, 0.5, 0.95]),
            "fraction": st.sampled_from([0.1, 0.3, 0.5, 1.0]),
            "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw", "none"]),
        }
    ),
    steps=st.sampled_from([1, 5, 12]),
    exact=st.booleans(),
    cautious=st.booleans(),
    maximize=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, steps, exact, cautious, maximize, seed):
    iteration = {"ns_coefficients": family.SIMPLE, "ns_steps": steps}

    def build(params):
        polar = {"polar": "svd"} if exact else {"polar": "newton_schulz", "ns_dtype": D}
        how = {"cautious": cautious, "maximize": maximize, "foreach": foreach}
        return Dion2(params, **options, **polar, **how, **iteration)

    def reference(w):
        oracle = oracles.Dion2(w, **options, exact=exact, **iteration)
        return family.Cautious(oracle, options["weight_decay"]) if cautious else oracle

    # Fifty steps of a few roundings, amplified by the inverse of the smallest singular value.
    assert family.compare(build, reference, shapes, seed, -1.0 if maximize else 1.0) < 1e-10


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (2, 3, 6)])
def test_with_all_lines_it_is_muon_in_sum_form(shape):
    start, stream = matrices(shape, 0, 1)[0], [[g] for g in matrices(shape, 1, 30)]
    p, q = parameter(start), parameter(start)
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "polar": "svd"}
    ours = train(Dion2([p], fraction=1.0, **options), [p], stream)
    theirs = train(Muon([q], nesterov=False, **options), [q], stream)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        # The momenta differ by the factor 1 - mu, which the factor does not see.
        assert relative(a, b) < 1e-11


@pytest.mark.parametrize("tall", [False, True])
def test_the_largest_lines_move_and_all_decay(tall):
    W, G = matrices((4, 6), 0, 1)[0], np.sign(matrices((4, 6), 1, 1)[0])
    G *= np.array([1.0, 2, 2, 1])[:, None]
    p, part = parameter(W.T if tall else W), parameter(W[1:3].T if tall else W[1:3])
    options = {"lr": 0.1, "weight_decay": 0.5, "adjust_lr_fn": "none", "polar": "svd"}
    optimizer = Dion2([p], fraction=0.3, **options)  # two of four
    train(optimizer, [p], [[G.T if tall else G]])
    train(Dion2([part], fraction=1.0, **options), [part], [[G[1:3].T if tall else G[1:3]]])
    after, moved = (x.detach().T if tall else x.detach() for x in (p, part))
    np.testing.assert_allclose(after[[0, 3]], 0.95 * W[[0, 3]], rtol=1e-15)
    np.testing.assert_allclose(after[1:3], moved, rtol=0, atol=1e-15)
    M = optimizer.state[p]["momentum_buffer"]
    kept = G * np.array([1, 0.95, 0.95, 1])[:, None]
    np.testing.assert_allclose(M.T if tall else M, kept, rtol=1e-15)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 5, 8), (3, 8, 5)])
def test_of_equal_lines_the_first_move(shape):
    p = parameter(np.zeros(shape))
    train(Dion2([p], lr=1.0, fraction=0.4, polar="svd"), [p], [[np.ones(shape)]])
    lines = (p.detach() != 0).any(-1 if shape[-1] > shape[-2] else -2)
    expected = torch.tensor([True, True, False, False, False])
    assert torch.equal(lines, expected.expand(lines.shape))


@pytest.mark.parametrize(("fraction", "lines"), [(0.25, 3), (0.01, 1), (0.5, 5), (1.0, 9)])
def test_the_number_of_lines_is_rounded_up(fraction, lines):
    p = parameter(np.zeros((9, 12)))
    train(Dion2([p], lr=1.0, fraction=fraction), [p], [[matrices((9, 12), 0, 1)[0]]])
    assert int((p.detach() != 0).any(-1).sum()) == lines == math.ceil(fraction * 9)


def test_what_waits_is_not_lost():
    """Without momentum a line's buffer is the sum of its gradients since it last moved."""
    p = parameter(np.zeros((4, 6)))
    optimizer = Dion2([p], lr=1.0, momentum=0.0, weight_decay=0.0, polar="svd")
    waiting, turns = np.zeros((4, 6)), np.zeros(4, dtype=int)
    for g in matrices((4, 6), 0, 40):
        before = p.detach().clone()
        train(optimizer, [p], [[g]])
        waiting += g
        moved = (p.detach() != before).any(-1).numpy()
        np.testing.assert_allclose(waiting[moved] / np.linalg.norm(waiting[moved]),
                                   (before - p.detach())[moved], rtol=0, atol=1e-12)  # fmt: skip
        waiting[moved], turns = 0, turns + moved
        np.testing.assert_allclose(optimizer.state[p]["momentum_buffer"], waiting, atol=1e-13)
    assert turns.sum() == 40
    assert turns.min() >= 5  # everyone's turn comes


def test_splits_are_matrices_of_their_own():
    start, stream = matrices((6, 4), 0, 1)[0], matrices((6, 4), 1, 8)
    whole, parts = parameter(start), [parameter(part) for part in np.split(start, 3)]
    options = {"lr": 0.1, "fraction": 0.5, "polar": "svd"}
    train(Dion2([whole], splits=3, **options), [whole], [[g] for g in stream])
    train(Dion2(parts, **options), parts, [np.split(g, 3) for g in stream])
    assert relative(whole.detach(), np.concatenate([p.detach() for p in parts])) < 1e-13


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4), (4, 3, 2, 2), (12, 3, 2, 1)])
def test_the_memory_layout_is_irrelevant(shape, foreach):
    start, stream = matrices(shape, 0, 1)[0], matrices(shape, 1, 6)
    turned = torch.tensor(start).permute(*range(len(shape))[::-1]).contiguous()
    plain, strided = parameter(start), nn.Parameter(turned.permute(*range(len(shape))[::-1]))
    assert not strided.is_contiguous()
    for p in (plain, strided):
        train(Dion2([p], lr=0.1, polar="svd", foreach=foreach), [p], [[g] for g in stream])
    assert relative(strided.detach(), plain.detach()) < 1e-13


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("polar", family.POLARS)
def test_empty_rows_and_zero_gradients_do_not_move(polar):
    p = parameter(matrices((3, 6), 0, 1)[0])
    start = p.detach().clone()
    optimizer = Dion2([p], weight_decay=0.0, fraction=1.0, polar=polar, ns_dtype="float32")
    train(optimizer, [p], [[np.zeros((3, 6))]])
    assert torch.equal(p, start)
    g = matrices((3, 6), 1, 1)[0]
    g[1] = 0
    train(optimizer, [p], [[g]])
    assert torch.equal(p[1], start[1])
    assert (p[[0, 2]] != start[[0, 2]]).any(-1).all()


def test_a_nan_gradient_stays_in_its_matrix():
    params = [parameter(matrices(s, 0, 1)[0]) for s in ((4, 3), (4, 3), (2, 4, 3))]
    grads = [matrices(p.shape, 5, 1)[0] for p in params]
    grads[0][1, 1] = grads[2][0, 1, 1] = np.nan
    optimizer = Dion2(params)
    train(optimizer, params, [grads, grads])
    assert not params[0].isfinite().all()
    assert params[1].isfinite().all()
    assert params[2][1].isfinite().all()


def test_half_precision_and_empty_parameters():
    half = nn.Parameter(torch.ones(4, 8, dtype=torch.bfloat16))
    empty = [nn.Parameter(torch.zeros(s)) for s in ((0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 3))]
    params = [half, *empty]
    optimizer = Dion2(params, lr=0.1)
    train(optimizer, params, [[np.ones(p.shape) for p in params]] * 2)
    assert optimizer.state[half]["momentum_buffer"].dtype is torch.float32
    assert (half.detach() < 1).any()


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_refusals(fraction):
    with pytest.raises(ValueError, match="fraction"):
        Dion2([nn.Parameter(torch.zeros(2, 2))], fraction=fraction)
    with pytest.raises(ValueError, match=r"Dion2 .*vectors.*muon_with_adamw"):
        Dion2([nn.Parameter(torch.zeros(3))])
