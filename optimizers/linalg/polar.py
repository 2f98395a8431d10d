r"""The polar factor of a matrix: :math:`U V^\top` for :math:`G = U S V^\top`.

Every function is batched over leading dimensions, works on the short side and maps the zero
matrix to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MUON_COEFFICIENTS: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
"""The quintic of Muon: steep at zero, and not convergent (singular values end near 0.7 to 1.2)."""


def newton_schulz(
    G: Tensor,
    *,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON_COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    eps_mode: str = "clamp",
    dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    r"""Approximate the polar factor by an odd polynomial iteration (matrix products only).

    With :math:`X_0 = G / \max(\|G\|_F, \epsilon)`, or :math:`G / (\|G\|_F + \epsilon)`, (transposed
    to be wide) each step maps

    .. math:: X \leftarrow a X + (b R + c R R) X, \qquad R = X X^\top,

    that is every singular value :math:`\sigma` to :math:`a\sigma + b\sigma^3 + c\sigma^5`.

    Args:
        G: Matrices ``(..., rows, columns)``.
        coefficients: One triple ``(a, b, c)`` for every step, or a list of triples (the last one
            is repeated when there are more steps).
        steps: Number of steps.
        eps: Keeps the zero matrix from being divided by zero.
        eps_mode: ``"clamp"``: the norm is at least ``eps`` (torch); ``"add"``: ``eps`` is added
            (the authors' code).
        dtype: Arithmetic of the iteration, after the cast of ``G``; ``None`` keeps ``G``'s.

    Returns:
        The approximate polar factors, in ``dtype``.

    Reference:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    if G.ndim < 2:
        raise ValueError(f"G must have at least two dimensions; got shape {tuple(G.shape)}.")
    # float16 over- and underflows before the division; the other types keep torch's order.
    half = dtype is torch.float16
    X = G.float() if half and G.dtype is not torch.float64 else G
    if dtype is not None and not half:
        X = G.to(dtype)
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    # Division out of place: the cast may have returned G itself.
    norms = _norms(X)
    X = X / (norms + eps if eps_mode == "add" else norms.clamp(min=eps))
    if half:
        X = X.half()
    for a, b, c in _rows(coefficients, steps):
        X = _quintic_step(X, a, b, c)
    result: Tensor = X.mT if tall else X
    return result


def _norms(X: Tensor) -> Tensor:
    """Frobenius norms, keeping the matrix dimensions."""
    norms: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return norms


def _rows(
    coefficients: Sequence[float] | Sequence[Sequence[float]], steps: int
) -> list[tuple[float, float, float]]:
    """Return one triple for each step."""
    table: list[Any] = [coefficients]
    if not isinstance(coefficients[0], (int, float)):
        table = list(coefficients)
    return [tuple(table[min(k, len(table) - 1)]) for k in range(steps)]


def _quintic_step(X: Tensor, a: float, b: float, c: float) -> Tensor:
    R = X @ X.mT
    if X.ndim == 2:
        Y = torch.addmm(R, R, R, beta=b, alpha=c)
        return torch.addmm(X, Y, X, beta=a)
    if X.ndim == 3:
        Y = torch.baddbmm(R, R, R, beta=b, alpha=c)
        return torch.baddbmm(X, Y, X, beta=a)
    Y = b * R + c * (R @ R)
    return a * X + Y @ X


def polar_svd(G: Tensor) -> Tensor:
    r"""Return the polar factor :math:`U V^\top` by a singular value decomposition.

    Directions with :math:`\sigma \le 10^{-12} \sigma_{max}` in float64 (:math:`10^{-6}` in
    float32) are numerically absent from ``G`` and dropped, so the factor of a rank-deficient
    matrix is a partial isometry. Half precision is computed in float32. A matrix that is not
    finite has the factor NaN.
    """
    work = G if G.dtype in (torch.float32, torch.float64) else G.float()
    if work.numel() == 0:
        return G.clone()
    # The decomposition raises on NaN, for the whole batch: such matrices go around it.
    bad = ~torch.isfinite(work).all(-1, keepdim=True).all(-2, keepdim=True)
    U, S, Vh = torch.linalg.svd(work.masked_fill(bad, 0), full_matrices=False)
    relative = 1e-12 if work.dtype is torch.float64 else 1e-6
    kept = (relative * S[..., :1] < S).to(work.dtype)
    factor: Tensor = (U * kept.unsqueeze(-2)) @ Vh
    return factor.masked_fill(bad, torch.nan).to(G.dtype)


def dual_norm_spectral(G: Tensor, O: Tensor) -> Tensor:
    r"""Return :math:`\langle G, O\rangle`, the nuclear norm when ``O`` is the polar factor."""
    inner: Tensor = (G * O).sum(dim=(-2, -1))
    return inner
