"""Drop-Muon: oracle, sampling, the expected decrease, flags and the backward work it skips."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizers import DropMuon, Muon, Objective, muon_with_adamw
from optimizers.layer_dropping.sampling import (
    cutoff_probabilities,
    draw_cutoff,
    inclusion_probabilities,
    optimal_probabilities,
)
from optimizers.orthogonalized.norms import BALLS
from tests.oracles import drop_muon as reference
from tests.oracles.trust_region import direction as direction_of
from tests.oracles.trust_region import dual_norm as dual_norm_of

D = torch.float64


def network(seed=0, dtype=D):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(16, 6, generator=generator, dtype=D),
        torch.randint(0, 4, (16,), generator=generator),
    )


@given(
    shapes=st.lists(
        st.lists(st.sampled_from([(3, 4), (4, 3), (5,), (2, 3, 2), (3, 2, 2, 2)]), min_size=1,
                 max_size=3),
        min_size=1,
        max_size=4,
    ),
    sampling=st.sampled_from(["uniform", "full", "epoch_shift"]),
    step_rule=st.sampled_from(["lmo", "sharp"]),
    exact=st.booleans(),
    foreach=st.sampled_from([None, False]),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_matches_the_oracle(shapes, sampling, step_rule, exact, foreach, momentum, seed):
    rng = np.random.default_rng(seed)
    starts = [[rng.standard_normal(s) for s in layer] for layer in shapes]
    params = [[nn.Parameter(torch.tensor(w)) for w in layer] for layer in starts]
    rates = [0.02 * (i + 1) for i in range(len(shapes))]
    optimizer = DropMuon(
        [{"params": layer, "lr": lr} for layer, lr in zip(params, rates, strict=True)],
        momentum=momentum,
        sampling=sampling,
        step_rule=step_rule,
        polar="svd" if exact else "newton_schulz",
        ns_dtype=D,
        foreach=foreach,
        seed=seed,
    )
    oracle = reference.DropMuon(
        starts, lr=rates, momentum=momentum, step_rule=step_rule, exact=exact
    )
    for _ in range(50):
        grads = [[rng.standard_normal(s) for s in layer] for layer in shapes]
        active = optimizer.active()
        for layer, gs in zip(params, grads, strict=True):
            for p, g in zip(layer, gs, strict=True):
                p.grad = torch.tensor(g)
        optimizer.step()
        expected = oracle.step(grads, active)
    for layer, layer_expected in zip(params, expected, strict=True):
        for p, w in zip(layer, layer_expected, strict=True):
            scale = max(1.0, np.abs(w).max())
            assert np.abs(p.detach().numpy() - w).max() / scale < 1e-10


@given(
    norm=st.sampled_from(BALLS),
    step_rule=st.sampled_from(["lmo", "sharp"]),
    foreach=st.sampled_from([None, False]),
    seed=st.integers(0, 1000),
)
def test_a_layers_norm_is_obeyed(norm, step_rule, foreach, seed):
    """Against the trust region's directions and dual norms, which have an oracle of their own."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((3, 4))
    p, other = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(w[:2].copy()))
    optimizer = DropMuon(
        [{"params": [p], "norm": norm}, {"params": [other]}],
        lr=0.02, momentum=0.5, sampling="full", step_rule=step_rule, polar="svd", foreach=foreach,
    )  # fmt: skip
    m = np.zeros_like(w)
    for _ in range(20):
        g = rng.standard_normal((3, 4))
        p.grad, other.grad = torch.tensor(g), torch.tensor(g[:2].copy())
        optimizer.step()
        m = 0.5 * m + 0.5 * g
        scale = dual_norm_of(norm, m) if step_rule == "sharp" else 1.0
        w = w - 0.02 * scale * direction_of(norm, m)
    assert np.abs(p.detach().numpy() - w).max() < 1e-11


