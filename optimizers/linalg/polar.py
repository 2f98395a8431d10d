r"""The polar factor of a matrix: :math:`U V^\top` for :math:`G = U S V^\top`.

Every function is batched over leading dimensions, works on the short side and maps the zero
matrix to zero; a matrix that is not finite becomes NaN and leaves the others of its batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optimizers.linalg.coefficients import MUON_COEFFICIENTS, Triple, rows_of

# One correcting step: p(1) = 1 with two vanishing derivatives, so an error e becomes 5/2 e^3.
CORRECTION: Triple = (15 / 8, -10 / 8, 3 / 8)


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

    that is every singular value :math:`\sigma` to :math:`a\sigma + b\sigma^3 + c\sigma^5`. This
    is the plain loop, in torch's order of operations, so that ``torch.optim.Muon`` can be
    reproduced bit by bit; :func:`optimizers.linalg.polar` has faster forms.

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
    norms = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = X / (norms + eps if eps_mode == "add" else norms.clamp(min=eps))
    if half:
        X = X.half()
    for row in rows_of(coefficients, steps):
        X = quintic_step(X, row)
    result: Tensor = X.mT if tall else X
    return result


def quintic_step(X: Tensor, row: Triple, transposed: bool = False) -> Tensor:
    """Return ``p(X)``; the products are on the left, or for tall matrices on the right."""
    a, b, c = row
    R = X.mT @ X if transposed else X @ X.mT
    if X.ndim > 3:
        P = b * R + c * (R @ R)
        return a * X + (X @ P if transposed else P @ X)
    if X.ndim == 2:
        P = torch.addmm(R, R, R, beta=b, alpha=c)
        return torch.addmm(X, *((X, P) if transposed else (P, X)), beta=a)
    P = torch.baddbmm(R, R, R, beta=b, alpha=c)
    return torch.baddbmm(X, *((X, P) if transposed else (P, X)), beta=a)


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


def polar_eigh(G: Tensor) -> Tensor:
    r"""Return the polar factor by an eigendecomposition of the Gram matrix, in float64.

    :math:`(G G^\top)^{-1/2} G` on the short side. Rounding perturbs the Gram matrix by about
    :math:`n \epsilon_{64} \sigma_{max}^2`, so a singular value comes out within
    :math:`n \epsilon_{64} \kappa^2` of 1 for :math:`\kappa = \sigma_{max}/\sigma`, and directions
    with :math:`\sigma^2 \le n \epsilon_{64} \sigma_{max}^2` cannot be told from zero and are
    dropped. On wide and thin matrices cheaper than five float32 quintic steps.
    """
    if G.numel() == 0:
        return G.clone()
    tall = G.shape[-2] > G.shape[-1]
    X = (G.mT if tall else G).double()
    # Scaled by the largest entry, lest squares overflow or vanish.
    peak = X.abs().amax((-2, -1), keepdim=True)
    bad = ~torch.isfinite(peak)
    X = (X / torch.where(peak > 0, peak, 1)).masked_fill(bad, 0)
    values, vectors = torch.linalg.eigh(X @ X.mT)
    n = X.shape[-2]
    kept = values > n * torch.finfo(torch.float64).eps * values[..., -1:]
    roots = torch.where(kept, values, 1).rsqrt() * kept
    factor: Tensor = ((vectors * roots.unsqueeze(-2)) @ vectors.mT) @ X
    factor = factor.masked_fill(bad, torch.nan)
    return (factor.mT if tall else factor).to(G.dtype)


def dual_norm_spectral(G: Tensor, O: Tensor) -> Tensor:
    r"""Return :math:`\langle G, O\rangle`, the nuclear norm when ``O`` is the polar factor."""
    inner: Tensor = (G * O).sum(dim=(-2, -1))
    return inner
