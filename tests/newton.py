"""What the tests of the Newton rules share: functions of one vector, and runs on them."""

import copy
import warnings

import torch
from torch import Tensor, nn

from optimizers import Objective
from optimizers.second_order import SaddleFreeNewton

D = torch.float64
EPS = torch.finfo(D).eps


def vector(values):
    return values if isinstance(values, Tensor) else torch.tensor(values, dtype=D)


class Run:
    """A function of a vector, cut into parameters, and the optimizer on it."""

    def __init__(self, f, start, pieces=1, dtype=D, rates=None, rule=SaddleFreeNewton, **options):
        self.f = f
        parts = vector(start).to(dtype).tensor_split(pieces)
        self.params = [nn.Parameter(part.clone()) for part in parts]
        groups = [{"params": [p]} for p in self.params]
        for group, lr in zip(groups, rates or (), strict=bool(rates)):
            group["lr"] = lr
        self.optimizer = rule(groups, **options)

    def closure(self):
        return self.f(torch.cat(self.params))

    def step(self):
        loss = self.optimizer.step(self.closure)
        return float(loss)

    def quiet_step(self):
        """A step that may warn that no trial was accepted."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.step()

    @property
    def w(self):
        return torch.cat([p.detach() for p in self.params]).clone()

    def value(self):
        with torch.no_grad():
            return float(self.closure())

    @property
    def found(self):
        return self.optimizer.param_groups[0]


def gradient(f, w):
    return torch.func.grad(f)(torch.as_tensor(w))


def hessian(f, w):
    return torch.func.hessian(f)(torch.as_tensor(w))


def random_net(n, seed):
    """A smooth function with saddles: a small tanh network, weights flattened, and a weak bowl."""
    g = torch.Generator().manual_seed(seed)
    X, y = torch.randn(12, 3, generator=g, dtype=D), torch.randn(12, generator=g, dtype=D)
    mix = torch.randn(n, n, generator=g, dtype=D) / n**0.5
    width = n // 4

    def f(w):
        v = mix @ w
        W, a = v[: 3 * width].reshape(3, width), v[3 * width : 4 * width]
        return ((torch.tanh(X @ W) @ a - y) ** 2).mean() / 2 + 1e-2 * (w @ w)

    return f, (0.3 * torch.randn(n, generator=g, dtype=D)).numpy()


def quadratic(values, seed=0, dtype=D):
    """A quadratic form of given eigenvalues, and its matrix in float64."""
    values = torch.as_tensor(values, dtype=D)
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=D))[0]
    A = Q @ torch.diag(values) @ Q.T
    A = (A + A.T) / 2
    return (lambda w: w @ (A.to(dtype) @ w) / 2), A


def check_statistics(make):
    """Assert that a step leaves the buffers of one evaluation where it began, and moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    optimizer = make(model.parameters())
    bound = Objective(model, nn.functional.mse_loss).on(x, y)
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(x)
        optimizer.step(bound)
        for found, expected in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(found, expected)
    assert all(
        not torch.equal(p, q)
        for p, q in zip(model[3:].parameters(), twin[3:].parameters(), strict=True)
    )
