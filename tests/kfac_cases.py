"""What the tests of K-FAC share: small models, data, losses."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ENTROPY = functional.cross_entropy
# Of this batch alone, and no clip.
PLAIN = {"momentum": 0.0, "kl_clip": None, "factor_decay": 0.0}
# Steps that show V at once.
BARE = {**PLAIN, "lr": 1e-3, "damping": 1e-2}


def half_mse(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().sum() / (2 * len(f))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    model = model.double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=seed + k) / 2)
    return model


def mlp(*sizes: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    return randomize(nn.Sequential(*layers[:-1]), seed)


def flat(module: nn.Module) -> np.ndarray:
    """Return [weight | bias] of a layer, whose memory it shares without a bias."""
    w = module.weight.detach().flatten(1)
    return (w if module.bias is None else torch.cat([w, module.bias.detach()[:, None]], 1)).numpy()


def zoo() -> nn.Module:
    """Return a classifier of images with one layer of most kinds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.GroupNorm(1, 3),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 3),
    ).double()


def images(k: int) -> tuple[Tensor, Tensor]:
    return normal(8, 2, 4, 4, seed=k), torch.arange(8) % 3


X, Y = normal(6, 3, seed=9), torch.arange(6) % 3


def chain() -> nn.Module:
    return mlp(3, 4, 3)


def statuses(optimizer: torch.optim.Optimizer) -> list[int]:
    return [optimizer.state[p]["status"] for g in optimizer.param_groups for p in g["params"]]


def status(optimizer: torch.optim.Optimizer, p: Tensor) -> int:
    return optimizer.state[p]["status"]