def test_a_matrix_norm_of_a_vector_is_refused():
    with pytest.raises(ValueError, match="norm='row'"):
        DropMuon([{"params": [nn.Parameter(torch.zeros(3))], "norm": "row"}])


def test_full_sampling_is_muon_without_nesterov():
    one = [nn.Parameter(torch.randn(4, 6, dtype=D)) for _ in range(3)]
    other = [nn.Parameter(p.detach().clone()) for p in one]
    left = DropMuon(one, lr=0.1, sampling="full")
    right = Muon(other, lr=0.1, nesterov=False, weight_decay=0.0, adjust_lr_fn="none")
    for k in range(10):
        torch.manual_seed(k)
        for p, q in zip(one, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad
        left.step()
        right.step()
    for p, q in zip(one, other, strict=True):
        # One adds a bfloat16 factor times a rate, the other subtracts the product.
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_each_layer_runs_on_its_own_when_it_is_active():
    """A layer's trajectory is Muon's at the times when it is active, on what it saw."""
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, ns_dtype=D)
    x, y = batch()
    weight = model[0].weight
    alone = nn.Parameter(weight.detach().clone())
    muon = Muon([alone], lr=0.1, nesterov=False, weight_decay=0, adjust_lr_fn="none", ns_dtype=D)
    times = 0
    for _ in range(30):
        active = 0 in optimizer.active()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if active:
            alone.grad = weight.grad
            muon.step()
            times += 1
    assert 0 < times < 30
    assert optimizer.state[weight]["step"].item() == times
    torch.testing.assert_close(weight, alone, rtol=0, atol=1e-13)


def test_expected_decrease():
    """E f(X+) <= f(X) - sum_i q_i ||grad_i||_nuc^2 / (2 L_i), over all outcomes of each step."""
    torch.manual_seed(0)
    A = [s * torch.randn(30, m, dtype=D) for m, s in zip((8, 10, 6), (1.0, 0.3, 2.0), strict=True)]
    B = torch.randn(30, 12, dtype=D)
    L = [3 * float(a.norm() ** 2) for a in A]
    assert np.allclose(L, (725.41, 81.40, 2143.35), atol=0.01)  # published
    X = [nn.Parameter(torch.zeros(a.shape[1], 12, dtype=D)) for a in A]
    groups = [{"params": [x], "lr": 1 / lip} for x, lip in zip(X, L, strict=True)]
    optimizer = DropMuon(groups, momentum=0.0, step_rule="sharp", polar="svd", seed=3)

    def residual():
        return sum(a @ x.detach() for a, x in zip(A, X, strict=True)) - B

    def f():
        return 0.5 * float(residual().norm() ** 2)

    p, q = [1 / 3] * 3, [1 / 3, 2 / 3, 1.0]
    decreases, start = [], f()
    for _ in range(400):
        grads = [a.T @ residual() for a in A]
        decrease = sum(
            qi * float(torch.linalg.svdvals(g).sum()) ** 2 / (2 * lip)
            for qi, g, lip in zip(q, grads, L, strict=True)
        )
        before, expected = f(), 0.0
        for cutoff in range(3):
            twin_x, twin = copy.deepcopy((X, optimizer))
            twin.param_groups[0]["cutoff"] = cutoff
            for x, g in zip(twin_x, grads, strict=True):
                x.grad = g
            twin.step()
            r = sum(a @ x.detach() for a, x in zip(A, twin_x, strict=True)) - B
            expected += p[cutoff] * 0.5 * float(r.norm() ** 2)
        assert expected <= before - decrease + 1e-12 * before
        decreases.append(decrease)
        for x, g in zip(X, grads, strict=True):
            x.grad = g
        optimizer.step()
    best = torch.linalg.lstsq(torch.cat(A, 1), B).solution
    gap = start - 0.5 * float((torch.cat(A, 1) @ best - B).norm() ** 2)
    assert np.mean(decreases) <= gap / 400


# ------------------------------------------------------------------ sampling


