"""What the tests of the Kronecker-factored rules share: shapes, and runs beside the oracles."""

import numpy as np
import torch

from optimizers.second_order import SOAP, KLShampoo, Shampoo, SPlus
from optimizers.second_order.kronecker import stack_shape
from tests.family import D, matrices, parameter, relative

STEPS = 60
# With fewer gradients than this a factor may lack full rank, and the basis of its null space is
# whatever LAPACK makes it: until then nothing is refreshed, and the first bases are copied.
WARM = 8
SHAPES = [(3, 5), (5, 3), (4, 4), (6, 2), (1, 4), (4, 1), (5,), (), (2, 3, 4), (4, 3, 2, 1)]
NEVER = 10**9
RULES = {
    "SOAP": lambda p, **o: SOAP(p, 0.05, **{"precondition_frequency": 3, **o}),
    # Beside the default eps of 1e-12 the rounding of a null space, of 1e-17, would show.
    "Shampoo": lambda p, **o: Shampoo(
        p, 0.05, (0.9, 0.99), eps=1e-4, grafting="adam", **{"precondition_frequency": 3, **o}
    ),
    "KLShampoo": lambda p, **o: KLShampoo(p, 0.02, **{"precondition_frequency": 3, **o}),
    "SPlus": lambda p, **o: SPlus(p, 0.1, **{"precondition_frequency": 3, **o}),
}


def members(tensor, group):
    """Return the members of the stack as which an array is seen."""
    tensor = np.asarray(tensor)
    return list(tensor.reshape(stack_shape(tensor.shape, group)))


def streams(shapes, seed, steps=STEPS, scale=1.0):
    """Return a start and gradients for each shape."""
    starts = [matrices(s, seed + i, 1)[0] for i, s in enumerate(shapes)]
    grads = [matrices(s, seed + 100 + i, steps) for i, s in enumerate(shapes)]
    return starts, [[scale * g for g in stream] for stream in grads]


def compare(build, reference, shapes, seed, *, scale=1.0, frequency="frequency", sign=1.0):
    """Return the largest difference from the oracles over a run, one for each member of a stack.

    Args:
        build: Makes the optimizer of a list of parameters.
        reference: Makes an oracle.
        shapes: Of the parameters.
        seed: Of starts and gradients.
        scale: Of the gradients.
        frequency: The oracle's attribute that holds its period of refreshes.
        sign: -1 where the optimizer maximizes.
    """
    starts, grads = streams(shapes, seed, scale=scale)
    params = [parameter(w) for w in starts]
    optimizer = build(params)
    (group,) = optimizer.param_groups
    period = group["precondition_frequency"]
    oracles = [[reference() for _ in members(w, group)] for w in starts]
    points = [members(w, group) for w in starts]
    group["precondition_frequency"] = NEVER
    worst = 0.0
    for t in range(STEPS):
        if t == WARM:
            group["precondition_frequency"] = period
        for p, stream in zip(params, grads, strict=True):
            p.grad = torch.tensor(sign * stream[t], dtype=D)
        optimizer.step()
        for p, stream, row, point in zip(params, grads, oracles, points, strict=True):
            for i, (oracle, g) in enumerate(zip(row, members(stream[t], group), strict=True)):
                setattr(oracle, frequency, period if t >= WARM else NEVER)
                point[i] = oracle.step(point[i], g)
                if t == 0:
                    copy_bases(optimizer.state[p], oracle, i)
            found = members(p.detach(), group)
            worst = max(worst, *(relative(a, b) for a, b in zip(found, point, strict=True)))
    return worst


def copy_bases(state, oracle, index):
    """Give an oracle the bases of one member of a stack."""
    for side, basis in enumerate(oracle.bases):
        if basis is not None:
            ours = state[f"basis_{side}"].numpy().reshape(-1, *basis.shape)[index]
            oracle.bases[side] = ours.copy()


def rotation(n, seed):
    """Return an orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=D))[0]


def whitening_problem(seed):
    r"""Return gradients :math:`A^{1/2} Z B^{1/2}`, A and B of condition 100, as a function."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        Q * torch.logspace(0, 1, len(Q), dtype=D) @ Q.T for Q in (rotation(6, seed), rotation(4, 9))
    )

    def draw(count):
        return left @ torch.randn(count, 6, 4, generator=generator, dtype=D) @ right

    return draw


def whitened(directions):
    """Return the spread of the covariance's eigenvalues, and the mean variance."""
    covariance = torch.cov(directions.flatten(1).T)
    values = torch.linalg.eigvalsh(covariance)
    return float(values[-1] / values[0]), float(covariance.diagonal().mean())


def accumulated(build, draw, steps):
    """Return the state of a 6x4 parameter that has seen so many gradients."""
    p = parameter(np.zeros((6, 4)))
    optimizer = build([p])
    for g in draw(steps):
        p.grad = g
        optimizer.step()
    return optimizer.state[p]


def many(state, name, count):
    """Return the matrices of both sides, so many times."""
    return [state[f"{name}_{k}"].expand(count, -1, -1) for k in range(2)]
