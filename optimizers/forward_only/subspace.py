"""The coordinates of PolyStep: the hybrid subspace, and candidates displaced within it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimizers.forward_only.polytopes import Array

# Keeps these draws apart from those of the rotations, which have the same seed.
_PROJECTION = 2
# What a chunk of candidates may hold. At 2 and 10 thousand parameters on a CPU 128 members are the
# fastest, 64 come within a fifth of it with half the activations, 32 within a half.
_CHUNK_MEMBERS = 64
_CHUNK_BYTES = 64 * 2**20


def coordinate_count(shape: Sequence[int], rank: int | None) -> int:
    r"""Return how many coordinates a parameter has.

    All of its elements without a rank and for vectors; for ``d_out`` rows of ``d_in`` elements
    :math:`\min(q(d_{out} + d_{in}), d_{out} d_{in})`, as many numbers as two factors of rank q.
    """
    numel = math.prod(shape)
    if rank is None or len(shape) < 2 or numel == 0:
        return numel
    return min(rank * (shape[0] + numel // shape[0]), numel)


def projection(shape: Sequence[int], rank: int, seed: int, index: int) -> Array:
    """Return the orthonormal basis ``M`` of a matrix's subspace, shape ``(numel, coordinates)``.

    The Q of a Gaussian matrix that is a function of the arguments, so it is never stored.

    Args:
        shape: The parameter's shape, of two or more dimensions.
        rank: ``q``, at least 1.
        seed: Of the optimizer.
        index: The parameter's place among the optimizer's parameters, frozen ones included.
    """
    rng = np.random.default_rng([seed, index, _PROJECTION])
    gaussian = rng.standard_normal((math.prod(shape), coordinate_count(shape, rank)))
    basis: Array = np.linalg.qr(gaussian)[0]
    return basis


class Block(NamedTuple):
    """A parameter and its coordinates ``start:stop`` among those of the whole problem."""

    p: Tensor
    start: int
    stop: int
    basis: Tensor | None  # rows span the parameter's subspace; None is the identity

    def moved(self, offsets: Tensor, low: int) -> Tensor:
        """Return the parameter displaced by offsets ``(m, w)`` of coordinates ``low:low+w``."""
        first, last = max(self.start, low), min(self.stop, low + offsets.shape[1])
        here = slice(first - self.start, last - self.start)
        value = working(self.p).reshape(-1)
        part = offsets[:, first - low : last - low].to(value)
        if self.basis is None:
            moved = value.repeat(len(part), 1)
            moved[:, here] += part
        else:
            moved = torch.addmm(value, part, self.basis[here])
        return moved.reshape(len(part), *self.p.shape).to(self.p.dtype)

    def displacement(self, coordinates: Tensor) -> Tensor:
        """Return what a step of all coordinates means for the parameter, in its shape."""
        part = coordinates[self.start : self.stop].to(working(self.p))
        return (part if self.basis is None else part @ self.basis).reshape(self.p.shape)


def candidates(reach: Tensor, num_probe: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield all candidates in the order (particle, vertex, probe), at most ``size`` at once.

    Args:
        reach: The farthest probe of each vertex, shape ``(P, V, d)``; the k-th of K probes lies
            at k/(K+1) of it.
        num_probe: K.
        size: Largest number of candidates in a chunk.

    Yields:
        The first coordinate that varies in the chunk, and the offsets ``(m, w)`` of the w
        coordinates from there on.
    """
    P, V, d = reach.shape
    each = V * num_probe
    for start in range(0, P * each, size):
        stop = min(start + size, P * each)
        first, last = start // each, (stop - 1) // each
        member = torch.arange(start, stop, device=reach.device)
        particle, vertex = member // each, member // num_probe % V
        scale = (member % num_probe + 1).to(reach.dtype) / (num_probe + 1)  # s_k
        offsets = reach.new_zeros(stop - start, last - first + 1, d)
        offsets[member - start, particle - first] = scale[:, None] * reach[particle, vertex]
        yield first * d, offsets.flatten(1)


def chunk_size(blocks: Sequence[Block]) -> int:
    """Return how many candidates to hold at once."""
    largest = max(block.p.numel() * block.p.element_size() for block in blocks)
    return max(1, min(_CHUNK_MEMBERS, _CHUNK_BYTES // largest))


def common_dtype(blocks: Sequence[Block]) -> torch.dtype:
    """Return the dtype, float32 at least, that holds every block's coordinates."""
    dtype = torch.float32
    for block in blocks:
        dtype = torch.promote_types(dtype, block.p.dtype)
    return dtype


def working(p: Tensor) -> Tensor:
    """Return the value of a parameter in at least float32."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))