def test_optimal_probabilities():
    p = optimal_probabilities((725.41, 81.40, 2143.35))
    assert np.allclose(inclusion_probabilities(p), (0.33845, 0.33845, 1.0), atol=1e-5)  # published
    assert np.allclose(optimal_probabilities((100, 10, 1)), (1, 0, 0))
    with pytest.raises(ValueError, match="positive"):
        optimal_probabilities((1.0, 0.0))


@given(
    layers=st.integers(1, 8),
    kind=st.sampled_from(["uniform", "full", "epoch_shift"]),
    progress=st.floats(0, 1),
    shift=st.floats(0, 5),
)
def test_probabilities_equal_the_oracle(layers, kind, progress, shift):
    ours = cutoff_probabilities(kind, layers, progress=progress, shift=shift)
    expected = reference.probabilities(kind, layers, progress=progress, shift=shift)
    assert np.allclose(ours, expected, rtol=1e-12, atol=1e-15)
    q = inclusion_probabilities(ours)
    assert q[-1] == pytest.approx(1)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(q))


def test_draws_have_the_probabilities():
    p, n = [0.5, 0.2, 0.3], 4000
    counts = np.bincount([draw_cutoff(p, 7, k) for k in range(n)], minlength=3)
    # Each count lies within five standard deviations (p = 6e-7 for a fair draw; seeded).
    assert np.all(np.abs(counts - n * np.array(p)) < 5 * np.sqrt(n * np.array(p)))
    assert draw_cutoff([0.5, 0.5], 3, 11) == draw_cutoff([0.5, 0.5], 3, 11)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ((0.5, 0.5), "one probability per layer"),
        ((0.0, 0.5, 0.5), "first layer"),
        ((0.5, 0.6, 0.1), "sum to 1"),
        ((1.5, -0.5, 0.0), r"got 1\.5"),
        ("often", "sampling must"),
    ],
)
def test_bad_sampling_is_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        DropMuon(network().named_parameters(), sampling=sampling)


def test_epoch_shift_follows_the_progress():
    optimizer = DropMuon(network().named_parameters(), sampling="epoch_shift", shift=2.0)
    early = optimizer.probabilities
    optimizer.set_progress(1.0)
    assert early[0] > 0.5 > optimizer.probabilities[0]
    assert optimizer.probabilities == pytest.approx(early[::-1])
    with pytest.raises(ValueError, match="progress"):
        optimizer.set_progress(1.5)


# ------------------------------------------------------------------ layers and flags


def test_layers_are_modules_or_groups():
    model = network()
    assert len(DropMuon(model.named_parameters()).param_groups) == 3
    assert len(DropMuon(model.parameters()).param_groups) == 3
    everything = [{"params": model.parameters()}]
    assert len(DropMuon(everything).param_groups) == 1


def steps(optimizer, model, count):
    x, y = batch()
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        yield
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the cut-off layer's own
def test_the_backward_pass_of_dropped_layers_is_not_run():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1)
    ran = dict.fromkeys((0, 2, 4), 0)
    for i in ran:
        model[i].register_full_backward_pre_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    expected = dict.fromkeys(ran, 0)
    for number, _ in enumerate(steps(optimizer, model, 40)):
        for layer, i in enumerate(ran):
            # The first backward is full: construction switches no flag.
            expected[i] += layer in optimizer.active() or number == 0
    assert ran == expected
    assert ran[0] < ran[2] < ran[4] == 40


def test_truncated_gradients_equal_full_ones():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1)
    x, y = batch()
    for _ in steps(optimizer, model, 10):
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.requires_grad_(True)
            p.grad = None
        nn.functional.cross_entropy(twin(x), y).backward()
        for p, full in zip(model.parameters(), twin.parameters(), strict=True):
            if p.grad is not None:
                assert torch.equal(p.grad, full.grad)


