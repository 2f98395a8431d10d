"""AdaMuon: oracle, published run, what it reduces to, steps of fixed RMS."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers.orthogonalized import AdaMuon, Muon
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
        }
    ),
    # Entries of a factor may be zero by cancellation, of signs also in each step anew. What is
    # left, some 1e-15, is divided by eps, and its sign decides about cautious decay: with 1e-8, or
    # with cautious signs, two right answers would differ.
    inputs=st.sampled_from([(1e-4, False, False), (1e-2, False, True), (1e-2, True, False)]),
    steps=st.sampled_from([1, 5, 12]),
    exact=st.booleans(),
    maximize=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_oracle(foreach, shapes, options, inputs, steps, exact, maximize, seed):
    eps, sign_input, cautious = inputs
    options = {**options, "eps": eps, "sign_input": sign_input}
    iteration = {"ns_coefficients": family.SIMPLE, "ns_steps": steps}

    def build(params):
        polar = {"polar": "svd"} if exact else {"polar": "newton_schulz", "ns_dtype": D}
        how = {"cautious": cautious, "maximize": maximize, "foreach": foreach}
        return AdaMuon(params, **options, **polar, **how, **iteration)

    def reference(w):
        oracle = oracles.AdaMuon(w, **options, exact=exact, **iteration)
        return family.Cautious(oracle, options["weight_decay"]) if cautious else oracle

    # Fifty steps of a few roundings, amplified by the inverse of the smallest singular value.
    assert family.compare(build, reference, shapes, seed, -1.0 if maximize else 1.0) < 1e-10


def test_golden_run():
    p = parameter(family.WIDE[0])
    optimizer = AdaMuon([p], 0.02, weight_decay=0.1, polar="svd")
    golden = [[.9822685121, 1.9762805041, 2.9784885525],
              [3.9643044881, 4.9583164801, 5.9516673435]]  # fmt: skip
    # Published with ten decimals.
    np.testing.assert_allclose(
        family.golden_run(optimizer, p, family.WIDE[1]), golden, rtol=0, atol=6e-11
    )


# ------------------------------------------------------------------ reductions


@pytest.mark.parametrize("sign_input", [True, False])
def test_entries_of_equal_size_move_like_muons_of_fixed_rms(sign_input):
    """A second moment that is the same for all entries cancels; so do the signs of signs."""
    H = family.hadamard(8)
    stream = [[c * H] for c in (1.0, 3.0, 0.5, 2.0, 2.0)]
    p, q = parameter(np.ones((8, 8))), parameter(np.ones((8, 8)))
    options = {"lr": 0.1, "weight_decay": 0.1, "polar": "svd"}
    ours = train(AdaMuon([p], sign_input=sign_input, **options), [p], stream)
    muon = Muon([q], adjust_lr_fn="match_rms_adamw", **options)
    for (a,), (b,) in zip(ours, train(muon, [q], stream), strict=True):
        assert relative(a, b) < 1e-6  # eps = 1e-8 beside entries of 0.1


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 5, 2)])
def test_the_first_step_is_a_fifth_of_the_signs_of_the_factor(shape):
    g = matrices(shape, 1, 1)[0]
    muon, p = parameter(np.zeros(shape)), parameter(np.zeros(shape))
    train(Muon([muon], lr=1.0, weight_decay=0.0, polar="svd"), [muon], [[np.sign(g)]])
    train(AdaMuon([p], lr=1.0, weight_decay=0.0, polar="svd"), [p], [[g]])
    torch.testing.assert_close(p.detach(), 0.2 * muon.detach().sign(), rtol=0, atol=1e-6)  # eps


@given(seed=st.integers(0, 1000), sign_input=st.booleans(), power=st.integers(-20, 20))
def test_every_step_has_the_same_rms_whatever_the_gradients(seed, sign_input, power):
    p = parameter(np.zeros((2, 4, 5)))
    optimizer = AdaMuon([p], lr=1.0, weight_decay=0.0, polar="svd", sign_input=sign_input)
    before = p.detach().clone()
    for g in matrices(p.shape, seed, 6):
        train(optimizer, [p], [[2.0**power * g]])
        rms = (p.detach() - before).square().mean((-2, -1)).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, 0.2), rtol=1e-6, atol=0)  # eps
        before = p.detach().clone()


def test_only_signs_count_without_momentum():
    start, stream = matrices((4, 6), 0, 1)[0], matrices((4, 6), 1, 10)
    scales = [np.exp(s) for s in matrices((4, 6), 2, 10)]
    plain, scaled, unsigned = (parameter(start) for _ in range(3))
    options = {"momentum": 0.0, "polar": "svd"}
    train(AdaMuon([plain], **options), [plain], [[g] for g in stream])
    changed = [[s * g] for s, g in zip(scales, stream, strict=True)]
    train(AdaMuon([scaled], **options), [scaled], changed)
    assert torch.equal(plain, scaled)
    # Without momentum v is the last square, so the step is that of O's signs.
    train(AdaMuon([unsigned], sign_input=False, **options), [unsigned], changed)
    assert relative(unsigned.detach(), plain.detach()) > 1e-3


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("polar", family.POLARS)
def test_signs_of_low_rank(polar):
    """All-positive gradients have the signs of rank one, whose factor has equal entries."""
    p = parameter(matrices((6, 4), 0, 1)[0])
    start = p.detach().clone()
    stream = [[np.abs(g)] for g in matrices((6, 4), 1, 5)]
    options = {"lr": 0.1, "weight_decay": 0.0, "polar": polar, "ns_dtype": "float32"}
    train(AdaMuon([p], **options), [p], stream)
    assert p.isfinite().all()
    if polar in ("eigh", "svd"):
        assert relative(p.detach(), start - 5 * 0.1 * 0.2) < 1e-6  # eps


@pytest.mark.parametrize("polar", family.POLARS)
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_empty_rows_and_columns_do_not_move(polar, shape):
    params = [parameter(matrices(shape, k, 1)[0]) for k in range(2)]
    starts = [p.detach().clone() for p in params]
    grads = [[g.copy() for g in matrices(shape, 10 + k, 2)] for k in range(3)]
    for row, column in grads:
        row[[0, 2]], column[:, [0, 2]] = 0, 0
    optimizer = AdaMuon(params, weight_decay=0.0, polar=polar, ns_dtype="float32")
    train(optimizer, params, grads)
    assert torch.equal(params[0][[0, 2]], starts[0][[0, 2]])
    assert torch.equal(params[1][:, [0, 2]], starts[1][:, [0, 2]])
    assert (params[0] != starts[0]).any()
    assert (params[1] != starts[1]).any()


@pytest.mark.parametrize("polar", ["auto", "svd"])
def test_a_nan_gradient_stays_in_its_matrix(polar):
    params = [parameter(matrices(s, 0, 1)[0]) for s in ((4, 3), (4, 3), (2, 4, 3))]
    grads = [matrices(p.shape, 5, 1)[0] for p in params]
    grads[0][1, 1] = grads[2][0, 1, 1] = np.nan
    train(AdaMuon(params, polar=polar), params, [grads])
    assert not params[0].isfinite().any()
    assert params[1].isfinite().all()
    assert params[2][1].isfinite().all()


def test_splits_are_matrices_of_their_own():
    start, stream = matrices((6, 4), 0, 1)[0], matrices((6, 4), 1, 5)
    whole, parts = parameter(start), [parameter(part) for part in np.split(start, 3)]
    options = {"lr": 0.1, "polar": "svd", "sign_input": False}
    train(AdaMuon([whole], splits=3, **options), [whole], [[g] for g in stream])
    train(AdaMuon(parts, **options), parts, [np.split(g, 3) for g in stream])
    assert relative(whole.detach(), np.concatenate([p.detach() for p in parts])) < 1e-13


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_the_memory_layout_is_irrelevant(layout):
    start, stream = matrices((4, 3, 2, 2), 0, 1)[0], matrices((4, 3, 2, 2), 1, 5)
    if layout == "transposed":
        strided = nn.Parameter(
            torch.tensor(start).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        )
    else:
        strided = nn.Parameter(torch.tensor(start).contiguous(memory_format=torch.channels_last))
    plain = parameter(start)
    for p in (plain, strided):
        train(AdaMuon([p], polar="svd", splits=1), [p], [[g] for g in stream])
    assert relative(strided.detach(), plain.detach()) < 1e-13


@pytest.mark.parametrize("options", [{"eps": 0.0}, {"sign_input": 1}, {"momentum": 1.0}])
def test_refusals(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaMuon([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(ValueError, match=r"AdaMuon .*vectors.*muon_with_adamw"):
        AdaMuon([nn.Parameter(torch.zeros(3))])
