"""NorMuon: oracle, published run, what it reduces to, rows of one size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers.orthogonalized import Muon, NorMuon
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
            "nesterov": st.booleans(),
            "beta2": st.sampled_from([0.0, 0.95]),
            # Without memory (beta2 = 0) the round-off of a row is divided by its length plus eps.
            "eps": st.sampled_from([1e-4, 1e-2]),
            "axis": st.sampled_from(["rows", "short"]),
            "adjust_lr_fn": st.sampled_from([None, "original", "match_rms_adamw"]),
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
        return NorMuon(params, **options, **polar, **how, **iteration)

    def reference(w):
        oracle = oracles.NorMuon(w, **options, exact=exact, **iteration)
        return family.Cautious(oracle, options["weight_decay"]) if cautious else oracle

    # Fifty steps of a few roundings, amplified by the inverse of the smallest singular value.
    assert family.compare(build, reference, shapes, seed, -1.0 if maximize else 1.0) < 1e-10


def test_golden_run():
    p = parameter(family.TALL[0])
    optimizer = NorMuon([p], 0.02, weight_decay=0.1, polar="svd")
    golden = [[.9691133169, 3.9552482309], [1.9853578841, 4.9138468390],
              [2.9830625951, 5.9154975226]]  # fmt: skip
    # Published with ten decimals.
    np.testing.assert_allclose(
        family.golden_run(optimizer, p, family.TALL[1]), golden, rtol=0, atol=6e-11
    )


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (2, 3, 6)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_wide_matrices_of_full_rank_move_like_muons(shape, nesterov):
    """The factor's rows have norm one, so that every row's mean square is the same."""
    start, stream = matrices(shape, 0, 1)[0], [[g] for g in matrices(shape, 1, 20)]
    p, q = parameter(start), parameter(start)
    options = {"lr": 0.1, "weight_decay": 0.2, "nesterov": nesterov, "polar": "svd"}
    ours = train(NorMuon([p], **options), [p], stream)
    theirs = train(Muon([q], **options), [q], stream)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        # eps = 1e-10 in two denominators of the order of 0.1 to 1.
        assert relative(a, b) < 1e-8
    tall, other = parameter(np.swapaxes(start, -1, -2)), parameter(np.swapaxes(start, -1, -2))
    turned = [[np.swapaxes(g, -1, -2)] for (g,) in stream]
    train(NorMuon([tall], **options), [tall], turned)
    train(Muon([other], **options), [other], turned)
    distance = relative(tall.detach(), other.detach())
    assert distance < 1e-8 if shape == (5, 5) else distance > 1e-3


def test_rows_of_equal_size_move_like_muons_also_in_tall_matrices():
    H = family.hadamard(8)[:, :3]
    stream = [[c * H] for c in (1.0, 3.0, 0.5, 2.0)]
    p, q = parameter(np.zeros((8, 3))), parameter(np.zeros((8, 3)))
    ours = train(NorMuon([p], lr=0.1, polar="svd"), [p], stream)
    theirs = train(Muon([q], lr=0.1, weight_decay=0.0, polar="svd"), [q], stream)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-8  # eps


def test_the_short_axis_commutes_with_transposing():
    W, stream = matrices((4, 7), 0, 1)[0], matrices((4, 7), 1, 10)
    plain, turned = parameter(W), parameter(W.T)
    options = {"lr": 0.1, "axis": "short", "adjust_lr_fn": "match_rms_adamw", "polar": "svd"}
    train(NorMuon([plain], **options), [plain], [[g] for g in stream])
    train(NorMuon([turned], **options), [turned], [[g.T] for g in stream])
    assert relative(turned.detach().T, plain.detach()) < 1e-12
    rows = parameter(W)
    train(NorMuon([rows], **{**options, "axis": "rows"}), [rows], [[g] for g in stream])
    assert relative(rows.detach(), plain.detach()) > 1e-3


@pytest.mark.parametrize("shape", [(9, 4), (3, 5, 2)])
def test_rows_get_one_size_and_the_step_keeps_its_norm(shape):
    """At the first step exactly, since v is a multiple of the rows' mean squares then."""
    p = parameter(np.zeros(shape))
    (after,) = train(NorMuon([p], lr=1.0, polar="svd", adjust_lr_fn="none"), [p],
                     [[matrices(shape, 3, 1)[0]]])[0]  # fmt: skip
    lengths = after.norm(dim=-1)
    size = shape[-1] ** 0.5 / shape[-2] ** 0.5  # of n orthonormal columns among m rows
    torch.testing.assert_close(lengths, torch.full_like(lengths, size), rtol=1e-8, atol=0)
    for k in range(5):
        before = p.detach().clone()
        ((after,),) = train(NorMuon([p], lr=1.0, adjust_lr_fn="none", polar="svd"), [p],
                            [[matrices(shape, 10 + k, 1)[0]]])  # fmt: skip
        norms = (after - before).norm(dim=(-2, -1))
        torch.testing.assert_close(norms, torch.full_like(norms, shape[-1] ** 0.5), rtol=1e-8,
                                   atol=0)  # fmt: skip