def test_user_flags_are_respected_and_restored():
    model = network()
    model[2].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.2, 0.4, 0.4))
    assert [p.requires_grad for p in model.parameters()] == flags  # construction switches none
    before = model[2].bias.detach().clone()
    for _ in steps(optimizer, model, 25):
        pass
    assert torch.equal(model[2].bias.detach(), before)
    optimizer.release()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_flags_come_back_after_an_exception():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.01, 0.01, 0.98), seed=1)
    dropped = 0
    with pytest.raises(ZeroDivisionError), optimizer.dropping():
        for _ in steps(optimizer, model, 3):
            pass
        dropped = sum(not p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert dropped > 0
    assert all(p.requires_grad for p in model.parameters())


def test_a_stale_gradient_of_a_dropped_layer_is_not_used():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.01, 0.01, 0.98), seed=1)
    optimizer.param_groups[0]["cutoff"] = 2
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].weight.detach(), before)
    assert not optimizer.state[model[0].weight]["momentum_buffer"].any()


def test_gradient_accumulation_keeps_one_plan():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1)
    x, y = batch()
    for _ in range(6):
        plan = optimizer.active()
        optimizer.zero_grad()
        for half in (slice(0, 8), slice(8, 16)):
            nn.functional.cross_entropy(model(x[half]), y[half]).backward()
            assert optimizer.active() == plan
        optimizer.step()


def test_loading_brings_plan_and_flags_along():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1)
    for _ in steps(optimizer, model, 7):
        pass
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = DropMuon(twin.named_parameters(), lr=0.5, seed=99)
    other.load_state_dict(optimizer.state_dict())
    assert other.active() == optimizer.active()
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    other.release()
    assert all(p.requires_grad for p in twin.parameters())


def test_loading_a_fresh_state_gives_the_flags_back():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.01, 0.01, 0.98), seed=1)
    fresh = copy.deepcopy(optimizer.state_dict())
    for _ in steps(optimizer, model, 3):
        pass
    assert not all(p.requires_grad for p in model.parameters())
    optimizer.load_state_dict(fresh)
    assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_last_layer_does_not_leave_the_loss_without_a_graph():
    model = network()
    for p in model[4].parameters():
        p.requires_grad_(False)
    optimizer = DropMuon(model.named_parameters(), lr=0.1)
    for _ in steps(optimizer, model, 20):
        pass
    assert 0 < optimizer.state[model[2].weight]["step"].item() < 20


def test_another_optimizer_does_not_take_dropped_layers_for_frozen_ones():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.01, 0.01, 0.98), seed=1)
    for _ in steps(optimizer, model, 2):
        pass
    for take_over in (
        lambda: DropMuon(model.named_parameters(), lr=0.1),
        lambda: muon_with_adamw(model),
    ):
        with pytest.raises(ValueError, match=r"release\(\)"):
            take_over()
    optimizer.release()
    DropMuon(model.named_parameters(), lr=0.1)
    muon_with_adamw(model)


def test_a_distributed_checkpoint_that_skips_dropped_layers_is_refused():
    from torch.distributed.checkpoint import state_dict as dcp

    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.1, sampling=(0.3, 0.01, 0.69), seed=1)
    for _ in steps(optimizer, model, 12):
        pass
    optimizer.param_groups[0]["cutoff"] = 2
    optimizer.prepare()
    stored = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    with pytest.raises(ValueError, match=r"release\(\)"):
        dcp.set_optimizer_state_dict(model, optimizer, copy.deepcopy(stored))
    momentum = {
        n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()
    }
    assert all(m.any() for m in momentum.values())
    optimizer.release()
    dcp.set_optimizer_state_dict(model, optimizer, stored)
    for n, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum[n])


def test_works_through_an_objective():
    model = network()
    optimizer = DropMuon(model.named_parameters(), lr=0.05)
    objective = Objective(model, nn.functional.cross_entropy)
    losses = [float(optimizer.step(objective.on(*batch()))) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert objective.counts.gradient == 40
