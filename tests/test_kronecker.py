"""Kronecker factors: products along sides, eigenbases, roots, blocks; batches, turns, resume."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from optimizers.linalg import kronecker as linalg
from optimizers.second_order import kronecker as core
from tests import kronecker_family as shared
from tests.family import D, matrices, parameter, relative, train
from tests.kronecker_family import RULES

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}
SHAPES = [(4, 3), (4, 3), (3, 4), (2, 4, 3), (5,), (5,), (), (4, 3, 2, 2), (1, 3), (0, 3)]


def random(*shape, seed=0, dtype=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=D).to(dtype)


def spectrum(values, seed=0, dtype=D):
    """Return a symmetric matrix with these eigenvalues, as a stack of one, and its eigenvectors."""
    Q = shared.rotation(len(values), seed)
    return ((Q * values) @ Q.T).to(dtype).unsqueeze(0), Q


# ------------------------------------------------------------------ products

SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@example(sizes=[2, 3, 4], count=2, seed=0, present=[True] * 4)
@given(
    sizes=SIDES,
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_products_along_the_sides(sizes, count, seed, present):
    X, present = random(count, *sizes, seed=seed), present[: len(sizes)]
    Ms = [random(count, n, n, seed=k) if on else None
          for k, (n, on) in enumerate(zip(sizes, present, strict=True))]  # fmt: skip
    expected = X
    for k, M in enumerate(Ms):
        if M is not None:
            expected = torch.einsum("cij,c...j->c...i", M, expected.movedim(k + 1, -1))
            expected = expected.movedim(-1, k + 1)
    for name in (None, "test"):
        torch.testing.assert_close(linalg.multiply(X, Ms, name=name), expected)
        turned = linalg.multiply(X, [None if M is None else M.mT.contiguous() for M in Ms],
                                 transposed=True, name=name)  # fmt: skip
        torch.testing.assert_close(turned, expected)


@example(sizes=[2, 3, 4], count=2, seed=0, side=1)
@given(sizes=SIDES, count=st.integers(1, 3), seed=st.integers(0, 99), side=st.integers(0, 3))
def test_gram_matrices_and_weighted_sums(sizes, count, seed, side):
    X, side = random(count, *sizes, seed=seed), side % len(sizes)
    rows = X.movedim(side + 1, 1).reshape(count, sizes[side], -1)
    expected = rows @ rows.mT
    torch.testing.assert_close(linalg.gram(X, side), expected)
    torch.testing.assert_close(linalg.gram(X, side, "test"), expected)
    F = random(count, sizes[side], sizes[side], seed=1)
    F = F + F.mT
    wanted = 0.3 * F + 0.5 * expected
    linalg.accumulate_(F, X, side, 0.3, 0.5)
    torch.testing.assert_close(F, wanted)
    w = random(count, sizes[side], seed=2)
    total = torch.einsum("cn,cnm->cm", w, rows)
    found = linalg.contract(X, w, side)
    assert found.shape[side + 1] == 1
    torch.testing.assert_close(found.movedim(side + 1, 1).reshape(count, -1), total)


@pytest.mark.parametrize("shape", [(2, 300, 7), (1, 7, 300), (1, 256, 256)])
def test_large_gram_matrices_are_made_of_panels(shape):
    X = random(*shape)
    side = int(shape[2] > shape[1])
    expected = X @ X.mT if side == 0 else X.mT @ X
    F = torch.eye(shape[1 + side], dtype=D).repeat(shape[0], 1, 1)
    wanted = 0.9 * F + 0.1 * expected
    linalg.accumulate_(F, X, side, 0.9, 0.1)
    torch.testing.assert_close(F, wanted)
    off = F - F.mT
    assert float(off.abs().max()) <= 1e-14 * float(F.abs().max())
    F.fill_(math.nan)
    linalg.accumulate_(F, X, side, 0.0, 1.0)  # what was there does not matter then
    torch.testing.assert_close(F, expected)


# ------------------------------------------------------------------ eigenvectors


def test_one_bad_matrix_does_not_hurt_the_others():
    A = torch.cat([spectrum(torch.tensor([3.0, 2, 1], dtype=D))[0]] * 4)
    A[1, 0, 0], A[2, 2, 1] = math.nan, math.inf
    values, Q = linalg.eigh(A)
    assert values[1:3].isnan().all()
    assert Q[1:3].isnan().all()
    for k in (0, 3):
        torch.testing.assert_close((Q[k] * values[k]) @ Q[k].T, A[k])
    assert linalg.inverse_root(A, -0.25, 1e-6)[1:3].isnan().all()


@pytest.mark.parametrize("failing", [{torch.float32}, {torch.float32, torch.float64}])
def test_eigh_is_tried_in_double_precision_and_never_raises(monkeypatch, failing):
    A = torch.cat([spectrum(torch.tensor([4.0, 2, 1]), k, torch.float32)[0] for k in range(3)])
    exact = torch.linalg.eigh

    def stubborn(X):
        # Of the batch only the second matrix fails.
        if X.dtype in failing and (X.ndim == 3 or torch.equal(X.float(), A[1])):
            raise torch.linalg.LinAlgError("did not converge")
        return exact(X)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    values, Q = linalg.eigh(A)
    assert values.dtype is Q.dtype is torch.float32
    torch.testing.assert_close(Q @ Q.mT, torch.eye(3).expand(3, 3, 3))
    for k in (0, 2) if len(failing) == 2 else (0, 1, 2):
        torch.testing.assert_close(values[k], torch.tensor([1.0, 2, 4]))
        torch.testing.assert_close((Q[k] * values[k]) @ Q[k].T, A[k])
    if len(failing) == 2:
        torch.testing.assert_close(values[1], A[1].diagonal().sort()[0])
        assert torch.equal(Q[1].T @ A[1].diagonal().diag() @ Q[1], values[1].diag())


@given(n=st.integers(1, 8), count=st.integers(1, 3), reorder=st.booleans(), seed=st.integers(0, 99))
def test_power_step_is_a_qr_decomposition(n, count, reorder, seed):
    A = torch.cat([spectrum(torch.rand(n, dtype=D, generator=torch.Generator().manual_seed(
        seed + k)) + 0.1, seed + k)[0] for k in range(count)])  # fmt: skip
    Q = torch.stack([shared.rotation(n, seed + 50 + k) for k in range(count)])
    new, order = linalg.power_step(A, Q, reorder=reorder)
    sizes = torch.einsum("cij,cik,ckj->cj", Q, A, Q)
    expected = sizes.argsort(descending=True) if reorder else torch.arange(n).expand(count, n)
    if order is None:
        order = torch.arange(n).expand(count, n)
    assert torch.equal(order, expected)
    for k in range(count):
        reference = np.linalg.qr((A[k] @ Q[k][:, order[k]]).numpy())[0]
        aligned = np.abs(np.sum(reference * new[k].numpy(), axis=0))
        np.testing.assert_allclose(aligned, 1, rtol=1e-10)
    torch.testing.assert_close(new.mT @ new, torch.eye(n, dtype=D).expand_as(new))


def test_power_steps_converge_to_the_eigenbasis():
    """Orthogonal iteration: the error shrinks by the largest ratio of neighbours, here 1/2."""
    values = 2.0 ** torch.arange(0, -5, -1, dtype=D)
    A, exact = spectrum(values)
    Q = shared.rotation(5, 7).unsqueeze(0)
    errors = []
    for _ in range(40):
        Q, _ = linalg.power_step(A, Q)
        errors.append(float((Q[0].T @ exact).abs().sub(torch.eye(5, dtype=D)).norm()))
    assert errors[-1] < 1e-10
    assert errors[25] / errors[15] < 2.0**-9


def low_rank(n, rank, dtype=D):
    """Return a positive semidefinite matrix and its square root."""
    root = random(n, rank, seed=n)
    return (root @ root.T).to(dtype).unsqueeze(0), root


@pytest.mark.parametrize(("n", "rank"), [(2, 1), (6, 1), (6, 4), (40, 7), (300, 20)])
def test_the_basis_of_a_null_space_is_not_made_of_rounding(n, rank):
    A, _ = low_rank(n, rank)
    Q = linalg.eigenbasis(A)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(n, dtype=D).unsqueeze(0))
    diagonal = Q.mT @ A @ Q
    size = float(diagonal.max())
    torch.testing.assert_close(
        diagonal, torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-14 * n * size
    )
    noise = random(n, n, seed=1) + random(n, n, seed=1).T
    noise *= EPS[D] * size / torch.linalg.matrix_norm(noise, 2)
    # Errors of the null space, over its gap and the least singular value of the fixed matrix in it.
    others = {"rounding": (A + noise, 1e-12 * n), "float32": (A.float(), 1e-4 * n)}
    for name, (other, bound) in others.items():
        overlap = (Q.mT @ linalg.eigenbasis(other).to(D))[0].abs()
        assert float((overlap - torch.eye(n, dtype=D)).abs().max()) < bound, name


def test_the_basis_of_a_zero_matrix_is_the_identity_whatever_is_beside_it():
    full, _ = spectrum(torch.tensor([4.0, 3, 2, 1], dtype=D))
    A = torch.cat([torch.zeros_like(full), low_rank(4, 2)[0], full, math.nan * full])
    Q = linalg.eigenbasis(A)
    assert torch.equal(Q[0], torch.eye(4, dtype=D))
    for k in (1, 2):
        alone = linalg.eigenbasis(A[k : k + 1])[0]
        overlap = (alone.T @ Q[k]).abs()
        torch.testing.assert_close(overlap, torch.eye(4, dtype=D), rtol=0, atol=1e-12)
    assert Q[3].isnan().all()


def test_permutation_of_one_side():
    X = random(2, 3, 4)
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    expected = torch.stack([x[o] for x, o in zip(X, order, strict=True)])
    linalg.permute_side_(X, order, 0)
    assert torch.equal(X, expected)


# ------------------------------------------------------------------ roots


def root_error(A, Q, values, exponent, eps):
    """Return the relative error of a root in the spectral norm."""
    exact = (Q * (values + eps) ** exponent) @ Q.T
    found = linalg.inverse_root(A, exponent, eps)[0].double()
    return float(torch.linalg.matrix_norm(found - exact, 2) / torch.linalg.matrix_norm(exact, 2))


@pytest.mark.parametrize("n", [2, 8, 40, 300])
@pytest.mark.parametrize("exponent", [-0.25, -0.5, -1 / 6, -1.0])
@pytest.mark.parametrize(
    ("dtype", "condition"),
    [(torch.float64, 10.0**k) for k in (0, 3, 6, 9, 12)]
    + [(torch.float32, 10.0**k) for k in (0, 2, 4, 6)],
)
def test_roots_up_to_the_largest_condition(n, exponent, dtype, condition):
    values = torch.logspace(0, -math.log10(condition), n, dtype=D)
    A, Q = spectrum(values, n, dtype)
    # Rounding of A and of its eigenvalues is of the order of 2 eps lambda_max; relative to the
    # smallest one it is the condition times larger, and the power multiplies it by |e|, with
    # (1 - x)^e <= 1 + 2 |e| x for it. Eigenvectors and products add rounding of the order of n.
    shift = 2 * EPS[dtype] * condition
    bound = 2 * abs(exponent) * shift + 4 * n * EPS[dtype] * abs(exponent) + 8 * EPS[dtype] * n**0.5
    assert root_error(A, Q, values, exponent, 1e-300 if dtype is D else 1e-37) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("exponent", [-0.25, -0.5])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_roots_of_singular_factors_are_those_of_the_damping(dtype, exponent, rank):
    n, eps = 8, 1e-10 if dtype is D else 1e-3
    values = torch.tensor([1.0, 0.5, 0.2, 0.1] + [0.0] * 4, dtype=D)
    values[rank:] = 0
    A, Q = spectrum(values, 3, dtype)
    # The zeros are found as 2 eps lambda_max at most, beside the damping.
    bound = 4 * abs(exponent) * EPS[dtype] / eps * float(values.max()) + 16 * n * EPS[dtype]
    assert root_error(A, Q, values, exponent, eps) <= bound
    if rank == 0:
        root = linalg.inverse_root(torch.zeros(1, n, n, dtype=dtype), exponent, eps)
        expected = eps**exponent * torch.eye(n, dtype=dtype)
        torch.testing.assert_close(
            root[0], expected, rtol=1e-5 if dtype is not D else 1e-13, atol=0
        )


def test_eigenvalues_below_zero_are_shifted_before_the_damping():
    A, Q = spectrum(torch.tensor([1.0, 0.5, -1e-3], dtype=D))
    expected = (Q * torch.tensor([1.001, 0.501, 0.0], dtype=D).add(1e-4) ** -0.25) @ Q.T
    torch.testing.assert_close(linalg.inverse_root(A, -0.25, 1e-4)[0], expected)
    weighted = linalg.inverse_root(0.1 * A, -0.25, 1e-4, weight=0.1)[0]
    torch.testing.assert_close(weighted, expected)


# ------------------------------------------------------------------ blocks


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), limit=st.integers(1, 8),
       count=st.integers(1, 2))  # fmt: skip
def test_blocks_cover_a_tensor_once(sizes, limit, count):
    X = random(count, *sizes)
    Y, covered = torch.full_like(X, math.nan), 0
    for shape in linalg.block_shapes(sizes, limit):
        assert all(1 <= size <= limit for _, _, size in shape)
        blocks = linalg.cut(X, shape)
        many = math.prod(m for _, m, _ in shape)
        assert blocks.shape == (count * many, *(size for _, _, size in shape))
        first = tuple(slice(start, start + size) for start, _, size in shape)
        assert torch.equal(blocks[0], X[0][first])
        linalg.paste_(Y, shape, blocks)
        covered += blocks.numel()
    assert torch.equal(X, Y)
    assert covered == X.numel()


# ------------------------------------------------------------------ shapes and batches


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((), {}, (1, 1)),
        ((5,), {}, (1, 5)),
        ((3, 4), {}, (1, 3, 4)),
        ((2, 3, 4), {}, (2, 3, 4)),
        ((2, 3, 4), {"flatten": True}, (1, 2, 12)),
        ((2, 3, 4), {"tensor": True}, (1, 2, 3, 4)),
        ((4, 3, 2, 2), {}, (1, 4, 12)),
        ((4, 3, 2, 2), {"tensor": True}, (1, 4, 3, 2, 2)),
        ((5,), {"tensor": True}, (1, 5)),
    ],
)
def test_shapes_as_stacks(shape, options, expected):
    assert core.stack_shape(shape, {"flatten": False, "tensor": False, **options}) == expected


def paths(rule, shapes, steps, *, seed=0, **options):
    starts, grads = shared.streams(shapes, seed, steps)
    params = [parameter(w) for w in starts]
    optimizer = RULES[rule](params, **options)
    return optimizer, params, train(optimizer, params, zip(*grads, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"stagger": True}, {"max_precond_dim": 3}])
@pytest.mark.parametrize("limit", [1, 30, 2**17])
def test_batches_equal_the_loop(monkeypatch, rule, options, limit):
    monkeypatch.setattr(core, "_BATCH_CPU", limit)
    *_, loop = paths(rule, SHAPES, 20, foreach=False, **options)
    *_, fast = paths(rule, SHAPES, 20, foreach=None, **options)
    for a, b in zip(loop[-1], fast[-1], strict=True):
        if a.numel():
            assert relative(a, b) < 1e-12  # twenty steps of a few roundings


@given(sizes=st.lists(st.integers(1, 9), max_size=12), limit=st.integers(1, 20))
def test_parts_of_a_batch_stay_below_the_limit(sizes, limit):
    numbers = list(range(len(sizes)))
    parts = list(core._chunks(numbers, sizes, limit))
    assert [i for part in parts for i in part] == numbers
    for part in parts:
        assert part
        assert len(part) == 1 or sum(sizes[i] for i in part) <= limit
    for left, right in itertools.pairwise(parts):
        assert sum(sizes[i] for i in left) + sizes[right[0]] > limit  # none too small


@pytest.mark.parametrize("rule", RULES)
def test_parameters_of_other_ages_have_other_batches(rule):
    """A parameter that joins late is a new one, beside an old one of its shape."""
    shapes = [(4, 3), (4, 3)]
    starts, grads = shared.streams(shapes, 0, 20)
    p, q, fresh = parameter(starts[0]), parameter(starts[1]), parameter(starts[1])
    optimizer = RULES[rule]([p, q])
    for t in range(20):
        p.grad = torch.tensor(grads[0][t])
        q.grad = torch.tensor(grads[1][t]) if t >= 7 else None
        optimizer.step()
    train(RULES[rule]([fresh]), [fresh], [[g] for g in grads[1][7:]])
    assert relative(q.detach(), fresh.detach()) < 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_stays_in_its_matrix(rule, foreach, bad):
    shapes = [(4, 3), (4, 3), (3, 4), (2, 4, 3), (3,)]
    starts, grads = shared.streams(shapes, 0, 9)
    params = [parameter(w) for w in starts]
    optimizer = RULES[rule](params, foreach=foreach)
    for t, step in enumerate(zip(*grads, strict=True)):
        step = [g.copy() for g in step]
        if t == 4:
            step[0][1, 1] = step[3][0, 1, 1] = bad
        train(optimizer, params, [step])
    assert params[0].isnan().any()
    assert params[3][0].isnan().any()
    assert params[3][1].isfinite().all()
    for k in (1, 2, 4):
        assert params[k].isfinite().all()


# ------------------------------------------------------------------ turns


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stagger", [False, True])
def test_each_side_has_its_turn_once_a_period(rule, stagger):
    params = [parameter(w) for w in (matrices((3, 3), k, 1)[0] for k in range(3))]
    optimizer = RULES[rule](params, precondition_frequency=4, stagger=stagger)
    name = "root" if rule == "Shampoo" else "basis"
    # What counts for the period: moves, of which the first gradient of some is none.
    late = rule in ("SOAP", "KLShampoo")
    refreshed = {}
    for t in range(1 - late, 17):
        before = [[optimizer.state[p][f"{name}_{k}"].clone() for k in range(2)] for p in params]
        train(optimizer, params, [[matrices((3, 3), 100 * t + k, 1)[0] for k in range(3)]])
        for i, p in enumerate(params):
            for k in range(2):
                if not torch.equal(before[i][k], optimizer.state[p][f"{name}_{k}"]):
                    refreshed.setdefault((i, k), []).append(t)
    first = {"SOAP": 0, "KLShampoo": 0, "SPlus": 1, "Shampoo": 4}[rule]
    for (i, k), found in refreshed.items():
        turn = (2 * i + k) % 4 if stagger else 0
        expected = {t for t in range(max(first, 1), 17) if t % 4 == turn} | {first}
        assert found == sorted(expected), (i, k)
    assert len(refreshed) == 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("after", range(1, 8))
def test_resume_between_refreshes_is_exact(rule, stagger, after):
    shapes = [(4, 3), (4, 3), (2, 4, 3), (5,)]
    starts, grads = shared.streams(shapes, 0, 14)
    options = {"precondition_frequency": 4, "stagger": stagger}
    steps = list(zip(*grads, strict=True))
    params = [nn.Parameter(torch.tensor(w).float()) for w in starts]
    optimizer = RULES[rule](params, **options)
    train(optimizer, params, steps[:after])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = RULES[rule](others, **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    copies, copied = copy.deepcopy((params, optimizer))
    runs = (optimizer, params), (resumed, others), (copied, copies)
    ends = [train(o, ps, steps[after:])[-1] for o, ps in runs]
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_single_precision_follows_double_precision(rule):
    """Also while the factors of wide and of tall matrices lack full rank."""
    shapes = [(8, 2), (2, 8), (4, 4)]
    starts, grads = shared.streams(shapes, 0, 15)
    moves = []
    for dtype in (D, torch.float32):
        params = [nn.Parameter(torch.tensor(w).to(dtype)) for w in starts]
        # At the first refresh there were gradients enough.
        optimizer = RULES[rule](params, precondition_frequency=5)
        end = train(optimizer, params, zip(*grads, strict=True))[-1]
        moves.append([p.to(D) - torch.tensor(w) for p, w in zip(end, starts, strict=True)])
    for a, b in zip(*moves, strict=True):
        # 2^-23 over relative gaps of eigenvalues and entries of rotated gradients, 1e-3 and more.
        assert float((a - b).norm() / a.norm()) < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_rate_is_a_rate(rule):
    *_, plain = paths(rule, SHAPES[:6], 8)
    starts, grads = shared.streams(SHAPES[:6], 0, 8)
    params = [parameter(w) for w in starts]
    optimizer = RULES[rule](params)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=D)
    tensor = train(optimizer, params, zip(*grads, strict=True))
    for a, b in zip(plain[-1], tensor[-1], strict=True):
        assert relative(a, b) < 1e-13


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_factors_are_float32(rule):
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    state = RULES[rule]([p]).state[p]
    kinds = {v.dtype for v in state.values() if isinstance(v, torch.Tensor)}
    assert kinds == {torch.float32}


def test_without_a_fused_kernel_the_moments_are_the_same():
    """What accelerators other than CUDA do."""
    g, m, v = random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2).square()
    found = {}
    for device in ("cpu", "other"):
        d, mm, vv = torch.full_like(g, 7.0), m.clone(), v.clone()
        core.adam_([d], [g], [mm], [vv], (0.9, 0.8), 1e-3, fused=device == "cpu")
        found[device] = d, mm, vv
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    expected = (0.9 * m + 0.1 * g) / ((0.8 * v + 0.2 * g * g).sqrt() + 1e-3)
    torch.testing.assert_close(found["cpu"][0], expected)