def test_splits_are_matrices_of_their_own():
    start, stream = matrices((6, 4), 0, 1)[0], matrices((6, 4), 1, 5)
    whole, parts = parameter(start), [parameter(part) for part in np.split(start, 3)]
    train(NorMuon([whole], lr=0.1, splits=3, polar="svd"), [whole], [[g] for g in stream])
    train(NorMuon(parts, lr=0.1, polar="svd"), parts, [np.split(g, 3) for g in stream])
    assert relative(whole.detach(), np.concatenate([p.detach() for p in parts])) < 1e-13


def test_a_kernel_of_one_dimension_is_flattened_when_told():
    start, stream = matrices((8, 3, 2), 0, 1)[0], matrices((8, 3, 2), 1, 5)
    kernel, flat = parameter(start), parameter(start.reshape(8, 6))
    train(NorMuon([kernel], flatten=True, polar="svd"), [kernel], [[g] for g in stream])
    train(NorMuon([flat], polar="svd"), [flat], [[g.reshape(8, 6)] for g in stream])
    assert relative(kernel.detach().reshape(8, 6), flat.detach()) < 1e-13


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("polar", family.POLARS)
@pytest.mark.parametrize("axis", ["rows", "short"])
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_empty_rows_and_columns_do_not_move(polar, axis, shape):
    params = [parameter(matrices(shape, k, 1)[0]) for k in range(2)]
    starts = [p.detach().clone() for p in params]
    grads = [[g.copy() for g in matrices(shape, 10 + k, 2)] for k in range(3)]
    for row, column in grads:
        row[[0, 2]], column[:, [0, 2]] = 0, 0
    train(NorMuon(params, lr=0.1, axis=axis, polar=polar, ns_dtype="float32"), params, grads)
    assert torch.equal(params[0][[0, 2]], starts[0][[0, 2]])
    assert torch.equal(params[1][:, [0, 2]], starts[1][:, [0, 2]])
    assert (params[0] != starts[0])[1].all()
    assert (params[1] != starts[1])[:, 1].all()


@pytest.mark.parametrize("polar", ["auto", "svd"])
def test_a_nan_gradient_stays_in_its_matrix(polar):
    params = [parameter(matrices(s, 0, 1)[0]) for s in ((4, 3), (4, 3), (2, 4, 3))]
    grads = [matrices(p.shape, 5, 1)[0] for p in params]
    grads[0][1, 1] = grads[2][0, 1, 1] = np.nan
    train(NorMuon(params, polar=polar), params, [grads])
    assert not params[0].isfinite().any()
    assert params[1].isfinite().all()
    assert params[2][1].isfinite().all()


def test_state_and_options():
    shapes = [(3, 5), (5, 3), (2, 3, 4), (4, 3, 2, 2)]
    params = [parameter(np.ones(s)) for s in shapes]
    found = [tuple(s["exp_avg_sq"].shape) for s in NorMuon(params).state.values()]
    assert found == [(1, 3, 1), (1, 5, 1), (2, 3, 1), (1, 4, 1)]
    optimizer = NorMuon(params, axis="short")
    found = [tuple(s["exp_avg_sq"].shape) for s in optimizer.state.values()]
    assert found == [(1, 1, 5), (1, 5, 1), (2, 1, 4), (1, 1, 12)]
    half = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    assert NorMuon([half]).state[half]["exp_avg_sq"].dtype is torch.float32


def test_eps_is_the_rules_and_not_the_iterations():
    """A gradient far below the rule's eps is orthogonalized all the same."""
    big, small = parameter(np.zeros((5, 3))), parameter(np.zeros((5, 3)))
    g = matrices((5, 3), 0, 1)[0]
    options = {"eps": 1e-2, "polar": "newton_schulz", "ns_dtype": D}
    train(NorMuon([big], **options), [big], [[g]])
    train(NorMuon([small], **options), [small], [[1e-4 * g]])
    assert relative(small.detach(), big.detach()) < 1e-12
    assert "eps_mode" not in NorMuon([big]).param_groups[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 1.0}, "beta2"),
        ({"eps": 0.0}, "eps"),
        ({"axis": "columns"}, "axis"),
        ({"momentum": -0.1}, "momentum"),
        ({"adjust_lr_fn": "spectral_norm"}, "adjust_lr_fn"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(ValueError, match=r"NorMuon .*vectors.*muon_with_adamw"):
        NorMuon([nn.Parameter(torch.zeros(3))])
