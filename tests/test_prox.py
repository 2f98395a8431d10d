"""Proximal operators: their references, their optimality conditions, and firm non-expansiveness."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizers.linalg.prox import project_box, prox_group, prox_l1
from tests.oracles import cyclic_bcd as reference

SHAPES = [(1,), (5,), (3, 4), (4, 1), (2, 3, 2)]
OURS = {
    "l1": lambda z, eta: prox_l1(z, eta * 0.7),
    "group": lambda z, eta: prox_group(z, eta * 0.7),
    "box": lambda z, eta: project_box(z, -0.5, 0.8),
}
THEIRS = {
    "l1": reference.prox_l1(0.7),
    "group": reference.prox_group(0.7),
    "box": reference.prox_box(-0.5, 0.8),
}


@given(
    kind=st.sampled_from(sorted(OURS)),
    shape=st.sampled_from(SHAPES),
    eta=st.floats(0, 3),
    seed=st.integers(0, 999),
)
def test_equal_the_references_and_are_firmly_nonexpansive(kind, shape, eta, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, *shape))
    a.flat[0] = 0.0
    u, v = (OURS[kind](torch.tensor(z), torch.tensor(eta, dtype=torch.float64)) for z in (a, b))
    # A few roundings.
    np.testing.assert_allclose(u, THEIRS[kind](a, eta), rtol=0, atol=1e-14)
    assert torch.equal(u, OURS[kind](torch.tensor(a), eta))  # a number is as good as a tensor
    d = (u - v).flatten().numpy()
    assert d @ d <= d @ (a - b).ravel() + 1e-13


@given(shape=st.sampled_from(SHAPES), eta=st.floats(0.01, 3), seed=st.integers(0, 999))
def test_optimality(shape, eta, seed):
    """u is the prox of z exactly if (z - u)/eta is a subgradient of r at u."""
    z = torch.tensor(np.random.default_rng(seed).standard_normal(shape))
    u = prox_l1(z, eta * 0.7)
    s = (z - u) / (0.7 * eta)
    # Roundings, magnified by 1/eta.
    assert float(s.abs().max()) <= 1 + 1e-12
    torch.testing.assert_close(s[u != 0], u[u != 0].sign(), rtol=0, atol=1e-12)
    u = prox_group(z, eta * 0.7)
    rows, s = u.reshape(len(u), -1), ((z - u) / (0.7 * eta)).reshape(len(u), -1)
    assert float(s.norm(dim=1).max()) <= 1 + 1e-12
    kept = rows.norm(dim=1) > 0
    unit = rows[kept] / rows[kept].norm(dim=1, keepdim=True)
    torch.testing.assert_close(s[kept], unit, rtol=0, atol=1e-11)


def test_edges():
    zero = torch.zeros(2, 3)
    assert torch.equal(prox_group(zero, 0.0), zero)  # no 0/0
    assert prox_l1(torch.tensor(-2.0), 0.5) == -1.5
    assert prox_group(torch.tensor(2.0), 0.5) == 1.5
    z = torch.tensor([-1.0, 2.0])
    assert project_box(z, 0.0, math.inf).tolist() == [0, 2]
    assert project_box(z, -math.inf, 1.0).tolist() == [-1, 1]


@pytest.mark.parametrize("prox", [prox_l1, prox_group])
def test_gradients_pass(prox):
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda z: prox(z, 0.3), z.requires_grad_())
