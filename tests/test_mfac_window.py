"""M-FAC's window: its traffic, whose gradients count, resuming, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optimizers.second_order.mfac as module
from optimizers import OracleError
from optimizers.second_order import MFAC
from optimizers.second_order.window import BLOCK
from tests.family import D, parameter, relative, train
from tests.oracles import mfac as reference
from tests.windows import SHAPES, stream, window

# ------------------------------------------------------------------ traffic


class Traffic(TorchDispatchMode):
    """Counts the elements of the window that are multiplied, and the largest fresh tensor."""

    def __init__(self, ring):
        super().__init__()
        self.ring, self.multiplied, self.largest = ring.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        reads = [t for t in tensors if t.untyped_storage().data_ptr() == self.ring]
        if name in ("mv", "addmv", "addmv_", "copy_") and reads:
            self.multiplied += max(t.numel() for t in reads if t.ndim == 2 or name == "copy_")
        known = {t.untyped_storage().data_ptr() for t in tensors}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_a_step_multiplies_the_window_twice_and_never_copies_it(name):
    m, d = 64, 20_000
    p = nn.Parameter(torch.zeros(d))
    optimizer = MFAC([p], ngrads=m, damp=1e-2, window_dtype=name)
    optimizer.state[p]["window"].normal_()
    optimizer.param_groups[0]["gram"].copy_(m * torch.eye(m))
    p.grad = torch.randn(d)
    optimizer._windows = (optimizer.state[p]["window"],)
    with Traffic(optimizer.state[p]["window"]) as traffic:
        optimizer.step()
    # The new row is written, and two products are made.
    assert traffic.multiplied in (2 * m * d, 2 * m * d + d)
    assert traffic.largest <= m * d / 4


# ------------------------------------------------------------------ whose gradients count


def test_a_parameter_without_gradient_counts_as_zeros_and_stays():
    starts, grads = stream(SHAPES[:3], 1)[0], stream(SHAPES[:3], 30, 1)
    params = [parameter(w) for w in starts]
    options = {"lr": 0.05, "momentum": 0.5, "ngrads": 7, "damp": 1e-3}
    optimizer, oracle = MFAC(params, **options), reference.MFAC(starts, **options)
    for k, some in enumerate(grads):
        if missing := k % 4 == 2 or k > 20:
            some = [some[0], None, some[2]]
        before = params[1].detach().clone(), optimizer.state[params[1]]["exp_avg"].clone()
        for p, g in zip(params, some, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        expected = oracle.step(some)
        assert relative(params[0].detach(), expected[0]) < 1e-10
        assert relative(params[2].detach(), expected[2]) < 1e-10
        if missing:  # the oracle goes on moving it
            assert torch.equal(params[1].detach(), before[0])
            assert torch.equal(optimizer.state[params[1]]["exp_avg"], before[1])
            assert not optimizer.state[params[1]]["window"][k % 7].any()
    for p in params:
        p.grad = None
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert same(optimizer.state_dict(), before)


def test_a_group_added_later_had_no_gradients_before():
    starts, grads = stream(SHAPES[:3], 1)[0], stream(SHAPES[:3], 40, 1)
    params = [parameter(w) for w in starts]
    options = {"ngrads": 9, "damp": 1e-3}
    optimizer = MFAC(params[:2], 0.05, **options)
    oracle = reference.MFAC(starts, lr=[0.05, 0.05, 0.2], **options)
    for k, some in enumerate(grads):
        if k == 13:
            optimizer.add_param_group({"params": [params[2]], "lr": 0.2, "window_dtype": None})
        if k < 13:
            some = [*some[:2], None]
        for p, g in zip(params, some, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        optimizer.step()
        expected = oracle.step(some)
        got = [p.detach() for p in params]
        assert max(map(relative, got, expected)) < 1e-10


@pytest.mark.parametrize("which", ["all", "one"])
def test_state_that_was_cleared_is_an_empty_window(which):
    starts, grads = stream(SHAPES[:2], 1)[0], stream(SHAPES[:2], 20, 1)
    params = [parameter(w) for w in starts]
    optimizer = MFAC(params, 0.05, ngrads=6, damp=1e-3)
    train(optimizer, params, grads[:8])
    history = [window(optimizer, p).clone() for p in params]
    if which == "all":
        optimizer.state = defaultdict(dict)
    else:
        del optimizer.state[params[0]]
    oracle = reference.MFAC([p.detach().numpy() for p in params], lr=0.05, ngrads=6, damp=1e-3)
    params[1].grad = torch.full_like(params[1], math.nan)
    with pytest.raises(OracleError):  # which must not hide that something was cleared
        optimizer.step()
    if which == "one":
        oracle.G = torch.cat([0 * history[0], history[1]], 1).numpy()
        oracle.j = 2
    for some in grads[8:]:
        (got,) = train(optimizer, params, [some])
        assert max(map(relative, got, oracle.step(some))) < 1e-10


def test_max_norm_shortens_the_joint_step_and_keeps_its_direction():
    shapes = SHAPES[:2]
    free, capped = ([parameter(np.zeros(s)) for s in shapes] for _ in range(2))
    options = {"lr": 1.0, "ngrads": 4, "damp": 1e-2}
    left, right = MFAC(free, **options), MFAC(capped, **options, max_norm=0.8)
    lengths = set()
    for grads in stream(shapes, 8):
        pair = []
        for params, optimizer in ((free, left), (capped, right)):
            before = torch.cat([p.detach().flatten() for p in params])
            train(optimizer, params, [grads])
            pair.append(torch.cat([p.detach().flatten() for p in params]) - before)
        scale = min(1.0, 0.8 / float(pair[0].norm()))
        lengths.add(scale < 1)
        torch.testing.assert_close(pair[1], scale * pair[0], rtol=1e-10, atol=1e-12)
    assert lengths == {True, False}


# ------------------------------------------------------------------ resuming


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def through_torch(params, optimizer):
    buffer = io.BytesIO()
    torch.save((params, optimizer.state_dict()), buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([nn.Parameter]):
        values, state = torch.load(buffer, weights_only=True)
    params = [nn.Parameter(v.detach()) for v in values]
    other = MFAC(params, 1.0, ngrads=3)  # what is loaded overrides it
    other.load_state_dict(state)
    return params, other


def through_pickle(params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


def through_deepcopy(params, optimizer):
    return copy.deepcopy((params, optimizer))


@pytest.mark.parametrize("through", [through_torch, through_pickle, through_deepcopy])
@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("m", "after"), [(7, 10), (BLOCK + 30, 20), (BLOCK + 30, BLOCK + 40)])
def test_resumes_bit_by_bit_in_the_middle_of_the_ring(through, name, m, after):
    shapes, steps, dtype = [(40, 30), (30,)], 60, getattr(torch, name)
    starts, basis = stream(shapes, 1)[0], stream(shapes, 3, 2)
    params = [nn.Parameter(torch.tensor(w).to(torch.promote_types(dtype, torch.float32)))
              for w in starts]  # fmt: skip
    grads = stream(shapes, after + steps, 1)
    if name == "float32":  # of three directions: the damping is raised, which must be resumed too
        mix = np.random.default_rng(3).standard_normal((len(grads), 3))
        grads = [[sum(c * g[i] for c, g in zip(row, basis, strict=True)) for i in (0, 1)]
                 for row in mix]  # fmt: skip
    options = {"momentum": 0.5, "weight_decay": 1e-4, "ngrads": m, "window_dtype": dtype}
    optimizer = MFAC(params, 1e-5, damp=1e-7, **options)
    train(optimizer, params, grads[:after])
    assert (optimizer.param_groups[0]["raised"] > 0) == (name == "float32")
    others, other = through(params, optimizer)
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])
    for k in range(after, after + steps):
        (left,), (right,) = (
            train(o, ps, [grads[k]]) for o, ps in ((optimizer, params), (other, others))
        )
        assert all(map(torch.equal, left, right)), k
    assert same(other.state_dict(), optimizer.state_dict())


def test_loads_into_an_optimizer_that_has_run():
    """In the same block, where what it keeps of its own elimination would fit."""
    runs = []
    for seed in (0, 1):
        params = [parameter(np.zeros((4, 30)))]
        optimizer = MFAC(params, 0.1, ngrads=BLOCK + 30, damp=1e-3)
        train(optimizer, params, stream([(4, 30)], 80, seed))
        runs.append((params, optimizer))
    (params, optimizer), (others, other) = runs
    other.load_state_dict(optimizer.state_dict())
    others[0].data.copy_(params[0].data)
    for grads in stream([(4, 30)], 20, 2):
        (a,), (b,) = train(optimizer, params, [grads])[0], train(other, others, [grads])[0]
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_resumes_through_a_distributed_checkpoint_on_disk(tmp_path):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dsd

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        return model, MFAC(model.parameters(), 1e-2, 0.5, ngrads=7, damp=1e-3)

    def run(model, optimizer, steps):
        for k in steps:
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(k))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    for flat in (False, True):
        options = dsd.StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = build()
        run(model, optimizer, range(10))
        dcp.save(dict(zip("mo", dsd.get_state_dict(model, optimizer, options=options),
                          strict=True)), checkpoint_id=tmp_path / str(flat))  # fmt: skip
        twin, other = build()
        loaded = dict(zip("mo", dsd.get_state_dict(twin, other, options=options), strict=True))
        dcp.load(loaded, checkpoint_id=tmp_path / str(flat))
        dsd.set_state_dict(twin, other, model_state_dict=loaded["m"],
                           optim_state_dict=loaded["o"], options=options)  # fmt: skip
        for m, o in ((model, optimizer), (twin, other)):
            run(m, o, range(10, 20))
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ------------------------------------------------------------------ refusals


def ready(**options):
    """Return an optimizer with some history, and its parameters with new gradients."""
    params = [parameter(w) for w in stream(SHAPES[:2], 1)[0]]
    optimizer = MFAC(params, 0.1, **{"momentum": 0.5, "ngrads": 3, "damp": 0.1, **options})
    train(optimizer, params, stream(SHAPES[:2], 4, 1))
    for p, g in zip(params, stream(SHAPES[:2], 1, 2)[0], strict=True):
        p.grad = torch.tensor(g)
    return optimizer, params


def nan(optimizer, params):
    params[1].grad[2] = math.nan


def infinite(optimizer, params):
    params[0].grad[1, 2] = -math.inf


def too_large(optimizer, params):
    params[0].grad[1, 2] = 1e200


def sparse(optimizer, params):
    params[0].grad = params[0].grad.to_sparse()


def other_damping(optimizer, params):
    optimizer.add_param_group({"params": [parameter(np.ones(2))]})
    optimizer.param_groups[1]["damp"] = 0.2


def other_length(optimizer, params):
    optimizer.param_groups[0]["ngrads"] = 4


def poisoned(optimizer, params):
    state = optimizer.state_dict()
    state["state"][0]["window"][1, 2] = math.nan  # of the slot that is overwritten next
    optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (nan, OracleError, "NaN or infinity, which would stay in the window"),
        (infinite, OracleError, "NaN or infinity, which would stay in the window"),
        (too_large, OracleError, "squared norm of the gradient overflows"),
        (sparse, RuntimeError, "sparse gradients"),
        (other_damping, ValueError, "damp must be the same in all groups.* got 0.2 in group 1"),
        (other_length, ValueError, "ngrads of a running MFAC cannot be changed"),
        (poisoned, OracleError, "the window of gradients holds NaN"),
    ],
)
def test_refusals_change_nothing(spoil, error, message):
    optimizer, params = ready()
    spoil(optimizer, params)
    values, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(map(torch.equal, params, values))
    for left, right in zip(
        [*optimizer.state_dict()["state"].values(), *optimizer.state_dict()["param_groups"]],
        [*state["state"].values(), *state["param_groups"]],
        strict=True,
    ):
        for key, value in right.items():
            torch.testing.assert_close(left[key], value, rtol=0, atol=0, equal_nan=True)


def test_a_refused_step_leaves_no_trace_in_what_follows():
    """Across blocks, where parts of the elimination are kept."""
    params, twins = ([parameter(np.zeros((4, 30)))] for _ in range(2))
    left, right = (MFAC(ps, 0.1, ngrads=BLOCK + 9, damp=1e-3) for ps in (params, twins))
    for k, grads in enumerate(stream([(4, 30)], 2 * BLOCK + 30)):
        if k % 5 == 0:
            params[0].grad = torch.full((4, 30), math.nan, dtype=D)
            with pytest.raises(OracleError):
                left.step()
        (a,), (b,) = train(left, params, [grads])[0], train(right, twins, [grads])[0]
        assert torch.equal(a, b)


def test_momentum_must_be_there_from_the_start():
    optimizer, _ = ready(momentum=0.0)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum must be positive from the start"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damp": 0.0}, r"damp must lie in \(0, inf\); got 0.0"),
        ({"ngrads": 0}, r"ngrads must lie in int \[1, inf\); got 0|ngrads must .*; got 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\); got 1.0"),
        ({"window_dtype": torch.float16}, "window_dtype must .*; got 'float16'"),
        ({"max_norm": 0.0}, "max_norm must .*; got 0.0"),
        ({"sparse": 1}, "sparse must be bool; got 1"),
        ({"weight_decay": -1.0}, "weight_decay must"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MFAC([parameter([1.0])], **options)


def test_groups_and_states_that_do_not_fit_are_refused():
    a, b = parameter([1.0, 2.0]), parameter([3.0])
    with pytest.raises(ValueError, match="ngrads must be the same"):
        MFAC([{"params": [a]}, {"params": [b], "ngrads": 2}], ngrads=3)
    with pytest.raises(ValueError, match="complex"):
        MFAC([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer, _ = ready()
    for spoil in ({"gram": torch.zeros(2, 2)}, {"gram": 1.0}, {"count": -1}, {"raised": math.nan}):
        state = optimizer.state_dict()
        state["param_groups"][0].update(spoil)
        with pytest.raises(ValueError, match=f"{next(iter(spoil))} must"):
            optimizer.load_state_dict(state)


def test_a_sparse_parameter_resumes_only_with_the_same_entries():
    p, q = parameter([0.0, 1.0, 2.0]), parameter([1.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="has shape"):
        MFAC([q], sparse=True, ngrads=2).load_state_dict(
            MFAC([p], sparse=True, ngrads=2).state_dict()
        )


def test_a_large_window_is_announced(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 100)
    with pytest.warns(UserWarning, match="ngrads=4"):
        MFAC([parameter(np.zeros(10))], ngrads=4)
